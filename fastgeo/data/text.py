"""Text as blocks of tokens that live on the device, each with the tokens that follow."""

import itertools
import sys
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path as FilePath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastgeo.data.outputs import IGNORED
from fastgeo.data.stored import Stored, check_order

STDLIB = "stdlib"
SUFFIXES = (".txt", ".md", ".py")  # of the files in a folder that are text
SPLITS = ("train", "validation", "test")
# Modules of a file each in every supported Python, and without tables; 2.2 MB in Python 3.11.
MODULES = """
argparse ast calendar cmd codecs configparser contextlib copy csv dataclasses difflib doctest enum
fractions functools heapq inspect ipaddress mailbox optparse pdb pickle pickletools platform pprint
pstats random shutil smtplib socket socketserver ssl statistics subprocess tarfile tempfile textwrap
threading tokenize traceback typing uuid warnings weakref
""".split()
Tokenizer = Callable[[str], tuple[Any, int]]


@dataclass(frozen=True)
class Text(Stored):
    """Blocks of a text in three parts, next to each other in it.

    Each row holds the T tokens of a block and the one that follows them. The last row of a part is
    filled up with -100, which no row of a loss counts.

    Attributes:
        train: [n, T + 1] int32, the first nine tenths of the text.
        validation: the same of the twentieth after them, for choosing settings by; no command reads
            it.
        test: the same of the last twentieth.
        num_classes: how many tokens the vocabulary has.
    """

    kind = "blocks"
    augmented = False

    train: Tensor
    validation: Tensor
    test: Tensor
    num_classes: int

    @property
    def device(self) -> torch.device:
        return self.train.device

    @property
    def training_inputs(self) -> int:
        return len(self.train)

    @property
    def block_size(self) -> int:
        """T."""
        return self.train.shape[1] - 1

    def batch(self, index: Tensor, *chance: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens of training blocks and the tokens that follow each, both [B, T]."""
        return inputs_and_targets(self.train[index])

    def in_order(
        self, split: str, batch_size: int, *, augment_seed: int | None = None
    ) -> "TextBatches":
        """All blocks of the split "train", "validation" or "test", as `batch` gives them.

        Args:
            split: which.
            batch_size: B; the last batch may be smaller.
            augment_seed: text is never augmented.
        """
        check_order(split, SPLITS, batch_size)
        return TextBatches(getattr(self, split), batch_size)

    def to(self, device: torch.device | str) -> "Text":
        """The same text on another device."""
        return replace(self, **{split: getattr(self, split).to(device) for split in SPLITS})


@dataclass(frozen=True)
class TextBatches:
    """Tokens and targets of blocks in order, with a length for progress bars."""

    blocks: Tensor
    batch_size: int

    def __len__(self) -> int:
        return -(-len(self.blocks) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return map(inputs_and_targets, self.blocks.split(self.batch_size))


def inputs_and_targets(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [B, T + 1] as tokens and the tokens that follow, both [B, T] int64.

    Where a row is filled up the token is 0 and the target -100.
    """
    blocks = blocks.long()
    return blocks[:, :-1].clamp(min=0), blocks[:, 1:]


def load_text(
    name: str,
    *,
    block_size: int = 64,
    tokens: str | Tokenizer = "characters",
    train_subset: int | None = None,
) -> Text:
    """A text by the name of its file or folder.

    Args:
        name: a file; a folder, of which all .txt, .md and .py files at any depth are read in the
            order of their paths, and joined by line breaks; or "stdlib", sources of the standard
            library of the Python that runs, which differ from version to version.
        block_size: T, how many tokens a block has.
        tokens: "characters", numbered in the order of their code points among those of the text;
            "bytes", 256 of them, whatever the files hold; or a function from the text to its tokens
            (integers from 0) and the size of the vocabulary.
        train_subset: use the first so many training blocks; all by default.

    Raises:
        ValueError: no such text, one that is not UTF-8 or too short, or tokens that are none. In a
            folder, files that are not UTF-8 are left out, and a line says so.
    """
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}")
    ids, size = _tokens(name, tokens)
    cuts = [int(share * len(ids)) for share in (0, 0.9, 0.95, 1)]
    parts = [ids[start:end] for start, end in itertools.pairwise(cuts)]
    if min(map(len, parts)) < 2 or size < 2:
        raise ValueError(
            f"text {name} has {len(ids)} tokens of a vocabulary of {size}, too few for three "
            "splits in each of which there is a next one to predict"
        )
    train, validation, test = (_blocks(part, block_size) for part in parts)
    if train_subset is not None and not 1 <= train_subset <= len(train):
        raise ValueError(
            f"train-subset must be within 1..{len(train)}, the training blocks of text {name}, got "
            f"{train_subset}"
        )
    return Text(train[:train_subset], validation, test, size)


def text_files(name: str) -> list[FilePath]:
    """The files of a text, in order. ValueError if there is none."""
    if name == STDLIB:
        folder = FilePath(sysconfig.get_path("stdlib"))
        return [folder / f"{module}.py" for module in MODULES]
    path = FilePath(name).expanduser()
    if not path.is_dir():
        return [path]
    files = sorted(f for f in path.rglob("*") if f.suffix in SUFFIXES and f.is_file())
    if not files:
        raise ValueError(f"{path} has no files that end in {', '.join(SUFFIXES)}")
    return files


def _tokens(name: str, tokens: str | Tokenizer) -> tuple[Tensor, int]:
    """All tokens of a text [L] int32, and how many the vocabulary has."""
    if tokens == "bytes":
        content = b"\n".join(map(_read, text_files(name)))
        return torch.from_numpy(np.frombuffer(content, np.uint8).astype(np.int32)), 256
    text = _text(text_files(name))
    if tokens == "characters":
        points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        characters, ids = np.unique(points, return_inverse=True)
        return torch.from_numpy(ids.astype(np.int32)), len(characters)
    if isinstance(tokens, str):
        raise ValueError(f"tokens must be characters, bytes or a function, got {tokens!r}")
    return _checked(tokens(text))


def _checked(found: Any) -> tuple[Tensor, int]:
    """What a user's function made of a text; ValueError unless these are tokens."""
    wanted = "tokens must come as (ids, size): integers [L] within 0..size - 1, and size"
    if not isinstance(found, tuple) or len(found) != 2 or not isinstance(found[1], int):
        raise ValueError(f"{wanted}; got {type(found).__name__}")
    ids, size = torch.as_tensor(found[0]), found[1]
    if ids.ndim != 1 or ids.is_floating_point() or ids.is_complex():
        raise ValueError(f"{wanted}; got {ids.dtype} {list(ids.shape)}")
    if len(ids) and not 0 <= ids.min() <= ids.max() < size:
        raise ValueError(f"{wanted}; got {int(ids.min())}..{int(ids.max())} and {size}")
    return ids.to(torch.int32), size


def _text(files: Sequence[FilePath]) -> str:
    parts, skipped = [], []
    for file in files:
        try:
            parts.append(_read(file).decode("utf-8"))
        except UnicodeDecodeError as error:
            skipped.append(file)
            if len(skipped) == len(files):
                raise ValueError(
                    f"cannot read {file}: it is not UTF-8 (byte {error.start} of it); its bytes "
                    "can be tokens as they are (tokens bytes)"
                ) from error
    if skipped:
        from tqdm import tqdm  # here, since whoever has other data may do without

        names = ", ".join(map(str, skipped))
        tqdm.write(f"left out, since they are not UTF-8: {names}", file=sys.stderr)
    return "\n".join(parts)


def _read(file: FilePath) -> bytes:
    try:
        return file.read_bytes()
    except FileNotFoundError as error:
        raise ValueError(f"cannot read {file}: there is no such file") from error
    except OSError as error:
        raise ValueError(f"cannot read {file}: {error.strerror}") from error


def _blocks(ids: Tensor, size: int) -> Tensor:
    """Tokens [L] as rows [n, size + 1], each of which begins with the last token of the one before;
    -100 behind the last token."""
    count = -(-(len(ids) - 1) // size)
    padding = count * size + 1 - len(ids)
    return torch.nn.functional.pad(ids, (0, padding), value=IGNORED).unfold(0, size + 1, size)
