"""Batches and outputs as users of transformers have them, and rows that do not count."""

import json
import sys
from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass

import catalogue
import pytest
import torch
import torch.nn.functional as F
from commands import refused
from conftest import evaluating, plain, settings
from torch import Tensor, nn
from torch.func import functional_call

from fastgeo import Forward, Path, Training, evaluate, match, optimize, recalibrate, stack
from fastgeo.app.cli import main
from fastgeo.data.loaders import loader_data
from fastgeo.train import train_ends

ENGINES = ("stacked", "vmap", "loop")


class Batch(UserDict):
    """As a tokenizer's BatchEncoding: no dict, and torch's pytree does not know it."""


class ModelOutput(OrderedDict):
    """As transformers': its entries are attributes, too, and torch's pytree does not know it."""

    @property
    def logits(self):
        return self["logits"]


@dataclass
class Output:
    logits: Tensor
    loss: Tensor | None = None
    layers: tuple = ()


Named = namedtuple("Named", ["hidden", "logits"])


SEEN = {}  # arguments of the last call of such a model


class Model(nn.Module):
    """Logits [B, T, V] of tokens, at every position from its own token, in the form that `returns`
    gives them."""

    def __init__(self, returns=lambda logits: logits):
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 6), nn.Linear(6, 7)
        self.returns = returns

    def forward(self, input_ids, attention_mask=None, scale=1.0, use_cache=None, labels=None):
        SEEN.update(scale=scale, use_cache=use_cache, labels=labels)
        return self.returns(scale * self.head(self.embed(input_ids).tanh()))


def line(returns=lambda logits: logits, points=5):
    """A module and a path of others."""
    module, a, b = (Model(returns).double() for _ in range(3))
    return module, Path.linear(a, b, points)


def texts(seed=0, batch=4, length=6):
    """Tokens, targets of which some are -100, and a mask; every fourth position in neither."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(9, (batch, length), generator=generator)
    targets = torch.randint(7, (batch, length), generator=generator)
    places = torch.arange(batch * length).view(batch, length)
    return tokens, targets.masked_fill(places % 4 == 1, -100), (places % 4 != 2).long()


def probabilities(module, path, tokens):
    """[N, rows, V], by the definition."""
    logits = [functional_call(module, point, (tokens,)).flatten(0, -2) for point in path.points()]
    return torch.stack(logits).softmax(-1).detach()


def divergences(p):
    """[E, rows] nats."""
    q, r = p[:-1], p[1:]
    m = (q + r) / 2
    return ((q * (q / m).log() + r * (r / m).log()).sum(-1) / 2).detach()


# --- Rows that do not count -----------------------------------------------------------------------


def energies(path, module, batch, **options):
    log = []
    optimize(
        path, module, [batch], steps=1, on_step=lambda m, p: log.append(m), **settings(**options)
    )
    return log[0]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("chunk", [None, 2])
@pytest.mark.parametrize("by", ["targets", "mask", "both"])
def test_the_energy_is_the_mean_over_the_rows_that_count(engine, chunk, by):
    (module, path), (tokens, targets, mask) = line(), texts()
    inputs = {"input_ids": tokens, "attention_mask": mask}
    counted = torch.ones_like(mask).bool()
    counted &= (targets != -100) | (by == "mask")
    counted &= mask.bool() | (by == "targets")
    rows = divergences(probabilities(module, path, tokens))
    expected = sum(rows[:, i] for i, counts in enumerate(counted.flatten()) if counts)
    expected = expected / counted.sum()
    got = energies(
        *(path, module, inputs if by == "mask" else (inputs, targets)),
        **dict(engine=engine, chunk=chunk, mask=None if by == "targets" else "attention_mask"),
    )
    assert got["energy"] == pytest.approx(expected.sum().item(), rel=1e-12)
    assert got["sqrt_jsd"] == pytest.approx(expected.sqrt().sum().item(), rel=1e-12)


@pytest.mark.parametrize("engine", ["auto", *ENGINES])
def test_steps_are_those_on_the_rows_that_count_alone(engine):
    (module, path), (tokens, targets, mask) = line(), texts()
    batch = {"input_ids": tokens, "attention_mask": mask}, targets
    counted = (targets != -100) & mask.bool()
    options = dict(steps=3, momentum=0.9, engine=engine)
    got = optimize(path, module, [batch], **settings(mask="attention_mask", **options))
    expected = optimize(path, module, [tokens[counted][:, None]], **settings(**options))
    torch.testing.assert_close(got.interior, expected.interior, rtol=1e-9, atol=1e-12)


def test_rows_count_where_no_target_is_minus_100_whatever_else_targets_are():
    (module, path), (tokens, targets, _) = line(), texts()
    expected = optimize(path, module, [tokens], steps=1, descent=plain())
    others = targets.clamp(min=0), torch.full((4,), -100.0), torch.full((4, 6), 156).byte(), "none"
    for other in others:
        got = optimize(path, module, [(tokens, other)], steps=1, descent=plain())
        torch.testing.assert_close(got.interior, expected.interior, rtol=0, atol=0)


def test_a_batch_in_which_no_row_counts_has_no_energy_and_moves_nothing():
    (module, path), (tokens, targets, _) = line(), texts()
    nothing = tokens, torch.full_like(targets, -100)
    assert energies(path, module, nothing)["energy"] == 0
    got = optimize(path, module, [nothing, (tokens, targets), nothing], descent=plain())
    expected = optimize(path, module, [(tokens, targets)], descent=plain())
    torch.testing.assert_close(got.interior, expected.interior, rtol=0, atol=0)


@pytest.mark.parametrize("by", ["targets", "mask"])
def test_an_evaluation_is_of_the_rows_that_count(by):
    """Over batches of which different numbers of rows count, one of them none."""
    module, path = line()
    tokens, targets, mask = texts(batch=9)
    mask[4:6], targets[4:6] = 0, -100
    labels = targets if by == "targets" else targets % 7  # -100 is no class, and 5 is one
    counted = (targets != -100 if by == "targets" else mask != 0).flatten()
    inputs = {"input_ids": tokens, "attention_mask": mask}
    how = dict(mask=None if by == "targets" else "attention_mask", batch_size=2)
    got = evaluate(path, module, {"x": (inputs, labels)}, **evaluating(**how))

    p, y = probabilities(module, path, tokens)[:, counted], labels.flatten()[counted]
    for i, q in enumerate(p):
        assert got.splits["x"].loss[i] == pytest.approx(F.nll_loss(q.log(), y).item())
        accuracy = (q.argmax(-1) == y).double().mean().item()
        assert got.splits["x"].accuracy[i] == pytest.approx(accuracy)
    divergence = divergences(p).mean(1)
    assert got.energy == pytest.approx(divergence.sum().item())
    assert got.sqrt_jsd == pytest.approx(divergence.sqrt().sum().item())

    def length(q, r):
        angle = 2 * (q * r).sqrt().sum(-1).clamp(max=1).acos()
        return angle.square().mean(-1).sqrt().sum().item()

    assert got.fisher_rao == pytest.approx(length(p[:-1], p[1:]))
    assert got.fisher_rao_lower_bound == pytest.approx(length(p[:1], p[-1:]))


def test_labels_of_rows_that_a_mask_leaves_out_need_be_no_classes():
    (module, path), (tokens, targets, mask) = line(), texts()
    inputs, labels = {"input_ids": tokens, "attention_mask": mask}, targets.clamp(min=0)
    padded = labels.masked_fill(mask == 0, 255)
    options = dict(mask="attention_mask", engine="loop")
    expected, got = (
        evaluate(path, module, {"x": (inputs, y)}, **evaluating(**options))
        for y in (labels, padded)
    )
    assert got == expected
    with pytest.raises(ValueError, match=r"within 0..6, or -100 .* got 0..255"):
        evaluate(path, module, {"x": (inputs, padded)})


def test_a_split_in_which_no_row_counts_is_refused():
    (module, path), (tokens, targets, mask) = line(), texts()
    none = torch.full_like(targets, -100)
    with pytest.raises(ValueError, match="split 'x' holds no row that counts"):
        evaluate(path, module, {"x": (tokens, none)})
    inputs = {"input_ids": tokens, "attention_mask": 0 * mask}
    with pytest.raises(ValueError, match="split 'x' holds no row that counts"):
        evaluate(path, module, {"x": [(inputs, targets)]}, forward=Forward(mask="attention_mask"))


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_a_mask_or_targets_that_do_not_fit_the_logits_are_named(cuda_graph):
    (module, path), (tokens, targets, mask) = line(), texts()
    fit = {"input_ids": tokens, "attention_mask": mask}
    tail = fit | {"attention_mask": mask[:, 1:]}
    for batch, name, words in (
        (
            fit,
            "mask",
            "mask 'mask' must name a tensor among the inputs, got dict of input_ids, att",
        ),
        (tokens, "mask", "mask 'mask' must name a tensor among the inputs, got Tensor"),
        (tail, "attention_mask", r"without their last axis, got \[4, 5\] for \[4, 6\]"),
    ):
        with pytest.raises(ValueError, match=words):
            how = dict(descent=plain(), forward=Forward(mask=name), cuda_graph=cuda_graph)
            optimize(path, module, [batch], steps=1, **how)
        with pytest.raises(ValueError, match=words):
            evaluate(path, module, {"x": [(batch, targets)]}, forward=Forward(mask=name))
    for inputs, name in ((tokens, None), (fit, "attention_mask")):
        how = dict(descent=plain(), forward=Forward(mask=name), cuda_graph=cuda_graph)
        with pytest.raises(ValueError, match=r"got \[4\] for \[4, 6\]"):
            optimize(path, module, [(inputs, targets[:, 1])], **how)


@pytest.mark.parametrize("options", [{}, dict(chunk=2), dict(coarse_to_fine=True, momentum=0.9)])
def test_captured_steps_count_the_rows_of_a_mask(options):
    module, path = line(points=7)
    batches = []
    for seed in range(3):
        tokens, _, mask = texts(seed)
        mask = mask.roll(seed, 1) if seed < 2 else 0 * mask
        inputs = {"input_ids": tokens, "attention_mask": mask, "scale": 2.0, "labels": None}
        batches.append((Batch(inputs), None))
    options |= dict(steps=5, mask="attention_mask")
    expected = optimize(path, module, batches, **settings(engine="stacked", **options))
    got = optimize(path, module, batches, cuda_graph=True, **settings(**options))
    torch.testing.assert_close(got.interior, expected.interior, rtol=1e-9, atol=1e-12)


def test_training_is_on_the_rows_that_count():
    """The losses that two networks are trained on, and steps of torch's own on the same rows."""
    tokens, targets, mask = texts(batch=6)
    inputs = {"input_ids": tokens, "attention_mask": mask, "scale": 2.0, "labels": targets}
    none = inputs, torch.full_like(targets, -100)
    data = loader_data(([(inputs, targets), none, (inputs, targets)], [(inputs, targets)]))
    counted = (targets != -100) & mask.bool()
    config = Training(epochs=1, train_batch_size=128, train_lr=0.05, weight_decay=0.0)

    log, modules = [], []

    def make():
        modules.append(Model(lambda logits: {"loss": None, "logits": logits}).double())
        return modules[-1]

    options = dict(mask="attention_mask", on_step=lambda m, states: log.append((m, states)))
    train_ends(make, data, (1, 2), config, **evaluating(**options))
    for step, (metrics, states) in enumerate(log):
        for loss, state in zip(metrics["loss"], states, strict=True):
            logits = functional_call(modules[0], state, (), {"input_ids": tokens, "scale": 2.0})
            expected = F.cross_entropy(logits["logits"][counted], targets[counted])
            assert loss == pytest.approx(0 if step == 1 else expected.item(), rel=1e-12)
    assert log[0][1][0]["head.weight"].ne(log[1][1][0]["head.weight"]).any()

    alone = Model().double()
    alone.load_state_dict(log[0][1][1])
    loss = F.cross_entropy(2.0 * alone(tokens)[counted], targets[counted])
    gradient = torch.autograd.grad(loss, list(alone.parameters()))
    moved = {n: log[0][1][1][n] - log[1][1][1][n] for n, _ in alone.named_parameters()}
    for name, own in zip(moved, gradient, strict=True):  # Nesterov's first step, at rate "lr"
        expected = (1 + 0.95) * log[0][0]["lr"] * own
        torch.testing.assert_close(moved[name], expected, rtol=1e-5, atol=1e-12)


# --- Batches --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [dict, Batch, OrderedDict])
@pytest.mark.parametrize("engine", ["auto", *ENGINES])
def test_mappings_of_any_kind_hold_tensors_and_other_values(kind, engine):
    (module, path), (tokens, targets, _) = line(), texts()
    inputs = kind({"input_ids": tokens, "attention_mask": None, "use_cache": True, "scale": 2.0})
    expected = optimize(
        path, module, [{"input_ids": tokens, "scale": torch.tensor(2.0)}], steps=2, descent=plain()
    )
    got = optimize(path, module, [inputs], steps=2, descent=plain(), forward=Forward(engine=engine))
    torch.testing.assert_close(got.interior, expected.interior)
    assert SEEN["use_cache"] is True and SEEN["scale"] == 2.0
    labels = targets.clamp(min=0)
    results = [
        evaluate(path, module, {"x": data}, batch_size=3, forward=Forward(engine=engine))
        .splits["x"]
        .loss
        for data in ((inputs, labels), [(inputs, labels)])
    ]
    for i, p in enumerate(path.points()):
        logits = functional_call(module, p, (), {"input_ids": tokens, "scale": 2.0})
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten()).item()
        assert results[0][i] == pytest.approx(loss) and results[1][i] == pytest.approx(loss)


@pytest.mark.parametrize("engine", ["auto", *ENGINES])
def test_labels_in_a_mapping_are_dropped_and_caches_are_off(engine):
    (module, path), (tokens, _, _) = line(), texts()
    expected = optimize(
        path, module, [tokens], steps=2, descent=plain(), forward=Forward(engine=engine)
    )
    assert SEEN["use_cache"] is False
    got = optimize(
        path,
        module,
        [{"input_ids": tokens, "labels": -100 * tokens}],
        descent=plain(),
        forward=Forward(engine=engine),
    )
    got = optimize(
        got,
        module,
        [Batch(input_ids=tokens, labels=tokens)],
        descent=plain(),
        forward=Forward(engine=engine),
    )
    assert SEEN == {"scale": 1.0, "use_cache": False, "labels": None}
    torch.testing.assert_close(got.interior, expected.interior)


def test_labels_within_a_mapping_are_no_split():
    (module, path), (tokens, targets, _) = line(), texts()
    with pytest.raises(TypeError, match="labels within a mapping are not read"):
        evaluate(path, module, {"x": [{"input_ids": tokens, "labels": targets}]})


def test_a_mapping_without_a_tensor_is_refused():
    module, path = line()
    for batch in ({"input_ids": [[1, 2]]}, Batch(), ({"scale": 2.0}, torch.zeros(2)), ()):
        with pytest.raises(TypeError, match="a mapping with such tensors"):
            optimize(path, module, [batch], steps=1, descent=plain())


def test_other_values_beside_the_same_tensors_are_other_inputs():
    """What is kept of the two ends is not used for them."""
    (module, path), (tokens, _, _) = line(), texts()
    log = []
    batches = [{"input_ids": tokens, "scale": scale} for scale in (1.0, 3.0)]
    optimize(
        path, module, batches, on_step=lambda m, p: log.append(m["energy"]), descent=plain(lr=1e-30)
    )
    for batch, energy in zip(batches, log, strict=True):
        assert energies(path, module, batch)["energy"] == pytest.approx(energy, rel=1e-12)


def test_numbers_that_are_not_finite_are_looked_for_with_the_same_arguments():
    (module, path), (tokens, targets, _) = line(), texts()
    batch = Batch(input_ids=tokens, attention_mask=None, scale=float("nan"), labels=targets)
    with pytest.raises(ValueError, match="what layer Model gives is not finite; look at the"):
        optimize(path, module, [batch], descent=plain())


# --- Outputs --------------------------------------------------------------------------------------

FORMS = {
    "dict": lambda x: {"loss": None, "hidden": x[..., 1:].exp(), "logits": x},
    "out": lambda x: OrderedDict(aux=x[..., 1:], out=x),
    "ModelOutput": lambda x: ModelOutput(hidden=x[..., 1:], logits=x),
    "UserDict": lambda x: Batch(logits=x),
    "dataclass": lambda x: Output(x, layers=(x[..., 1:],)),
    "namedtuple": lambda x: Named(x[..., 1:], x),
    "tuple": lambda x: (None, x, x[..., 1:]),
    "list": lambda x: [x, x[..., 1:]],
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("engine", ["auto", *ENGINES])
def test_logits_are_found_in_what_a_module_returns(form, engine):
    (module, path), (tokens, targets, _) = line(FORMS[form]), texts()
    batches, splits = [(tokens, targets)], {"x": (tokens, targets)}
    usual = Model().double()
    expected = optimize(path, usual, batches, steps=2, descent=plain())
    got = optimize(path, module, batches, steps=2, descent=plain(), forward=Forward(engine=engine))
    torch.testing.assert_close(got.interior, expected.interior)
    expected, got = (evaluate(path, m, splits).splits["x"].loss for m in (usual, module))
    assert got == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("engine", ["auto", *ENGINES])
@pytest.mark.parametrize(
    "returns, name",
    [
        (lambda x: {"logits": x[..., 1:], "scores": 2 * x}, "scores"),
        (lambda x: ModelOutput(hidden=x[..., 1:], scores=2 * x), "scores"),
        (lambda x: Batch(out=x[..., 1:], scores=2 * x), "scores"),
        (lambda x: Output(x[..., 1:], 2 * x), "loss"),
        (lambda x: Named(2 * x, x[..., 1:]), "hidden"),
    ],
)
def test_another_output_is_named(engine, returns, name):
    (module, path), (tokens, targets, _) = line(returns), texts()
    doubled = Model(lambda x: 2 * x).double()
    options = dict(engine=engine, output=name)
    got = optimize(path, module, [tokens], steps=2, **settings(**options))
    expected = optimize(path, doubled, [tokens], steps=2, descent=plain())
    torch.testing.assert_close(got.interior, expected.interior)
    expected = evaluate(path, doubled, {"x": (tokens, targets)}).splits["x"].loss
    got = evaluate(path, module, {"x": (tokens, targets)}, **evaluating(**options)).splits["x"].loss
    assert got == pytest.approx(expected, rel=1e-12)
    got = stack(module, **options)(path.stacked(), tokens)
    torch.testing.assert_close(got, stack(doubled)(path.stacked(), tokens))
    if engine == "stacked":
        got = optimize(
            path,
            module,
            [tokens],
            steps=2,
            cuda_graph=True,
            descent=plain(),
            forward=Forward(output=name),
        )
        expected = optimize(path, doubled, [tokens], steps=2, descent=plain())
        torch.testing.assert_close(got.interior, expected.interior)


def test_a_name_is_looked_up_as_it_is():
    """Neither a tensor by itself nor the first of a tuple, and nothing that all tensors have."""
    tokens, targets, _ = texts()
    for returns, name in ((lambda x: x, "scores"), (lambda x: (x,), "scores"), (lambda x: x, "T")):
        module, path = line(returns)
        with pytest.raises(TypeError, match=f"must return {name}, one tensor .* got (T|t)"):
            optimize(path, module, [tokens], descent=plain(), forward=Forward(output=name))
        with pytest.raises(TypeError, match=f"must return {name}, one tensor .* got (T|t)"):
            evaluate(path, module, {"x": (tokens, targets)}, forward=Forward(output=name))


@pytest.mark.parametrize("engine", ["auto", *ENGINES])
@pytest.mark.parametrize(
    "returns, words",
    [
        (lambda x: {"scores": x, "hidden": x}, "got dict of scores, hidden; name another"),
        (lambda x: ModelOutput(scores=x), "got ModelOutput of scores; name another"),
        (lambda x: Output(None, x), "got Output of logits, loss, layers; name another"),
        (lambda x: (None, 3), "got tuple of NoneType, int; name another"),
        (lambda x: None, "got NoneType; name another"),
    ],
)
def test_what_holds_no_logits_is_named(engine, returns, words):
    (module, path), (tokens, targets, _) = line(returns), texts()
    with pytest.raises(TypeError, match=words):
        optimize(path, module, [tokens], descent=plain(), forward=Forward(engine=engine))
    with pytest.raises(TypeError, match=words):
        evaluate(path, module, {"x": (tokens, targets)}, forward=Forward(engine=engine))
    with pytest.raises(TypeError, match=words):
        stack(module, engine=engine, output="logits")(path.stacked(), tokens)


def test_stack_returns_all_outputs_unless_one_is_named():
    module, path = line(lambda x: {"logits": x, "hidden": (x[..., 1:],), "loss": None})
    tokens, params = texts()[0], path.stacked()
    got = stack(module)(params, tokens)
    assert list(got) == ["logits", "hidden", "loss"] and got["loss"] is None
    assert got["hidden"][0].shape == (5, 4, 6, 6)
    torch.testing.assert_close(stack(module, output="logits")(params, tokens), got["logits"])


def test_statistics_are_recalibrated_whatever_the_module_returns():
    class Normalised(nn.Sequential):
        def forward(self, x):
            return Output(super().forward(x))

    a, b, plain = (
        kind(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
        for kind in (Normalised, Normalised, nn.Sequential)
    )
    path = Path.linear(a, b, 4, batchnorm="recalibrate")
    x, y = torch.randn(16, 6).double(), torch.arange(16) % 3
    got, expected = (recalibrate(path, module, [x]) for module in (a, plain))
    torch.testing.assert_close(got.interior, expected.interior)
    got, expected = (
        evaluate(path, module, {"x": (x, y)}, forward=Forward(batchnorm="recalibrate"))
        for module in (a, plain)
    )
    assert got.splits["x"].loss == pytest.approx(expected.splits["x"].loss)


@pytest.mark.parametrize("form", ["dict", "ModelOutput", "dataclass"])
def test_what_is_returned_keeps_its_places_when_networks_are_matched(form):
    a, b = Model(FORMS[form]), Model(FORMS[form])
    inputs = Batch(input_ids=texts()[0], attention_mask=None, labels=texts()[0])
    matching = match(a, b, inputs)
    assert matching.relative_change < 1e-10 and len(matching.permutations) == 1


# --- transformers ---------------------------------------------------------------------------------

ENTRIES = {entry.name: entry for entry in catalogue.TRANSFORMERS}


@pytest.mark.parametrize("name", ["gpt2-eager", "gpt2-sdpa"])
def test_a_language_model_of_transformers_as_its_users_call_it(name):
    """A causal model on padded text: the next tokens are the targets, those of pads -100."""
    module, a, b = (ENTRIES[name].make().double() for _ in range(3))
    module.config.use_cache = True  # the default of a configuration
    path, batch = Path.linear(a, b, 4), Batch(ENTRIES[name].inputs(4))
    tokens, mask = batch["input_ids"], batch["attention_mask"]
    batch["labels"] = tokens.masked_fill(mask == 0, -100)
    targets = F.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    paths = [
        optimize(
            path,
            module,
            [(batch, targets)],
            steps=2,
            descent=plain(),
            forward=Forward(engine=engine),
        )
        for engine in ("stacked", "loop")
    ]
    torch.testing.assert_close(*(path.interior for path in paths), rtol=1e-6, atol=1e-9)
    results = [
        evaluate(
            paths[0], module, {"x": (batch, targets)}, batch_size=3, forward=Forward(engine=engine)
        )
        for engine in ("stacked", "loop")
    ]
    assert results[0].splits["x"].loss == pytest.approx(results[1].splits["x"].loss)
    assert results[0].fisher_rao == pytest.approx(results[1].fisher_rao)
    for i, point in enumerate(paths[0].points()):  # against the loss that the model itself computes
        module.load_state_dict(point)
        loss = module.eval()(**batch).loss.item()
        assert results[0].splits["x"].loss[i] == pytest.approx(loss)


@pytest.mark.parametrize("name", ["bert-eager", "bert-sdpa"])
def test_a_classifier_of_transformers_as_its_users_call_it(name):
    module, a, b = (ENTRIES[name].make().double() for _ in range(3))
    path, batch = Path.linear(a, b, 4), Batch(ENTRIES[name].inputs(6))
    labels = torch.arange(6) % 5
    loader = [Batch({**batch, "labels": labels})]
    paths = [
        optimize(path, module, loader, steps=2, descent=plain(), forward=Forward(engine=engine))
        for engine in ("stacked", "loop")
    ]
    torch.testing.assert_close(*(path.interior for path in paths), rtol=1e-6, atol=1e-9)
    for engine in ("stacked", "loop"):
        result = evaluate(
            paths[0], module, {"x": (batch, labels)}, batch_size=4, forward=Forward(engine=engine)
        )
        for i, point in enumerate(paths[0].points()):
            module.load_state_dict(point)
            loss = module.eval()(**batch, labels=labels).loss.item()
            assert result.splits["x"].loss[i] == pytest.approx(loss)
    with pytest.raises(ValueError, match=r"without their last axis, got \[6, 13\] for \[6\]"):
        optimize(path, module, loader, descent=plain(), forward=Forward(mask="attention_mask"))


# --- Command line ---------------------------------------------------------------------------------

MODULE = """
import torch
from torch import nn

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(9, 6), nn.Linear(6, 5), nn.Linear(5, 9)

    def forward(self, input_ids, attention_mask, labels=None, use_cache=True):
        assert labels is None and not use_cache
        scores = self.head(self.mix(self.embed(input_ids)).tanh())
        return {"loss": None, "hidden": scores[..., 1:], "scores": scores}

def batch(seed, pad):
    ids = torch.randint(9, (8, 6), generator=torch.Generator().manual_seed(seed))
    mask = (torch.arange(6) < 2 + torch.arange(8)[:, None] % 5).long()
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": ids}
    return inputs, ((ids + 1) % 9).masked_fill(mask == 0, pad)

padded = lambda: ([batch(i, -100) for i in range(6)], [batch(9, -100)])
masked = lambda: ([batch(i, 99) for i in range(6)], [batch(9, 99)])
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "words.py").write_text(MODULE)
    yield ["--model", "words:Model", "--output", "scores", "--points", "4", "--steps", "4"]
    sys.modules.pop("words", None)


def test_a_run_counts_the_same_rows_by_a_mask_and_by_targets(own, capsys):
    reports = []
    for data, options in (("padded", []), ("masked", ["--mask", "attention_mask"])):
        data, engine = ["--data", f"words:{data}"], ["--engine", "stacked", "--epochs", "4"]
        main(["run", "--out", "r", *own, *data, *engine, *options, "--overwrite"])
        reports.append(json.loads(open("r/report.json").read()))
    first, second = (report["paths"]["bezier"] for report in reports)
    for split in ("train", "test"):
        assert first[split]["loss"] == pytest.approx(second[split]["loss"], rel=1e-4)
    assert first["energy"] == pytest.approx(second["energy"], rel=1e-3)
    main(["optimize", "r", "--overwrite", "--cuda-graph", "True", "--engine", "auto"])
    main(["evaluate", "r"])
    static = json.loads(open("r/report.json").read())["paths"]["bezier"]
    assert static["energy"] == pytest.approx(second["energy"], rel=1e-3)


def test_what_does_not_fit_an_output_or_a_mask_is_said_before_a_run(own, capsys):
    masked, padded = (["--data", f"words:{data}"] for data in ("masked", "padded"))
    for options, words in (
        ([*own[:2], *masked], "words:Model: the module must return logits, one tensor"),
        ([*own, *masked], "labels must be within 0..8, or -100 where a row does not count"),
        ([*own, *masked, "--mask", "mask"], "mask 'mask' must name a tensor among the inputs"),
    ):
        assert words in refused(capsys, "run", "--out", "r", *options)
    words = "profile measures steps on all rows of plain logits only; leave out --output and"
    assert words in refused(capsys, "profile", "--mask", "attention_mask")
