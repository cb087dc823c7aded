"""Which engine is chosen, and that the choice changes nothing but the time."""

import pytest
import torch
from conftest import evaluating, images, plain, settings, tiny_resnet
from torch import nn

from fastgeo import Forward, Path, evaluate, models, optimize, stack
from fastgeo.stacking.module import StackedModule
from fastgeo.step import engines
from fastgeo.step.agreement import few_of, outputs_and_gradients
from fastgeo.step.engines import EngineChoice

CANDIDATES = [
    "stacked",
    "stacked, channels-last, 4 at a time",
    "loop, channels-last, 4 at a time",
    "loop, 4 at a time",
]


class Clock:
    """Stands in for the time module."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(engines, "time", clock)
    return clock


def small():
    """A network whose convolutions may be in channels-last on any CPU."""
    return tiny_resnet(norm="channel")


def one_network(module):
    return {name: tensor[None] for name, tensor in module.state_dict().items()}


def chosen(clock, seconds, module=None, inputs=None, **options):
    """Work that takes each candidate the given time, until one is chosen; the turns and record."""
    module, turns, records = module or small(), [], []
    choice = EngineChoice(module, Forward(**options), on_choice=records.append)
    inputs = images() if inputs is None else inputs
    choice.prepare(one_network(module), inputs, points=5)

    def work(engine):
        turns.append(str(engine))
        clock.now += seconds[str(engine)]

    while choice.chosen is None:
        choice.run(work)
    choice.run(work)
    assert turns.pop() == str(choice.chosen) and len(records) == 1
    return turns, records[0], str(choice.chosen)


@pytest.mark.parametrize("fastest", CANDIDATES)
def test_the_fastest_engine_is_chosen_after_three_turns_each(clock, fastest):
    seconds = {name: 0.1 if name == fastest else 0.2 for name in CANDIDATES}
    turns, record, name = chosen(clock, seconds)
    assert turns == CANDIDATES * 3 and name == fastest
    assert record["seconds"] == pytest.approx(seconds) and record["failed"] == {}
    assert record["engine"] == fastest.split(",")[0]
    assert record["channels_last"] == ("channels-last" in fastest)
    assert record["chunk"] == (None if fastest == "stacked" else 4)


def test_bf16_is_a_candidate_where_the_processor_has_units_for_it(clock, monkeypatch):
    half = [
        f"stacked{layout}{few}, bf16"
        for few in ("", ", 4 at a time")
        for layout in (", channels-last", "")
    ]
    for units in (True, False):
        monkeypatch.setattr(engines, "multiplies_in_bf16", lambda _: units)  # noqa: B023
        names = CANDIDATES + half * units
        seconds = {name: 0.1 if "bf16" in name else 0.2 for name in names}
        turns, record, name = chosen(clock, seconds, precision="auto")
        assert turns == names * 3
        assert name == (half[0] if units else "stacked")
        assert record["precision"] == ("bf16" if units else "fp32")
    monkeypatch.setattr(engines, "multiplies_in_bf16", lambda _: True)
    seconds = {"stacked": 0.1, "stacked, bf16": 0.2}
    turns, record, _ = chosen(clock, seconds, precision="auto", engine="stacked")
    assert turns == list(seconds) * 3 and record["precision"] == "fp32"


def test_precision_auto_is_one_that_has_a_name(monkeypatch):
    """Where nothing can be measured, in a graph, it is what the processor has units for."""
    module, a, b = (tiny_resnet(seed).float() for seed in range(3))
    path, batches = Path.linear(a, b, 5), [images().float()]

    def weight(precision, **how):
        forward = Forward(engine="stacked", precision=precision)
        found = optimize(path, module, batches, steps=8, descent=plain(), forward=forward, **how)
        return found.interior["conv1.weight"]

    for units in (True, False):
        for where in ("capture", "engines"):
            name = f"fastgeo.step.{where}.multiplies_in_bf16"
            monkeypatch.setattr(name, lambda _: units)  # noqa: B023
        named = weight("bf16" if units else "fp32", cuda_graph=True)
        assert torch.equal(weight("auto", cuda_graph=True), named)
    assert torch.equal(weight("auto"), weight("fp32"))  # no units for anything else
    assert not torch.equal(weight("bf16"), weight("fp32"))


def test_times_that_are_alike_leave_the_first_candidate(clock):
    seconds = dict(zip(CANDIDATES, (1.0, 0.96, 0.97, 1.2), strict=True))
    assert chosen(clock, seconds)[2] == "stacked"


def test_long_work_takes_one_turn_each(clock):
    turns, _, name = chosen(clock, dict(zip(CANDIDATES, (9, 8, 7, 6), strict=True)))
    assert turns == CANDIDATES and name == CANDIDATES[3]


def test_work_that_ends_early_chooses_by_what_it_knows(clock):
    module, records = small(), []
    choice = EngineChoice(module, Forward(), on_choice=records.append)
    choice.prepare(one_network(module), images(), points=5)
    choice.finish()
    assert str(choice.chosen) == CANDIDATES[0] and records[0]["seconds"] == {}

    choice = EngineChoice(module, Forward(), on_choice=records.append)
    choice.prepare(one_network(module), images(), points=5)
    for seconds in (9e-1, 1e-1, 1e-1, 1e-1, 5e-1, 2e-1):  # a second turn for two of them
        choice.run(lambda engine, seconds=seconds: setattr(clock, "now", clock.now + seconds))
    choice.finish()
    assert str(choice.chosen) == CANDIDATES[1]
    assert records[1]["seconds"] == pytest.approx({CANDIDATES[0]: 0.5, CANDIDATES[1]: 0.2})


def test_what_has_no_images_has_no_memory_format_to_choose(clock):
    module = models.mlp(64, (8,), 5).double()
    seconds = {"stacked": 0.1, "stacked, 4 at a time": 0.3, "loop, 4 at a time": 0.2}
    turns, *_ = chosen(clock, seconds, module, torch.randn(3, 64).double())
    assert turns == [*seconds] * 3


@pytest.mark.parametrize("cuda_graph", [False, True])
@pytest.mark.parametrize("chunk, networks", [(None, 11), (4, 4)])
def test_an_engine_is_checked_once_a_run_for_as_many_networks_as_it_evaluates(
    monkeypatch, cuda_graph, chunk, networks
):
    """Not for each level of points."""
    checked = []

    def outputs(network, params, *args, **options):
        checked.append((network.engine, len(params["linear.weight"])))
        return outputs_and_gradients(network, params, *args, **options)

    monkeypatch.setattr(engines, "outputs_and_gradients", outputs)
    line = Path.linear(small(), tiny_resnet(1, "channel"), 13)
    how = settings(coarse_to_fine=True, chunk=chunk, lr=1e-3, engine="stacked")
    optimize(line, small(), [images()], steps=6, cuda_graph=cuda_graph, **how)
    assert checked == [("loop", networks), ("stacked", networks)]


def test_stages_that_share_a_module_check_its_engine_once(monkeypatch):
    checked = []

    def outputs(network, *args, **options):
        checked.append((network.engine, options["gradients"]))
        return outputs_and_gradients(network, *args, **options)

    monkeypatch.setattr(engines, "outputs_and_gradients", outputs)
    module, line = small(), Path.linear(small(), tiny_resnet(1, "channel"), 6)
    x, y, how = images(), torch.arange(12) % 5, Forward(engine="stacked", chunk=3)
    with engines.checked_once():
        moved = optimize(line, module, [x], steps=2, descent=plain(), forward=how)
        evaluate(moved, module, (x, y), forward=how)
        assert checked == [("loop", True), ("stacked", True)]
        evaluate(moved, small(), (x, y), forward=how)  # another module
        assert checked[2:] == [("loop", False), ("stacked", False)]
    evaluate(moved, module, (x, y), forward=how)  # which may have changed since
    assert len(checked) == 6


def test_inputs_whose_first_axis_is_no_batch_are_not_cut():
    """The nodes of a graph whose edges the network holds."""

    class Graph(nn.Module):
        def __init__(self, nodes=12):
            super().__init__()
            self.first, self.second = nn.Linear(6, 16), nn.Linear(16, 5)
            self.register_buffer("source", torch.arange(nodes))
            self.register_buffer("target", torch.arange(nodes).roll(1))

        def forward(self, x):
            h = self.first(x).relu()
            return self.second(torch.zeros_like(h).index_add(0, self.target, h[self.source]))

    class Mixing(Graph):
        def forward(self, x):  # a part of the nodes is evaluated, to something else
            h = self.first(x).relu()
            return self.second(h - h.mean(0))

    for kind in (Graph, Mixing):
        line = Path.linear(kind().double(), kind().double(), 5)
        x = torch.randn(12, 6).double()
        one = {name: tensor[None] for name, tensor in kind().double().named_parameters()}
        assert few_of(stack(kind().double(), engine="loop"), one, x, False) == (x, 1.0)
        paths = [
            optimize(line, kind(), [x], steps=2, descent=plain(), forward=Forward(engine=e))
            for e in ("auto", "loop")
        ]
        torch.testing.assert_close(*(path.interior for path in paths))


def test_a_convolution_that_channels_last_breaks_on_a_cpu_is_not_measured_in_it(clock):
    seconds = {"stacked": 0.1, "stacked, 4 at a time": 0.3, "loop, 4 at a time": 0.2}
    turns, *_ = chosen(clock, seconds, tiny_resnet(norm="group"))  # 4 channels, 1x1, stride 2
    assert turns == [*seconds] * 3


@pytest.mark.parametrize("engine", ["stacked", "vmap", "loop"])
def test_an_engine_and_format_that_are_named_are_not_measured(engine):
    record = []
    forward = Forward(engine=engine, channels_last=True, chunk=2)
    choice = EngineChoice(tiny_resnet(), forward, on_choice=record.append)
    choice.prepare(one_network(tiny_resnet()), images(), points=5)
    named = {"engine": engine, "channels_last": True, "chunk": 2, "precision": "fp32"}
    assert record == [{**named, "points": 5, "seconds": {}, "failed": {}}]


def test_an_engine_that_fails_in_its_turn_is_left_out():
    module, record = small(), []
    choice = EngineChoice(module, Forward(), on_choice=record.append)
    choice.prepare(one_network(module), images(), points=5)

    def work(engine):
        if engine.network.engine == "stacked":
            raise torch.OutOfMemoryError("too large")
        return engine.network.engine

    with pytest.warns(UserWarning, match="engine stacked is left out: too large"):
        assert [choice.run(work) for _ in range(9)] == ["loop"] * 9
    assert record[0]["failed"] == dict.fromkeys(CANDIDATES[:2], "too large")


def test_an_error_of_the_work_itself_is_raised(path, module):
    def fails(engine):
        raise KeyError("mine")

    choice = EngineChoice(module, Forward())
    choice.prepare(one_network(module), images(), points=5)
    with pytest.raises(KeyError, match="mine"):
        choice.run(fails)


@pytest.mark.parametrize(
    "change", [lambda t: t * 1.01, lambda t: 2 * t.detach() - t, lambda t: t.detach() + 0 * t]
)
def test_an_engine_with_other_outputs_or_gradients_is_not_used(path, module, monkeypatch, change):
    run = StackedModule._run

    def wrong(self, engine, *args):
        out = run(self, engine, *args)
        return out if engine == "loop" else type(out)(change(out.tensor))

    monkeypatch.setattr(StackedModule, "_run", wrong)
    record = []
    with pytest.warns(UserWarning, match="engine stacked is left out: its .* differs? from"):
        optimize(path, module, [images()], steps=9, on_choice=record.append, descent=plain())
    assert record[0]["engine"] == "loop"
    for engine in ("stacked", "vmap"):
        with pytest.raises(ValueError, match="its .* differs? from the module's"):
            optimize(
                path, module, [images()], steps=1, descent=plain(), forward=Forward(engine=engine)
            )


@pytest.mark.parametrize("engine", ["auto", "stacked"])
def test_a_frozen_backbone_is_optimised_as_in_the_module(engine):
    class Frozen(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(Backbone())
            self.head = nn.Linear(5, 4)

        def forward(self, x):
            return self.head(self.inner(x))

    class Backbone(nn.Linear):
        def __init__(self):
            super().__init__(6, 5)

        @torch.no_grad()
        def forward(self, x):
            return super().forward(x).tanh()

    line = Path.linear(Frozen(), Frozen(), 5)
    got = optimize(
        line,
        Frozen(),
        [torch.randn(16, 6)],
        steps=2,
        descent=plain(),
        forward=Forward(engine=engine),
    )
    for name, before in line.interior.items():
        assert torch.equal(got.interior[name], before) == name.startswith("inner")


def test_inputs_that_are_not_all_of_the_batch_are_not_cut():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(7, 6), nn.Linear(6, 4)

        def forward(self, tokens, mask, scale):
            x = self.embed(tokens)
            return self.head(nn.functional.scaled_dot_product_attention(x, x, x, mask)) * scale

    tokens = torch.randint(7, (16, 12), generator=torch.Generator().manual_seed(1))
    mask, scale = torch.ones(12, 12).tril().bool(), torch.tensor(2.0)
    inputs = {"tokens": tokens, "mask": mask, "scale": scale}
    line = Path.linear(Masked(), Masked(), 4)
    paths = [
        optimize(line, Masked(), [inputs], steps=2, descent=plain(), forward=Forward(engine=engine))
        for engine in ("auto", "loop")
    ]
    torch.testing.assert_close(*(path.interior for path in paths))


@pytest.mark.parametrize("engine", ["stacked", "vmap", "loop"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_every_engine_takes_the_same_steps_and_evaluates_the_same(
    path, module, engine, channels_last
):
    x, y = images(), torch.arange(12) % 5
    options = dict(engine=engine, channels_last=channels_last)
    got = optimize(path, module, [x], steps=2, **settings(chunk=2, **options))
    expected = optimize(path, module, [x], steps=2, descent=plain())
    torch.testing.assert_close(got.interior, expected.interior)
    results = [
        evaluate(expected, module, {"x": (x, y)}, **evaluating(**given))
        for given in (dict(chunk=3, **options), {})
    ]
    assert results[0].splits["x"].loss == pytest.approx(results[1].splits["x"].loss)
    assert results[0].fisher_rao == pytest.approx(results[1].fisher_rao)


class Tokens(nn.Module):
    """A language model in miniature: logits [B, T, V] of tokens, given a mask."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.mix = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11)

    def forward(self, tokens, mask):
        x = self.embed(tokens) * mask[..., None]
        return self.head(x + self.mix(x.cumsum(1)).tanh())


def test_named_inputs_and_logits_at_every_position():
    module, other = (Tokens().double() for _ in range(2))
    tokens = torch.randint(11, (4, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(7) < torch.tensor([7, 5, 7, 3])[:, None]
    inputs = {"mask": mask.double(), "tokens": tokens}
    labels = tokens.roll(-1, 1)
    path = Path.linear(module, other, 5)
    paths = [
        optimize(
            path,
            module,
            [(inputs, labels)],
            steps=2,
            descent=plain(),
            forward=Forward(engine=engine, chunk=chunk),
        )
        for engine, chunk in (("stacked", None), ("loop", 1))
    ]
    torch.testing.assert_close(*(path.interior for path in paths))

    result = evaluate(paths[0], module, {"x": (inputs, labels)}, batch_size=3)
    for i, point in enumerate(paths[0].points()):
        logits = torch.func.functional_call(module, point, (), inputs).flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, labels.flatten())
        assert result.splits["x"].loss[i] == pytest.approx(loss.item())


def test_what_returns_no_logits_is_named(path):
    class Pair(nn.Module):
        def __init__(self, outputs):
            super().__init__()
            self.head = nn.Linear(4, 3)
            self.outputs = outputs

        def forward(self, x):
            return self.outputs(self.head(x))

    for outputs, error, words in (
        (lambda x: (3, None), TypeError, "one tensor .*, got tuple of int, NoneType; name another"),
        (lambda x: {"scores": x}, TypeError, "one tensor .*, got dict of scores; name another"),
        (lambda x: x[:, 0], ValueError, r"logits \[B, ..., C\], got \[5\]"),
    ):
        line = Path.linear(Pair(outputs), Pair(outputs), 4)
        with pytest.raises(error, match=words):
            optimize(line, Pair(outputs), [torch.randn(5, 4)], descent=plain())
        with pytest.raises(error, match=words):
            evaluate(line, Pair(outputs), {"x": (torch.randn(5, 4), torch.zeros(5).long())})
