"""Stacked training against one network at a time with torch's own optimiser and schedule."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastgeo import Forward, Training, models
from fastgeo.data.images import load
from fastgeo.data.loaders import loader_data
from fastgeo.train import train_ends

CONFIG = Training(epochs=4, train_batch_size=16, train_lr=0.05)


@pytest.fixture(scope="module")
def dataset():
    return load("digits", train_subset=80, augment="flip-crop")


def make_module():
    return models.resnet(8, 0.25, in_channels=1)


def train_alone(dataset, seed, config):
    """The schedule of the paper's appendix and public code, in torch's own terms."""
    torch.manual_seed(seed)
    module = make_module()
    how = dict(lr=1e-9, weight_decay=1e-4)
    if config.optimizer == "sgd":
        optimizer = torch.optim.SGD(module.parameters(), momentum=0.9, nesterov=True, **how)
    else:
        optimizer = torch.optim.AdamW(module.parameters(), betas=(0.9, 0.99), **how)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        config.train_lr,
        epochs=config.epochs,
        steps_per_epoch=5,
        pct_start=0.1,
        div_factor=1e9,
        final_div_factor=1e6,
    )
    generator, losses = torch.Generator().manual_seed(seed), []
    for x, y in dataset.shuffled(16, generator, epochs=config.epochs):
        loss = F.cross_entropy(module(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return module.state_dict(), losses


@pytest.mark.parametrize(
    "config", [CONFIG, replace(CONFIG, optimizer="adamw", train_lr=0.002)], ids=["sgd", "adamw"]
)
def test_each_stacked_network_is_the_one_trained_alone(dataset, config):
    log = []
    seeds = (3, 8, 11)
    ends = train_ends(make_module, dataset, seeds, config, on_step=lambda m, e: log.append(m))
    for i, seed in enumerate(seeds):
        state, losses = train_alone(dataset, seed, config)
        assert [line["loss"][i] for line in log] == pytest.approx(losses, rel=1e-3)
        torch.testing.assert_close(ends[i], state, rtol=1e-3, atol=1e-4)
    assert not torch.equal(ends[0]["conv1.weight"], ends[1]["conv1.weight"])


def test_the_same_seeds_give_the_same_networks_bit_for_bit(dataset):
    first, second = (
        train_ends(make_module, dataset, (0, 1), CONFIG, forward=Forward(engine="stacked"))
        for _ in range(2)
    )
    for one, other in zip(first, second, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_training_lowers_the_loss_and_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    log = []
    config, dataset = replace(CONFIG, epochs=20), load("digits", train_subset=80)
    train_ends(make_module, dataset, (0, 1), config, on_step=lambda m, e: log.append(m["loss"]))
    assert torch.equal(torch.rand(3), expected)
    for i in range(2):
        assert sum(loss[i] for loss in log[-5:]) < 0.7 * sum(loss[i] for loss in log[:5])


def test_a_loss_that_is_not_finite_stops_and_leaves_the_last_good_states(dataset):
    kept = []
    config = replace(CONFIG, train_lr=1e30)
    with pytest.raises(ValueError, match=r"stopped at step 1 of 20.*lower train_lr \(now 1e\+30\)"):
        train_ends(make_module, dataset, (0, 1), config, on_step=lambda m, e: kept.append(e))
    assert len(kept) == 1
    assert all(tensor.isfinite().all() for end in kept[0] for tensor in end.values())


@pytest.fixture
def read_together(monkeypatch):
    """Captured steps, in the form that they have without a GPU, read three at a time."""
    monkeypatch.setattr("fastgeo.train.AT_ONCE", 3)
    return dict(forward=Forward(engine="stacked"), cuda_graph=True)


def test_captured_steps_are_those_taken_one_by_one(dataset, read_together):
    logs, ends = ([], []), []
    for graph, log in zip((False, True), logs, strict=True):
        how = read_together | {"cuda_graph": graph}
        told = lambda metrics, states: log.append((metrics, states))  # noqa: B023, E731
        ends.append(train_ends(make_module, dataset, (0, 1), CONFIG, on_step=told, **how))
    for one, other in zip(*ends, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert [metrics for metrics, _ in logs[0]] == [metrics for metrics, _ in logs[1]]
    for step in range(20):  # the first is looked at by itself
        first = 0 if step == 0 else step - (step - 1) % 3
        expected, given = logs[0][first][1][1], logs[1][step][1][1]
        assert torch.equal(expected["conv1.weight"], given["conv1.weight"])


def test_captured_steps_take_batches_of_any_form(read_together):
    """A padded batch now and then, of which one gradient must not be taken for another's."""
    x, y = torch.randn(24, 5), torch.arange(24) % 3
    batches = [(x[:9], y[:9]), (x[9:18], y[9:18]), (x[18:], y[18:]), (x[:9], y[3:12])]
    data = loader_data((batches, batches))
    config = Training(epochs=4, train_batch_size=9, train_lr=0.1)
    ends = [
        train_ends(
            lambda: nn.Linear(5, 3), data, (0, 1), config, **read_together | {"cuda_graph": graph}
        )
        for graph in (False, True)
    ]
    for one, other in zip(*ends, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_captured_training_is_stopped_by_a_loss_that_is_not_finite(dataset, read_together):
    kept, config = [], replace(CONFIG, train_lr=1e30)
    words = r"stopped at step [1-3] of 20: the loss of network [ab] is (nan|inf); lower train_lr"
    with pytest.raises(ValueError, match=words) as error:
        told = lambda metrics, _: kept.append(metrics["step"])  # noqa: E731
        train_ends(make_module, dataset, (0, 1), config, on_step=told, **read_together)
    assert f"step {len(kept)} of" in str(error.value) and kept == list(range(len(kept)))


def test_what_cannot_be_captured_is_said_or_trained_step_by_step(dataset, monkeypatch):
    class Reads(nn.Sequential):
        def forward(self, x):
            return super().forward(x if x.sum() > -1e9 else -x)

    make = lambda: Reads(nn.Flatten(), nn.Linear(64, 10))  # noqa: E731
    with pytest.raises(ValueError, match="Reads reads numbers back from the device, .*sum"):
        train_ends(make, dataset, (0, 1), CONFIG, cuda_graph=True)
    expected = train_ends(make, dataset, (0, 1), CONFIG)
    monkeypatch.setattr("fastgeo.train.captures", lambda *_: True)  # as on a GPU by default
    got = train_ends(make, dataset, (0, 1), CONFIG, forward=Forward(engine="stacked"))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_ends_that_are_trained_in_bf16_are_as_good_as_other_seeds(dataset):
    """Their losses at the end are within what another seed changes."""
    found = {}
    for precision in ("fp32", "bf16"):
        log = []
        how = dict(forward=Forward(engine="stacked", precision=precision), on_step=log.append)
        how["on_step"] = lambda metrics, _: log.append(metrics["loss"])  # noqa: B023
        train_ends(make_module, dataset, range(6), replace(CONFIG, epochs=12), **how)
        found[precision] = torch.tensor(log[-10:]).mean(0)
    exact, half = found["fp32"], found["bf16"]
    assert not torch.equal(exact, half)
    assert (half - exact).mean().abs() < exact.std()


@pytest.mark.parametrize("epochs, batch_size", [(2, 80), (2, 16), (3, 50)])
def test_a_handful_of_steps_is_enough(dataset, epochs, batch_size):
    log = []
    config = replace(CONFIG, epochs=epochs, train_batch_size=batch_size)
    train_ends(make_module, dataset, (0, 1), config, on_step=lambda m, e: log.append(m["lr"]))
    assert len(log) == epochs * (80 // batch_size) and max(log) == pytest.approx(0.05)


def test_settings_that_leave_no_steps_are_refused(dataset):
    for changes in (dict(train_batch_size=81), dict(train_batch_size=80, epochs=1)):
        with pytest.raises(ValueError, match="fewer than two steps on 80 training images"):
            train_ends(make_module, dataset, (0, 1), replace(CONFIG, **changes))


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(epochs=0), "epochs must be at least 1, got 0"),
        (dict(train_lr=0.0), "train_lr must be positive, got 0.0"),
        (dict(train_lr=float("inf")), "train_lr must be positive, got inf"),
        (dict(weight_decay=float("nan")), "weight_decay must be within 0..1, got nan"),
        (dict(momentum_high=1.5), "momentum_high must be within 0..1, got 1.5"),
    ],
)
def test_numbers_that_cannot_be_meant_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        Training(**changes)


@pytest.mark.parametrize("engine", ["stacked", "vmap", "loop"])
@pytest.mark.parametrize("options", [dict(sparse=True), dict(max_norm=0.5)], ids=str)
def test_sparse_and_bounded_embeddings_are_trained_as_one_network_would_be(engine, options):
    """Against torch's own steps on one network; the other trains beside it."""
    tokens = torch.arange(40).view(10, 4) % 7
    batches = [(tokens, tokens.sum(1) % 3)] * 4
    made = []

    def make():
        made.append(nn.Sequential(nn.Embedding(7, 4, **options), nn.Flatten(), nn.Linear(16, 3)))
        return made[-1]

    how = Training(epochs=1, train_lr=0.1, weight_decay=0.0)
    got, _ = train_ends(
        *(make, loader_data((batches, batches)), (0, 1), how),
        forward=Forward(engine=engine),
    )
    torch.manual_seed(0)
    plain = nn.Sequential(
        nn.Embedding(7, 4, max_norm=options.get("max_norm")), nn.Flatten(), nn.Linear(16, 3)
    )
    sgd = torch.optim.SGD(plain.parameters(), 0.1, momentum=0.9, nesterov=True)
    one_cycle = torch.optim.lr_scheduler.OneCycleLR(
        *(sgd, 0.1, 4),
        pct_start=0.5,
        base_momentum=0.85,
        max_momentum=0.95,
        div_factor=1e9,
        final_div_factor=1e6,
    )
    for x, y in batches:
        sgd.zero_grad()
        nn.functional.cross_entropy(plain(x), y).backward()
        sgd.step()
        if one_cycle.last_epoch < 3:
            one_cycle.step()
    expected = plain(tokens)
    module = made[0]
    module.load_state_dict(got)
    torch.testing.assert_close(module(tokens), expected)
