"""Digits of the divergence and its gradient in fp32, against 60-digit arithmetic.

    python -m benchmarks.numerics     # the table, and benchmarks/results/numerics-<device>.json

Neighbouring rows of 10 classes, the worst of 4,096 rows; about three minutes. Where there is no GPU
the two Triton kernels run in Triton's interpreter, which has no rounding of its own in exp and log.
"""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton

import warnings

import mpmath
import torch.nn.functional as F
from fastgeo_kernels import js_div

from benchmarks.harness import device_slug, environment, write_result
from fastgeo.profiling.measure import headline, table, version_of

ROWS, CLASSES = 4096, 10
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def pairs() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Name -> two [ROWS, CLASSES] tensors of fp32 logits."""
    generator = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(ROWS, CLASSES, generator=generator)
    step = torch.randn(ROWS, CLASSES, generator=generator)
    cases = {
        f"logit distance {d:g}": (x, x + d * step) for d in (30, 10, 3, 1, 0.1, 0.01, 1e-3, 1e-4)
    }
    for margin in (10, 20):
        winner = margin * F.one_hot(torch.arange(ROWS) % CLASSES, CLASSES).float()
        small = 0.1 * x
        name = f"saturated, margin {margin}"
        cases[f"{name}, one winner"] = (winner + small, winner + small + step)
        cases[f"{name}, two winners"] = (winner + small, winner.roll(1, 1) + small + step)
    hot = 200 * F.one_hot(torch.arange(ROWS) % CLASSES, CLASSES).float() - 100
    cases["+-100, other class"] = (hot, hot.roll(1, 1))
    return cases


def oracle(x: torch.Tensor, y: torch.Tensor) -> tuple[list, list]:
    """Per row: the divergence, and its gradient to x, as mpmath numbers."""
    values, grads = [], []
    with mpmath.workdps(60):
        for a, b in zip(x.tolist(), y.tolist(), strict=True):
            p, q = ([mpmath.exp(v) for v in row] for row in (a, b))
            p, q = ([v / mpmath.fsum(row) for v in row] for row in (p, q))
            log_p = [mpmath.log(2 * s / (s + t)) for s, t in zip(p, q, strict=True)]
            log_q = [mpmath.log(2 * t / (s + t)) for s, t in zip(p, q, strict=True)]
            kl_p = mpmath.fsum(s * v for s, v in zip(p, log_p, strict=True))
            kl_q = mpmath.fsum(t * v for t, v in zip(q, log_q, strict=True))
            values.append((kl_p + kl_q) / 2)
            grads.append([s * (v - kl_p) / 2 for s, v in zip(p, log_p, strict=True)])
    return values, grads


def of_function(function):
    """Turns (x, y) -> per-row divergence into (x, y) -> per-row divergence and gradient to x."""

    def both(x, y):
        x = x.clone().requires_grad_()
        rows = function(x, y)
        (grad,) = torch.autograd.grad(rows.sum(), x)
        return rows.detach(), grad

    return both


def softmax_log_kl_div(x, y):
    """The paper's formula."""
    p, q = x.softmax(-1), y.softmax(-1)
    log_m = ((p + q) / 2).log()
    kl_p, kl_q = (F.kl_div(log_m, rows, reduction="none").sum(-1) for rows in (p, q))
    return (kl_p + kl_q) / 2


def liger(x, y):
    """Liger-Kernel's JSD takes log-probabilities and gives the mean of the rows: one at a time."""
    from liger_kernel.ops.jsd import LigerJSDFunction

    rows = [
        LigerJSDFunction.apply(a[None].log_softmax(-1), b[None].log_softmax(-1), None, 0.5, -100)
        for a, b in zip(x, y, strict=True)
    ]
    return torch.stack(rows)


def implementations() -> dict:
    def this(impl):
        return of_function(lambda x, y: js_div(x, y, reduction="none", impl=impl))

    found = {"this, torch": this("torch")}
    if version_of("triton") != "none":
        found["this, Triton"] = this("triton")
    found["softmax-log-kl_div"] = of_function(softmax_log_kl_div)
    if version_of("liger-kernel") != "none":
        found["Liger-Kernel"] = of_function(liger)
    return found


def errors(got, expected) -> tuple[float, float]:
    """Worst row: relative error of the value; gradient error over the row's largest entry, which
    counts as 1e-38 where fp32 has no number so small."""
    (values, grads), (true_values, true_grads) = got, expected
    if not (values.isfinite().all() and grads.isfinite().all()):
        nan = float("nan")
        return (nan if not values.isfinite().all() else 0.0), nan
    value_error = max(
        abs(mpmath.mpf(v) - t) / t for v, t in zip(values.tolist(), true_values, strict=True)
    )
    grad_error = max(
        max(abs(mpmath.mpf(v) - t) for v, t in zip(row, true, strict=True))
        / max(1e-38, *map(abs, true))
        for row, true in zip(grads.tolist(), true_grads, strict=True)
    )
    return float(value_error), float(grad_error)


def main() -> None:
    warnings.simplefilter("ignore", RuntimeWarning)
    rows = []
    for name, (x, y) in pairs().items():
        expected = oracle(x, y)
        row = {"neighbours": name, "JSD": f"{float(sum(expected[0]) / ROWS):.1e}"}
        for impl, function in implementations().items():
            got = (t.cpu() for t in function(x.to(DEVICE), y.to(DEVICE)))
            row[impl] = "{:.0e} / {:.0e}".format(*errors(tuple(got), expected))
        rows.append(row)
    print(headline(environment()), end="\n\n")
    print("fp32, worst row: relative error of the value / gradient error over its largest entry\n")
    print(table(rows))
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    write_result(f"numerics-{device_slug()}", {"interpreted": interpreted, "rows": rows})


if __name__ == "__main__":
    main()
