"""Value and gradient of the divergence, of a path and of a pair: time, bandwidth, memory and error.

    python -m benchmarks.path_jsd     # three tables, and benchmarks/results/path_jsd-<device>.json

All times are of a forward and a backward pass through the public function. A pair is what a
distillation loss calls: teacher and student, with a gradient to the student alone. Without a GPU
memory is what a fresh process gets resident besides the logits, in tensors of the size of the
student's; a model's vocabulary takes as many of its own.

On a GPU the times are the device's own (a pause lets the host run ahead), on a CPU the processor's,
which other work disturbs less than the clock on the wall, whose time stands next to it. GB/s
counts one read and one write of the logits, whatever an implementation really moves; its share is
of a copy of as many bytes in the same run. An implementation off by more than 1e-3 in the value
or the gradient is reported as wrong, without a time
(1e-2 where the gradient leaves in bf16).
"""

from __future__ import annotations

import argparse
import math
import resource
import time
from collections.abc import Callable
from functools import partial
from multiprocessing import get_context

import torch
import torch.nn.functional as F
from fastgeo_kernels import (
    fused_linear_js_div,
    js_div,
    path_js_div,
    path_js_div_value_and_grad,
)
from fastgeo_kernels.path_js_div import fused

from benchmarks.harness import device_slug, environment, write_result
from fastgeo.profiling.measure import (
    copy_bandwidth,
    headline,
    quantiles,
    table,
    time_alternating,
    version_of,
)

# N, B, C
GPU_SHAPES = [(25, 256, 10), (25, 65536, 10), (25, 1024, 1000), (25, 64, 32768), (2, 1024, 32768)]
CPU_SHAPES = [(25, 256, 10), (25, 64, 1000), (2, 64, 32768)]
GPU_PAIRS = [(65536, 10), (4096, 1000), (4096, 32768), (4096, 151_936)]  # B, C
CPU_PAIRS = [(256, 10), (128, 1000), (64, 32768)]
PAPER = "paper's loop, eager"
BASE = "softmax, log, kl_div"


def pair(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The paper's formula for one edge: softmax, log, kl_div."""
    p, q = x.float().softmax(-1), y.float().softmax(-1)
    log_m = ((p + q) / 2).log()
    kl = [F.kl_div(log_m, rows, reduction="batchmean") for rows in (p, q)]
    return (kl[0] + kl[1]) / 2


def loop(logits: torch.Tensor) -> torch.Tensor:
    points = logits.unbind(0)
    return torch.stack([pair(x, y) for x, y in zip(points, points[1:], strict=False)])


def stacked(logits: torch.Tensor) -> torch.Tensor:
    """The same without a loop."""
    p = logits.float().softmax(-1)
    log_m = ((p[:-1] + p[1:]) / 2).log()
    kl = [F.kl_div(log_m, rows, reduction="none").sum(-1) for rows in (p[:-1], p[1:])]
    return ((kl[0] + kl[1]) / 2).mean(-1)


def stacked_log_space(logits: torch.Tensor) -> torch.Tensor:
    log_p = logits.float().log_softmax(-1)
    log_m = torch.logaddexp(log_p[:-1], log_p[1:]) - math.log(2)
    options = dict(reduction="none", log_target=True)
    kl = [F.kl_div(log_m, rows, **options).sum(-1) for rows in (log_p[:-1], log_p[1:])]
    return ((kl[0] + kl[1]) / 2).mean(-1)


def liger(logits: torch.Tensor) -> torch.Tensor:
    """Liger-Kernel's JSD for each pair; its gradient goes to the first argument alone, so that
    both orders are needed."""
    from liger_kernel.ops.jsd import LigerJSDFunction

    log_p = logits.float().log_softmax(-1).unbind(0)
    edges = []
    for x, y in zip(log_p, log_p[1:], strict=False):
        there = LigerJSDFunction.apply(x, y.detach(), None, 0.5, -100)
        back = LigerJSDFunction.apply(y, x.detach(), None, 0.5, -100)
        edges.append(there + back - back.detach())
    return torch.stack(edges)


def log_space(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """log_softmax, logaddexp, kl_div."""
    p, q = teacher.float().log_softmax(-1), student.float().log_softmax(-1)
    log_m = torch.logaddexp(p, q) - math.log(2)
    options = dict(reduction="batchmean", log_target=True)
    return (F.kl_div(log_m, p, **options) + F.kl_div(log_m, q, **options)) / 2


def trl(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """The formula of `GKDTrainer.generalized_jsd_loss` of TRL, beta = 1/2."""
    q, p = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
    beta = torch.tensor(0.5, device=p.device)
    mixture = torch.logsumexp(torch.stack([q + torch.log1p(-beta), p + torch.log(beta)]), 0)
    kl = [F.kl_div(mixture, rows, reduction="none", log_target=True) for rows in (p, q)]
    return (beta * kl[0] + (1 - beta) * kl[1]).sum() / len(p)


def liger_pair(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    from liger_kernel.ops.jsd import LigerJSDFunction

    p, q = teacher.float().log_softmax(-1), student.float().log_softmax(-1)
    return LigerJSDFunction.apply(q, p, None, 0.5, -100)


def with_autograd(function: Callable, logits: torch.Tensor) -> Callable:
    leaf = logits.detach().requires_grad_()

    def value_and_grad():
        value = function(leaf)
        (grad,) = torch.autograd.grad(value.sum(), leaf)
        return value.detach(), grad

    return value_and_grad


def implementations(logits: torch.Tensor, compile: bool) -> dict[str, Callable]:
    plain = {"this, torch": partial(path_js_div, impl="torch"), PAPER: loop}
    plain |= {"stacked": stacked, "stacked, log space": stacked_log_space}
    if logits.is_cuda:
        plain = {"this, Triton": partial(path_js_div, impl="triton"), **plain}
    found = {name: with_autograd(function, logits) for name, function in plain.items()}
    found["this, value_and_grad"] = lambda: path_js_div_value_and_grad(logits)
    if compile:
        torch._dynamo.reset()
        for name in ("this, torch", "stacked", "stacked, log space"):
            compiled = torch.compile(plain[name])
            found[f"{name}, torch.compile"] = with_autograd(compiled, logits)
    if logits.is_cuda and version_of("liger-kernel") != "none":
        found["Liger-Kernel a pair"] = with_autograd(liger, logits)
    return found


def of_student(function: Callable, teacher: torch.Tensor, student: torch.Tensor) -> Callable:
    return with_autograd(lambda leaf: function(teacher, leaf), student)


def pair_implementations(
    teacher: torch.Tensor, student: torch.Tensor, compile: bool
) -> dict[str, Callable]:
    plain = {"this": js_div, BASE: pair, "log space": log_space, "TRL's formula": trl}
    if teacher.is_cuda and version_of("liger-kernel") != "none":
        plain["Liger-Kernel"] = liger_pair
    found = {name: of_student(function, teacher, student) for name, function in plain.items()}
    if compile:
        torch._dynamo.reset()
        for name, function in plain.items():
            compiled = of_student(torch.compile(function), teacher, student)
            found[f"{name}, torch.compile"] = compiled
    return found


MEMORY = (512, 32768)  # B, C; 64 MiB a tensor
VOCABULARY = (8 * 512, 151_936)
HIDDEN = 32


def distillations() -> dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]:
    return {
        "this": js_div,
        "this, inplace": partial(js_div, inplace=True),
        BASE: pair,
        "log space": log_space,
        "TRL's formula": trl,
    }


def resident(name: str) -> float:
    """What a forward and backward pass add to the memory of this process, which is a fresh one, in
    [B, C] tensors of fp32. Behind a head the logits count, too."""
    torch.set_num_threads(1)
    fused.LOGITS = 1 << 20  # for sizes as small as these
    batch, classes = MEMORY
    hidden, head = torch.randn(batch, HIDDEN), torch.randn(classes, HIDDEN, requires_grad=True)
    teacher_head = torch.randn(classes, HIDDEN)
    if "head" in name:

        def step(rows: int) -> None:
            x = hidden[:rows].clone().requires_grad_()
            if name.startswith("this"):
                fused_linear_js_div(x, head, hidden[:rows], teacher_head).backward()
            else:
                trl(hidden[:rows] @ teacher_head.T, x @ head.T).backward()
    else:
        teacher, student = (torch.empty(batch, classes).normal_() for _ in range(2))
        function = distillations()[name]

        def step(rows: int) -> None:
            function(teacher[:rows], student[:rows].requires_grad_()).backward()

    step(2)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB
    step(batch)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return grown * 1024 / (4 * batch * classes)


def memory() -> list[dict[str, str]]:
    names = [*distillations(), "this, behind a head", "TRL's formula, behind a head"]
    rows, one = [], 4 * math.prod(VOCABULARY) / 2**30
    for name in names:
        with get_context("spawn").Pool(1) as pool:
            tensors = pool.apply(resident, (name,))
        rows.append(
            {
                "impl": name,
                "B, C": "{}, {}".format(*MEMORY),
                "tensors": f"{tensors:.1f}",
                "GiB at {}, {}, by count".format(*VOCABULARY): f"{tensors * one:.1f}",
            }
        )
    return rows


def processor_seconds(
    functions: dict[str, Callable], repeats: int, least: float = 2e-3
) -> dict[str, list[float]]:
    """Of this process, a call of each function, the functions taking turns. A call shorter than
    `least` is timed as one of many."""
    calls = {}
    for name, function in functions.items():
        started = time.process_time()
        function()
        calls[name] = max(1, round(least / max(time.process_time() - started, 1e-6)))
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(repeats):
        for name in list(functions)[:: 1 if turn % 2 else -1]:
            started = time.process_time()
            for _ in range(calls[name]):
                functions[name]()
            seconds[name].append((time.process_time() - started) / calls[name])
    return seconds


def error(got, expected) -> float:
    """The larger of the value's and the gradient's error, each over its largest entry."""
    return max(
        ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()
        for a, b in zip(got, expected, strict=True)
    )


def peak_mib(function: Callable, device: torch.device) -> str:
    if device.type != "cuda":
        return "-"
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return f"{(torch.cuda.max_memory_allocated() - before) / 2**20:.1f}"


def measure(shape, dtype: torch.dtype, device: torch.device, compile: bool, repeats: int):
    generator = torch.Generator(device).manual_seed(0)
    steps = torch.randn(shape, device=device, generator=generator)
    logits = (3 * steps[:1] + steps.cumsum(0)).to(dtype)
    expected = path_js_div_value_and_grad(logits.double().cpu(), impl="torch")
    words = {"N, B, C": "{}, {}, {}".format(*shape), "dtype": str(dtype)[6:]}
    return compare(implementations(logits, compile), expected, words, PAPER, logits, repeats)


def measure_pair(shape, dtype: torch.dtype, device: torch.device, compile: bool, repeats: int):
    generator = torch.Generator(device).manual_seed(0)
    teacher = 3 * torch.randn(shape, device=device, generator=generator)
    student = teacher + torch.randn(shape, device=device, generator=generator)
    teacher, student = teacher.to(dtype), student.to(dtype)
    functions = pair_implementations(teacher, student, compile)
    exact = of_student(js_div, teacher.double().cpu(), student.double().cpu())
    words = {"B, C": "{}, {}".format(*shape), "dtype": str(dtype)[6:]}
    return compare(functions, exact(), words, BASE, torch.stack([teacher, student]), repeats)


def compare(
    functions: dict[str, Callable],
    expected: tuple[torch.Tensor, torch.Tensor],
    words: dict[str, str],
    base: str,
    logits: torch.Tensor,
    repeats: int,
) -> list[dict[str, str]]:
    """A row for each implementation of one value and gradient."""
    device, dtype, errors = logits.device, logits.dtype, {}
    for name, function in list(functions.items()):
        try:
            errors[name] = error([t.cpu() for t in function()], expected)
        except Exception as failure:  # a baseline that does not run is a row, not the end
            if name.startswith("this"):
                raise
            print(f"{name}: {type(failure).__name__}: {str(failure).splitlines()[0]}")
            del functions[name]
    allowed = 1e-3 if dtype == torch.float32 else 1e-2  # gradients leave in the logits' dtype
    sound = {name: f for name, f in functions.items() if errors[name] < allowed}
    wall = time_alternating(sound, repeats)
    if device.type == "cuda":
        seconds = time_alternating(sound, repeats, "device")
    else:
        seconds = processor_seconds(sound, repeats)
    bandwidth = copy_bandwidth(logits.numel() * logits.element_size() // 4, device)
    usual = quantiles(seconds[base])["p50"] if base in sound else None
    rows = []
    for name in functions:
        row = {"impl": name, **words}
        if name not in sound:
            blank = dict.fromkeys(
                ("ms p20", "p50", "p80", "wall ms", "GB/s", "of copy", "peak MiB"), "wrong"
            )
            rows.append({**row, **blank, "max error": f"{errors[name]:.0e}", f"vs {base}": "-"})
            continue
        times = quantiles(seconds[name])
        rate = 2 * logits.nbytes / times["p50"]
        rows.append(
            {
                **row,
                "ms p20": f"{times['p20'] * 1e3:.4g}",
                "p50": f"{times['p50'] * 1e3:.4g}",
                "p80": f"{times['p80'] * 1e3:.4g}",
                "wall ms": f"{quantiles(wall[name])['p50'] * 1e3:.4g}",
                "GB/s": f"{rate / 1e9:.4g}",
                "of copy": f"{rate / bandwidth:.1%}",
                "peak MiB": peak_mib(functions[name], device),
                "max error": f"{errors[name]:.0e}",
                f"vs {base}": f"{usual / times['p50']:.1f}x" if usual else "-",
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--threads", type=int, help="of the CPU; all by default")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpu = device.type == "cuda"
    print(headline(environment()), end="\n\n")
    rows, pairs = [], []
    peaks = [] if gpu else memory()  # first: a new process inherits the peak of this one
    for shape in GPU_SHAPES if gpu else CPU_SHAPES:
        for dtype in (torch.float32, torch.bfloat16) if gpu else (torch.float32,):
            rows += measure(shape, dtype, device, not arguments.no_compile, arguments.repeats)
    print(table(rows))
    for shape in GPU_PAIRS if gpu else CPU_PAIRS:
        for dtype in (torch.float32, torch.bfloat16) if gpu else (torch.float32,):
            pairs += measure_pair(shape, dtype, device, not arguments.no_compile, arguments.repeats)
    print(f"\n{table(pairs)}")
    print(f"\n{table(peaks)}" if peaks else "")
    write_result(f"path_jsd-{device_slug()}", {"rows": rows, "pairs": pairs, "memory": peaks})


if __name__ == "__main__":
    main()
