"""Curves and objectives: their steps by definition, for every engine, captured and gone on with."""

import pytest
import torch
import torch.nn.functional as F
from conftest import images, settings, tiny_resnet
from torch import Tensor
from torch.func import functional_call

from fastgeo import Checkpoints, Descent, Forward, Path, evaluate, optimize
from fastgeo.step.nodes import Nodes

STIFFNESS = {"bezier": 4 / 3, "polychain": 4.0}  # of one control point, by hand: ∫ B_1'^2 dt
METHODS = {
    "geodesic": dict(),
    "geodesic, random nodes": dict(nodes=3),
    "geodesic, labels": dict(objective="cross_entropy"),
    "bezier": dict(nodes=3),
    "bezier, own points": dict(),
    "bezier, labels": dict(objective="cross_entropy", nodes=1),
    "polychain": dict(nodes=2),
    "polychain, labels": dict(objective="cross_entropy", nodes=2),
}


def labels(count: int = 12) -> Tensor:
    return torch.arange(count) % 5


def start(method: str, n: int = 7, inner: int = 1) -> Path:
    kind, ends = method.partition(",")[0], (tiny_resnet(1), tiny_resnet(2))
    if kind == "geodesic":
        return Path.linear(*ends, n)
    return getattr(Path, kind)(*ends, n, **{dict(bezier="controls").get(kind, "bends"): inner})


def batches() -> list:
    return [(images(seed=seed), labels()) for seed in range(3)]


def drawn(nodes: int) -> Tensor:
    """The first places of a step, by the rule: one in each of `nodes` equal parts."""
    generator = torch.Generator().manual_seed(torch.initial_seed())
    return (
        torch.arange(nodes) + torch.rand(nodes, dtype=torch.double, generator=generator)
    ) / nodes


def network(kind: str, ends: tuple, control: dict, t: Tensor) -> dict:
    """Of one control point: De Casteljau's rule, or the line that t is on."""
    a, b = ends
    if kind == "bezier":
        mix = lambda p, q, r: (1 - t) ** 2 * p + 2 * t * (1 - t) * q + t**2 * r  # noqa: E731
    elif t < 0.5:
        mix = lambda p, q, r: (1 - 2 * t) * p + 2 * t * q  # noqa: E731
    else:
        mix = lambda p, q, r: (2 - 2 * t) * q + (2 * t - 1) * r  # noqa: E731
    return {name: mix(a[name], control[name], b[name]) for name in a}


def divergence(p: Tensor, q: Tensor) -> Tensor:
    middle = ((p + q) / 2).log()
    return sum(F.kl_div(middle, each, reduction="batchmean") for each in (p, q)) / 2


@pytest.mark.parametrize(
    "engine, chunk", [("stacked", None), ("vmap", 2), ("loop", 1), ("stacked", 3)]
)
@pytest.mark.parametrize("nodes", [None, 4])
@pytest.mark.parametrize("objective", ["jsd", "cross_entropy"])
@pytest.mark.parametrize("kind", ["bezier", "polychain"])
def test_a_step_is_autograds_through_the_curve(module, kind, objective, nodes, engine, chunk):
    x, y, path = images(), labels(), start(kind)
    torch.manual_seed(0)
    t = torch.arange(1, 6).double() / 6 if nodes is None else drawn(nodes)
    control = {name: tensor[0].clone().requires_grad_() for name, tensor in path.interior.items()}
    whole = torch.cat([torch.zeros(1), t, torch.ones(1)])
    states = [network(kind, (path.start, path.end), control, place) for place in whole]
    logits = [functional_call(module, state, (x,)) for state in states]
    if objective == "jsd":
        p = [each.softmax(-1) for each in logits]
        edges = zip(p[:-1], p[1:], whole.diff(), strict=True)
        loss = sum(divergence(one, other) / width for one, other, width in edges)
    else:
        loss = sum(F.cross_entropy(each, y) for each in logits[1:-1]) / len(t)
    gradients = torch.autograd.grad(loss, list(control.values()))

    for precondition in (False, True):
        how = dict(lr=0.1, precondition=precondition, objective=objective, nodes=nodes)
        got = optimize(path, module, [(x, y)], **settings(engine=engine, chunk=chunk, **how))
        factor = 0.1 / STIFFNESS[kind] if precondition else 0.1
        for (name, before), gradient in zip(control.items(), gradients, strict=True):
            expected = before.detach() - factor * gradient
            torch.testing.assert_close(got.interior[name][0], expected, rtol=1e-6, atol=1e-9)
        line = got.history[0]
        if objective == "jsd":
            assert line["energy"] == pytest.approx(loss.item() / 6)
        else:
            assert line["cross_entropy"] == pytest.approx(loss.item()) and "energy" not in line
        assert line["points"] == 7


def test_of_a_geodesic_the_curves_rule_is_the_inverse_laplacian(module):
    """Seven points, by the rule of curves and by that of free points, which needs no basis."""
    free = start("geodesic")
    curve = Path(free.start, free.interior, free.end, points=7)
    how = dict(steps=3, lr=0.1, momentum=0.9, engine="stacked")
    expected = optimize(free, module, [images()], **settings(**how))
    got = optimize(curve, module, [images()], **settings(**how))
    assert not got.free  # L⁻¹ is in fp32
    torch.testing.assert_close(got.interior, expected.interior, rtol=1e-6, atol=1e-9)
    for one, other in zip(got.history, expected.history, strict=True):
        assert one["energy"] == pytest.approx(other["energy"], rel=1e-6)
    generator = torch.Generator()
    assert Nodes(free, Descent(), generator).draw() is None
    back = Nodes(curve, Descent(), generator).draw().back
    laplacian = torch.diag(torch.full((5,), 2.0)).double()
    laplacian -= torch.diag(torch.ones(4), 1) + torch.diag(torch.ones(4), -1)
    torch.testing.assert_close(6 * back @ laplacian, torch.eye(5).double())


@pytest.mark.parametrize("method", METHODS)
def test_captured_steps_are_those_one_by_one(module, method, monkeypatch):
    monkeypatch.setattr("fastgeo.step.steps.AT_ONCE", 2)
    path = start(method, 9, inner=2)
    how = Descent(lr=0.05, **METHODS[method])
    results = []
    for graph in (False, True):
        torch.manual_seed(0)
        forward = Forward(engine="stacked", chunk=2)
        given = path, module, batches()
        results.append(optimize(*given, steps=7, descent=how, forward=forward, cuda_graph=graph))
    expected, got = results
    torch.testing.assert_close(got.interior, expected.interior, rtol=1e-9, atol=1e-12)
    for one, other in zip(got.history, expected.history, strict=True):
        assert {**one, "seconds": 0} == pytest.approx({**other, "seconds": 0}, rel=1e-9)


@pytest.mark.parametrize("stop", [1, 4])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_goes_on_to_the_last_bit(module, method, stop, tmp_path):
    path, how = start(method, 9, inner=2), Descent(lr=0.05, **METHODS[method])
    options = dict(steps=6, descent=how, forward=Forward(engine="stacked"))
    torch.manual_seed(0)
    uncut = optimize(path, module, batches(), **options)

    def interrupt(metrics, now):
        if metrics["step"] == stop:
            raise RuntimeError

    torch.manual_seed(0)
    with pytest.raises(RuntimeError), Checkpoints(tmp_path) as states:
        optimize(path, module, batches(), checkpoints=states, on_step=interrupt, **options)
    torch.manual_seed(1)  # of another process
    with Checkpoints(tmp_path) as states:
        got = optimize(path, module, batches(), checkpoints=states, **options)
    torch.testing.assert_close(got.interior, uncut.interior, rtol=0, atol=0)
    assert (got.basis, got.free, len(got)) == (uncut.basis, uncut.free, len(uncut))


def test_states_of_another_curve_are_refused(module, tmp_path):
    options = dict(steps=2, **settings(engine="stacked", nodes=2))

    def interrupt(metrics, now):
        if metrics["step"] == 1:
            raise RuntimeError

    with pytest.raises(RuntimeError), Checkpoints(tmp_path) as states:
        optimize(
            start("bezier"), module, batches(), checkpoints=states, on_step=interrupt, **options
        )
    for other in (start("polychain"), start("bezier", inner=2), start("bezier", n=9)):
        with pytest.raises(ValueError, match="between other ends, or of another number"):
            with Checkpoints(tmp_path) as states:
                optimize(other, module, batches(), checkpoints=states, **options)


def test_the_degree_rises_on_the_way(module):
    """Against one call for each degree; without momentum, so that there is no velocity."""
    path, sizes = start("bezier", inner=3), []
    how = settings(engine="stacked", lr=0.05)
    got = optimize(
        *(path, module, batches()),
        steps=6,
        on_step=lambda metrics, now: sizes.append(now.basis.size),
        **settings(engine="stacked", lr=0.05, coarse_to_fine=True),
    )
    assert sizes == [3, 3, 3, 4, 4, 5] and got.basis.size == 5
    first = optimize(path.refined(3), module, batches(), **how)
    second = optimize(first.refined(4), module, batches()[:2], **how)
    expected = optimize(second.refined(5), module, batches()[2:], **how)
    torch.testing.assert_close(got.interior, expected.interior, rtol=0, atol=0)


class OnlyWhereTheyCount(Tensor):
    """Labels of which may be asked where they are -100, and nothing else."""

    ALLOWED = ("is_floating_point", "is_complex", "long", "ne", "__ne__", "__get__")

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function.__name__ not in cls.ALLOWED:
            raise AssertionError(f"labels were read by {function.__name__}")
        found = super().__torch_function__(function, types, args, kwargs or {})
        return found.as_subclass(Tensor) if function.__name__ in ("ne", "__ne__") else found


class Untouchable:
    def __getattr__(self, name):
        raise AssertionError(f"labels were read: {name}")


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("method", ["geodesic", "bezier"])
def test_divergences_need_no_labels(module, method, graph):
    path, how, x = start(method), settings(nodes=None, engine="stacked"), images()
    y = labels()
    given = [y.as_subclass(OnlyWhereTheyCount), Untouchable(), y.flip(0), None]
    with pytest.raises(AssertionError, match="labels were read by"):
        F.cross_entropy(torch.zeros(12, 5), given[0])
    results = [
        optimize(path, module, [(x, target)], steps=2, cuda_graph=graph, **how) for target in given
    ]
    for other in results[1:]:
        torch.testing.assert_close(results[0].interior, other.interior, rtol=0, atol=0)


def test_labels_are_needed_where_the_objective_is_the_loss(module):
    how, x = settings(objective="cross_entropy", engine="stacked"), images()
    for batch in (x, (x, None), (x, "cat")):
        with pytest.raises(ValueError, match=r"the cross-entropy needs batches \(inputs, labels\)"):
            optimize(start("bezier"), module, [batch], steps=1, **how)
    with pytest.raises(ValueError, match="within 0..4, or -100 where a row does not count, got 7"):
        optimize(start("bezier"), module, [(x, torch.full((12,), 7))], steps=1, **how)
    with pytest.raises(ValueError, match=r"labels must be integers \[12\]"):
        optimize(start("bezier"), module, [(x, torch.zeros(12))], steps=1, **how)


@pytest.mark.parametrize("graph", [False, True])
def test_rows_that_do_not_count_have_no_loss(module, graph):
    how = dict(steps=2, cuda_graph=graph)
    how |= settings(objective="cross_entropy", engine="stacked", nodes=2)
    x, y = images(), labels()
    few = optimize(start("bezier"), module, [(x[:7], y[:7])], **how)
    y = torch.cat([y[:7], torch.full((5,), -100)])
    masked = optimize(start("bezier"), module, [(x, y)], **how)
    torch.testing.assert_close(masked.interior, few.interior, rtol=1e-9, atol=1e-12)
    nothing = optimize(start("bezier"), module, [(x, torch.full((12,), -100))], **how)
    torch.testing.assert_close(nothing.interior, start("bezier").interior, rtol=0, atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_lowers_what_it_is_for(module, method):
    """The loss is lowered on labels that the middle of the line has none of."""
    path, x, y = start(method), images(), labels()
    how = Descent(lr=0.05, coarse_to_fine=False, **METHODS[method])
    got = optimize(path, module, [(x, y)], steps=40, descent=how, forward=Forward(engine="stacked"))
    before, after = (evaluate(p, module, {"x": (x, y)}) for p in (path, got))
    if how.objective == "jsd":
        assert after.energy < 0.9 * before.energy
    else:
        means = [sum(found.splits["x"].loss) for found in (before, after)]
        assert means[1] < 0.9 * means[0]
    assert got.history[-1]["points"] == 7 and len(got.plot().axes) == 2


def test_a_curve_and_its_loss_that_are_not_finite_are_named(module):
    how = settings(lr=1e300, engine="stacked", nodes=2, objective="cross_entropy")
    with pytest.raises(ValueError, match="step 1: the cross-entropy of point 1 is nan, since at"):
        optimize(start("bezier"), module, batches(), steps=3, **how)
    with pytest.raises(ValueError, match="step 1: .* edge 0 is nan, since .*; lower lr"):
        optimize(start("bezier"), module, batches(), steps=3, **settings(lr=1e300, nodes=2))


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(objective="loss"), "objective must be 'jsd' or 'cross_entropy', got 'loss'"),
        (dict(nodes=0), "nodes must be at least 1, got 0"),
    ],
)
def test_bad_settings_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        Descent(**options)
