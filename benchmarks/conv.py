"""All ways of every convolution in the table: `python -m benchmarks.conv`.

The output, the input's gradient and the weights' are timed apart, on tensors that lie as each way
likes them, after a comparison with the grouped convolution. What the table should hold is printed
as Python, ready for conv_table.py: for images of (B, H, W, N, C), and for those of (N, B, H, W, C),
since a table of both would copy activations from the one to the other. The faster of the two in the
whole step (`python -m benchmarks.step`) is to stay.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
from fastgeo_kernels.stacked.conv import forward, input_gradient, weight_gradient
from fastgeo_kernels.stacked.conv_table import TABLE, Shape, Ways
from torch import Tensor

from benchmarks.harness import device_slug, environment, write_result
from fastgeo.profiling.measure import headline, quantiles, table, time_alternating

LAYOUTS = {"(B, H, W, N, C)": ("grouped", "triton"), "(N, B, H, W, C)": ("dense", "triton")}
WAYS = ("grouped", "dense", "triton")
CLEARLY = 0.95  # of the time of PyTorch's convolution, for the own kernel to be preferred


def products(
    shape: Shape, points: int, batch: int, dtype: torch.dtype, device: str
) -> dict[str, dict[str, Callable[[], Tensor]]]:
    """product -> way -> a function without arguments, each on tensors that lie as it likes."""
    generator = torch.Generator(device).manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(size, device=device, dtype=dtype, generator=generator)

    size, stride, channels, out, pixels = shape
    after = (pixels + 2 * (size // 2) - size) // stride + 1
    x = random(batch, pixels, pixels, points, channels).permute(3, 0, 4, 1, 2)
    dy = random(batch, after, after, points, out).permute(3, 0, 4, 1, 2)
    weight = random(points, out, size, size, channels).movedim(-1, 2) / (size * channels**0.5)
    around = [t.movedim(2, -1).contiguous().movedim(-1, 2) for t in (x, dy)]
    functions: dict[str, dict[str, Callable[[], Tensor]]] = {p: {} for p in Ways._fields}
    for way in WAYS:
        images, grads = around if way == "dense" else (x, dy)
        given, options = (images, weight), (stride, size // 2)
        functions["forward"][way] = partial(forward, way, *given, *options)
        functions["input"][way] = partial(input_gradient, way, grads, *given, *options)
        functions["weight"][way] = partial(weight_gradient, way, grads, *given, *options)
    return functions


def measure(
    shape: Shape, points: int, batch: int, dtype: torch.dtype, device: str, repeats: int
) -> tuple[list[dict], dict[str, Ways], dict[str, float]]:
    """A row for each product and way; layout -> the ways that are fastest in it, and seconds."""
    size, stride, channels, out, pixels = shape
    after = (pixels + 2 * (size // 2) - size) // stride + 1
    flop = 2 * points * batch * after**2 * channels * out * size**2
    gpu = device == "cuda"
    rows, best = [], {layout: [] for layout in LAYOUTS}
    total = dict.fromkeys(LAYOUTS, 0.0)
    for product, functions in products(shape, points, batch, dtype, device).items():
        expected = functions["grouped"]().double()
        errors, sound = {}, {}
        for way, function in functions.items():
            if way == "triton" and not gpu:
                continue
            got = function().double()
            errors[way] = ((got - expected).abs().max() / expected.abs().max()).item()
            if errors[way] < (3e-2 if dtype == torch.bfloat16 else 5e-3):
                sound[way] = function
            del got
        seconds = time_alternating(sound, repeats, "device" if gpu else "wall")
        times = {way: quantiles(each) for way, each in seconds.items()}
        medians = {way: time["p50"] for way, time in times.items()}
        for layout, (usual, own) in LAYOUTS.items():
            usually = medians.get(usual, float("inf"))
            clearly = medians.get(own, float("inf")) < CLEARLY * usually
            best[layout].append(own if clearly else usual)
            total[layout] += medians[own] if clearly else usually
        for way, error in errors.items():
            row = {
                "size, stride, C, O, pixels": ", ".join(map(str, shape)),
                "product": product,
                "way": way,
                "ms (p20/p50/p80)": "wrong",
                "TFLOP/s": "-",
                "error": f"{error:.0e}",
            }
            if way in times:
                row["ms (p20/p50/p80)"] = "/".join(f"{1e3 * t:.3g}" for t in times[way].values())
                row["TFLOP/s"] = f"{flop / times[way]['p50'] / 1e12:.3g}"
            rows.append(row)
    return rows, {layout: Ways(*ways) for layout, ways in best.items()}, total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--points", type=int, default=25)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--save", action="store_true", help="write results/conv-DEVICE.json")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(headline(environment()), end="\n\n")
    rows, lines = [], {layout: [] for layout in LAYOUTS}
    seconds = dict.fromkeys(LAYOUTS, 0.0)
    for shape in TABLE:
        found, ways, took = measure(
            *(shape, arguments.points, arguments.batch, getattr(torch, arguments.dtype), device),
            arguments.repeats,
        )
        rows += found
        for layout in LAYOUTS:
            lines[layout].append(f"    {shape!r}: {ways[layout]!r},")
            seconds[layout] += took[layout]
    print(table(rows))
    for layout, own in lines.items():
        total = f"{1e3 * seconds[layout]:.3g} ms, every shape once"
        print(f"\nFor conv_table.py, images of {layout}, {total}:\n", *own, sep="\n")
    if arguments.save:
        payload = {"table": lines, "rows": rows}
        print(f"\nwrote {write_result(f'conv-{device_slug()}', payload)}")


if __name__ == "__main__":
    main()
