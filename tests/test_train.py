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
    optimizer = torch.optim.SGD(
        module.parameters(), 1e-9, momentum=0.9, nesterov=True, weight_decay=1e-4
    )
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


def test_each_stacked_network_is_the_one_trained_alone(dataset):
    log = []
    seeds = (3, 8, 11)
    ends = train_ends(make_module, dataset, seeds, CONFIG, on_step=lambda m, e: log.append(m))
    for i, seed in enumerate(seeds):
        state, losses = train_alone(dataset, seed, CONFIG)
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
