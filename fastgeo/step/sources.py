"""Batches of many steps that wait on the device, for steps that the host does not look at."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from itertools import islice

import torch
from torch import Tensor

from fastgeo.data.images import Shuffled
from fastgeo.data.inputs import Inputs, Passes, Stream
from fastgeo.data.outputs import rows_that_count


class Source(ABC):
    """What the inputs of following steps are made of.

    Attributes:
        stream: whose place is before the next step that is taken.
    """

    stream: Stream

    @abstractmethod
    def take(self, count: int) -> Iterator:
        """What to keep on the device for each of so many steps; may end early."""

    @abstractmethod
    def inputs(self, kept) -> Inputs:
        """A step's inputs, from what was kept for it."""


class Drawn(Source):
    """Batches of a data set, which are cut out and augmented where they are used; the host only
    draws numbers."""

    def __init__(self, stream: Shuffled):
        self.stream = stream

    def take(self, count: int) -> Iterator[tuple[Tensor, ...]]:
        for _ in range(count):
            try:
                yield self.stream.draw()
            except StopIteration:
                return

    def inputs(self, kept: tuple[Tensor, ...]) -> Inputs:
        return self.stream.dataset.batch(*kept)


class Given(Source):
    """Batches of equal shapes as they come, and again from the first one when they end."""

    def __init__(self, batches: Iterable):
        self.stream = Passes(batches, repeat=True)

    def take(self, count: int) -> Iterator[Inputs]:
        for inputs, targets in islice(self.stream, count):
            if rows_that_count(inputs, targets, None) is not None:
                raise ValueError(
                    "steps on static buffers do not look at targets, of which some are -100; give "
                    "inputs alone and mask= for the rows that count, or use fastgeo.optimize"
                )
            yield inputs

    def inputs(self, kept: Inputs) -> Inputs:
        return kept


def source_of(batches: Iterable, device: torch.device) -> Source:
    """Batches that `Dataset.shuffled` gives are made on the device, if the data is there."""
    if isinstance(batches, Shuffled) and batches.dataset.device == device:
        return Drawn(batches)
    return Given(batches)
