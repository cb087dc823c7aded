"""What all ranks decide alike: whether a step can be taken, what it found, when to stop.

Before anything of a step is sent, all ranks say whether they have a batch, and the same one, or
that they cannot go on; after it they add up its energies, with whether numbers are finite and
whether one of them was asked to stop. So an error of one rank ends all of them, at the same step
and with that rank's sentence, and nobody waits for what will not come.
"""

import contextlib
import zlib
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastgeo.data.inputs import tensors_within
from fastgeo.ranks.axis import Axis, LostRank, OtherRank

SAMPLED = 4096  # numbers of each tensor, about, by which batches are compared
WISHES = 4
LONG = 300  # for a sentence
_calls = count()


class Found(NamedTuple):
    """What a step found, the same on all ranks.

    Attributes:
        energies: [E] nats, float64, on the host.
        length: [], of the path before it.
        unsound: how many ranks have a gradient that is not finite.
    """

    energies: Tensor
    length: Tensor
    unsound: int


class Agreement:
    """The decisions of all ranks of a mesh during one optimisation.

    Args:
        axes: which together reach all ranks.
        device: where tensors are that are sent.

    Attributes:
        wishes: of this rank, as a function that is asked in every step.
        wished: how many ranks had each wish in the last step.
    """

    def __init__(self, axes: Sequence[Axis], device: torch.device):
        self._axes, self._device = axes, device
        self._ranks = torch.Size([axis.size for axis in axes]).numel()
        self._key = f"fastgeo/{next(_calls)}/error"
        self._awaited: Literal["", "ready", "found"] = ""  # what the others wait for
        self._terms = 0
        self._held: Exception | None = None
        self.wishes: Callable[[], Sequence[bool]] = lambda: [False] * WISHES
        self.wished = [0.0] * WISHES

    @contextlib.contextmanager
    def step(self, terms: int, give_up: Callable[[], None]) -> Iterator[None]:
        """A step whose objective has so many terms. An error in it is said to the other ranks.

        Args:
            give_up: called before that, so that none of them waits for what this one has not sent.
        """
        self._awaited, self._terms = "ready", terms
        try:
            if self._held is not None:
                raise self._held
            yield
        except LostRank as lost:
            if said := self._said():
                raise OtherRank(said) from lost
            raise
        except OtherRank:
            raise
        except Exception as error:
            if self._awaited:
                with contextlib.suppress(OtherRank):  # which has ended as well
                    self._fail(error, give_up)
            raise

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """An error in here is raised when the others listen, in the next step."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - whatever a caller's function raises
            self._held = self._held or error

    def ready(self, drawn: Any) -> None:
        """All ranks have drawn this batch, or all have none.

        Raises:
            OtherRank: one of them stopped.
            ValueError: they have drawn others.
        """
        self._awaited = ""
        failed, ended, *known = self._total([0, drawn is None, *_squared(fingerprint(drawn))])
        if failed:
            raise OtherRank(self._said())
        if 0 < ended < self._ranks:
            raise ValueError(
                f"the batches ended on {int(ended)} of {self._ranks} ranks and go on on others; "
                "give all ranks the same ones"
            )
        if not self._alike(known):
            raise ValueError(
                "the ranks have drawn different batches; draw the same ones on all of them, with "
                "one seed and order, since each takes its own rows of them"
            )
        self._awaited = "found"

    def found(self, energies: Tensor, length: Tensor | float, unsound: bool) -> Found:
        """The sum of what all ranks found.

        Args:
            energies: [E] nats, 0 where another rank has them.
            length: of the edges that this rank has.
            unsound: whether its gradient is not finite.
        """
        self._awaited = ""
        known = [0, unsound, *self.wishes(), float(length), *energies.tolist()]
        failed, bad, *others = self._total(known)
        if failed:
            raise OtherRank(self._said())
        self.wished = others[:WISHES]
        sums = torch.tensor(others[WISHES:], dtype=torch.float64)
        return Found(sums[1:], sums[0], int(bad))

    def same(self, what: str, value: object) -> None:
        """ValueError unless it reads the same on all ranks."""
        text = repr(value)
        if not self._alike(self._total(_squared(zlib.crc32(text.encode())))):
            own = f"; rank {dist.get_rank()} has {text}" if len(text) < LONG else ""
            raise ValueError(f"{what} must be the same on all ranks{own}")

    def any(self, wish: bool) -> bool:
        """Whether one of the ranks wishes it."""
        return self._total([wish])[0] > 0

    def total(self, value: float) -> float:
        return self._total([value])[0]

    def objects(self, own: object) -> list:
        """Of all ranks."""
        found = [own]
        for axis in self._axes:
            found = [one for part in axis.objects(found) for one in part]
        return found

    def _total(self, values: Sequence[float]) -> list[float]:
        summed = torch.tensor(values, dtype=torch.float64, device=self._device)
        for axis in self._axes:
            axis.add_up(summed)
        return summed.tolist()

    def _alike(self, sums: Sequence[float]) -> bool:
        """Whether numbers were alike on all ranks, by the sums of them and of their squares."""
        pairs = zip(sums[::2], sums[1::2], strict=True)
        return all(int(one) ** 2 == self._ranks * int(square) for one, square in pairs)

    def _fail(self, error: Exception, give_up: Callable[[], None]) -> None:
        awaited, self._awaited = self._awaited, ""
        text = f"rank {dist.get_rank()} stopped: {error or type(error).__name__}"
        store().compare_set(self._key, "", text)
        if awaited == "found":
            give_up()
        others = 2 + WISHES + self._terms if awaited == "found" else 5
        self._total([1] + [0] * others)

    def _said(self) -> str:
        """The sentence of the first rank that stopped; empty if none has said one."""
        with contextlib.suppress(RuntimeError):  # the store is gone with its process
            if store().check([self._key]):
                return store().get(self._key).decode()
        return ""


def store() -> dist.Store:
    """Where all processes read what one of them has written."""
    return dist.distributed_c10d._get_default_store()


def fingerprint(drawn: Any) -> int:
    """32 bits of all tensors in a batch: their types, shapes and some of their numbers."""
    found = 0
    for tensor in tensors_within(drawn):
        flat = tensor.detach().reshape(-1)
        some = flat[:: max(1, len(flat) // SAMPLED)].contiguous().cpu()
        found = zlib.crc32(f"{tensor.dtype}{list(tensor.shape)}".encode(), found)
        found = zlib.crc32(some.view(torch.uint8).numpy().tobytes(), found)
    return found


def _squared(number: int) -> list[float]:
    """The halves of 32 bits and their squares, whose sums over any number of ranks are exact."""
    low, high = number & 0xFFFF, number >> 16
    return [low, low**2, high, high**2]
