"""Data that is kept whole, so that its inputs are known by their numbers."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from fastgeo.data.inputs import Stream


class Stored(ABC):
    """Training and test inputs with their labels, on the device that evaluates networks.

    Attributes:
        kind: what an input is, in words, several of them.
    """

    kind: ClassVar[str]

    @property
    @abstractmethod
    def device(self) -> torch.device: ...

    @property
    @abstractmethod
    def training_inputs(self) -> int:
        """How many there are."""

    @abstractmethod
    def batch(self, index: Tensor, *chance: Tensor) -> tuple[Tensor, Tensor]:
        """Training inputs and labels of these numbers [B], and of what `chance` gave for them."""

    def chance(self, count: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """What is random in so many inputs beside their numbers, on the CPU."""
        return ()

    @property
    def training_size(self) -> str:
        """How much there is to train on, in words."""
        return f"{self.training_inputs} training {self.kind}"

    def batches_per_epoch(self, batch_size: int) -> int:
        """How many full batches one pass over the training inputs has."""
        return self.training_inputs // batch_size

    def shuffled(
        self, batch_size: int, generator: torch.Generator, *, epochs: int | None = None
    ) -> "Shuffled":
        """Batches of training inputs and labels, in a new order each epoch.

        Args:
            batch_size: B; the rest of an epoch that fills no batch is left out.
            generator: of the order and of all else that is random.
            epochs: how many; without end by default.
        """
        if not 1 <= batch_size <= self.training_inputs:
            raise ValueError(
                f"batch_size must be within 1..{self.training_inputs}, the training {self.kind}, "
                f"got {batch_size}"
            )
        return Shuffled(self, batch_size, generator, epochs)


class Shuffled(Stream):
    """What `Stored.shuffled` returns."""

    def __init__(
        self, dataset: Stored, batch_size: int, generator: torch.Generator, epochs: int | None
    ):
        self.dataset, self.batch_size, self.epochs = dataset, batch_size, epochs
        self.generator = generator
        self._epoch, self._drawn = 0, 0
        self._batches = dataset.batches_per_epoch(batch_size)
        self._start = generator.get_state()
        self._order: tuple[Tensor, ...] = ()  # of this epoch, once it is drawn

    def __next__(self) -> tuple[Tensor, Tensor]:
        if self._drawn == self._batches:
            self._epoch, self._drawn, self._order = self._epoch + 1, 0, ()
        if self._epoch == self.epochs:
            raise StopIteration
        if not self._order:
            self._shuffle()
        index = self._order[self._drawn]
        self._drawn += 1
        drawn = (index, *self.dataset.chance(len(index), self.generator))
        return self.dataset.batch(*(tensor.to(self.dataset.device) for tensor in drawn))

    def state_dict(self) -> dict[str, Tensor]:
        """The generator at the start of the epoch, which gives its order again, and now."""
        now = self.generator.get_state()
        start = self._start if self._order else now
        place = torch.tensor([self._epoch, self._drawn])
        return {"start": start, "now": now, "place": place}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._epoch, self._drawn = state["place"].tolist()
        self.generator.set_state(state["start"])
        self._order = ()
        if self._drawn:
            self._shuffle()
        self.generator.set_state(state["now"])

    def _shuffle(self) -> None:
        self._start = self.generator.get_state()
        order = torch.randperm(self.dataset.training_inputs, generator=self.generator)
        self._order = order.split(self.batch_size)


def check_order(split: str, splits: tuple[str, ...], batch_size: int) -> None:
    """ValueError unless there is such a split and batches can have this size."""
    if split not in splits:
        raise ValueError(f"split must be {' or '.join(map(repr, splits))}, got {split!r}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
