"""Which engine evaluates the networks, and how many at a time: as asked, or as measured.

No engine is the fastest everywhere: stacking saves most where operations are small; for wide
networks on a CPU a few at a time, or a loop in channels-last, may win. All give the same numbers up
to rounding, which is checked once on a few inputs, for as many networks as are evaluated at once,
gradients included and also of an engine that is named; so candidates take turns at the real work
until the fastest is known, and none of it is done twice.
"""

import contextlib
import time
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fastgeo.data.inputs import Inputs, each_tensor, tensors_of
from fastgeo.forward.modes import evaluation_mode
from fastgeo.forward.options import Forward, bytes_of, size_of, way
from fastgeo.forward.standin import Unsupported
from fastgeo.stacking.module import Parameters, StackedModule, channels_last_is_unsafe, part_of
from fastgeo.stacking.precision import matmul_precision, multiplies_in_bf16
from fastgeo.stacking.products import Product, Products
from fastgeo.stacking.stacked import first_line
from fastgeo.step.agreement import (
    check_agreement,
    few_of,
    networks_like,
    outputs_and_gradients,
    refuse_probabilities,
    refuse_random,
)
from fastgeo.step.logits import Logits, most_in, most_of_each
from fastgeo.step.memory import activation_bytes, free_bytes, step_memory

T = TypeVar("T")
VISITS = 3  # of each candidate, the first of them to warm up
LONG = 2.0  # seconds; one visit of that length is enough
CLEARLY = 0.95  # of an earlier candidate's time, for a later one to be preferred
FEW = 4  # networks in one pass, whose memory stays in reach: the allocator's, and the processor's


@dataclass(frozen=True)
class Engine:
    """One way to evaluate N networks.

    Attributes:
        network: the module as a function of stacked parameters.
        chunk: networks in one pass; None for all.
    """

    network: StackedModule
    chunk: int | None = None

    def __str__(self) -> str:
        how = self.network
        return way(how.engine, how.channels_last, self.chunk, how.precision)

    @property
    def kind(self) -> tuple[str, str]:
        """What an engine that was checked has in common with others: operations, and numbers."""
        return self.network.engine, "bf16" if self.network.precision == "bf16" else "fp32"

    def chunks(self, n: int) -> list[slice]:
        """N networks in consecutive parts."""
        size = self.chunk or n
        return [slice(first, min(first + size, n)) for first in range(0, n, size)]

    def forward(self, params: Parameters, inputs: Inputs) -> Tensor:
        """[N, B, ...] outputs on inputs that all networks share, chunk by chunk."""
        n = len(next(iter(params.values())))
        outputs = [self.network(part_of(params, part), inputs) for part in self.chunks(n)]
        one = len(outputs) == 1 or not isinstance(outputs[0], Tensor)
        return outputs[0] if one else torch.cat(outputs)

    def logits(self, params: Parameters, inputs: Inputs) -> Logits:
        """Those of N networks on inputs that all share, chunk by chunk."""
        n = len(next(iter(params.values())))
        found: list[Tensor | Product] = []
        for part in self.chunks(n):
            outputs = self.network.by_rows(part_of(params, part), inputs, most_of_each(n))
            found += outputs if isinstance(outputs, Products) else [outputs]
        return Logits(found)


# Module -> what was checked of its engines -> for how many networks, and whether with gradients.
Checked = WeakKeyDictionary[nn.Module, dict[tuple, tuple[int, bool]]]
_CHECKED: ContextVar[Checked | None] = ContextVar("checked", default=None)


@contextlib.contextmanager
def checked_once() -> Iterator[None]:
    """What an engine was found to compute is known for a while, of modules that do not change."""
    token = _CHECKED.set(WeakKeyDictionary())
    try:
        yield
    finally:
        _CHECKED.reset(token)


def _known(module: nn.Module) -> dict[tuple, tuple[int, bool]]:
    checked = _CHECKED.get()
    return {} if checked is None else checked.setdefault(module, {})


class EngineChoice:
    """The engine of work that is done again and again.

    Args:
        module: the network of all.
        forward: how to evaluate them.
        work: a key of `COPIES`.
        on_choice: as of `fastgeo.optimize`.

    Attributes:
        chosen: the engine; None until it is known.
    """

    def __init__(
        self,
        module: nn.Module,
        forward: Forward,
        *,
        work: str = "optimisation",
        on_choice: Callable[[dict], None] | None = None,
    ):
        self.module, self.forward, self.work, self.on_choice = module, forward, work, on_choice
        budget = forward.memory_budget
        self._budget = None if budget is None else bytes_of(budget)
        first = "fp32" if forward.precision == "auto" else forward.precision
        self._stacked = self._network(forward.engine, False, first)
        self._agrees: dict[tuple, str] | None = None  # kind -> why it does not, "" if it does
        self.chosen: Engine | None = None
        self._points = 0
        self._visits: dict[Engine, list[float]] = {}  # seconds
        self._failed: dict[str, str] = {}  # engine -> why

    def prepare(
        self,
        params: Parameters,
        inputs: Inputs,
        *,
        per_point: bool = False,
        points: int,
        most: int | None = None,
    ) -> None:
        """Line the candidates up, unless this was done before.

        Args:
            params: name -> [1, ...] of one network.
            inputs: of the work to come, [B, ...], or [1, B, ...] if per_point.
            points: N, networks in the work to come.
            most: N of all that is to come, if that is more: engines are checked once.

        Raises:
            ValueError: a memory budget that one network exceeds, an engine that was named and does
                not compute what the module computes, or a network that is random in evaluation
                mode or gives probabilities.
        """
        if self.has_begun:
            return
        self._points = points
        images = any(tensor.ndim == 4 + per_point for tensor in tensors_of(inputs))
        device = next(iter(params.values())).device
        candidates = list(self._candidates(images, device, points))
        loop = self._network("loop", False, "fp32")
        with evaluation_mode(self.module):
            whole = most_in(self.work, points)
            few, scale = few_of(loop, params, inputs, per_point, whole)
            if self._agrees is None:
                large = most_in(self.work, points, scale)
                self._look_at_one(loop, params, few, per_point, large)
                size = most or points
                self._agrees = self._checked(candidates, params, few, per_point, size, large)
        agreeing = [engine for engine in candidates if not self._agrees.get(engine.kind)]
        for engine in agreeing or candidates[-1:]:
            if self._budget is not None:
                given = engine.network, params, inputs, per_point
                chunk = self._affordable(self._budget, *given, points=points)
                engine = Engine(engine.network, chunk)
            elif self.forward.engine == "auto" and self.forward.chunk is None:
                with evaluation_mode(self.module):
                    engine = self._fitting(engine, params, few, scale, per_point, points)
            self._visits[engine] = []
        if len(self._visits) == 1:
            self._choose()

    @property
    def has_begun(self) -> bool:
        """Whether candidates were lined up."""
        return bool(self.chosen or self._visits)

    def next_level(self) -> None:
        """The work goes on with other numbers of networks: choose again, of what agrees."""
        self.finish()
        self.chosen, self._visits = None, {}

    def run(self, work: Callable[[Engine], T]) -> T:
        """Do the work with the chosen engine, or with the candidate whose turn it is."""
        while self.chosen is None:
            engine = min(self._visits, key=lambda e: len(self._visits[e]))
            started = time.perf_counter()
            try:
                result = work(engine)
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
            except Exception as error:  # noqa: BLE001 - whatever the user's forward raises
                if len(self._visits) == 1:
                    raise
                del self._visits[engine]
                self._failed[str(engine)] = first_line(error)
                continue
            seconds = time.perf_counter() - started
            self._visits[engine] += [seconds] * (VISITS if seconds > LONG else 1)
            visits = self._visits.values()
            if len(visits) == 1 or all(len(seconds) >= VISITS for seconds in visits):
                self._choose()
            return result
        return work(self.chosen)

    def _candidates(self, images: bool, device: torch.device, points: int) -> Iterator[Engine]:
        """In the order of preference where times are alike."""
        own, how = self._stacked.engine, self.forward
        on_gpu, few = device.type == "cuda", FEW if points > FEW else None
        choice = images and not on_gpu and not channels_last_is_unsafe(self.module)
        layouts = [True, False] if choice else [False]
        found: list[tuple[str, bool, int | None, str]] = []
        if how.precision != "bf16":
            ways: list[tuple[str, bool, int | None]] = [(own, False, None)]
            if how.engine == "auto":
                ways.append((own, layouts[0], few))
                if on_gpu and own == "stacked":
                    ways.append(("vmap", False, None))
                ways += [("loop", layout, few) for layout in layouts]
            exact = "tf32" if how.precision == "tf32" and on_gpu else "fp32"
            found += [(*each, exact) for each in ways]
        units = how.precision == "auto" and own == "stacked" and multiplies_in_bf16(device)
        if how.precision == "bf16" or units:  # which that engine alone can
            free = how.engine == "auto"
            found += [
                (own, layout, k, "bf16")
                for k in ((None, few) if free else (None,))
                for layout in (layouts if free else (False,))
            ]
        for name, layout, chunk, precision in dict.fromkeys(
            (
                name,
                layout if how.channels_last is None else how.channels_last,
                chunk if how.chunk is None else how.chunk,
                precision,
            )
            for name, layout, chunk, precision in found
        ):
            yield Engine(self._network(name, layout, precision), chunk)

    def _network(self, engine: str, channels_last: bool, precision: str) -> StackedModule:
        return StackedModule(
            self.module,
            engine=engine,
            channels_last=channels_last,
            batchnorm=self.forward.batchnorm,
            precision=precision,
            output=self.forward.output,
        )

    def _look_at_one(
        self,
        loop: StackedModule,
        params: Parameters,
        few: Inputs,
        per_point: bool,
        large: int | None,
    ) -> None:
        """ValueError if what one network gives is random, or no logits but probabilities."""
        state = {name: tensor[0] for name, tensor in params.items()}
        own = each_tensor(lambda tensor: tensor[0], few) if per_point else few
        refuse_random(self.module, state, own, large)
        with torch.no_grad():
            refuse_probabilities(loop.by_rows(params, few, large, per_point=per_point))

    def _checked(
        self,
        candidates: list[Engine],
        params: Parameters,
        few: Inputs,
        per_point: bool,
        points: int,
        large: int | None,
    ) -> dict[tuple, str]:
        """Of each kind of engine that is no loop, whether it computes what the module computes, and
        its gradients, for as many networks as it is to evaluate at once: "", or why it does not.

        Raises:
            ValueError: an engine was named, and does not.
        """
        largest: dict[tuple[str, str], tuple[int, StackedModule]] = {}
        for engine in candidates:
            size = min(engine.chunk or points, points)
            if engine.network.engine != "loop" and size > largest.get(engine.kind, (0,))[0]:
                largest[engine.kind] = size, engine.network
        # TF32 moves so many numbers over the kinks of ReLUs that it would hide an error: the same
        # operations are compared without it.
        loop = self._network("loop", False, "fp32")
        found: dict[tuple, str] = {}
        gradients = self.work != "evaluation"
        known = _known(self.module)
        for kind, (size, network) in largest.items():
            name, precision = kind
            same = (*kind, self.forward.batchnorm, self.forward.output, per_point)
            before = known.get(same, (0, False))
            if before[0] >= size and (before[1] or not gradients):
                found[kind] = ""
                continue
            own = few
            if per_point:
                own = each_tensor(lambda t: t.expand(size, *t.shape[1:]), few)  # noqa: B023
            given = (networks_like(params, size), own, per_point, large)
            try:
                with matmul_precision("fp32"):
                    expected = outputs_and_gradients(loop, *given, gradients=gradients)
                    if network.precision != precision:
                        network = self._network(name, network.channels_last, precision)
                    got = outputs_and_gradients(network, *given, gradients=gradients)
                    check_agreement(got, expected, precision)
                found[kind], known[same] = "", (size, gradients)
            except Exception as error:  # noqa: BLE001 - as in `run`
                if self.forward.engine != "auto" or isinstance(error, Unsupported):
                    raise
                shown = way(name, False, None, precision)
                found[kind] = self._failed[shown] = first_line(error)
        return found

    def _affordable(
        self,
        budget: int,
        network: StackedModule,
        params: Parameters,
        inputs: Inputs,
        per_point: bool,
        *,
        points: int,
    ) -> int | None:
        """How many networks' activations fit into half of the budget; None if all fit into it."""
        with evaluation_mode(self.module):
            large = most_in(self.work, points)
            each = activation_bytes(network, params, inputs, per_point=per_point, most=large)
        if points * each <= budget:
            return None
        if 2 * each > budget:
            raise ValueError(
                f"memory_budget {size_of(budget)} is too small: the activations of one "
                f"network are {size_of(each)} on these inputs, and a step keeps those of two; give "
                f"{size_of(2 * each)} or smaller batches"
            )
        return budget // (2 * each)

    def _fitting(
        self,
        engine: Engine,
        params: Parameters,
        few: Inputs,
        scale: float,
        per_point: bool,
        points: int,
    ) -> Engine:
        """The candidate, with fewer networks at a time if the memory is not there for it."""
        free = free_bytes(next(iter(params.values())).device)
        need = step_memory(
            engine.network,
            params,
            few,
            networks=points,
            work=self.work,
            per_point=per_point,
            scale=scale,
        )
        if free is None or need.peak(points, engine.chunk, streamed=not per_point) <= free:
            return engine
        return Engine(engine.network, need.fitting(points, free, streamed=not per_point) or 1)

    def finish(self) -> None:
        """The work is done: choose by what is known of the candidates, if they all had no turns."""
        if self._visits and self.chosen is None:
            self._choose()

    def _choose(self) -> None:
        seconds = {e: min(visits[1:]) for e, visits in self._visits.items() if len(visits) > 1}
        self.chosen = next(iter(seconds or self._visits))
        for engine in seconds:
            if seconds[engine] < CLEARLY * seconds[self.chosen]:
                self.chosen = engine
        for name, why in self._failed.items():
            warnings.warn(f"engine {name} is left out: {why}", stacklevel=4)
        if self.on_choice is not None:
            self.on_choice(
                {
                    "engine": self.chosen.network.engine,
                    "channels_last": self.chosen.network.channels_last,
                    "chunk": self.chosen.chunk,
                    "precision": self.chosen.network.precision,
                    "points": self._points,
                    "seconds": {str(engine): s for engine, s in seconds.items()},
                    "failed": self._failed,
                }
            )
