"""What people set up to optimise a path: the paper's loop over modules, and its usual improvements.

N modules are evaluated one after the other, the divergence of each pair of neighbours is taken by
softmax, log and kl_div, and SGD moves the interior after one backward pass (Tan et al., "Geodesic
Mode Connectivity", with its logging left out). For comparison: `fastgeo.profile` and the benchmarks
measure fastgeo against these.
"""

import contextlib
import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgeo.data.inputs import Inputs, arguments, each_tensor
from fastgeo.data.outputs import logits_in
from fastgeo.path import Path

Network = Callable[..., Tensor]


@dataclass(frozen=True)
class Baseline:
    """A way to do optimisation steps.

    Attributes:
        step: inputs [B, ...] -> the energy before the step, nats.
        points: the N state dicts as they are now.
    """

    step: Callable[[Inputs], Tensor]
    points: Callable[[], list[dict[str, Tensor]]]


def loop(
    module: nn.Module,
    path: Path,
    *,
    lr: float = 0.1,
    channels_last: bool = False,
    bfloat16: bool = False,
    forward: Callable[[nn.Module], Network] = lambda network: network,
) -> Baseline:
    """The paper's loop.

    Args:
        module: copied N times, in the mode that it is in.
        path: gives the copies their weights.
        lr: learning rate.
        channels_last: networks and images in channels-last memory format.
        bfloat16: networks under autocast; softmax and divergence stay fp32, as autocast has it.
        forward: a network -> what evaluates it.
    """
    networks = []
    for point in path.points():
        network = copy.deepcopy(module).to(path.device)
        network.load_state_dict(point)
        networks.append(network)
    for end in (networks[0], networks[-1]):
        end.requires_grad_(False)
    if channels_last:
        networks = [network.to(memory_format=torch.channels_last) for network in networks]
    interior = [p for network in networks[1:-1] for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(interior, lr)
    evaluate = [forward(network) for network in networks]

    def step(inputs: Inputs) -> Tensor:
        if channels_last:
            inputs = each_tensor(_channels_last, inputs)
        with _autocast(path.device, bfloat16):
            logits = [_logits(module, network, inputs) for network in evaluate]
        optimizer.zero_grad()
        energy = energy_of_pairs([each.float().softmax(-1) for each in logits])
        energy.backward()
        optimizer.step()
        return energy.detach()

    return Baseline(step, lambda: [network.state_dict() for network in networks])


def compiled_loop(module: nn.Module, path: Path, **options: Any) -> Baseline:
    """The loop over compiled modules: one graph for all networks, each with its own parameters."""
    compiled: Any = torch.compile(module)

    def forward(network: nn.Module) -> Network:
        state = [*network.named_parameters(), *network.named_buffers()]
        params = {f"_orig_mod.{name}": tensor for name, tensor in state}
        return lambda *args, **kwargs: torch.func.functional_call(compiled, params, args, kwargs)

    return loop(module, path, forward=forward, **options)


def vmapped(module: nn.Module, path: Path, *, lr: float = 0.1, bfloat16: bool = False) -> Baseline:
    """All networks under torch.func.vmap."""
    own = dict([*module.named_parameters(), *module.named_buffers()])  # tied ones once
    params = {name: t.clone() for name, t in path.stacked().items() if name in own}
    trained = {name: t for name, t in params.items() if own[name].requires_grad}
    for tensor in trained.values():
        tensor.requires_grad_()
    optimizer = torch.optim.SGD(list(trained.values()), lr)

    def one(params: dict[str, Tensor], inputs: Inputs) -> Tensor:
        network = lambda *a, **k: torch.func.functional_call(module, params, a, k)  # noqa: E731
        return _logits(module, network, inputs)

    def step(inputs: Inputs) -> Tensor:
        with _autocast(path.device, bfloat16):
            logits = torch.vmap(one, in_dims=(0, None))(params, inputs)
        optimizer.zero_grad()
        energy = energy_of_pairs(logits.float().softmax(-1).unbind(0))
        energy.backward()
        for tensor in trained.values():
            if tensor.grad is not None:
                tensor.grad[[0, -1]] = 0  # the ends stay
        optimizer.step()
        return energy.detach()

    def points() -> list[dict[str, Tensor]]:
        return [{k: v[i].detach() for k, v in params.items()} for i in range(len(path))]

    return Baseline(step, points)


def energy_of_pairs(p: Sequence[Tensor]) -> Tensor:
    """The sum of the divergences of neighbours [B, ..., C], nats, as the paper's code has it."""
    energies = []
    for left, right in zip(p[:-1], p[1:], strict=True):
        middle = ((left + right) / 2).log()
        divergences = [F.kl_div(middle, q, reduction="sum") for q in (left, right)]
        energies.append(torch.stack(divergences).sum() / (2 * left[..., 0].numel()))
    return torch.stack(energies).sum()


def _logits(module: nn.Module, network: Network, inputs: Inputs) -> Tensor:
    args, kwargs = arguments(module, inputs)
    return logits_in(network(*args, **kwargs))


def _autocast(device: torch.device, enabled: bool) -> contextlib.AbstractContextManager:
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def _channels_last(tensor: Tensor) -> Tensor:
    images = tensor.ndim == 4
    return tensor.contiguous(memory_format=torch.channels_last) if images else tensor
