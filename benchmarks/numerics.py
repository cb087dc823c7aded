"""Digits of the divergence and its gradient in fp32, against 60-digit arithmetic.

    python -m benchmarks.numerics     # two tables, and benchmarks/results/numerics-<device>.json

Neighbouring rows of 10 classes, the worst of 4,096 rows; of other betas than 1/2, and of KL at the
ends, the worst of 512 rows. About four minutes. Where there is no GPU
the two Triton kernels run in Triton's interpreter, which has no rounding of its own in exp and log.
"""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton

import warnings
from functools import partial

import mpmath
import torch.nn.functional as F
from fastgeo_kernels import js_div

from benchmarks.harness import device_slug, environment, write_result
from fastgeo.profiling.measure import headline, table, version_of

ROWS, CLASSES = 4096, 10
BETAS, BETA_ROWS = (0.0, 1e-3, 0.1, 0.9, 1.0), 512
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


def oracle(x: torch.Tensor, y: torch.Tensor, beta: float = 0.5) -> tuple[list, list]:
    """Per row: the divergence, and its gradient to x, as mpmath numbers."""
    with mpmath.workdps(60):
        rows = [_row(a, b, mpmath.mpf(beta)) for a, b in zip(x.tolist(), y.tolist(), strict=True)]
    values, grads = zip(*rows, strict=True)
    return list(values), list(grads)


def _row(a: list[float], b: list[float], beta: mpmath.mpf) -> tuple[mpmath.mpf, list]:
    p, q = ([mpmath.exp(v) for v in row] for row in (a, b))
    p, q = ([v / mpmath.fsum(row) for v in row] for row in (p, q))
    if beta == 1:  # KL(q || p)
        kl = mpmath.fsum(t * mpmath.log(t / s) for s, t in zip(p, q, strict=True))
        return kl, [s - t for s, t in zip(p, q, strict=True)]
    m = q if beta == 0 else [beta * s + (1 - beta) * t for s, t in zip(p, q, strict=True)]
    logs = [mpmath.log(s / v) for s, v in zip(p, m, strict=True)]
    kl = mpmath.fsum(s * v for s, v in zip(p, logs, strict=True))
    share = beta or 1
    grad = [share * s * (v - kl) for s, v in zip(p, logs, strict=True)]
    back = mpmath.fsum(t * mpmath.log(t / v) for t, v in zip(q, m, strict=True))
    return share * kl + (1 - share) * back, grad


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


def of_betas() -> list[dict]:
    """A row for each beta: the worst of all cases, in PyTorch and in Triton."""
    rows = []
    for beta in BETAS:
        worst: dict[str, list[tuple[float, float]]] = {}
        for x, y in pairs().values():
            x, y = x[:BETA_ROWS], y[:BETA_ROWS]
            if x.abs().max() == 100:  # KL is 200 there, and exact; gradients are below fp32's range
                continue
            expected = oracle(x, y, beta)
            for impl in ("torch", "triton") if version_of("triton") != "none" else ("torch",):
                function = of_function(partial(js_div, reduction="none", beta=beta, impl=impl))
                got = tuple(t.cpu() for t in function(x.to(DEVICE), y.to(DEVICE)))
                worst.setdefault(f"this, {impl}", []).append(errors(got, expected))
        row = {"beta": f"{beta:g}"}
        for impl, found in worst.items():
            values, grads = zip(*found, strict=True)
            row[impl] = f"{max(values):.0e} / {max(grads):.0e}"
        rows.append(row)
    return rows


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
    betas = of_betas()
    print("\nthe worst of all of these but the last, value / gradient, of other betas\n")
    print(table(betas))
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    write_result(
        f"numerics-{device_slug()}", {"interpreted": interpreted, "rows": rows, "betas": betas}
    )


if __name__ == "__main__":
    main()
