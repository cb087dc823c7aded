"""The phases of an optimisation step, as a profiler sees them."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

from torch.profiler import record_function

T = TypeVar("T")
PHASES = ("data", "forward", "divergence", "backward", "update")


def phase(name: str) -> record_function:
    """A context whose time is that of one of `PHASES`."""
    return record_function(f"fastgeo.{name}")


def drawn(batches: Iterable[T]) -> Iterator[T]:
    """The same batches; the time of drawing them is that of the phase "data"."""
    iterator, end = iter(batches), object()
    while True:
        with phase("data"):
            batch = next(iterator, end)
        if batch is end:
            return
        yield batch
