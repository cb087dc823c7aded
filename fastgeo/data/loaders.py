"""A user's own data: batches as their loaders give them."""

import copy
import itertools
import random
import time
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from fastgeo.data.inputs import Inputs, Stream, is_inputs, on_device

Batch = tuple[Inputs, Tensor]
COUNTING = 20.0  # seconds in which an iterable without a length must end


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

        Random numbers, which order and augment a loader's data, are drawn from a stream of its own
        that the generator's seed starts, and every pass is one over a copy of the loader with a
        sampler, generators and workers of its own, so several of these do not mix.
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
    """One pass over a loader, the same batches in every pass."""

    data: LoaderData
    split: str

    def __iter__(self) -> Iterator[Batch]:
        loader = getattr(self.data, self.split)
        batches = _RandomStream(0).drawn(self.split, loader)
        for batch in itertools.islice(batches, _declared_length(loader)):
            yield self.data.checked(self.split, batch)


class LoaderStream(Stream):
    """What `LoaderData.shuffled` returns.

    To return to a place, the pass is begun again and the batches before it are left aside.
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
        self._pass = self._random.drawn("train", self.data.train)
        return self._pass


_END = object()


class _RandomStream:
    """Random numbers as one reader of a loader draws them, apart from all others.

    Attributes:
        state: of torch's generator, where the next pass begins.
    """

    def __init__(self, seed: int):
        self.state = torch.Generator().manual_seed(seed).get_state()

    def drawn(self, name: str, loader: Iterable) -> Iterator[Any]:
        """One pass over a copy of a loader; those of Python and NumPy begin anew in every pass."""
        generator = torch.Generator()
        generator.set_state(self.state)
        seed = int(torch.randint(2**31, (), generator=generator))
        self.state = generator.get_state()
        others = random.Random(seed).getstate(), np.random.RandomState(seed).get_state()
        own, end = own_loader(name, loader, seed), object()

        def call(function: Callable, *args: Any) -> Any:
            nonlocal others
            before = random.getstate(), np.random.get_state()
            with torch.random.fork_rng(devices=[]):
                try:
                    torch.set_rng_state(self.state)
                    _set_generators(others)
                    return function(*args)
                finally:
                    self.state = torch.get_rng_state()
                    others = random.getstate(), np.random.get_state()
                    _set_generators(before)

        batches = call(iter, own)
        while (batch := call(next, batches, end)) is not end:
            yield batch


def _set_generators(states: tuple) -> None:
    """Those of Python and NumPy."""
    random.setstate(states[0])
    np.random.set_state(states[1])


GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
GLOBAL = (torch.default_generator, random._inst, np.random.mtrand._rand)
SHARED = (Tensor, np.ndarray, nn.Module, types.ModuleType)
CONTAINERS = (list, tuple, dict, set)
LOOKED_INTO = 100  # entries of a container; a longer one holds data
DEPTH = 12  # of objects within objects that are looked into


def own_loader(name: str, loader: Iterable, seed: int) -> Iterable:
    """A copy of a loader that shares its data, but no place in them, no worker and no generator.

    Raises:
        ValueError: it cannot be copied.
    """
    if isinstance(loader, list | tuple):
        return loader
    try:
        return copy.deepcopy(loader, _Known(loader, seed).copies)
    except Exception as error:
        raise ValueError(
            f"the {name} loader cannot be copied ({type(error).__name__}: {error}), and each pass "
            "is one over a copy of its own; give a list of batches, or a DataLoader whose sampler "
            "can be copied"
        ) from error


class _Known:
    """What a copy of a loader shares with it, or holds in its place.

    Attributes:
        copies: as copy.deepcopy knows what it has copied, by id.
    """

    def __init__(self, loader: Iterable, seed: int):
        self.copies: dict[int, Any] = {}
        self._seed = seed
        self._random: dict[int, bool] = {}  # id -> whether there is a generator
        self._is_random(loader, DEPTH, data=False)

    def _is_random(self, value: Any, depth: int, *, data: bool) -> bool:
        """Whether a generator is in a value; what has none is shared if it is data."""
        if id(value) not in self._random:
            self._random[id(value)] = False  # or it would be looked at in circles
            self._random[id(value)] = found = depth > 0 and self._look(value, depth - 1, data)
            if data and not found:
                self.copies[id(value)] = value
        return self._random[id(value)]

    def _look(self, value: Any, depth: int, data: bool) -> bool:
        owner = getattr(value, "__self__", value)  # of a method
        if any(owner is generator for generator in GLOBAL):  # each reader has its own state of it
            self.copies[id(value)] = value
            return False
        if callable(value) and owner is not value:
            return self._is_random(owner, depth, data=data)
        if isinstance(value, GENERATORS):
            self.copies[id(value)] = _seeded(value, self._seed)
            self._seed += 1
            return True
        if isinstance(value, SHARED):
            self.copies[id(value)] = value
            return False
        if isinstance(value, CONTAINERS):
            parts = value.values() if isinstance(value, dict) else value
            parts = parts if len(value) <= LOOKED_INTO else ()
            return any([self._is_random(part, depth, data=data) for part in parts])
        if isinstance(value, type) or not hasattr(value, "__dict__"):
            return False
        found = []
        for name, part in vars(value).items():
            if isinstance(value, DataLoader) and name == "_iterator":
                self.copies[id(part)] = None  # of workers that persist
                continue
            shared = isinstance(part, Dataset)
            shared |= isinstance(value, DataLoader) and name in ("dataset", "collate_fn")
            shared &= not isinstance(part, IterableDataset)  # which may hold its place
            found.append(self._is_random(part, depth, data=data or shared))
        return any(found)


def _seeded(generator: Any, seed: int) -> Any:
    """A generator like this one, from a seed."""
    if isinstance(generator, torch.Generator):
        return torch.Generator(generator.device).manual_seed(seed)
    if isinstance(generator, np.random.Generator):
        return np.random.Generator(type(generator.bit_generator)(seed))
    return type(generator)(seed)


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
    data = LoaderData(train, test, _length("train", train))
    _length("test", test)
    for split in ("train", "test"):
        if next(iter(data.in_order(split, 0)), None) is None:
            raise ValueError(f"the {split} loader is empty")
    return data


def _declared_length(loader: Iterable) -> int | None:
    try:
        return len(loader) if isinstance(loader, Sized) else None
    except TypeError:  # a DataLoader of an iterable data set has none
        return None


def _length(name: str, loader: Iterable) -> int:
    """How many batches a pass has; ValueError if it does not end."""
    declared = _declared_length(loader)
    if declared is not None:
        return declared
    started, count = time.monotonic(), 0
    for count, _ in enumerate(own_loader(name, loader, 0), 1):
        if time.monotonic() - started > COUNTING:
            raise ValueError(
                f"the {name} loader has no length and did not end in {COUNTING:.0f} seconds, after "
                f"{count:,} batches; give it a __len__ that says how many batches are one pass"
            )
    return count


def _described(value: Any) -> str:
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {', '.join(type(v).__name__ for v in value) or 'none'}"
    return type(value).__name__
