"""The comparison of curves in small: equal costs, rates from held-out pairs, the elastic band."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from benchmarks import curves, elastic
from benchmarks.curves import FOUND, METHODS, SECONDS, Case, Method, Options, Pair, Results
from fastgeo import Descent, Path
from fastgeo.app.config import PRESETS

BEZIER = "Bezier, JSD"


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    small = dict(width=0.25, train_subset=200, epochs=2, points=9, batch_size=50, steps=12)
    monkeypatch.setitem(PRESETS, "tiny", PRESETS["digits"].changed(**small))
    monkeypatch.setattr(Results, "search", lambda self, name: ([], METHODS[name].rate))
    out = tmp_path / "tiny.jsonl"
    return Options(pairs=2, held_out=1, preset="tiny", budgets=(0.5, 1.0), out=out)


def costs_of(steps, descent, path):
    sizes = descent.levels(path.basis, steps)
    every = [max(size for first, size in sizes.items() if first <= i) for i in range(steps)]
    return sum(descent.nodes or size - 2 for size in every)


def test_every_method_is_measured_at_the_same_cost(tiny, monkeypatch):
    costs = []
    taken = curves.optimize

    def counted(path, module, batches, *, steps, descent, forward):
        costs.append(costs_of(steps, descent, path))
        return taken(path, module, batches, steps=steps, descent=descent, forward=forward)

    monkeypatch.setattr(curves, "optimize", counted)
    results = Results(replace(tiny, pairs=1, ends=("matched",)))
    results.measure()
    per_budget = len(costs) // 2
    for budget, own in ((0.5, costs[:per_budget]), (1.0, costs[per_budget:])):
        assert own == pytest.approx([curves.networks(tiny.config, budget)] * per_budget, abs=6)
    assert curves.networks(tiny.config, 1.0) == pytest.approx(8 * 3 + 4 * 7, abs=1)  # of 5, of 9
    rows = results.rows()
    moving = [name for name in METHODS if name != "line"]
    assert [row["path"] for row in rows] == [*METHODS, *moving]
    by_name = {row["path"]: row for row in rows}
    assert [name for name, row in by_name.items() if row["labels"] == "yes"] == [
        *("Bezier, cross-entropy", "polychain, cross-entropy", "elastic band")
    ]
    assert by_name["line"]["image·points"] == "0"
    assert by_name[BEZIER]["image·points"] == by_name["elastic band"]["image·points"]
    assert "less on" in by_name[BEZIER]["Fisher-Rao, rad: less the geodesic's"]
    found = rows[-1]["of each"][0]
    assert max(found["losses"]) == pytest.approx(found[FOUND[0]], rel=1e-3)
    assert min(found["losses"]) < found["mean along its length"] < max(found["losses"])
    along, lengths = curves.figure(json.loads(json.dumps(rows))).axes
    assert len(along.get_lines()) == len(METHODS)
    assert {len(line.get_xdata()) for line in lengths.get_lines()} == {2}


def test_a_benchmark_that_was_stopped_goes_on_where_it_was(tiny, monkeypatch):
    some = replace(tiny, budgets=(0.5,), ends=("matched",), methods=("line", BEZIER))
    whole = Results(some)
    whole.measure()
    *early, last = tiny.out.read_text().splitlines()
    tiny.out.write_text("\n".join(early) + "\n")
    monkeypatch.delattr(curves, "trained")  # the networks are kept, too
    again = Results(some)
    (row,) = [row for row in again.rows() if row["path"] == BEZIER]
    assert row["pairs"] == 1
    again.measure()
    new, old = json.loads(tiny.out.read_text().splitlines()[-1]), json.loads(last)
    assert new.pop(SECONDS) > 0 < old.pop(SECONDS)
    assert new == old
    assert again.known.keys() == whole.known.keys()
    with pytest.raises(ValueError, match="holds results of"):
        Results(replace(some, model="mlp"))


@pytest.mark.parametrize(
    ("highest", "tried", "best"),
    [
        (lambda rate: abs(rate - 0.11), (0.05, 0.1, 0.2), 0.1),
        (lambda rate: 1 / rate if rate < 1 else math.inf, (0.05, 0.1, 0.2, 0.4, 0.8, 1.6), 0.8),
        (lambda rate: rate if rate > 0.02 else 1.0, (0.05, 0.1, 0.025, 0.0125), 0.025),
    ],
)
def test_a_rate_is_the_best_between_two_others_on_held_out_pairs(tmp_path, highest, tried, best):
    results = Results(Options(held_out=2, budgets=(0.5, 1.0), out=tmp_path / "x.jsonl"))
    found = []
    while unknown := results.search(BEZIER)[0]:
        assert results.best(0, "unmatched", BEZIER, 1.0) is None
        for case in unknown:
            assert case == Case(case.pair, "matched", BEZIER, case.rate, 0.5)
            found.append((case.rate, case.pair))
            results.known[case] = {FOUND[0]: highest(case.rate)}
    assert found == [(pytest.approx(rate), pair) for rate in tried for pair in (8, 9)]
    case = results.best(0, "unmatched", BEZIER, 1.0)
    assert case == Case(0, "unmatched", BEZIER, pytest.approx(best), 1.0)
    assert results.best(1, "matched", "line", 1.0) == Case(1, "matched", "line", 0.0, 0.0)


def test_differences_are_those_of_the_same_pairs():
    own, reference = {0: {"x": 1.0}, 2: {"x": 5.0}}, {0: {"x": 3.0}, 1: {"x": 0.0}, 2: {"x": 6.0}}
    assert curves.less(own, reference, "x") == "-1.5 ± 0.7, less on 2 of 2"
    assert curves.less(reference, reference, "x") == "-"


def test_a_path_that_diverges_is_said_to(tiny, monkeypatch):
    wild = Method(Path.bezier, Descent(nodes=3, momentum=0.0))
    monkeypatch.setitem(METHODS, "wild", wild)
    result = Pair(tiny, 0).result(Case(0, "matched", "wild", 1e38, 0.5))
    assert result[FOUND[0]] == math.inf
    assert curves.spread([result[FOUND[0]], 1.0]) == "diverged"
    assert curves.spread([1.0, 2.0]) == "1.5 ± 0.71"


def test_forces_on_a_band_are_those_by_hand():
    """Three pivots in a plane: gradients are taken across the band, springs pull along it."""
    whole = torch.tensor([[0.0, 0], [1, 0], [3, 0], [4, 0], [5, 0]])
    gradient = torch.tensor([[7.0, 1], [7, 2], [7, 3]])
    got = elastic.force(whole, gradient, torch.zeros(2), torch.tensor([1.0, 2, 1]))
    spring = elastic.SPRING
    expected = torch.tensor([[spring * (2 - 1), -1], [spring * (1 - 2), -2], [0.0, -3]])
    torch.testing.assert_close(got, expected)
    bent = torch.tensor([[0.0, 0], [1, 0], [1, 1]])  # the tangent is to the higher neighbour
    got = elastic.force(bent, torch.tensor([[1.0, 1.0]]), torch.tensor([0.0, 5.0]), torch.ones(1))
    torch.testing.assert_close(got, torch.tensor([[-1.0, 0.0]]))


def test_forces_on_a_band_are_those_of_the_definition_pivot_by_pivot():
    draw = torch.Generator().manual_seed(0)
    whole, gradient = (torch.randn(n, 5, generator=draw).double() for n in (8, 6))
    every = torch.rand(8, generator=draw).double()
    got = elastic.force(whole, gradient, every[[0, -1]], every[1:-1])
    for i in range(1, 7):
        before, after = whole[i] - whole[i - 1], whole[i + 1] - whole[i]
        to_higher = after if every[i + 1] > every[i - 1] else before
        tangent = to_higher / math.sqrt(sum(x * x for x in to_higher.tolist()))
        pull = elastic.SPRING * (after.norm() - before.norm())
        across = gradient[i - 1] - (gradient[i - 1] @ tangent) * tangent
        torch.testing.assert_close(got[i - 1], pull * tangent - across)


def test_springs_alone_space_a_straight_band_evenly():
    whole = torch.tensor([0.0, 0.1, 0.15, 0.7, 1.0]).double()[:, None] * torch.ones(3).double()
    for _ in range(500):
        flat = torch.zeros(3).double()
        whole[1:-1] += 0.1 * elastic.force(whole, torch.zeros(3, 3).double(), flat[:2], flat)
    torch.testing.assert_close(whole[:, 0], torch.linspace(0, 1, 5).double())


@pytest.mark.parametrize(
    ("rises", "expected"),
    [
        ({}, []),  # a slope is no rise above the line
        ({3: 1.0}, [0.15]),  # between the first two networks, where it is highest
        ({1: 0.4, 3: 1.0, 8: 0.3, 17: 0.19}, [0.15, 0.4]),  # less than a fifth of the range: none
    ],
)
def test_pivots_are_inserted_where_the_loss_rises_most(monkeypatch, rises, expected):
    """Four gaps with four networks in each, so a network every twentieth of the way."""
    a, b = {"w": torch.zeros(1)}, {"w": torch.ones(1)}

    def evaluated(path, module, splits, *, forward):
        assert [float(point["w"]) for point in path.points()] == pytest.approx(
            [i / 20 for i in range(21)]
        )
        losses = [rises.get(i, 0.0) if rises else i / 20 for i in range(21)]
        return SimpleNamespace(splits={"batch": SimpleNamespace(loss=losses)})

    monkeypatch.setattr(elastic, "evaluate", evaluated)
    batch = torch.zeros(1, 1), torch.zeros(1)
    path = elastic._inserted(Path.linear(a, b, 5), nn.Identity(), batch)
    found = [float(point["w"]) for point in path.points()]
    assert found == pytest.approx(sorted([0, 0.25, 0.5, 0.75, 1, *expected]))


def test_a_band_costs_what_it_may(tiny, monkeypatch):
    passes = []
    gradient, evaluate = elastic.losses_and_gradient, elastic.evaluate

    def counted(path, *rest):
        passes.append(len(path) - 2)
        return gradient(path, *rest)

    def looked(path, *rest, **settings):
        passes.append((len(path) - 2) / 3)
        return evaluate(path, *rest, **settings)

    monkeypatch.setattr(elastic, "losses_and_gradient", counted)
    monkeypatch.setattr(elastic, "evaluate", looked)
    path = Pair(tiny, 0).path(Case(0, "unmatched", "elastic band", 0.05, 5.0))
    allowed = curves.networks(tiny.config, 5.0)
    assert allowed - len(path) <= sum(passes) <= allowed


def test_the_band_gets_pivots_where_the_loss_rises_and_is_lower_in_the_end(tiny):
    pair = Pair(tiny, 0)
    line = pair.result(Case(0, "unmatched", "line", 0.0, 0.0))
    case = Case(0, "unmatched", "elastic band", 0.1, 8.0)
    path = pair.path(case)
    assert len(path) > elastic.FIRST + 2
    assert pair.result(case)[FOUND[0]] < line[FOUND[0]]
    for name in path.start:
        assert torch.equal(path.start[name], pair.ends["unmatched"][0][name])
        assert torch.equal(path.end[name], pair.ends["unmatched"][1][name])
