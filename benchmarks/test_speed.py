"""The quick set under pytest-benchmark: `pytest benchmarks`.

Each time is of a result that was first compared with that of the plain implementation.
"""

import pytest
import torch

from benchmarks.cases import cases, error

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CASES = list(cases(DEVICE))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_speed(case, benchmark):
    first = next(c for c in CASES if (c.group, c.setting) == (case.group, case.setting))
    assert error(case.run(), first.run()) <= case.tolerance
    benchmark.group = f"{case.group}: {case.setting}"
    benchmark.extra_info["unit"], benchmark.extra_info["work"] = case.unit, case.work

    def run():
        case.run()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(run, rounds=5, warmup_rounds=1)
