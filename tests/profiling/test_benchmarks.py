"""Benchmarks in small: engines agree, counts are right, tables say what was measured."""

import json

import pytest
import torch
from torch import nn

from benchmarks import __main__ as everything
from benchmarks import (
    cases,
    convergence,
    ends,
    harness,
    points,
    precision,
    roofline,
    step,
    step_gpu,
)
from fastgeo import models
from fastgeo.app.config import PRESETS

TINY = step_gpu.Setting(depth=8, width=0.5, pixels=8, points=4, batch=8)


def test_the_papers_step_is_23_5_tflop():
    setting = step_gpu.Setting()
    assert setting.flop(models.resnet(20, 4)) == pytest.approx(23.5e12, rel=0.01)


def test_flop_are_those_of_the_layers():
    module = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Flatten(), nn.Linear(256, 10))
    macs = 64 * 4 * 27 + 256 * 10
    assert TINY.flop(module) == 2 * macs * 8 * (3 * 2 + 2)


def test_every_engine_takes_the_same_step():
    names = step_gpu.chosen(gpu=True, compiled=False)
    rows = {row["implementation"]: row for row in run_tiny(names)}
    assert list(rows) == names and len(names) == 11
    for name, row in rows.items():
        assert "/" in row["ms a step (p20/p50/p80)"], (name, row)
    on_cpu = step_gpu.chosen(gpu=False, compiled=True)
    assert len(on_cpu) == 7 and step_gpu.COMPILED in on_cpu and step_gpu.BOTH not in on_cpu


def test_an_engine_that_takes_another_step_is_called_wrong(monkeypatch):
    class Lazy(step_gpu.Loops):
        energy = torch.ones(())

        def _run(self):
            pass

    def make(*given):
        return Lazy(step_gpu.vmapped, *given)

    monkeypatch.setattr(step_gpu, "engines", lambda: {"lazy": step_gpu.Engine(make, "bf16")})
    (row,) = run_tiny(["lazy"])
    assert row["ms a step (p20/p50/p80)"] == "wrong" and row["times as released"] == "-"


def test_engines_are_given_as_soon_as_each_is_measured_in_turns():
    names = [step_gpu.RELEASED, "fastgeo, bf16"]
    found = step_gpu.measure(step_gpu.Start.of(TINY, "cpu"), names, repeats=3)
    seen = [(one.name, len(one.seconds)) for one in found]
    assert seen == [(names[0], 3), (names[1], 3), (names[1], 6), (names[0], 6)]


def run_tiny(names):
    measured = step_gpu.measure(step_gpu.Start.of(TINY, "cpu"), names, repeats=1, rounds=1)
    return step_gpu.rows(measured, flop=1e9, rate=1e12)


def test_the_roofline_has_every_layer_of_the_paper_and_counts_their_products():
    setting = step_gpu.Setting()
    kernels = list(roofline.kernels(setting, "cpu"))
    convolutions = [kernel for kernel in kernels if kernel.name.startswith("conv")]
    assert sum(kernel.count for kernel in convolutions) == 3 * 20  # 18 3x3 and 2 1x1
    interior = setting.flop(models.resnet(20, 4)) * 3 * 23 / (3 * 23 + 2)
    first = 3 * 2 * 23 * 256 * 32 * 32 * 3 * 64 * 9
    counted = sum(kernel.count * kernel.flop for kernel in kernels)
    assert counted == pytest.approx(interior - first, rel=1e-3)  # less the head
    norms = [kernel for kernel in kernels if kernel.name.startswith("GroupNorm")]
    assert sum(kernel.count for kernel in norms) == 2 * 19


def test_the_roofline_runs():
    rows = roofline.measure(TINY, "cpu", 1e12, 1)
    assert rows[-1]["kernel"] == "all, as often as in a step"
    assert all(float(row["measured, ms"]) > 0 for row in rows)


def test_every_way_to_optimise_starts_at_one_line_and_the_best_is_named(monkeypatch):
    small = dict(width=0.25, train_subset=200, epochs=2, points=9, batch_size=50)
    monkeypatch.setitem(PRESETS, "tiny", PRESETS["digits"].changed(**small))
    monkeypatch.setattr(convergence, "RATES", (0.1, 1e38))
    monkeypatch.setattr(convergence, "MOMENTUM_RATES", (0.1,))
    monkeypatch.setattr(points, "POINTS", (5, 9))
    bench = convergence.Bench(ends.Options(preset="tiny", steps=3))
    rows = convergence.methods(bench)
    assert [row["step"] for row in rows if row["energy, nats"] == "diverged"] == [
        row["step"] for row in rows if row["rate"] == 1e38
    ]
    sound = [row for row in rows if row["rate"] == 0.1]
    assert [row["step"] for row in sound] == list(convergence.METHODS)
    first = [row["course"][0] for row in sound]
    assert len({line["energy"] for line in first[:5]}) == 1
    assert [line["points"] for line in first] == [9] * 5 + [5] * 2
    assert all(row["energy, nats"] < bench.before(9)["energy, nats"] for row in sound)
    assert "coarse to fine at its best rate, 0.1, ends at" in convergence.reached(rows)
    thinned = json.loads(json.dumps(convergence.thinned(rows)))
    assert [len(row["course"]) for row in thinned] == [3 * (row["rate"] == 0.1) for row in rows]
    drawn = convergence.figure(thinned).axes[0].get_lines()
    assert [line.get_ydata()[0] for line in drawn] == pytest.approx(
        [sum(line["sqrt_jsd"] for line in row["course"]) / 3 for row in sound], rel=1e-4
    )
    by_points = points.by_points(bench)  # the last as the preset does, which is the last way
    assert [(row["N"], row["path"]) for row in by_points] == [
        *((5, "matched line"), (5, "geodesic"), (9, "matched line"), (9, "geodesic")),
    ]
    assert by_points[-1]["energy, nats"] == pytest.approx(sound[-1]["energy, nats"])


def test_precisions_are_set_against_orders_of_the_images(monkeypatch):
    small = dict(width=0.25, train_subset=200, epochs=2, points=5, batch_size=50, steps=3)
    monkeypatch.setitem(PRESETS, "tiny", PRESETS["digits"].changed(**small))
    between = ends.Ends(precision.Options(preset="tiny"))
    orders = [precision.curve(between, "fp32", seed) for seed in range(2)]
    half = precision.curve(between, "bf16", 0)
    assert len(half["energy of a step"]) == 3 and len(half["train loss"]) == 5
    assert 0 < (half["energy"] - orders[0]["energy"]).abs() < 0.01 * orders[0]["energy"]
    rows = precision.compared(orders, {"same": orders[0], "other": orders[1], "bf16": half})
    assert {row["from fp32"] for row in rows[::3]} == {"0"}
    assert all(row["from fp32"] == row["another order from fp32"] for row in rows[1::3])
    assert all(float(row["from fp32"]) > 0 for row in rows[2::3])
    energies, losses = precision.figure(orders, {"bf16": half}).axes
    assert [len(line.get_ydata()) for line in energies.get_lines()] == [1] * 3  # a mean of 3 steps
    assert list(losses.get_lines()[-1].get_ydata()) == half["train loss"].tolist()


def test_a_row_is_printed_before_the_next_one_is_measured(capsys):
    shown = []

    def measured():
        for name in ("one", "two"):
            shown.append(capsys.readouterr().out)
            yield [{"what": name, "ms": {"p20": 1.0, "p50": 2.0, "p80": 3.0}}]

    rows = harness.printed(measured())
    shown.append(capsys.readouterr().out)
    assert [row["what"] for row in rows] == ["one", "two"]
    head = "| what | ms (p20/p50/p80) |\n| --- | --- |\n"
    assert shown == ["", f"{head}| one | 1/2/3 |\n", "| two | 1/2/3 |\n"]


def test_a_setting_of_the_step_is_named_by_its_first_words():
    assert step.chosen("digits") == step.chosen("digits preset") == ["digits preset"]
    assert step.chosen("paper") == ["paper preset"]
    assert step.chosen("ResNet8") == ["ResNet8 width 0.5", "ResNet8 width 1"]
    assert step.chosen("all") == step.ALL and step.chosen("grid") == list(step.GRID)
    for nothing in ("", "digit", "ResNet8 wide"):
        with pytest.raises(ValueError, match="one of digits preset"):
            step.chosen(nothing)


def test_the_loop_that_evaluation_is_timed_against_finds_the_same():
    loop, ours = cases.evaluation(torch.device("cpu"), 8, 0.25, points=3)
    expected, found = loop.run(), ours.run()
    assert len(expected) == len(found) == 7
    assert cases.error(found, expected) < 1e-4


def test_a_time_of_several_steps_is_given_for_one(monkeypatch):
    run = lambda: (torch.ones(1),)  # noqa: E731
    five = cases.Case("step", "one step", "loop", run, work=10.0, unit="images·points", count=5)
    seconds = lambda functions, repeats: {name: [0.5] * repeats for name in functions}  # noqa: E731
    monkeypatch.setattr(everything, "time_alternating", seconds)
    (row,) = everything.measure([five], 3)
    assert row["ms"]["p50"] == pytest.approx(100) and row["rate"] == "20 images·points/s"


def test_ends_of_two_precisions_are_compared_seed_by_seed():
    found = {"fp32": {"loss": [1.0, 2.0, 3.0]}, "bf16": {"loss": [1.5, 2.5, 4.1]}}
    first, second = precision.compared_ends(found)
    assert first["over the seeds"] == "2 ± 1" and first["less fp32's"] == "-"
    assert second["over the seeds"] == "2.7 ± 1.3"  # of 1.5, 2.5, 4.1
    assert second["less fp32's"] == "0.7 ± 0.2"  # 0.5, 0.5, 1.1: deviation 0.35 over √3


def test_networks_of_every_seed_are_evaluated(monkeypatch):
    short = PRESETS["digits"].changed(train_subset=128, epochs=1, width=0.25)
    monkeypatch.setitem(PRESETS, "digits", short)
    found = precision.trained("digits", "bf16", range(4))
    assert {len(values) for values in found.values()} == {4}
    assert len(set(found["train loss, nats"])) == 4
