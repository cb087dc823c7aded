"""Image data sets that live on the device as stored, and are normalised and augmented there."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastgeo.data.arrays import read_arrays
from fastgeo.data.stored import Stored, check_order

CROP_PADDING = 4  # pixels; Tan et al. (2023) and He et al. (2016, section 4.2)
COLOURS = 4  # channels that images have: grey, with alpha, RGB, RGBA; others must be square
MOST_APART = 16  # times the largest value of the other split: 0..1 and 0..255 are further apart
SLIGHTLY = 0.01  # of the largest value: what a filter leaves below 0
MOST_CLASSES = 2**18  # a label beyond is a mistake, and would ask for a head of that size


class Split(NamedTuple):
    """Images [n, C, H, W] uint8 or float32 as stored, and labels [n] int64."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Dataset(Stored):
    """Training and test images with what it takes to feed them to a network.

    Attributes:
        train, test: the splits.
        mean, std: [C, 1, 1] of the stored training images, per channel.
        num_classes: C of the labels 0 .. C - 1.
        augmented: whether training images are flipped and cropped at random.
    """

    kind = "images"

    train: Split
    test: Split
    mean: Tensor
    std: Tensor
    num_classes: int
    augmented: bool

    @property
    def device(self) -> torch.device:
        return self.train.images.device

    @property
    def training_inputs(self) -> int:
        return len(self.train.labels)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        _, channels, height, width = self.train.images.shape
        return channels, height, width

    def normalize(self, images: Tensor) -> Tensor:
        """[B, C, H, W] as stored -> fp32 of mean 0 and deviation 1 over the training set."""
        return (images.float() - self.mean) / self.std

    def inputs(self, index: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Normalised training images [B, C, H, W]; augmented if given a generator."""
        images = self.train.images[index]
        if generator is not None and self.augmented:
            images = flip_and_crop(images, generator)
        return self.normalize(images)

    def batch(self, index: Tensor, *window: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised training images [B, C, H, W] and labels [B]; of windows if rows and columns
        are given."""
        images = self.train.images[index]
        images = crop(images, *window) if window else images
        return self.normalize(images), self.train.labels[index]

    def chance(self, count: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """The windows of augmented images, rows [B, H] and columns [B, W]."""
        return windows(count, *self.image_shape[1:], generator) if self.augmented else ()

    def in_order(
        self, split: str, batch_size: int, *, augment_seed: int | None = None
    ) -> "Batches":
        """All inputs and labels of the split "train" or "test", the same in every pass.

        Args:
            split: "train" or "test".
            batch_size: B; the last batch may be smaller.
            augment_seed: flip and crop the images with a generator of this seed.
        """
        check_order(split, ("train", "test"), batch_size)
        return Batches(self, getattr(self, split), batch_size, augment_seed)

    def to(self, device: torch.device | str) -> "Dataset":
        """The same data on another device."""
        train, test = (Split(*(t.to(device) for t in split)) for split in (self.train, self.test))
        mean, std = self.mean.to(device), self.std.to(device)
        return replace(self, train=train, test=test, mean=mean, std=std)


@dataclass(frozen=True)
class Batches:
    """Normalised inputs and labels of a split in order, with a length for progress bars."""

    dataset: Dataset
    split: Split
    batch_size: int
    augment_seed: int | None

    def __len__(self) -> int:
        return -(-len(self.split.labels) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(self.augment_seed or 0)
        for images, labels in zip(*(t.split(self.batch_size) for t in self.split), strict=True):
            if self.augment_seed is not None:
                images = flip_and_crop(images, generator)
            yield self.dataset.normalize(images), labels


def flip_and_crop(images: Tensor, generator: torch.Generator) -> Tensor:
    """[B, C, H, W]: each image mirrored or not, and shifted by up to 4 pixels with reflection."""
    batch, _, height, width = images.shape
    rows, columns = windows(batch, height, width, generator)
    return crop(images, rows.to(images.device), columns.to(images.device))


def windows(
    batch: int, height: int, width: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Random windows of `flip_and_crop`: rows [B, H] and columns [B, W] of each image."""
    shift = torch.randint(2 * CROP_PADDING + 1, (2, batch, 1), generator=generator) - CROP_PADDING
    mirror = torch.randint(2, (batch, 1), generator=generator).bool()
    rows = _reflect(torch.arange(height) + shift[0], height)
    columns = _reflect(torch.arange(width) + shift[1], width)
    return rows, torch.where(mirror, columns.flip(1), columns)


def crop(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """[B, C, H, W] at rows [B, H] and columns [B, W] of each image."""
    image = torch.arange(len(images), device=images.device)[:, None, None]
    cropped = images.permute(0, 2, 3, 1)[image, rows[:, :, None], columns[:, None, :]]
    # A clone: `contiguous` leaves the strides of one channel those of channels-last.
    return cropped.permute(0, 3, 1, 2).clone(memory_format=torch.contiguous_format)


def _reflect(index: Tensor, size: int) -> Tensor:
    """Indices up to size - 1 outside [0, size), mirrored at the edge pixels."""
    return size - 1 - (size - 1 - index.abs()).abs()


def load(
    name: str,
    *,
    root: str = "~/.cache/fastgeo",
    augment: str = "auto",
    train_subset: int | None = None,
) -> Dataset:
    """A data set by name.

    Args:
        name: "digits" (bundled); "cifar10", "cifar100", "mnist" or "fashion-mnist" (through
            torchvision, downloaded on first use); "npz:PATH", a NumPy archive with Keras-style
            keys x_train, y_train, x_test, y_test: uint8 or float images of one scale, NHW, or NHWC
            or NCHW, of up to four channels or square, so that it can be seen which.
        root: where downloads are kept.
        augment: "flip-crop", "none", or "auto": flip-crop for CIFAR, none for all others.
        train_subset: use the first so many training images; all by default.

    Raises:
        ValueError: an unknown name, data that cannot be read or obtained, or damaged data.
    """
    if augment not in ("auto", "none", "flip-crop"):
        raise ValueError(f"augment must be 'auto', 'none' or 'flip-crop', got {augment!r}")
    arrays = read_arrays(name, root)
    augmented = name.startswith("cifar") if augment == "auto" else augment == "flip-crop"
    return _dataset(name, *arrays, augmented=augmented, train_subset=train_subset)


def _dataset(
    name: str,
    x_train: np.ndarray,
    y_train: np.ndarray,
    x_test: np.ndarray,
    y_test: np.ndarray,
    *,
    augmented: bool,
    train_subset: int | None,
) -> Dataset:
    train, test = _split(name, "train", x_train, y_train), _split(name, "test", x_test, y_test)
    if train.images.shape[1:] != test.images.shape[1:]:
        shapes = [list(split.images.shape[1:]) for split in (train, test)]
        raise ValueError(f"{name}: train images are {shapes[0]} and test images {shapes[1]}")
    _check_same_scale(name, train.images, test.images)
    num_classes = int(train.labels.max()) + 1
    if train.labels.min() == train.labels.max():
        raise ValueError(
            f"{name}: y_train has class {num_classes - 1} only; there is nothing to tell apart"
        )
    if test.labels.max() >= num_classes:
        raise ValueError(
            f"{name}: y_test has class {int(test.labels.max())}, outside 0..{num_classes - 1}, "
            "the classes of y_train"
        )
    if augmented and min(train.images.shape[2:]) <= CROP_PADDING:
        raise ValueError(f"{name}: images of {CROP_PADDING} pixels or less cannot be cropped")
    # Moments in exact or double arithmetic, an image at a time to bound the memory.
    sums = torch.stack([_moments(images) for images in train.images.split(1000)]).sum(0)
    pixels = train.images.numel() // train.images.shape[1]
    mean, square = sums / pixels
    std = (square - mean.square()).clamp(min=0).sqrt()
    std = torch.where(std > 0, std, 1)
    if train_subset is not None:
        if not 1 <= train_subset <= len(train.labels):
            raise ValueError(
                f"train-subset must be within 1..{len(train.labels)}, the training images of "
                f"{name}, got {train_subset}"
            )
        train = Split(*(tensor[:train_subset] for tensor in train))
    mean, std = (tensor.float().view(-1, 1, 1) for tensor in (mean, std))
    return Dataset(train, test, mean, std, num_classes, augmented)


def _check_same_scale(name: str, train: Tensor, test: Tensor) -> None:
    """ValueError unless the images of both splits are of one type, and their values of one range:
    a network normalises both by the moments of the training images."""
    ranges = [tuple(float(end) for end in torch.aminmax(images)) for images in (train, test)]
    largest = [max(-low, high) for low, high in ranges]
    signed = [low < -SLIGHTLY * high for (low, _), high in zip(ranges, largest, strict=True)]
    alike = signed[0] == signed[1] and max(largest) <= MOST_APART * min(largest)
    if train.dtype != test.dtype or (min(largest) > 0 and not alike):
        found = [
            f"x_{split} is {images.dtype} within {low:g}..{high:g}".replace("torch.", "")
            for split, images, (low, high) in zip(
                ("train", "test"), (train, test), ranges, strict=True
            )
        ]
        raise ValueError(
            f"{name}: {' and '.join(found)}; scale both alike, as raw uint8 or as the same floats"
        )


def _moments(images: Tensor) -> Tensor:
    """[2, C]: sums of values and of squares over images and pixels, in float64."""
    x = images.double()
    return torch.stack([x.sum((0, 2, 3)), x.square().sum((0, 2, 3))])


def _channels_first(name: str, shape: tuple[int, ...]) -> bool:
    """Whether images [n, ., ., .] are NCHW and not NHWC: of up to four channels, or else square.

    Raises:
        ValueError: both can be meant, or neither.
    """
    _, first, middle, last = shape
    nhwc = last <= COLOURS or first == middle
    nchw = first <= COLOURS or middle == last
    if nhwc == nchw:
        raise ValueError(
            f"{name} is {list(shape)}, which can be read as "
            f"{'either' if nhwc else 'neither'} of [n, H, W, C] and [n, C, H, W]: up to "
            f"{COLOURS} channels, or square images, tell them apart; give these by a loader "
            "(data PACKAGE.MODULE:FUNCTION), which says it"
        )
    return nchw


def _split(name: str, split: str, x: np.ndarray, y: np.ndarray) -> Split:
    """Arrays as tensors, after the checks that give every complaint a sentence."""
    x_name, y_name = f"{name}: x_{split}", f"y_{split}"
    if x.ndim not in (3, 4) or 0 in x.shape:
        raise ValueError(
            f"{x_name} must be images [n, H, W], [n, H, W, C] or [n, C, H, W], got {list(x.shape)}"
        )
    if x.dtype != np.uint8 and x.dtype.kind != "f":
        raise ValueError(f"{x_name} must be uint8 or float, got {x.dtype}")
    if y.dtype.kind not in "iu" or y.ndim == 0 or y.size != len(y):
        raise ValueError(f"{name}: {y_name} must be integers [n], got {y.dtype} {list(y.shape)}")
    if len(x) != len(y):
        raise ValueError(f"{x_name} has {len(x)} images and {y_name} {len(y)} labels")
    for worst in (y.min(), y.max()):
        if not 0 <= worst < MOST_CLASSES:
            raise ValueError(
                f"{name}: {y_name} has class {worst}; classes count from 0 to {MOST_CLASSES - 1}"
            )
    if x.dtype.kind == "f":
        x = x.astype(np.float32)
        if not np.isfinite(x).all():
            raise ValueError(f"{x_name} has values that are not finite")
    images = torch.from_numpy(x if x.ndim == 4 else x[:, None])
    if x.ndim == 4 and not _channels_first(x_name, x.shape):
        images = images.permute(0, 3, 1, 2)
    return Split(images.contiguous(), torch.from_numpy(y.reshape(-1).astype(np.int64)))
