"""A deep ensemble by the stacked layers, against the loop over its members.

`python -m benchmarks.ensemble`: a step (forward, backward, SGD) of eight convolutional networks on
one batch of images, by fastgeo_kernels' public functions and by a loop over eight modules, as they
are and in channels-last. Each step is taken in turns, and its cost is the processor time of all
threads, which other programs on the machine disturb less than they do the wall clock.

A stacked step allocates the activations of all networks at once. glibc's malloc gives such blocks
back to the system after every step and takes them anew, page by page; with --keep-pages it does
not, for any of the implementations.
"""

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from fastgeo_kernels import stacked_conv, stacked_group_norm, stacked_linear
from torch import Tensor, nn

from benchmarks.harness import environment, write_result
from fastgeo import keep_pages
from fastgeo.profiling.measure import headline, quantiles, table

NETWORKS, BATCH, CLASSES, RATE = 8, 64, 10, 0.1
SETTINGS = ((8, 16), (16, 16), (16, 32), (32, 16), (32, 32), (64, 16))  # channels, pixels
SAME = 1e-3  # of a loss, after the steps that came before
STACKED = "stacked"


def member(channels: int) -> nn.Sequential:
    """Three convolutions, each with GroupNorm and ReLU behind it, the mean and a linear layer."""
    layers: list[nn.Module] = []
    for inputs in (3, channels, channels):
        conv = nn.Conv2d(inputs, channels, 3, padding=1, bias=False)
        layers += [conv, nn.GroupNorm(1, channels), nn.ReLU()]
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES)
    )


def by_loop(members: list[nn.Sequential], x: Tensor, labels: Tensor) -> Callable[[], Tensor]:
    """A step of every member, which returns their losses, [N]."""
    optimisers = [torch.optim.SGD(own.parameters(), RATE) for own in members]

    def step() -> Tensor:
        losses = []
        for own, optimiser in zip(members, optimisers, strict=True):
            loss = F.cross_entropy(own(x), labels)
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            losses.append(loss.detach())
        return torch.stack(losses)

    return step


def by_stacked_layers(
    members: list[nn.Sequential], x: Tensor, labels: Tensor
) -> Callable[[], Tensor]:
    """The same of all members at once, whose parameters are [N, ...]."""
    each = zip(*(own.parameters() for own in members), strict=True)
    parameters = [torch.stack([p.detach() for p in own]).requires_grad_() for own in each]
    *blocks, weight, bias = parameters
    optimiser = torch.optim.SGD(parameters, RATE)

    def step() -> Tensor:
        h = x
        for conv, factor, shift in zip(blocks[::3], blocks[1::3], blocks[2::3], strict=True):
            h = stacked_conv(h, conv, padding=1)
            h = stacked_group_norm(h, 1, factor, shift, relu=True)
        logits = stacked_linear(h.mean((3, 4)), weight, bias).flatten(0, 1)
        losses = F.cross_entropy(logits, labels.repeat(NETWORKS), reduction="none")
        losses = losses.view(NETWORKS, -1).mean(1)
        losses.sum().backward()
        optimiser.step()
        optimiser.zero_grad()
        return losses.detach()

    return step


def steps(channels: int, pixels: int) -> dict[str, Callable[[], Tensor]]:
    torch.manual_seed(0)
    x, labels = torch.randn(BATCH, 3, pixels, pixels), torch.randint(CLASSES, (BATCH,))
    states = [member(channels).state_dict() for _ in range(NETWORKS)]

    def members(memory_format: torch.memory_format) -> list[nn.Sequential]:
        copies = [member(channels).to(memory_format=memory_format) for _ in states]
        for own, state in zip(copies, states, strict=True):
            own.load_state_dict(state)
        return copies

    usual, last = torch.contiguous_format, torch.channels_last
    return {
        "loop": by_loop(members(usual), x, labels),
        "loop, channels-last": by_loop(members(last), x.contiguous(memory_format=last), labels),
        STACKED: by_stacked_layers(members(usual), x, labels),
    }


def measure(channels: int, pixels: int, repeats: int) -> dict[str, object]:
    """A row: milliseconds of each, and how often the stacked step fits into the others.

    Raises:
        AssertionError: they do not give the same losses.
    """
    own = steps(channels, pixels)
    seconds: dict[str, list[float]] = {name: [] for name in own}
    for turn in range(-2, repeats):
        losses = {}
        for name in list(own) if turn % 2 == 0 else list(own)[::-1]:
            start = time.process_time()
            losses[name] = own[name]()
            if turn >= 0:
                seconds[name].append(time.process_time() - start)
        for found in losses.values():
            torch.testing.assert_close(found, losses["loop"], rtol=SAME, atol=0)
    row: dict[str, object] = {"channels": channels, "pixels": f"{pixels}x{pixels}"}
    for name, each in seconds.items():
        row[f"{name}, ms"] = quantiles(1e3 * s for s in each)
    for name in own.keys() - {STACKED}:
        pairs = zip(seconds[name], seconds[STACKED], strict=True)
        row[f"{name} / stacked"] = quantiles(one / other for one, other in pairs)
    return dict(sorted(row.items(), key=lambda item: " / " in item[0]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--keep-pages", action="store_true", help="let malloc reuse large blocks")
    parser.add_argument("--save", action="store_true", help="write results/ensemble-cpu-….json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.keep_pages:
        keep_pages()
    print(headline(environment()), flush=True)
    rows = []
    for channels, pixels in SETTINGS:
        rows.append(measure(channels, pixels, arguments.repeats))
        print(table(rows).splitlines()[-1] if rows[1:] else table(rows), flush=True)
    if arguments.save:
        pages = "-pages" if arguments.keep_pages else ""
        name = f"ensemble-cpu-{arguments.threads}{pages}"
        print(f"\nwrote {write_result(name, {'rows': rows})}")


if __name__ == "__main__":
    main()
