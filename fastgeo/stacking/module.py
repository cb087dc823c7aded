"""Any nn.Module as a function of stacked parameters: N networks in one pass.

The module itself is called, on tensors that look like those of one network and hold those of all
(`fastgeo.forward.standin`, `fastgeo.stacking.passes`): a convolution becomes one with N groups, a
linear layer a batched matrix product, and so on (`fastgeo.operations`). A layer that decides by the
numbers that it computes runs in a loop over the networks; if that is the module itself, it does.
"""

import threading
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastgeo.data.inputs import Inputs, arguments
from fastgeo.data.outputs import logits_in
from fastgeo.forward.modes import (
    dense_gradients,
    no_fast_path,
    refuse_batch_norm,
    sparse_layers,
)
from fastgeo.forward.standin import RUNNING, Unfollowed, Unsupported, eagerly, held_by
from fastgeo.path import uncompiled
from fastgeo.stacking.passes import Known, StackedPass, in_loops, to_loop
from fastgeo.stacking.precision import Casts, check_precision, matmul_precision
from fastgeo.stacking.products import Products, products_in, waiting_beyond, waits_in_loops
from fastgeo.stacking.stacked import (
    ChangedInput,
    Stacked,
    by_loop,
    by_vmap,
    call,
    first_line,
    on_copies,
    own_buffers,
    refused_in_place,
    tensors_in,
    undone_on_failure,
    without_n,
)

Parameters = Mapping[str, Tensor]
LOCK = threading.RLock()  # a module holds other parameters while it is evaluated
ENGINES = ("stacked", "vmap", "loop")


class StackedModule:
    """What `stack` returns.

    Attributes:
        module: as it was given, or what torch.compile was given.
        engine: "stacked" where the module runs on stacked parameters, else "vmap" or "loop".
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
        output: str | None = None,
    ):
        module = uncompiled(module)
        if engine not in ("auto", *ENGINES):
            raise ValueError(f"engine must be auto, {', '.join(ENGINES)}, got {engine!r}")
        if batchnorm not in ("refuse", "recalibrate"):
            raise ValueError(f"batchnorm must be 'refuse' or 'recalibrate', got {batchnorm!r}")
        if batchnorm == "refuse":
            refuse_batch_norm(module)
        check_precision(precision)
        if precision == "bf16" and engine not in ("auto", "stacked"):
            raise ValueError(
                "precision 'bf16' keeps the head in fp32, which engine 'stacked' alone can tell, "
                f"not {engine!r}"
            )
        self.module, self.channels_last, self.precision = module, channels_last, precision
        self.engine, self.reason = "stacked" if engine == "auto" else engine, ""
        self.output = output
        self._own = {
            name: (tensor, first)
            for named in (module.named_parameters, module.named_buffers)
            for name, tensor, first in _with_first_names(named(remove_duplicate=False))
        }
        self._parameters = {n for n, (t, _) in self._own.items() if isinstance(t, nn.Parameter)}
        self._layers = list(module.modules())
        self._attributes = held_by(self._layers)
        self._sparse = sparse_layers(module)
        self._call = call(module, attributes=self._attributes)
        self._copies: bool | None = None  # whether the module changes its inputs, once it is known
        self._unsafe_on_cpu = channels_last_is_unsafe(module)
        self._known: dict[tuple, Known] = {}
        self._last: Known | None = None
        self._may_change = engine == "auto" and precision != "bf16"

    def __call__(self, params: Parameters, x: Inputs, *, per_point: bool = False) -> Tensor:
        """Evaluate N networks on inputs that they share, or on inputs of their own.

        Args:
            params: name -> [N, ...], parameters and buffers as in the module's `state_dict()` or
                `torch.func.stack_module_state`; buffers that are left out are the module's own.
            x: [B, ...], or [N, B, ...] if per_point; or a mapping, the keyword arguments of the
                module's forward: such tensors, and any other values. Labels in it are dropped.
            per_point: whether each network has an input of its own.

        Returns:
            [N, B, ...] outputs; all tensors in what the module returns, if that is a tuple or dict
            and no output of it is named.

        Raises:
            TypeError: the module does not return the output that is named.
            ValueError: params that are not of this module, or inputs of another N.
        """
        n, state = self._state(params)
        args, kwargs = arguments(self.module, x)
        args, kwargs = pytree.tree_map(lambda t: self._input(t, n, per_point), (args, kwargs))
        with LOCK:
            if RUNNING and not RUNNING[-1].paused:
                RUNNING[-1].refuse("its forward evaluates a stack of its own")
            return self._evaluate(params, state, args, kwargs, n)

    def by_rows(
        self, params: Parameters, x: Inputs, most: int | None, *, per_point: bool = False
    ) -> Tensor | Products:
        """As a call; but outputs of more than `most` numbers a network, which its last linear layer
        gives, are products yet to be computed, of all networks or of each one. They are computed by
        vmap, and where what follows that layer is not a function of every number by itself."""
        with waiting_beyond(most):
            return self(params, x, per_point=per_point)

    def _evaluate(
        self, params: Parameters, state: dict[str, Any], args: tuple, kwargs: dict, n: int
    ) -> Any:
        """What the engine gives, or the one that "auto" goes on with."""
        engine, reason = self.engine, self.reason
        while True:
            try:
                with undone_on_failure(self._updated(params)), matmul_precision(self.precision):
                    outputs = self._of_all(self._run(engine, state, args, kwargs, n), n)
                break
            except (torch.OutOfMemoryError, Unsupported):
                raise
            except ChangedInput as error:
                if self._copies is None:
                    self._copies = True
                    continue
                raise error
            except Exception as error:  # noqa: BLE001 - whatever the user's code raises
                failure = error
            if engine == "loop" or not self._may_change:
                followed = engine != "stacked" or not isinstance(failure, Unfollowed)
                raise failure if followed else self._not_stacked(failure) from failure
            engine, reason = "loop", first_line(failure)
        if engine != self.engine:
            self.engine, self.reason = engine, reason
            name = type(self.module).__name__
            warnings.warn(f"{name} runs as {engine}: {reason}", stacklevel=2)
        return outputs

    def _of_all(self, out: Any, n: int) -> Any:
        """What all networks returned: [N, ...], or what is to wait."""
        return products_in(out, self.precision) or without_n(out, n)

    def __repr__(self) -> str:
        layout = ", channels-last" if self.channels_last else ""
        name = type(self.module).__name__
        return f"{name} of N networks: engine {self.engine}{layout}, {self.precision}"

    def explain(self, inputs: Inputs | None = None) -> str:
        """Which way each call of the module runs, and why; of inputs, or of the last ones.

        The first line has the shares of calls and of parameters that run stacked, and in a loop;
        then there is a line for each call: its layer, its function, its way.
        """
        name = type(self.module).__name__
        if inputs is not None and self.engine == "stacked":
            params = {n: t.detach().expand(2, *t.shape) for n, t in self.module.named_parameters()}
            buffers = {n: t.expand(2, *t.shape).clone() for n, t in self.module.named_buffers()}
            with torch.no_grad():
                self(params | buffers, inputs)
        if self.engine != "stacked" or self._last is None or self._last.record is None:
            return f"{name}: engine {self.engine}" + (f": {self.reason}" if self.reason else "")
        names = {layer: name for name, layer in self.module.named_modules()}
        rows = [(names.get(e.layer, ""), e.name, e.way) for e in self._last.record]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
        return "\n".join([f"{name}: engine stacked; {self._shares(self._last)}", *lines])

    def not_stacked(self) -> list[str]:
        """Calls that have run in another way, and why."""
        return [
            f"{entry.name}: {entry.way}"
            for known in self._known.values()
            for entry in known.record or ()
            if _way(entry.way) != "stacked"
        ]

    def reads(self) -> list[str]:
        """Calls by which the forward, in its last pass that was recorded, looks at numbers."""
        record = self._last.record if self._last is not None else None
        return [f"{e.name}: {e.way}" for e in record or () if e.way.startswith("read by")]

    def parameters_in_half(self) -> set[str]:
        """Names of parameters that precision "bf16" reads in bf16 only, as the last pass did."""
        casts = self._last and self._last.casts
        return set(casts.of_body) if casts else set()

    def _shares(self, known: Known) -> str:
        """'12 calls: 75% stacked, 25% loop; 340 parameters: 100% stacked'."""
        calls = Counter(_way(entry.way) for entry in known.record or ())
        ways: dict[str, str] = {}
        for entry in known.record or ():
            own = {name for of, at in entry.given if at is None for name in of or ()}
            for name in own:
                worst = max(ways.get(name, "stacked"), _way(entry.way), key=ENGINES.index)
                ways[name] = worst
        numbers: Counter[str] = Counter()
        for name, way in ways.items():
            numbers[way] += self._own[name][0].numel()
        parts = []
        for what, counted in (("calls", calls), ("parameters", numbers)):
            total = sum(counted.values())
            shares = [f"{counted[way] / total:.0%} {way}" for way in ENGINES if counted[way]]
            parts.append(f"{total:,} {what}: {', '.join(shares) or 'none'}")
        return "; ".join(parts)

    def _run(
        self, engine: str, state: dict[str, Stacked | Tensor], args: tuple, kwargs: dict, n: int
    ) -> Any:
        whole = on_copies(self._call) if self._copies else self._call
        function = lambda *given: logits_in(whole(*given), self.output)  # noqa: E731
        if self._training() or self._copies:
            state = own_buffers(self.module, n) | state
        own = [t for name, (t, _) in self._own.items() if name not in state and t.numel()]
        shared = tensors_in((args, kwargs, own))
        with (
            undone_on_failure(shared if self._copies is None else ()),
            no_fast_path(),
            dense_gradients(self._sparse),
            eagerly(),
            refused_in_place(shared),
        ):
            if engine == "stacked":
                out = self._stacked(function, state, args, kwargs, n)
            elif engine == "vmap":
                out = by_vmap(function, (state, args, kwargs), n)
            else:
                with waits_in_loops():
                    out = by_loop(function, (state, args, kwargs), {}, n)
        self._copies = bool(self._copies)
        return out

    def _stacked(self, function: Any, state: dict, args: tuple, kwargs: dict, n: int) -> Any:
        """The module on stacked values; a layer that cannot be followed in a loop from then on."""
        known = self._known_of(args, kwargs)
        if self.precision == "bf16" and known.casts is None:
            known.casts = self._casts(function, state, args, kwargs)
        looped = dict(known.looped)
        of_networks = [value for value in state.values() if isinstance(value, Stacked)]
        parameters = [value.tensor for value in of_networks if value.of is not None]
        versions = [tensor._version for tensor in parameters]
        updated = [value.tensor for value in of_networks if value.of is None]
        updated = updated if self._training() or known.record is None else []
        while True:
            records = known.record is None
            run = StackedPass(n, known, self._attributes, records=records, casts=known.casts)
            try:
                with undone_on_failure(updated), in_loops(run), run:
                    out = function(state, args, kwargs)
                out = run.finish(out)
                break
            except (torch.OutOfMemoryError, Unsupported):
                raise
            except Exception as error:  # noqa: BLE001 - whatever the user's forward raises
                if versions != [tensor._version for tensor in parameters]:
                    raise Unsupported(
                        f"its forward changes parameters in place, then: {error}"
                    ) from error
                layer = to_loop(error, self.module, known)
                if layer is self.module:
                    known.looped = looped
                    raise
                known.looped[layer] = first_line(error)
        if known.record is None:
            known.record = run.record
        for layer in known.looped.keys() - looped.keys():
            reason = f"{type(layer).__name__} runs in a loop over the networks"
            run.failed.append(f"{reason}: {known.looped[layer]}")
        for failure in run.failed:
            warnings.warn(failure, stacklevel=5)
        self._last = known
        return out

    def _known_of(self, args: tuple, kwargs: dict) -> Known:
        """What is known of passes over inputs like these, in the present modes."""
        leaves = pytree.tree_leaves((args, kwargs))
        kinds = tuple(x if isinstance(x, bool | str | None) else type(x) for x in leaves)
        modes = tuple(layer.training for layer in self._layers)
        shapes: tuple[tuple[int, ...], ...] = ()
        if self.precision == "bf16":  # of which layers are told apart by their numbers
            shapes = tuple(tuple(x.shape) for x in leaves if torch.is_tensor(x))
        key = (kinds, tuple(kwargs), shapes, modes, torch.is_grad_enabled())
        return self._known.setdefault(key, Known())

    def _casts(self, function: Any, state: dict, args: tuple, kwargs: dict) -> Casts:
        """What of the module is its body and its head, from a pass over one network."""

        def first(value: Tensor) -> Stacked:
            t = value.tensor[:1] if isinstance(value, Stacked) else value[None]
            half = t.is_floating_point() and t.dtype != torch.float64
            return Stacked(t.to(torch.float32, copy=True) if half else t.clone())

        state = {name: first(value) for name, value in state.items()}
        args, kwargs = pytree.tree_map_only(Tensor, first, (args, kwargs))
        for name, value in state.items():
            if name in self._parameters:
                value.of = frozenset([self._own[name][1]])
        run = StackedPass(1, Known(), self._attributes, records=True)
        with torch.no_grad(), run:
            out = function(state, args, kwargs)
        return Casts(
            run.record or (), [t for t in pytree.tree_leaves(out) if isinstance(t, Stacked)]
        )

    def _training(self) -> bool:
        return any(layer.training for layer in self._layers)

    def _updated(self, params: Parameters) -> list[Tensor]:
        """The buffers among params that a pass may change, though it may be tried once more."""
        if not self._training():
            return []
        return [params[name] for name, _ in self.module.named_buffers() if name in params]

    def _not_stacked(self, error: Exception) -> Exception:
        return ValueError(
            f"{type(self.module).__name__} cannot be stacked: {error}; engine='auto' (on the "
            "command line --engine auto) evaluates it in a loop"
        )

    def _state(self, params: Parameters) -> tuple[int, dict[str, Stacked | Tensor]]:
        """N, and all parameters and the given buffers under all of their names."""
        if not params:
            raise ValueError("params must hold the module's parameters, got none")
        n = len(next(iter(params.values())))
        for name in params:
            if name not in self._own:
                raise ValueError(f"params hold {name}, which the module does not have")
        training = self._training()
        state: dict[str, Stacked | Tensor] = {}
        for name, (tensor, first) in self._own.items():
            if first in state:  # tied
                state[name] = state[first]
                continue
            given = params.get(first, params.get(name))
            if given is not None:
                if given.shape != (n, *tensor.shape):
                    shape = ", ".join(map(str, ("N", *tensor.shape)))
                    raise ValueError(
                        f"{name} must be [{shape}] with N = {n}, got {list(given.shape)}"
                    )
                # Integers that are the same everywhere, as in a Path, are one value for all.
                alike = not given.dtype.is_floating_point and given.stride(0) == 0 and not training
                own = given[0] if alike else Stacked(given)
                if isinstance(own, Stacked) and name in self._parameters:
                    own.of = frozenset([first])
                state[name] = own
            elif name in self._parameters:
                raise ValueError(f"params lack {name}")
            elif tensor.is_meta:
                raise ValueError(f"params lack {name}, which the module has on the meta device")
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


def _way(way: str) -> str:
    """The engine of an entry in a record."""
    found = way.partition(":")[0]
    return found if found in ENGINES else "stacked"


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
    """Some of the networks, without a copy."""
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
    output: str | None = None,
) -> StackedModule:
    """The module as a function of N networks' stacked parameters: `(params, x) -> [N, B, ...]`.

    Equivalent to::

        torch.stack([functionalcall(module, {k: v[i] for k, v in params.items()}, x)
                     for i in range(N)])

    Dropout draws for each network by itself; in train mode BatchNorm updates the running statistics
    in params in place, as it would a network's own.

    Args:
        module: any nn.Module, run in train or eval mode as it is; it is not changed (what its
            forward assigns to attributes is undone), and its own parameter values are not used. Of
            one that torch.compile gave, the module within.
        engine: "stacked" calls the module on tensors that look like those of one network and hold
            those of all, by stacked forms and torch's batching rules; a call without either runs in
            a loop, and a layer that decides by numbers on which the networks differ, or has a
            torch.autograd.Function or gradient hooks, runs in a loop over the networks. Where that
            is the module itself, "stacked" raises and "auto" goes on with "loop". "vmap" is
            torch.func.vmap of the whole module, "loop" one network after the other. Those who want
            the fastest give "auto" to `fastgeo.optimize` and `fastgeo.evaluate`, which measure.
        channels_last: give the module its images [B, C, H, W] in channels-last memory format; not
            on a CPU where `channels_last_is_unsafe`.
        batchnorm: "refuse", or "recalibrate" for a module with BatchNorm, whose statistics are then
            buffers of each network like any other; see `fastgeo.recalibrate`.
        precision: "fp32" is parameters as they are, with fp32 products that no GPU rounds to TF32;
            "tf32" lets it; "bf16" casts parameters and inputs of all layers but the last ones,
            which are in fp32, as is the output. A backward pass outside of `fastgeo.optimize`
            rounds as torch.backends say.
        output: name of the one output that is wanted, an attribute or key of what the module
            returns; None for all of it. "logits" is also a tensor by itself, one named "out", or
            else the first of a tuple or list.

    Raises:
        TypeError: anything else, TorchScript included.
        ValueError: a module with BatchNorm, or an unknown option; when it is called, a module that
            cannot be stacked if engine is "stacked" or precision "bf16".

    Example:
        >>> nets = [resnet(8, 0.5) for _ in range(3)]
        >>> params, _ = torch.func.stack_module_state(nets)
        >>> stack(nets[0])(params, torch.randn(5, 3, 32, 32)).shape
        torch.Size([3, 5, 10])
    """
    return StackedModule(
        module,
        engine=engine,
        channels_last=channels_last,
        batchnorm=batchnorm,
        precision=precision,
        output=output,
    )
