"""Any nn.Module as a function of stacked parameters: N networks in one pass.

The module is traced once (`fastgeo.tracing`) and its graph is run on stacked parameters: a
convolution becomes one with N groups, a linear layer a batched matrix product, and so on
(`fastgeo.plan`, `fastgeo.operators`, `fastgeo.layers`). An operation that has no form of its own
goes through torch.func.vmap by itself; a module that cannot be traced goes through vmap as a whole,
or else through a loop.
"""

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastgeo.attributes import unchanged
from fastgeo.fusion import fuse
from fastgeo.inputs import Inputs
from fastgeo.modes import refuse_batch_norm
from fastgeo.plan import Plan
from fastgeo.precision import check_precision, matmul_precision
from fastgeo.tracing import TraceFailed, trace
from fastgeo.values import (
    ChangedInput,
    Stacked,
    by_loop,
    by_vmap,
    call,
    first_line,
    own_buffers,
    refused_in_place,
    tensors_in,
    undone_on_failure,
    without_n,
)

Parameters = Mapping[str, Tensor]
ENGINES = ("stacked", "vmap", "loop")


class StackedModule:
    """What `stack` returns.

    Attributes:
        module: as it was given.
        engine: "stacked" where the traced graph runs on stacked parameters, else "vmap" or "loop".
        reason: why it is not "stacked", in one sentence; empty if it is, or was asked for.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        engine: str = "auto",
        channels_last: bool = False,
        batchnorm: str = "refuse",
        precision: str = "fp32",
    ):
        if not isinstance(module, nn.Module):
            raise TypeError(f"module must be an nn.Module, got {type(module).__name__}")
        if engine not in ("auto", *ENGINES):
            raise ValueError(f"engine must be auto, {', '.join(ENGINES)}, got {engine!r}")
        if batchnorm not in ("refuse", "recalibrate"):
            raise ValueError(f"batchnorm must be 'refuse' or 'recalibrate', got {batchnorm!r}")
        if batchnorm == "refuse":
            refuse_batch_norm(module)
        check_precision(precision)
        self.module, self.channels_last, self.precision = module, channels_last, precision
        self.engine, self.reason = engine, ""
        self._own = {
            name: (tensor, first)
            for named in (module.named_parameters, module.named_buffers)
            for name, tensor, first in _with_first_names(named(remove_duplicate=False))
        }
        self._copies: bool | None = None  # whether the module changes its inputs, once it is known
        self._unsafe_on_cpu = channels_last_is_unsafe(module)
        self._plans: dict[tuple, Plan] = {}
        if engine in ("auto", "stacked"):
            try:
                self._plan({})
                self.engine = "stacked"
            except TraceFailed as error:
                if engine == "stacked":
                    raise self._not_stacked(error) from error
                self.engine, self.reason = error.engine, str(error)
        if precision == "bf16" and self.engine != "stacked":
            why = f": {self.reason}" if self.reason else f", not engine {self.engine!r}"
            raise ValueError(
                f"precision 'bf16' keeps the head in fp32, for which it needs the traced graph{why}"
            )
        self._may_change = engine == "auto" and precision != "bf16"

    def __call__(self, params: Parameters, x: Inputs, *, per_point: bool = False) -> Tensor:
        """Evaluate N networks on inputs that they share, or on inputs of their own.

        Args:
            params: name -> [N, ...], parameters and buffers as in the module's `state_dict()` or
                `torch.func.stack_module_state`; buffers that are left out are the module's own.
            x: [B, ...], or [N, B, ...] if per_point; or a mapping, the keyword arguments of the
                module's forward: such tensors, and any other values.
            per_point: whether each network has an input of its own.

        Returns:
            [N, B, ...] outputs; all tensors in what the module returns, if that is a tuple or dict.

        Raises:
            ValueError: params that are not of this module, or inputs of another N.
        """
        n, state = self._state(params)
        args, kwargs = ((), dict(x)) if isinstance(x, Mapping) else ((x,), {})
        args, kwargs = pytree.tree_map(lambda t: self._input(t, n, per_point), (args, kwargs))
        engine, reason = self.engine, self.reason
        while True:
            try:
                with undone_on_failure(self._updated(params)), matmul_precision(self.precision):
                    outputs = without_n(self._run(engine, state, args, kwargs, n), n)
                break
            except torch.OutOfMemoryError:
                raise
            except ChangedInput as error:
                if self._copies is None and engine != "stacked":
                    self._copies = True
                    continue
                failure = error
            except TraceFailed as error:
                failure = error if self._may_change else self._not_stacked(error)
            except Exception as error:  # noqa: BLE001 - whatever vmap or the user's code raises
                failure = error
            if not self._may_change or engine == "loop":
                raise failure  # of the loop, what the module itself raises
            reason = f"{engine} failed: {first_line(failure)}"
            out_of_range = isinstance(failure, IndexError)  # as in fastgeo.plan
            engine = "loop" if out_of_range else ENGINES[ENGINES.index(engine) + 1]
        if engine != self.engine:
            self.engine, self.reason = engine, reason
            name = type(self.module).__name__
            warnings.warn(f"{name} runs as {engine}; {reason}", stacklevel=2)
        return outputs

    def explain(self) -> str:
        """A line for each operation: the layer it is in, which way it runs, and why."""
        title = f"{type(self.module).__name__}: engine {self.engine}"
        if self.engine != "stacked":
            return f"{title}; {self.reason}" if self.reason else title
        rows = list(next(reversed(self._plans.values())).rows())
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
        return "\n".join([title, *lines])

    def not_stacked(self) -> list[str]:
        """Operations that have run in another way, and why."""
        plans = self._plans.values()
        return [f"{n.name}: {why}" for plan in plans for n, why in plan.reasons.items() if why]

    def parameters_in_half(self) -> set[str]:
        """Names of the parameters that precision "bf16" reads in bf16 only."""
        casts = self._plan({}).casts
        return set() if casts is None else casts.parameters_of_body()

    def _run(
        self, engine: str, state: dict[str, Stacked | Tensor], args: tuple, kwargs: dict, n: int
    ) -> Any:
        if engine == "stacked":
            return self._plan(kwargs).run(state, args, kwargs, n)
        way = by_vmap if engine == "vmap" else by_loop
        inputs = tensors_in((args, kwargs))
        function = call(self.module, copies=bool(self._copies))
        state = own_buffers(self.module, n) | state
        with (
            undone_on_failure(inputs if self._copies is None else ()),
            unchanged(self.module),
            refused_in_place(inputs),
        ):
            out = way(function, (state, args, kwargs), {}, n)
        self._copies = bool(self._copies)
        return out

    def _updated(self, params: Parameters) -> list[Tensor]:
        """The buffers among params that a pass may change, though another engine may yet need them
        as they were."""
        if not self._may_change or not any(layer.training for layer in self.module.modules()):
            return []
        return [params[name] for name, _ in self.module.named_buffers() if name in params]

    def _not_stacked(self, error: TraceFailed) -> Exception:
        return ValueError(
            f"{type(self.module).__name__} cannot be stacked: {error}; engine='auto' (on the "
            "command line --engine auto) evaluates it through vmap or in a loop"
        )

    def _plan(self, inputs: Mapping[str, Any]) -> Plan:
        """The graph for these inputs by name, {} for one input, in the present modes of all layers.

        Raises:
            TraceFailed: there is none.
        """
        names = [name for name, x in inputs.items() if isinstance(x, Tensor | Stacked)]
        fixed = {name: x for name, x in inputs.items() if name not in names}
        for name, value in fixed.items():
            if not isinstance(value, bool | int | float | str | None):
                raise TraceFailed(f"its input {name!r} is a {type(value).__name__}")
        modes = tuple(layer.training for layer in self.module.modules())
        key = (frozenset(names), repr(sorted(fixed.items())), modes)
        if key not in self._plans:
            traced = trace(self.module, names if inputs else None, fixed)
            fuse(traced.graph)
            self._plans[key] = Plan(self.module, traced, self.precision == "bf16")
        return self._plans[key]

    def _state(self, params: Parameters) -> tuple[int, dict[str, Stacked | Tensor]]:
        """N, and all parameters and the given buffers under all of their names."""
        if not params:
            raise ValueError("params must hold the module's parameters, got none")
        n = len(next(iter(params.values())))
        for name in params:
            if name not in self._own:
                raise ValueError(f"params hold {name}, which the module does not have")
        training = any(layer.training for layer in self.module.modules())
        state = {}
        for name, (tensor, first) in self._own.items():
            given = params.get(first, params.get(name))
            if given is not None:
                if given.shape != (n, *tensor.shape):
                    shape = ", ".join(map(str, ("N", *tensor.shape)))
                    raise ValueError(
                        f"{name} must be [{shape}] with N = {n}, got {list(given.shape)}"
                    )
                # Integers that are the same everywhere, as in a Path, are one value for all.
                alike = not given.dtype.is_floating_point and given.stride(0) == 0 and not training
                state[name] = given[0] if alike else Stacked(given)
            elif isinstance(tensor, nn.Parameter):
                raise ValueError(f"params lack {name}")
        return n, state

    def _input(self, x: Any, n: int, per_point: bool) -> Any:
        if not isinstance(x, Tensor):
            return x
        if per_point and len(x) != n:
            raise ValueError(f"x must be [N, B, ...] with N = {n}, got {list(x.shape)}")
        if x.ndim == 4 + per_point and (self.channels_last or not x.is_cuda):
            last = self.channels_last and (x.is_cuda or not self._unsafe_on_cpu)
            images = x.transpose(0, 1).flatten(1, 2) if per_point else x
            if last:
                images = images.contiguous(memory_format=torch.channels_last)
            else:  # of one channel, too, whose strides may else be those of channels-last
                images = images.contiguous().flatten().view(images.shape)
            x = images.unflatten(1, (n, -1)).transpose(0, 1) if per_point else images
        return Stacked(x) if per_point else x


def _with_first_names(named: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor, str]]:
    """(name, tensor, first name of the same tensor): tied parameters have several names."""
    first: dict[Tensor, str] = {}
    for name, tensor in named:
        yield name, tensor, first.setdefault(tensor, name)


def channels_last_is_unsafe(module: nn.Module) -> bool:
    """Whether oneDNN, on this CPU, gets the gradient of one of the convolutions wrong.

    In channels-last the weight gradient of a strided 1x1 convolution of fewer input channels than a
    vector register holds overruns a buffer (uxlfoundation/oneDNN issue 6035, seen in torch 2.14.1).
    """
    vector = 16 if "AVX512" in torch.backends.cpu.get_cpu_capability() else 8
    return any(
        max(layer.kernel_size) == 1
        and max(layer.stride) > 1
        and layer.groups == 1
        and layer.in_channels < vector
        for layer in module.modules()
        if isinstance(layer, nn.Conv2d)
    )


def part_of(params: Parameters, part: slice) -> dict[str, Tensor]:
    """Some of the networks; without a copy, and without a trace where they are all."""
    n = len(next(iter(params.values())))
    if part == slice(0, n):
        return dict(params)
    return {name: tensor[part] for name, tensor in params.items()}


def stack(
    module: nn.Module,
    *,
    engine: str = "auto",
    channels_last: bool = False,
    batchnorm: str = "refuse",
    precision: str = "fp32",
) -> StackedModule:
    """The module as a function of N networks' stacked parameters: `(params, x) -> [N, B, ...]`.

    Equivalent to::

        torch.stack([functionalcall(module, {k: v[i] for k, v in params.items()}, x)
                     for i in range(N)])

    Dropout draws for each network by itself; in train mode BatchNorm updates the running statistics
    in params in place, as it would a network's own.

    Args:
        module: any nn.Module, run in train or eval mode as it is; it is not changed (what its
            forward assigns to attributes is undone), and its own parameter values are not used.
            Hooks that are added later are not seen.
        engine: "stacked" is the traced graph, "vmap" torch.func.vmap of the whole module, "loop"
            one network after the other; "auto" the first of them that works. Those who want the
            fastest give "auto" to `fastgeo.optimize` and `fastgeo.evaluate`, which measure.
        channels_last: give the module its images [B, C, H, W] in channels-last memory format; not
            on a CPU where `channels_last_is_unsafe`.
        batchnorm: "refuse", or "recalibrate" for a module with BatchNorm, whose statistics are then
            buffers of each network like any other; see `fastgeo.recalibrate`.
        precision: "fp32" is parameters as they are, with fp32 products that no GPU rounds to TF32;
            "tf32" lets it; "bf16" casts parameters and inputs of all layers but the last ones,
            which are in fp32, as is the output. A backward pass outside of `fastgeo.optimize`
            rounds as torch.backends say.

    Raises:
        TypeError: anything else.
        ValueError: a module with BatchNorm, or one that cannot be traced if engine is "stacked" or
            precision "bf16".

    Example:
        >>> nets = [resnet(8, 0.5) for _ in range(3)]
        >>> params, _ = torch.func.stack_module_state(nets)
        >>> stack(nets[0])(params, torch.randn(5, 3, 32, 32)).shape
        torch.Size([3, 5, 10])
    """
    options = dict(engine=engine, channels_last=channels_last, batchnorm=batchnorm)
    return StackedModule(module, **options, precision=precision)
