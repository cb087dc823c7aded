"""A path of N networks: two fixed ends, and what is between them as a map of control points."""

import operator
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from fastgeo import figures
from fastgeo.basis import Basis, Kind
from fastgeo.store.files import read_tensors, write_tensors
from fastgeo.store.weights import write_pretrained

if TYPE_CHECKING:
    from matplotlib.figure import Figure

StateDict = Mapping[str, Tensor]
WRAPPERS = (
    nn.DataParallel,
    nn.parallel.DistributedDataParallel,
    torch.optim.swa_utils.AveragedModel,
)


class Path:
    """N networks from a start to an end, on a curve that control points span.

    The network at t is B(t) @ controls. Most often the control points are the N points themselves,
    with straight lines between them (`linear`); a curve may have fewer (`bezier`, `polychain`).

    Attributes:
        start, end: name -> tensor, as in `state_dict()`.
        interior: name -> [K - 2, ...], the floating point entries of the control points between the
            ends; K is N where they are the points. Integer entries are the same in all points and
            live in `start` and `end` only.
        kind: "polychain", straight lines from one control point to the next, or "bezier".
        free: whether the control points are the points.
        interpolated: names of buffers that differ between the ends and are interpolated knowingly.
        history: of a path that `fastgeo.optimize` returned, a mapping for each step of that call
            with "step", "points" (N), "energy" (nats) and "sqrt_jsd" before it and "seconds" since
            the first one, and a last one for the path itself, whose energy is that on the last
            batch. "euclidean" is in the first and the last one, and in all of them where there was
            an on_step or checkpoints. Empty for all other paths; it is not saved.

    Example:
        >>> path = Path.linear(model_a, model_b, 25)
        >>> model_a.load_state_dict(path.at(0.5))
        <All keys matched successfully>
    """

    def __init__(
        self,
        start: StateDict,
        interior: Mapping[str, Tensor],
        end: StateDict,
        interpolated: Iterable[str] = (),
        *,
        kind: Kind = "polychain",
        points: int | None = None,
    ):
        self.start, self.interior, self.end = dict(start), dict(interior), dict(end)
        self.kind, self.free = kind, points is None
        self._points = self.basis.size if points is None else points
        self._weights: Tensor | None = None  # of the points between the ends, once they are asked
        self.history: list[dict[str, float]] = []
        self.interpolated = frozenset(interpolated)

    @classmethod
    def linear(
        cls,
        a: StateDict | nn.Module,
        b: StateDict | nn.Module,
        n: int,
        *,
        spacing: str = "even",
        batchnorm: str = "refuse",
        interpolate_buffers: Collection[str] = (),
    ) -> "Path":
        """The straight line from a to b.

        Args:
            a, b: two modules, or two state dicts of one module; copied.
            n: N, points with both ends, at least 3.
            spacing: "even" places point i at i / (N - 1); "release" places the interior at
                i / (N + 1), as the paper's public code does.
            batchnorm: "refuse" networks with BatchNorm, or "recalibrate": their running statistics
                are to be computed anew by `fastgeo.recalibrate`, as is all else that a network
                updates by itself in train mode.
            interpolate_buffers: names of other buffers that differ and are to be interpolated as
                the weights are, a codebook for one. State dicts do not say what is a buffer, so
                those of them are looked at where the path meets its module.

        Raises:
            ValueError: n < 3, an unknown spacing, ends that do not fit each other, or a buffer that
                differs between them and is not to be interpolated.
        """
        modules = [network for network in (a, b) if isinstance(network, nn.Module)]
        a, b = state_dict(a), state_dict(b)
        check_same_form(a, b, batchnorm=batchnorm)
        for name in interpolate_buffers:
            if name not in a:
                raise ValueError(
                    f"interpolate_buffers names {name}, which the two ends do not have"
                )
        if modules and batchnorm == "refuse":
            check_buffers(a, b, uncompiled(modules[0]), interpolated=interpolate_buffers)
        if not any(tensor.is_floating_point() for tensor in a.values()):
            raise ValueError("the two ends have no floating point entries to interpolate")
        _check_points(n)
        if spacing not in ("even", "release"):
            raise ValueError(f"spacing must be 'even' or 'release', got {spacing!r}")
        position = torch.arange(1, n - 1) / (n - 1 if spacing == "even" else n + 1)
        interior = {}
        for name, start in a.items():
            if start.is_floating_point():
                t = position.to(start).view(-1, *(1,) * start.ndim)
                line = torch.lerp(start[None], b[name][None], t)
                interior[name] = line.where(start != b[name], start)  # of infinities, too
        return cls(a, interior, b, interpolate_buffers)

    @classmethod
    def bezier(
        cls,
        a: StateDict | nn.Module,
        b: StateDict | nn.Module,
        n: int,
        *,
        controls: int = 1,
        batchnorm: str = "refuse",
        interpolate_buffers: Collection[str] = (),
    ) -> "Path":
        """The straight line from a to b as a Bezier curve, which bends when it is optimised.

        Args:
            a, b, n, batchnorm, interpolate_buffers: as in `linear`; point i of N is at
                t = i / (N - 1).
            controls: control points between the ends, at least 1.

        Raises:
            ValueError: as in `linear`, or controls < 1.

        Example:
            >>> path = Path.bezier(model_a, model_b, 25)
            >>> path = optimize(path, model_a, batches, descent=Descent(nodes=3))
        """
        return cls._curve(a, b, n, "bezier", controls, batchnorm, interpolate_buffers)

    @classmethod
    def polychain(
        cls,
        a: StateDict | nn.Module,
        b: StateDict | nn.Module,
        n: int,
        *,
        bends: int = 1,
        batchnorm: str = "refuse",
        interpolate_buffers: Collection[str] = (),
    ) -> "Path":
        """The straight line from a to b as a chain of bends + 1 lines; otherwise as `bezier`."""
        return cls._curve(a, b, n, "polychain", bends, batchnorm, interpolate_buffers)

    @classmethod
    def _curve(
        cls,
        a: StateDict | nn.Module,
        b: StateDict | nn.Module,
        n: int,
        kind: Kind,
        controls: int,
        batchnorm: str,
        interpolate_buffers: Collection[str],
    ) -> "Path":
        if controls < 1:
            name = "bends" if kind == "polychain" else "controls"
            raise ValueError(f"{name} must be at least 1, got {controls}")
        _check_points(n)
        how: dict[str, Any] = dict(batchnorm=batchnorm, interpolate_buffers=interpolate_buffers)
        line = cls.linear(a, b, controls + 2, **how)
        own = line.start, line.interior, line.end, line.interpolated
        return cls(*own, kind=kind, points=n)

    def with_interior(self, interior: Mapping[str, Tensor]) -> "Path":
        """A curve of this kind with other control points between the ends."""
        points = None if self.free else len(self)
        own = self.start, interior, self.end, self.interpolated
        return Path(*own, kind=self.kind, points=points)

    @property
    def basis(self) -> Basis:
        return Basis(self.kind, len(next(iter(self.interior.values()))) + 2)

    @property
    def controls(self) -> dict[str, Tensor]:
        """name -> [K, ...], the floating point entries of the control points with both ends."""
        return {
            name: torch.cat([self.start[name][None], between, self.end[name][None]])
            for name, between in self.interior.items()
        }

    def __len__(self) -> int:
        """N."""
        return self._points

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        """The state dict of point i, counted from the end if negative; it shares the path's memory.

        Raises:
            IndexError: there is no such point.
            TypeError: no whole number.
        """
        try:
            point = range(len(self))[operator.index(i)]
        except IndexError:
            raise IndexError(
                f"the path has {len(self)} points, 0..{len(self) - 1} or -{len(self)}..-1, got {i}"
            ) from None
        return self._point(point)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """The N state dicts, from start to end."""
        return self.points()

    def __repr__(self) -> str:
        held = sum(t.nbytes for part in self._parts().values() for t in part.values())
        curve = "" if self.free else f" on a {self.kind} of {self.basis.size} control points"
        return (
            f"Path({len(self)} points of {size_of(self.start)} each{curve}; "
            f"{held / 2**20:,.1f} MiB, {self.device})"
        )

    @property
    def device(self) -> torch.device:
        return next(iter(self.interior.values())).device

    def to(self, device: torch.device | str) -> "Path":
        """The same path on another device."""
        parts = self._parts().items()
        return Path._of({name: {k: v.to(device) for k, v in p.items()} for name, p in parts})

    def stacked(self) -> dict[str, Tensor]:
        """All points: name -> [N, ...], the form of `torch.func.stack_module_state`."""
        stacked = self.stacked_interior()
        for name, between in stacked.items():
            start, end = self.start[name], self.end[name]
            if name in self.interior or not torch.equal(start, end):
                stacked[name] = torch.cat([start[None], between, end[None]])
            else:
                stacked[name] = start.expand(len(self), *start.shape)
        return stacked

    def stacked_interior(self) -> dict[str, Tensor]:
        """All points but the ends: name -> [N - 2, ...], integer entries included."""
        interior = self.freed().interior
        return {
            name: interior.get(name, constant.expand(len(self) - 2, *constant.shape))
            for name, constant in self.start.items()
        }

    def points(self) -> Iterator[dict[str, Tensor]]:
        """The N state dicts, from start to end."""
        for i in range(len(self)):
            yield self._point(i)

    def plot(self, *, title: str = "") -> "Figure":
        """Lengths of the path during its optimisation, from its history.

        Raises:
            ValueError: it has none.
        """
        if not self.history:
            raise ValueError("only a path that optimize returned has a history to draw")
        return figures.lengths(self.history, title=title)

    def at(self, t: float) -> dict[str, Tensor]:
        """The state dict at t in [0, 1]: point i at i / (N - 1), on the curve between points, which
        are straight lines where the control points are the points.

        Raises:
            ValueError: t outside [0, 1].
        """
        if not 0 <= t <= 1:
            raise ValueError(f"t must be within [0, 1], got {t}")
        if self.kind == "bezier":
            mixed = self.mixed(self.basis.weights(torch.tensor([t], dtype=torch.float64)))
            return {name: mixed[name][0] if name in mixed else s for name, s in self.start.items()}
        edges = self.basis.size - 1
        edge = min(int(t * edges), edges - 1)
        weight = t * edges - edge
        low, high = self._control(edge), self._control(edge + 1)
        return {
            name: torch.lerp(low[name], high[name], weight) if name in self.interior else low[name]
            for name in low
        }

    def resample(self, n: int) -> "Path":
        """The same curve with N = n: point i is `at(i / (n - 1))`.

        With 2 N - 1 points, those of the path and the midpoints between them. Control points that
        are the points become n, too; others stay, and are shared with this path, as is all where n
        is its own N.

        Raises:
            ValueError: n < 3.
        """
        _check_points(n)
        if n == len(self):
            return self
        if not self.free:
            own = self.start, self.interior, self.end, self.interpolated
            return Path(*own, kind=self.kind, points=n)
        edges = len(self) - 1
        places = torch.arange(1, n - 1, dtype=torch.float64) * edges / (n - 1)
        edge = places.floor().long().clamp(max=edges - 1)
        interior = {}
        for name, whole in self.controls.items():
            weight = (places - edge).to(whole).view(-1, *(1,) * (whole.ndim - 1))
            low = edge.to(whole.device)
            interior[name] = torch.lerp(whole[low], whole[low + 1], weight)
        return Path(self.start, interior, self.end, self.interpolated)

    def refined(self, size: int) -> "Path":
        """The curve with K = size control points: the same one where this is a refinement
        (`Basis.levels`), else one that meets it at as many even t."""
        if size == self.basis.size:
            return self
        if self.free:
            return self.resample(size)
        mixed = self.mixed(self.basis.refinement(size)[1:-1])
        return self.with_interior(mixed)

    def freed(self) -> "Path":
        """A path whose control points are the N points of this one; itself if they are already."""
        if self.free:
            return self
        if self._weights is None:  # kept: a captured step may read them, but not make them
            t = torch.arange(1, len(self) - 1, dtype=torch.float64) / (len(self) - 1)
            self._weights = self.basis.weights(t).to(self.device)
        return Path(self.start, self.mixed(self._weights), self.end, self.interpolated)

    def mixed(self, weights: Tensor) -> dict[str, Tensor]:
        """name -> [T, ...], the floating point entries of weights [T, K] @ controls."""
        return {name: _product(weights, whole) for name, whole in self.controls.items()}

    def euclidean(self) -> Tensor:
        """[E], the Euclidean distance of neighbouring points over all floating point entries."""
        squares = torch.zeros(len(self) - 1, device=self.device)
        for name, between in self.freed().interior.items():
            start, end = self.start[name], self.end[name]
            steps = torch.cat([between[:1] - start, between.diff(dim=0), end - between[-1:]])
            steps.masked_fill_((start == end) & start.isinf(), 0)  # as of a mask, which stays
            steps = steps.to(torch.promote_types(steps.dtype, torch.float32))
            squares = squares + steps.reshape(len(steps), -1).square().sum(1)
        return squares.sqrt()

    def save(self, file: str | os.PathLike) -> None:
        """Write one safetensors file: start/NAME, interior/NAME [K - 2, ...], end/NAME and, unless
        the control points are the points, curve/KIND, which is N."""
        write_tensors(FilePath(file), "path", self._parts())

    def export(self, t: float, folder: str | os.PathLike, *, like: str | os.PathLike) -> None:
        """Write the network at t as a folder that the `from_pretrained` of transformers loads.

        Args:
            t: as in `at`.
            folder: a new or an empty one.
            like: a folder of `save_pretrained`, that of an end, say. All of its files but weights
                are copied, the configuration and the tokenizer among them, and weights are written
                in the types that they have there; tied ones, which are there once, stay tied.

        Raises:
            ValueError: t outside [0, 1], `folder` is not empty, `like` cannot be read, or its
                weights have other names or shapes than the path's, as of another vocabulary.

        Example:
            >>> path = Path.linear(*map(GPT2LMHeadModel.from_pretrained, ("tuned-a", "tuned-b")), 9)
            >>> path.export(0.5, "merged", like="tuned-a")
        """
        write_pretrained(FilePath(folder), self.at(t), FilePath(like))

    @classmethod
    def load(cls, file: str | os.PathLike, device: torch.device | str = "cpu") -> "Path":
        """Read what `save` wrote.

        Raises:
            ValueError: a missing or damaged file, or one that holds no path.
        """
        return cls._of(read_tensors(FilePath(file), "path", device))

    def _parts(self) -> dict[str, dict[str, Tensor]]:
        parts = {"start": self.start, "interior": self.interior, "end": self.end}
        if self.interpolated:
            parts["interpolated"] = {name: torch.empty(0) for name in sorted(self.interpolated)}
        return parts if self.free else parts | {"curve": {self.kind: torch.tensor(len(self))}}

    @classmethod
    def _of(cls, parts: Mapping[str, Mapping[str, Any]]) -> "Path":
        """The path that had these parts."""
        ((kind, points),) = parts.get("curve", {"polychain": None}).items()
        points = None if points is None else int(points)
        own = parts["start"], parts["interior"], parts["end"], parts.get("interpolated", ())
        return cls(*own, kind=cast(Kind, kind), points=points)

    def _point(self, i: int) -> dict[str, Tensor]:
        if i in (0, len(self) - 1):
            return dict(self.start if i == 0 else self.end)
        return self._control(i) if self.free else self.at(i / (len(self) - 1))

    def _control(self, i: int) -> dict[str, Tensor]:
        if i in (0, self.basis.size - 1):
            return dict(self.start if i == 0 else self.end)
        between = {name: tensor[i - 1] for name, tensor in self.interior.items()}
        return {name: between.get(name, constant) for name, constant in self.start.items()}


def state_dict(network: StateDict | nn.Module) -> dict[str, Tensor]:
    """A copy of the state of a module or state dict, as `state_of` gives it."""
    return {name: tensor.clone() for name, tensor in state_of(network).items()}


def state_of(network: StateDict | nn.Module) -> dict[str, Tensor]:
    """The state of a module or state dict, not copied, without the prefix of torch.compile and
    without extra states, which are no tensors of numbers.

    Raises:
        TypeError: anything else, or entries that are packed or quantised.
    """
    if isinstance(network, nn.Module):
        network = uncompiled(network).state_dict()
    if not isinstance(network, Mapping):
        raise TypeError(
            f"a network must be an nn.Module or a state dict, got {type(network).__name__}"
        )
    network = {k: tensor for k, tensor in network.items() if not str(k).endswith("_extra_state")}
    check_numbers("a state dict", network)
    compiled = "_orig_mod." if all(name.startswith("_orig_mod.") for name in network) else ""
    return {name.removeprefix(compiled): tensor.detach() for name, tensor in network.items()}


def check_numbers(where: str, state: Mapping[str, Any]) -> None:
    """TypeError, which begins with where, unless all entries of a state are tensors of numbers."""
    for name, value in state.items():
        if not torch.is_tensor(value) or value.is_quantized:
            kind = "quantised" if torch.is_tensor(value) else f"a {type(value).__name__}"
            raise TypeError(
                f"{where}: {name} is {kind}, and no tensor of numbers that can be interpolated; "
                "give the state of the network before it was packed or quantised"
            )


def uncompiled(module: nn.Module) -> nn.Module:
    """The module itself, without torch.compile and without what only calls it.

    Raises:
        TypeError: anything else than a module written in Python.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be an nn.Module, got {type(module).__name__}")
    if isinstance(module, torch.jit.ScriptModule):
        raise TypeError(
            f"{type(module).__name__} is TorchScript, whose forward cannot be called on other "
            "parameters; give the nn.Module that it was made of"
        )
    inner = module.module if isinstance(module, WRAPPERS) else getattr(module, "_orig_mod", module)
    return inner if inner is module else uncompiled(inner)


def _check_points(n: int) -> None:
    if n < 3:
        raise ValueError(f"points must be at least 3 (two ends and one between), got {n}")


def _product(weights: Tensor, stacked: Tensor) -> Tensor:
    """[T, ...] of weights [T, K] and a tensor [K, ...]; of half precision taken in fp32."""
    precise = torch.promote_types(stacked.dtype, torch.float32)
    flat = stacked.reshape(len(stacked), -1).to(precise)
    product = weights.to(flat) @ flat
    return product.view(-1, *stacked.shape[1:]).to(stacked.dtype)


def size_of(state: StateDict) -> str:
    """How many numbers a state has, and of what type, in words."""
    count = sum(tensor.numel() for tensor in state.values())
    types = {str(t.dtype).removeprefix("torch."): None for t in state.values()}
    return f"{count:,} numbers ({', '.join(types)})"


def check_path_of(path: Path, module: nn.Module) -> nn.Module:
    """The module without its wrappers (`uncompiled`), of which the points of path are.

    Raises:
        TypeError, ValueError: anything else, naming the first difference.
    """
    if not isinstance(path, Path):
        raise TypeError(f"path must be a fastgeo.Path, got {type(path).__name__}")
    module = uncompiled(module)
    state = state_of(module)
    for name in [*state, *path.start]:
        if name not in state or name not in path.start:
            there, missing = ("path", "module") if name in path.start else ("module", "path")
            raise ValueError(f"{name} is in the {there} and not in the {missing}")
        if state[name].shape != path.start[name].shape:
            raise ValueError(
                f"{name} has shape {list(path.start[name].shape)} in the path and "
                f"{list(state[name].shape)} in the module"
            )
        own, wanted = path.start[name].dtype, state[name].dtype
        if own != wanted and {own, wanted} & {torch.bfloat16, torch.float16}:
            raise ValueError(
                f"{name} has dtype {own} in the path and {wanted} in the module; give both in one, "
                f"for example by module.to({own})"
            )
    for where, part in (("start", path.start), ("interior", path.interior), ("end", path.end)):
        check_tied(part, module, f"the {where} of the path")
    return module


def check_tied(state: StateDict, module: nn.Module, where: str) -> None:
    """ValueError if what is one tensor in the module, under several names, is not one in a state.

    Args:
        state: name -> tensor, some names of the module's or all.
        where: the state, in words.
    """
    for named in (module.named_parameters, module.named_buffers):
        first: dict[Tensor, str] = {}
        for name, tensor in named(remove_duplicate=False):
            if name in state:
                other = first.setdefault(tensor, name)
                if name != other and not torch.equal(state[name], state[other]):
                    raise ValueError(
                        f"{other} and {name} are one tensor in the module and differ in {where}; "
                        "give both the same values, or a module in which they are not tied"
                    )


def check_buffers(
    a: StateDict,
    b: StateDict,
    module: nn.Module,
    *,
    interpolated: Collection[str] = (),
    updated: Collection[str] = (),
) -> None:
    """ValueError, naming the first buffer of the module that differs between two of its states.

    Args:
        interpolated: names of those that may, unless they are masks.
        updated: names of those that the network updates by itself, so that they will be computed.
    """
    for name, _ in module.named_buffers(remove_duplicate=False):
        if name not in a or name in updated or torch.equal(a[name], b[name]):
            continue
        if _is_mask(a[name]) and _is_mask(b[name]):
            raise ValueError(
                f"{name} is a mask of zeros and ones that differs between the two ends, and no "
                "network between them has one; give both the same mask, or make it part of the "
                "weights (torch.nn.utils.prune.remove)"
            )
        if not a[name].is_floating_point():
            raise ValueError(f"{name} is not floating point and differs between the two ends")
        if name not in interpolated:
            raise ValueError(
                f"{name} is a buffer, which no training moves, and differs between the two ends; "
                "what a network updates by itself in train mode is computed anew with "
                "batchnorm='recalibrate', and anything else is interpolated if that is wanted: "
                f"Path.linear(..., interpolate_buffers=[{name!r}])"
            )


def _is_mask(tensor: Tensor) -> bool:
    """Whether it holds nothing but zeros and ones, and more than one number."""
    return tensor.ndim > 0 and bool(((tensor == 0) | (tensor == 1)).all())


def check_same_form(a: StateDict, b: StateDict, *, batchnorm: str = "refuse") -> None:
    """ValueError, naming the first difference, unless a and b are states of one module."""
    if batchnorm not in ("refuse", "recalibrate"):
        raise ValueError(f"batchnorm must be 'refuse' or 'recalibrate', got {batchnorm!r}")
    for name in [*a, *b]:
        if name not in a or name not in b:
            there, missing = ("a", "b") if name in a else ("b", "a")
            raise ValueError(f"the two ends differ: {name} is in {there} and not in {missing}")
        if name.endswith("running_mean") and batchnorm == "refuse":
            raise ValueError(
                f"{name} belongs to a BatchNorm (or an InstanceNorm that tracks), whose running "
                "statistics do not interpolate between networks; use GroupNorm or LayerNorm (or "
                "track_running_stats=False) in its place and train again, or have them computed "
                "anew with batchnorm='recalibrate'"
            )
        if a[name].shape != b[name].shape:
            raise ValueError(
                f"the two ends differ: {name} has shape {list(a[name].shape)} in a and "
                f"{list(b[name].shape)} in b"
            )
        for what in ("dtype", "device"):
            found = [getattr(end[name], what) for end in (a, b)]
            if found[0] != found[1]:
                raise ValueError(
                    f"the two ends differ: {name} has {what} {found[0]} in a and {found[1]} in b"
                )
        if a[name].is_floating_point():
            for end, tensor in (("a", a[name]), ("b", b[name])):
                if not (tensor.isfinite() | (a[name] == b[name])).all():  # as in a causal mask
                    raise ValueError(
                        f"{name} is not finite in {end}, which no path can end in; look at how it "
                        "was trained"
                    )
            continue
        count = batchnorm == "recalibrate" and not a[name].ndim  # of batches, say
        if not (count or torch.equal(a[name], b[name])):
            raise ValueError(f"{name} is not floating point and differs between the two ends")
