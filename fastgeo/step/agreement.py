"""Whether an engine computes what the module computes: its outputs and their gradients."""

import torch
from torch import Tensor

from fastgeo.data.inputs import Inputs, first_few
from fastgeo.stacking.module import Parameters, StackedModule

FEW_INPUTS = 8  # on which engines are checked, and memory is estimated


def networks_like(params: Parameters, count: int) -> dict[str, Tensor]:
    """[count, ...] of parameters [1, ...]: networks that differ from each other by little."""
    scales = 1 + torch.arange(count).sub(count // 2) / (50 * count)
    return {
        name: t * scales.to(t).view(-1, *(1,) * (t.ndim - 1))
        if t.is_floating_point()
        else t.expand(count, *t.shape[1:])
        for name, t in params.items()
    }


@torch.no_grad()
def few_of(
    loop: StackedModule, params: Parameters, inputs: Inputs, per_point: bool
) -> tuple[Inputs, float]:
    """A few inputs for one network, and how many times as many there are.

    All of them, if they do not give what they give among all: the first axis is no batch then, but
    the nodes of a graph, say.
    """
    few, scale = first_few(inputs, FEW_INPUTS, int(per_point))
    if scale == 1.0:
        return few, scale
    whole = loop(params, inputs, per_point=per_point)
    try:
        part = loop(params, few, per_point=per_point)
        check_agreement((part, {}), (whole[:, : part.shape[1]], {}))
    except Exception:  # noqa: BLE001 - whatever the user's forward raises of a part
        return inputs, 1.0
    return few, scale


def outputs_and_gradients(
    network: StackedModule,
    params: Parameters,
    inputs: Inputs,
    per_point: bool,
    *,
    gradients: bool = True,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Outputs, and the gradients of one number made of them to all trained parameters."""
    trained = {name for name, p in network.module.named_parameters() if p.requires_grad}
    trained &= params.keys() if gradients else set()
    trained -= params.keys() if torch.is_inference_mode_enabled() else set()
    leaves = {
        name: tensor.detach().clone().requires_grad_(name in trained)
        for name, tensor in params.items()
    }
    with torch.set_grad_enabled(bool(trained)):
        outputs = network(leaves, inputs, per_point=per_point)
        if not isinstance(outputs, Tensor) or not outputs.requires_grad or not trained:
            return outputs, {}
        upstream = torch.arange(outputs.numel(), device=outputs.device).cos()
        to = {name: leaves[name] for name in sorted(trained)}
        found = torch.autograd.grad(
            outputs, list(to.values()), upstream.view(outputs.shape).to(outputs), allow_unused=True
        )
    named = zip(to, found, strict=True)
    return outputs.detach(), {name: g.to_dense() for name, g in named if g is not None}


def check_agreement(
    got: tuple[Tensor, dict[str, Tensor]],
    expected: tuple[Tensor, dict[str, Tensor]],
    precision: str = "fp32",
) -> None:
    """ValueError unless outputs and gradients are equal up to a generous rounding.

    Of gradients the lengths are compared: where rounding moves a number over the kink of a ReLU, a
    few entries differ by much; in bf16 many are, and three quarters of the length may be.

    Args:
        precision: "fp32", or "bf16" of what was got.
    """
    (outputs, gradients), (true_outputs, true_gradients) = got, expected
    if not isinstance(true_outputs, Tensor):
        return  # not what any caller wants, who will say so
    if not true_outputs.isfinite().all():
        return  # of any engine, and so is the energy
    eps = 2**-7 if precision == "bf16" else torch.finfo(true_outputs.dtype).eps
    largest = true_outputs.abs().max().item()
    tolerance = max(1e-3, 16 * eps) * largest
    if not torch.allclose(outputs, true_outputs, rtol=0, atol=tolerance, equal_nan=True):
        difference = (outputs - true_outputs).abs().max().item()
        raise ValueError(
            f"its outputs differ from the module's by {difference:.1e} (largest {largest:.1e})"
        )
    lengths = {name: _length(gradient) for name, gradient in true_gradients.items()}
    longest = max(lengths.values(), default=0.0)
    for name in gradients | true_gradients:
        zero = torch.zeros(())
        one, other = (g.get(name, zero.to(outputs.device)) for g in (gradients, true_gradients))
        difference, length = _length(one - other), lengths.get(name, 0.0)
        if difference > max(0.05, 96 * eps) * length + 1e-3 * longest:
            raise ValueError(
                f"its gradient to {name} differs from the module's by {difference:.1e} (length "
                f"{length:.1e})"
            )


def _length(gradient: Tensor) -> float:
    dtype = torch.promote_types(gradient.dtype, torch.float32)
    return torch.linalg.vector_norm(gradient, dtype=dtype).item()
