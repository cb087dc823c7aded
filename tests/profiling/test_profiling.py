"""What is measured is what it says, and an implementation that is wrong has no time."""

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import images, plain, tiny_resnet
from zoo import GPT, words

from benchmarks import compare as compare_files
from fastgeo import Forward, Path, optimize
from fastgeo.app.cli import main
from fastgeo.profiling import baselines, breakdown, measure
from fastgeo.profiling import compare as profiling
from fastgeo.profiling.measure import (
    QUANTILES,
    OtherLoad,
    flops_of,
    peak_bytes,
    quantiles,
    table,
    time_alternating,
)

STACKED = Forward(engine="stacked", channels_last=False)


@pytest.mark.parametrize(
    "make",
    [
        baselines.loop,
        baselines.vmapped,
        lambda *args, **options: baselines.loop(*args, channels_last=True, **options),
    ],
)
def test_every_baseline_takes_the_steps_of_plain_sgd(path, module, make):
    x, baseline = images(), make(module, path, lr=0.2)
    expected = optimize(path, module, [x], steps=3, descent=plain(lr=0.2, precondition=False))
    energies = [baseline.step(x).item() for _ in range(3)]
    for got, other in zip(baseline.points(), expected.points(), strict=True):
        torch.testing.assert_close(got, other)
    assert energies[2] < energies[0]


def test_the_energy_of_pairs_is_the_divergence_by_definition():
    p, q = torch.randn(2, 6, 5, dtype=torch.float64).softmax(-1)
    m = (p + q) / 2
    by_definition = ((p * (p / m).log() + q * (q / m).log()) / 2).sum(-1).mean()
    torch.testing.assert_close(baselines.energy_of_pairs([p, q]), by_definition)


def test_baselines_keep_tied_weights_tied():
    ends = []
    for seed in range(2):
        torch.manual_seed(seed)
        ends.append(GPT().double().eval())
    path, tokens = Path.linear(*ends, 4), words(11, 6, 3)
    for make in (baselines.loop, baselines.vmapped):
        baseline = make(ends[0], path)
        baseline.step(tokens)
        expected = optimize(path, ends[0], [tokens], steps=1, descent=plain(precondition=False))
        for got, other in zip(baseline.points(), expected.points(), strict=True):
            torch.testing.assert_close(got["embed.weight"], other["embed.weight"])


@pytest.fixture(params=[True, False], ids=["bf16 units", "no bf16 units"])
def units(request, monkeypatch):
    monkeypatch.setattr(profiling, "multiplies_in_bf16", lambda _: request.param)
    return request.param


def test_a_row_for_each_implementation_and_none_is_wrong(units):
    module, *ends = (tiny_resnet(seed, norm="channel").float() for seed in range(3))
    path = Path.linear(*ends, 7)
    options = dict(repeats=2, steps=1, compiled=False, forward=replace(STACKED, chunk=2))
    rows = profiling.compare(module, path, images().float(), **options)
    names = [row["implementation"] for row in rows]
    assert names[:5] == [
        "loop over modules",
        "loop, channels-last",
        "torch.func.vmap",
        "fastgeo, stacked",
        "fastgeo, stacked, 2 at a time",
    ]
    if units:
        assert rows[-1]["implementation"].endswith(", bf16") and float(rows[-1]["error"]) > 1e-4
        rows = rows[:-1]
    assert len(rows) == 5
    for row in rows:
        assert row["ms a step"]["p20"] <= row["ms a step"]["p50"] <= row["ms a step"]["p80"]
        assert float(row["error"]) < 1e-2 and row["peak MiB"] >= 0
    assert rows[0]["times the loop"] == {"p20": 1, "p50": 1, "p80": 1}


def test_a_loop_that_channels_last_breaks_on_a_cpu_is_left_out(module, path):
    options = dict(repeats=1, steps=1, compiled=False, forward=STACKED)
    rows = profiling.compare(module, path, images(), **options)  # 4 channels, 1x1, stride 2
    assert "loop, channels-last" not in [row["implementation"] for row in rows]


def test_what_is_wrong_has_no_time(module, path, monkeypatch):
    def off(*args, **options):
        return baselines.loop(*args, **options | {"lr": 0.104})  # 4 % beyond

    monkeypatch.setattr(baselines, "vmapped", off)
    monkeypatch.setattr(profiling, "multiplies_in_bf16", lambda _: False)
    options = dict(repeats=1, steps=1, compiled=False, forward=STACKED)
    rows = profiling.compare(module, path, images(), **options)
    wrong = {row["implementation"]: row for row in rows if row["ms a step"] == "wrong"}
    assert list(wrong) == ["torch.func.vmap"]
    assert float(wrong["torch.func.vmap"]["error"]) == pytest.approx(0.04, abs=0.01)
    assert "wrong" in table(rows)


def test_flops_are_those_of_the_definition():
    x, w = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3)
    assert flops_of(lambda: F.conv2d(x, w, padding=1)) == 2 * 2 * 4 * 64 * 27
    assert flops_of(lambda: torch.randn(5, 6) @ torch.randn(6, 7)) == 2 * 5 * 6 * 7


def test_a_step_needs_the_interiors_backward_and_the_ends_forward_only(module, path):
    x = images(40)
    few = x[: profiling.CHECKED]
    forward = flops_of(lambda: module(few))
    both = flops_of(lambda: module(few).sum().backward())
    expected = (len(path) - 2) * both + 2 * forward
    assert profiling.step_flops(module, path, x) == pytest.approx(expected * 40 / len(few))


def test_peak_bytes_are_those_that_are_held_at_once():
    def two_then_one():
        both = torch.ones(2**20, dtype=torch.uint8), torch.ones(2**21, dtype=torch.uint8)
        del both
        return torch.ones(2**20, dtype=torch.uint8)

    two_then_one()
    assert peak_bytes(two_then_one) == pytest.approx(3 * 2**20, rel=0.01)


def test_functions_take_turns(monkeypatch):
    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in "ab"}
    seconds = time_alternating(functions, 3)
    assert "".join(calls[4:]) == "abbaab" and len(seconds["a"]) == 3
    assert quantiles([3.0, 1.0, 2.0])["p50"] == 2


def test_the_phases_of_a_step_make_up_its_time(module, path):
    found = breakdown.breakdown(
        module, path, [images()] * 6, descent=plain(), forward=STACKED, steps=3
    )
    assert sum(found.phases.values()) == pytest.approx(found.ms)
    for phase in ("forward", "divergence", "backward", "update"):
        assert found.phases[phase] > 0, phase
    assert found.phases["backward"] > found.phases["divergence"]
    assert any("conv" in name for name, _, _ in found.kernels)
    assert found.limit in str(found) and " the step: " in found.limit


CONV, ADD = ("aten::conv", 6.0, 9), ("aten::add", 2.0, 9)


@pytest.mark.parametrize(
    "operations, floor, given, words",
    [
        ([CONV, ADD], 3.1, {}, "Arithmetic limits .* 75% of its time and reach 52%"),
        ([CONV, ADD], 0.2, {}, "Memory traffic limits .* 75% .* reach 3% .* copies are 25%"),
        ([("aten::conv", 2.0, 9), ("aten::add", 7.0, 9)], 1.9, {}, "Memory traffic .* 22% .* 78%"),
        ([("aten::add", 9.0, 9)], 0.0, {}, "Memory traffic .* products are 0% of its time, and"),
        (
            [("aten::conv", 6.0, 900), ADD],
            0.2,
            {},
            "Overhead limits .* 9 µs is what its 909 operations",
        ),
        ([("aten::conv", 6.0, 900), ADD], 5.0, {}, "Arithmetic limits .* reach 83%"),
        ([("aten::add", 3.0, 300)], 0.0, {}, "The host limits.*no operation runs 70%.*300 operat"),
        ([("gemm", 3.0, 3)], 3.0, dict(on_gpu=True), "The host limits.*the device waits 70%"),
        ([], 0.0, dict(on_gpu=True), "The host limits.*the device waits 100%"),
        (
            [CONV, ADD],
            3.1,
            dict(others=1.0),
            "Other processes limit .* 1.0 of 2 cores .* 2 threads",
        ),
        ([CONV, ADD], 3.1, dict(others=1.0, threads=1), "Arithmetic"),  # there is room for both
        ([CONV, ADD], 3.1, dict(others=0.2), "Arithmetic"),
        ([CONV, ADD], 3.1, dict(others=1.0, on_gpu=True), "Arithmetic"),  # the device is busy
        ([("gemm", 3.0, 3)], 3.0, dict(others=1.0, on_gpu=True), "Other processes limit"),
    ],
)
def test_one_sentence_says_what_limits_a_step(operations, floor, given, words):
    """Of 10 ms each."""
    given = dict(on_gpu=False, cores=2, threads=2) | given
    assert re.search(words, breakdown.limit(operations, 10.0, floor, **given))


def test_what_other_processes_keep_busy_is_counted_on_the_cores_of_this_one(tmp_path, monkeypatch):
    """Ticks of 10 ms: 3.5 s of work, 1 s of it this process's own, within 2 s."""
    stat, now = tmp_path / "stat", SimpleNamespace(perf_counter=0.0, process_time=5.0)
    clock = SimpleNamespace(**{name: lambda n=name: getattr(now, n) for name in vars(now)})
    monkeypatch.setattr(measure, "STAT", stat)
    monkeypatch.setattr(measure, "time", clock)
    monkeypatch.setattr(measure, "usable_cores", lambda: [1, 3])
    monkeypatch.setattr(measure.os, "sysconf", lambda name: 100)
    #      user nice system idle iowait irq softirq steal guest guest_nice
    before = ["cpu 9 9 9 9 9 9 9 9 9 9", "cpu0 5 5 5 5 5 5 5 5 5 5"]
    stat.write_text(
        "\n".join([*before, "cpu1 10 0 0 7 0 0 0 0 0 0", "cpu3 0 0 0 0 0 0 0 0 0 0", ""])
    )
    load = OtherLoad()
    now.perf_counter, now.process_time = 2.0, 6.0
    after = ["cpu1 110 20 30 900 80 5 5 40 60 0", "cpu3 190 0 0 0 0 0 0 0 0 0", "intr 1 2 3"]
    stat.write_text("\n".join(["cpu 0 0 0 0 0 0 0 0 0 0", "cpu0 999 0 0 0 0 0 0 0 0 0", *after]))
    assert load.cores() == pytest.approx((3.5 - 1) / 2)
    stat.unlink()
    load, now.perf_counter = OtherLoad(), 3.0
    assert load.cores() == 0  # a system that does not tell


def test_the_command_line_profiles_and_its_rows_can_be_compared(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = "--points 4 --batch-size 8 --width 0.25 --repeats 1 --no-compiled"
    for name in ("one", "two"):
        main(["profile", *options.split(), "--json", f"{name}.json", "--trace", f"{name}.trace"])
    out = capsys.readouterr().out
    assert "loop over modules" in out and "aten::" in out and " the step: " in out
    assert json.load(open("one.trace"))["traceEvents"]
    assert sorted(f.name for f in tmp_path.iterdir()) == [
        *("one.json", "one.trace", "two.json", "two.trace")
    ]
    rows = compare_files.compare(*(json.load(open(f"{n}.json")) for n in ("one", "two")))
    assert [row["what"] for row in rows][0] == "resnet8, digits, N = 4, B = 8: loop over modules"


def test_a_difference_of_two_files_is_one_beyond_their_spread():
    def result(**ms):
        times = {name: dict(zip(QUANTILES, three, strict=True)) for name, three in ms.items()}
        return {"rows": [{"setting": name, "ms": times[name]} for name in ms]}

    before = result(a=(1, 2, 3), b=(10, 11, 12), c=(1, 1, 1), d=(1, 1, 1))
    after = result(a=(2, 3, 4), b=(4, 5, 6), c=(2, 2, 2), e=(1, 1, 1))
    rows = {row["what"]: row for row in compare_files.compare(before, after)}
    assert {name: row[""] for name, row in rows.items()} == {
        "a": "no difference",
        "b": "faster",
        "c": "slower",
    }
    assert rows["b"]["before/after (range)"] == "2.20 (1.67 to 3.00)"
    with pytest.raises(ValueError, match="no row in common"):
        compare_files.compare(before, result(z=(1, 1, 1)))


def test_the_profile_of_a_network_with_batch_norm_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["profile", "--batchnorm", "recalibrate"])
    assert stop.value.code == 2 and "without BatchNorm" in capsys.readouterr().err
