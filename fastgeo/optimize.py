"""Geodesic optimisation: SGD on the energy of a path, the sum of its neighbours' divergences.

Near a solution the energy's Hessian is (Fisher metric) x L / 4 with L = tridiag(-1, 2, -1) along
the path, so its smoothest mode relaxes about (2 (N - 1) / pi)^2 times slower than its roughest.
Multiplying the stacked gradient by the inverse of L, the gradient in the H1 inner product of paths,
removes that factor at the same optimum and learning rate.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice

import torch
from fastgeo_kernels import path_js_div_value_and_grad
from torch import Tensor, nn
from tqdm import tqdm

from fastgeo.path import Path
from fastgeo.stacking import StackedModule, evaluation_mode, stack


def optimize(
    path: Path,
    module: nn.Module,
    batches: Iterable,
    *,
    steps: int | None = None,
    lr: float = 0.1,
    precondition: bool = True,
    on_step: Callable[[dict, Path], None] | None = None,
    progress: bool = False,
) -> Path:
    """Move the interior of a path towards the geodesic between its ends.

    Each step is equivalent to::

        p = [functional_call(module, point, inputs).softmax(-1) for point in path.points()]
        energy = sum(js_div(p[i], p[i + 1]) for i in range(N - 1))
        gradient = torch.autograd.grad(energy, interior)         # [N - 2, ...] each
        interior -= lr * inverse_path_laplacian(N - 2) @ gradient

    Args:
        path: where to start; not changed.
        module: the network of all points, run in eval mode; its parameter values are not used.
        batches: iterable of inputs [B, ...], or of tuples whose first entry they are (targets are
            ignored). Gone through again, if it can be, until all steps are done.
        steps: how many; one pass over the batches by default.
        lr: learning rate.
        precondition: multiply the gradient by the inverse path Laplacian; False is the SGD of
            Tan et al.
        on_step: called before every update with {"step", "energy": nats, "sqrt_jsd",
            "euclidean"} on the step's batch, and the path that has them, which may be kept.
        progress: show a progress bar.

    Returns:
        A new path with the same ends.

    Raises:
        TypeError: a path, module or batches of another type.
        ValueError: a path that is not of this module, no parameter to train, lr <= 0, too few
            batches, or an energy that stops being finite.

    Example:
        >>> path = Path.linear(a, b, 25)
        >>> path = optimize(path, module, [inputs], steps=100)
    """
    if not lr > 0:
        raise ValueError(f"lr must be positive, got {lr}")
    if steps is not None and steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    check_path_of(path, module)
    network = stack(module)
    trained = _trained_names(module)
    inverse = inverse_path_laplacian(len(path) - 2).to(path.device) if precondition else None

    taken = 0
    with (
        evaluation_mode(module),
        tqdm(total=steps, desc="optimize", unit="step", disable=not progress) as bar,
    ):
        for step, inputs in enumerate(islice(_inputs(batches, repeat=steps is not None), steps)):
            energies, gradient = energy_and_gradient(path, network, inputs.to(path.device), trained)
            if not torch.isfinite(energies).all():
                edge = int((~torch.isfinite(energies)).nonzero()[0])
                cause = f"lower lr (now {lr})" if step else "look at the inputs and the two ends"
                raise ValueError(
                    f"optimisation stopped at step {step}: the divergence of edge {edge} is "
                    f"{energies[edge].item()}; {cause}"
                )
            if on_step is not None:
                on_step(_metrics(step, energies, path), path)
            path = _updated(path, gradient, trained, lr, inverse)
            taken += 1
            bar.update()
            bar.set_postfix_str(f"energy {energies.sum():.4f} nats", refresh=False)
    if taken < (steps or 1):
        raise ValueError(f"batches ended after {taken} of {steps or 1} steps")
    for name, tensor in path.interior.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{name} is not finite after step {taken - 1}; lower lr (now {lr})")
    return path


def energy_and_gradient(
    path: Path, network: StackedModule, inputs: Tensor, trained: dict[str, str]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Divergence of each edge on a batch, [E] nats, and the energy's gradient [N - 2, ...]."""
    with torch.no_grad():  # the ends never change and need no gradient
        ends = {name: torch.stack([path.start[name], path.end[name]]) for name in path.start}
        end_logits = network(ends, inputs)  # [2, B, C]
    leaves = {
        name: path.interior[name].detach().requires_grad_()
        for name in dict.fromkeys(trained.values())
    }
    tied = {name: leaves[first] for name, first in trained.items()}
    with torch.enable_grad():
        logits = network(path.stacked_interior() | tied, inputs)  # [N-2, B, C]
    if logits.ndim != 3:
        raise ValueError(f"the module must return logits [B, C], got {list(logits.shape[1:])}")
    whole = torch.cat([end_logits[:1], logits.detach(), end_logits[1:]])
    energies, gradient = path_js_div_value_and_grad(whole)
    gradients = torch.autograd.grad(
        logits, list(leaves.values()), gradient[1:-1].to(logits), materialize_grads=True
    )
    return energies, dict(zip(leaves, gradients, strict=True))


def inverse_path_laplacian(size: int) -> Tensor:
    """[n, n] fp32, the inverse of tridiag(-1, 2, -1): min(i, j) (n + 1 - max(i, j)) / (n + 1).

    Example:
        >>> inverse_path_laplacian(2) * 3
        tensor([[2., 1.],
                [1., 2.]])
    """
    i = torch.arange(1, size + 1, dtype=torch.float32)
    return torch.minimum(i, i[:, None]) * (size + 1 - torch.maximum(i, i[:, None])) / (size + 1)


def check_path_of(path: Path, module: nn.Module) -> None:
    """TypeError or ValueError, naming the first difference, unless the points are of module."""
    if not isinstance(path, Path):
        raise TypeError(f"path must be a fastgeo.Path, got {type(path).__name__}")
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be an nn.Module, got {type(module).__name__}")
    state = module.state_dict()
    for name in [*state, *path.start]:
        if name not in state or name not in path.start:
            there, missing = ("path", "module") if name in path.start else ("module", "path")
            raise ValueError(f"{name} is in the {there} and not in the {missing}")
        if state[name].shape != path.start[name].shape:
            raise ValueError(
                f"{name} has shape {list(path.start[name].shape)} in the path and "
                f"{list(state[name].shape)} in the module"
            )


def _trained_names(module: nn.Module) -> dict[str, str]:
    """Name of every parameter to train -> the first name of it (tied parameters have several)."""
    first: dict[nn.Parameter, str] = {}
    names = module.named_parameters(remove_duplicate=False)
    trained = {name: first.setdefault(p, name) for name, p in names if p.requires_grad}
    if not trained:
        raise ValueError("the module has no parameter with requires_grad to train")
    return trained


def _inputs(batches: Iterable, *, repeat: bool) -> Iterator[Tensor]:
    """The inputs of one pass, or of pass after pass until one is empty."""
    if isinstance(batches, Tensor):
        raise TypeError("batches must be an iterable of inputs; give one batch as [inputs]")
    while True:
        empty = True
        for batch in batches:
            empty = False
            inputs = batch[0] if isinstance(batch, tuple | list) else batch
            if not isinstance(inputs, Tensor):
                raise TypeError(
                    "each of batches must be inputs [B, ...], or a tuple that begins with them, "
                    f"got {type(batch).__name__}"
                )
            yield inputs
        if empty or not repeat:
            return


def _updated(
    path: Path,
    gradient: dict[str, Tensor],
    trained: dict[str, str],
    lr: float,
    inverse: Tensor | None,
) -> Path:
    """The path after one SGD step; tied parameters stay tied."""
    moved = {}
    for name, grad in gradient.items():
        if inverse is not None:
            precision = torch.promote_types(grad.dtype, inverse.dtype)  # at least fp32
            rows = grad.reshape(len(grad), -1).to(precision)
            grad = (inverse.to(precision) @ rows).view_as(grad).to(grad)
        moved[name] = path.interior[name] - lr * grad
    tied = {name: moved[first] for name, first in trained.items()}
    return Path(path.start, path.interior | tied, path.end)


def _metrics(step: int, energies: Tensor, path: Path) -> dict:
    return {
        "step": step,
        "energy": energies.sum().item(),
        "sqrt_jsd": energies.sqrt().sum().item(),
        "euclidean": path.euclidean().sum().item(),
    }
