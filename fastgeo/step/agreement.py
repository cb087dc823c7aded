"""Whether an engine computes what the module computes: its outputs and their gradients."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastgeo.data.inputs import Inputs, first_few, tensors_within
from fastgeo.forward.modes import called_with, copied_state, looked_at
from fastgeo.stacking.module import Parameters, StackedModule
from fastgeo.stacking.products import Products, sources, waiting_beyond, waits_in_loops
from fastgeo.step.logits import Evaluated

FEW_INPUTS = 8  # on which engines are checked, and memory is estimated
SAME = 1e-5  # of the largest number, what an order of sums may change


def refuse_random(
    module: nn.Module, state: Mapping[str, Tensor], inputs: Inputs, most: int | None = None
) -> None:
    """ValueError, naming the layer, if a network in evaluation mode gives now this and now that.

    Args:
        state: name -> tensor of one network.
        most: as of `StackedModule.by_rows`; of what comes by rows, what it is made of is compared.
    """
    with waiting_beyond(most), waits_in_loops():
        first, second = (_outputs(module, state, inputs) for _ in range(2))
    if _same(first, second):
        return
    calls = [_calls(module, state, inputs) for _ in range(2)]
    name = next(
        (
            name
            for (name, given, gave), (_, given_then, gave_then) in zip(*calls, strict=False)
            if _same(given, given_then) and not _same(gave, gave_then)
        ),
        "",
    )
    layer = type(module.get_submodule(name)).__name__
    raise ValueError(
        f"{f'layer {name}, {layer},' if name else layer} draws random numbers in evaluation mode: "
        "the same inputs give other outputs, and a path would be one of noise; switch that off in "
        "eval mode (F.dropout has training=self.training)"
    )


def refuse_probabilities(outputs: Any) -> None:
    """ValueError if what should be logits [..., C] are the probabilities of C classes.

    Args:
        outputs: as of `StackedModule.by_rows`.
    """
    if isinstance(outputs, Products):
        logits = Evaluated(outputs)
        outputs = logits.of(logits.spread())
    if isinstance(outputs, Tensor) and outputs.ndim and outputs.shape[-1] > 1:
        sums = outputs.double().sum(-1)
        if (outputs >= 0).all() and torch.allclose(sums, torch.ones_like(sums), atol=1e-3):
            raise ValueError(
                "the network gives probabilities, rows that sum to 1, and logits are wanted, of "
                "which softmax is taken once more; take the softmax at its end away, or its log"
            )


def _outputs(module: nn.Module, state: Mapping[str, Tensor], inputs: Inputs) -> list[Tensor]:
    with looked_at(module):
        return _copies(called_with(module, copied_state(module, state), inputs))


def _calls(
    module: nn.Module, state: Mapping[str, Tensor], inputs: Inputs
) -> list[tuple[str, list[Tensor], list[Tensor]]]:
    """The calls of all layers, the inner ones first: name, what it was given, what it gave."""
    given: dict[str, list[list[Tensor]]] = {}
    found: list[tuple[str, list[Tensor], list[Tensor]]] = []
    hooks = []
    for name, layer in module.named_modules():

        def before(_: nn.Module, args: tuple, kwargs: dict, name: str = name) -> None:
            given.setdefault(name, []).append(_copies((args, kwargs)))

        def after(_: nn.Module, args: tuple, outputs: Any, name: str = name) -> None:
            found.append((name, given[name].pop(), _copies(outputs)))

        hooks.append(layer.register_forward_pre_hook(before, with_kwargs=True))
        hooks.append(layer.register_forward_hook(after))
    try:
        _outputs(module, state, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _copies(value: Any) -> list[Tensor]:
    return [own.clone() for tensor in tensors_within(value) for own in sources(tensor)]


def _same(some: list[Tensor], others: list[Tensor]) -> bool:
    """Whether two lists of tensors are equal up to rounding."""
    return len(some) == len(others) and all(
        one.shape == other.shape and _close(one, other)
        for one, other in zip(some, others, strict=True)
    )


def _close(one: Tensor, other: Tensor) -> bool:
    if torch.equal(one, other) or not one.is_floating_point():
        return torch.equal(one, other)
    finite = one[one.isfinite()]
    atol = SAME * finite.abs().max().item() if len(finite) else 0.0
    return torch.allclose(one, other, rtol=0, atol=atol, equal_nan=True)


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
    loop: StackedModule,
    params: Parameters,
    inputs: Inputs,
    per_point: bool,
    most: int | None = None,
) -> tuple[Inputs, float]:
    """A few inputs for one network, and how many times as many there are.

    All of them, if they do not give what they give among all: the first axis is no batch then, but
    the nodes of a graph, say.

    Args:
        most: as of `StackedModule.by_rows`.
    """
    few, scale = first_few(inputs, FEW_INPUTS, int(per_point))
    if scale == 1.0:
        return few, scale
    whole = loop.by_rows(params, inputs, most, per_point=per_point)
    try:
        part: Any = loop.by_rows(params, few, most, per_point=per_point)
        if isinstance(whole, Products):
            own = Evaluated(part)
            check_agreement((own.of(own.spread()), {}), (Evaluated(whole).of(own.spread()), {}))
        else:
            check_agreement((part, {}), (whole[:, : part.shape[1]], {}))
    except Exception:  # noqa: BLE001 - whatever the user's forward raises of a part
        return inputs, 1.0
    return few, scale


def outputs_and_gradients(
    network: StackedModule,
    params: Parameters,
    inputs: Inputs,
    per_point: bool,
    most: int | None = None,
    *,
    gradients: bool = True,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Outputs, and the gradients of one number made of them to all trained parameters.

    Args:
        most: as of `StackedModule.by_rows`; where there are more, some rows [N, r, C] of them.
    """
    trained = {name for name, p in network.module.named_parameters() if p.requires_grad}
    trained &= params.keys() if gradients else set()
    trained -= params.keys() if torch.is_inference_mode_enabled() else set()
    leaves = {
        name: tensor.detach().clone().requires_grad_(name in trained)
        for name, tensor in params.items()
    }
    with torch.set_grad_enabled(bool(trained)):
        outputs = network.by_rows(leaves, inputs, most, per_point=per_point)
    if not isinstance(outputs, Tensor | Products):
        return outputs, {}
    large, rows = None, slice(None)
    if isinstance(outputs, Products) or (most is not None and outputs[0].numel() > most):
        large = Evaluated(outputs)
        rows = large.spread()
        outputs = large.of(rows)
    if not trained or not (outputs if large is None else large).requires_grad:
        return outputs, {}
    upstream = torch.arange(outputs.numel(), device=outputs.device).cos()
    upstream = upstream.view(outputs.shape).to(outputs)
    to = {name: leaves[name] for name in sorted(trained)}
    if large is None:
        found = torch.autograd.grad(outputs, list(to.values()), upstream, allow_unused=True)
    else:
        large.add(rows, upstream)
        found = large.gradients(list(to.values()), allow_unused=True)
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
