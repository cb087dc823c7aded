"""A user's own data: batches as their loaders give them."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastgeo.data.inputs import Inputs, Stream, is_inputs, on_device

Batch = tuple[Inputs, Tensor]


@dataclass(frozen=True)
class LoaderData:
    """Two loaders, with what the stages of a run ask of data.

    Attributes:
        train, test: iterables of batches (inputs, labels), gone through again and again.
        batches: how many `train` has.
        device: where inputs and labels are put.
    """

    train: Iterable[Batch]
    test: Iterable[Batch]
    batches: int
    device: torch.device = torch.device("cpu")
    augmented = False  # what a loader does to its data is its own

    @property
    def training_size(self) -> str:
        return f"{self.batches} training batches"

    def batches_per_epoch(self, batch_size: int) -> int:
        """How many batches one pass has; their size is the loader's own."""
        return self.batches

    def shuffled(self, batch_size: int, generator: torch.Generator) -> "LoaderStream":
        """Training batches without end, pass after pass, in the order that the loader gives.

        Torch's random numbers, which order and augment a DataLoader's data, are drawn from a stream
        of its own that the generator's seed starts, so several of these do not mix.
        """
        return LoaderStream(self, generator.initial_seed())

    def in_order(
        self, split: str, batch_size: int, *, augment_seed: int | None = None
    ) -> "LoaderSplit":
        """All batches of the split "train" or "test"."""
        return LoaderSplit(self, split)

    def to(self, device: torch.device | str) -> "LoaderData":
        """The same data, with batches put on another device."""
        return replace(self, device=torch.device(device))

    def checked(self, split: str, batch: Any) -> Batch:
        """A batch on the device; ValueError if it is none."""
        pair = isinstance(batch, tuple | list) and len(batch) == 2
        if not pair or not is_inputs(batch[0]) or not isinstance(batch[1], Tensor):
            raise ValueError(
                f"the {split} loader must give batches (inputs, labels), inputs a tensor or a "
                f"mapping that holds tensors and labels a tensor, got {_described(batch)}"
            )
        return on_device(batch[0], self.device), batch[1].to(self.device)


@dataclass(frozen=True)
class LoaderSplit:
    """One pass over a loader, the same random numbers in every pass."""

    data: LoaderData
    split: str

    def __iter__(self) -> Iterator[Batch]:
        for batch in _RandomStream(0).drawn(getattr(self.data, self.split)):
            yield self.data.checked(self.split, batch)


class LoaderStream(Stream):
    """What `LoaderData.shuffled` returns.

    To return to a place, the pass is begun again and the batches before it are left aside: what the
    loader draws must be given by torch's random numbers.
    """

    def __init__(self, data: LoaderData, seed: int):
        self.data = data
        self._random = _RandomStream(seed)
        self._start, self._drawn = self._random.state, 0
        self._pass: Iterator[Any] | None = None

    def __next__(self) -> Batch:
        batch = next(self._pass or self._begin(), _END)
        while batch is _END:
            batch = next(self._begin(), _END)
        self._drawn += 1
        return self.data.checked("train", batch)

    def state_dict(self) -> dict[str, Tensor]:
        return {"start": self._start, "drawn": torch.tensor(self._drawn)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._random.state = state["start"]
        self._begin()
        for _ in range(int(state["drawn"])):
            next(self)

    def _begin(self) -> Iterator[Any]:
        self._start, self._drawn = self._random.state, 0
        self._pass = self._random.drawn(self.data.train)
        return self._pass


_END = object()


class _RandomStream:
    """Torch's random numbers as one reader of a loader draws them, apart from all others."""

    def __init__(self, seed: int):
        self.state = torch.Generator().manual_seed(seed).get_state()

    def drawn(self, loader: Iterable) -> Iterator[Any]:
        """One pass over a loader."""
        batches, end = self._with(iter, loader), object()
        while (batch := self._with(next, batches, end)) is not end:
            yield batch

    def _with(self, function: Callable, *args: Any) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self.state)
            try:
                return function(*args)
            finally:
                self.state = torch.get_rng_state()


def loader_data(loaders: Any) -> LoaderData:
    """What a user's function returned, (train, test), as data.

    Raises:
        ValueError: anything but two iterables that can be gone through again, neither empty.
    """
    pair = isinstance(loaders, tuple | list) and len(loaders) == 2
    if not pair or not all(isinstance(loader, Iterable) for loader in loaders):
        raise ValueError(
            "the data must be a tuple (train, test) of iterables of batches (inputs, labels), got "
            f"{_described(loaders)}"
        )
    for name, loader in zip(("train", "test"), loaders, strict=True):
        if isinstance(loader, Iterator):
            raise ValueError(
                f"the {name} loader can be gone through once only ({type(loader).__name__}); give "
                "a list or a DataLoader"
            )
    train, test = loaders
    data = LoaderData(train, test, _length(train))
    for split in ("train", "test"):
        if next(iter(data.in_order(split, 0)), None) is None:
            raise ValueError(f"the {split} loader is empty")
    return data


def _length(loader: Iterable) -> int:
    if isinstance(loader, Sized):
        try:
            return len(loader)
        except TypeError:  # a DataLoader of an iterable data set has none
            pass
    return sum(1 for _ in loader)


def _described(value: Any) -> str:
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {', '.join(type(v).__name__ for v in value) or 'none'}"
    return type(value).__name__
