"""The comparison of curves in small: equal costs, rates from held-out pairs, the elastic band."""

import json
import math
from dataclasses import replace

import pytest
import torch

from benchmarks import curves, elastic
from fastgeo import Descent, Path
from fastgeo.app.config import PRESETS


@pytest.fixture
def tiny(monkeypatch):
    small = dict(width=0.25, train_subset=200, epochs=2, points=9, batch_size=50, steps=12)
    monkeypatch.setitem(PRESETS, "tiny", PRESETS["digits"].changed(**small))
    monkeypatch.setattr(curves, "SEEN", 9)
    return curves.Options(pairs=1, held_out=1, preset="tiny", budgets=(0.5, 1.0))


def test_every_method_is_measured_at_the_same_cost(tiny, monkeypatch):
    costs = []
    taken = curves.optimize

    def counted(path, module, batches, *, steps, descent, forward):
        sizes = descent.levels(path.basis, steps)
        networks = [max(size for first, size in sizes.items() if first <= i) for i in range(steps)]
        costs.append(sum(descent.nodes or size - 2 for size in networks))
        return taken(path, module, batches, steps=steps, descent=descent, forward=forward)

    monkeypatch.setattr(curves, "optimize", counted)
    methods = {name: replace(m, rates=m.rates[:1]) for name, m in curves.METHODS.items()}
    monkeypatch.setattr(curves, "METHODS", methods)
    pair = curves.Pair(tiny, 0)
    measured = list(curves.measured(tiny, [pair], []))
    rows, results = ([part[i] for part in measured] for i in (0, 1))
    assert [row["path"] for row in rows] == list(curves.METHODS) * 4
    per_budget = len(costs) // 2
    for budget, own in ((0.5, costs[:per_budget]), (1.0, costs[per_budget:])):
        assert own == pytest.approx([pair.networks(budget)] * per_budget, abs=6)
    assert pair.networks(1.0) == pytest.approx(8 * 3 + 4 * 7, abs=1)  # of 5 and of 9 points
    by_name = {row["path"]: row for row in rows if row["ends"] == "matched"}
    assert [name for name, row in by_name.items() if row["labels"] == "yes"] == [
        *("Bezier, cross-entropy", "polychain, cross-entropy", "elastic band")
    ]
    assert by_name["line"]["image·points"] == "0"
    assert by_name["Bezier, JSD"]["image·points"] == by_name["elastic band"]["image·points"]
    assert "less on" in by_name["Bezier, JSD"]["Fisher-Rao, rad: less the geodesic's"]
    found = results[-1][0]
    assert max(found["losses"]) == pytest.approx(found["highest train loss, nats"])
    assert min(found["losses"]) < found["mean along its length"] < max(found["losses"])
    kept = json.loads(json.dumps(results))
    along, lengths = curves.figure(rows, kept).axes
    assert len(along.get_lines()) == len(curves.METHODS)
    assert {len(line.get_xdata()) for line in lengths.get_lines()} == {2}


def test_the_rate_is_the_best_of_the_held_out_pairs():
    class Known:
        def result(self, method, kind, lr, budget):
            return {curves.FOUND[0]: {0.05: math.inf, 0.1: 0.2, 0.2: 0.3}[lr]}

    method = curves.METHODS["Bezier, JSD"]
    assert curves.chosen([Known(), Known()], method, "matched", 1.0) == 0.1


def test_a_path_that_diverges_is_said_to(tiny, monkeypatch):
    pair = curves.Pair(tiny, 0)
    method = curves.Method(Path.bezier, Descent(nodes=3, momentum=0.0))
    result = pair.result(method, "matched", 1e38, 0.5)
    assert result[curves.FOUND[0]] == math.inf
    assert curves.spread([result[curves.FOUND[0]], 1.0]) == "diverged"
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


def test_the_band_gets_pivots_where_the_loss_rises_and_is_lower_in_the_end(tiny):
    pair = curves.Pair(tiny, 0)
    method = curves.METHODS["elastic band"]
    line = pair.result(curves.METHODS["line"], "unmatched", 0.0, 1.0)
    path = pair.path(method, "unmatched", 0.1, 8.0)
    assert len(path) > elastic.FIRST + 2
    band = pair.result(method, "unmatched", 0.1, 8.0)
    assert band[curves.FOUND[0]] < line[curves.FOUND[0]]
    for name in path.start:
        assert torch.equal(path.start[name], pair.ends["unmatched"][0][name])
        assert torch.equal(path.end[name], pair.ends["unmatched"][1][name])
