"""How N networks are evaluated: what training, optimisation and evaluation take alike."""

import re
from dataclasses import dataclass
from typing import Literal

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


@dataclass(frozen=True)
class Forward:
    """How N networks are evaluated, and what counts of what they return.

    Attributes:
        engine: "stacked", "vmap" or "loop" as in `fastgeo.stack`, or "auto": they take turns in the
            first steps until the fastest is known. All compute the same up to rounding, so a run
            repeats itself to the last bit only with an engine that is named.
        channels_last: memory format of images; None is the faster one if the engine is "auto", that
            of a captured step on a GPU, else no.
        chunk: networks in one pass; None for all. On a path two chunks' activations are kept at
            most, nothing is computed twice, and the gradient is the same.
        memory_budget: of an optimisation step; choose the chunk so that the activations kept for
            the backward pass take at most so many bytes: a number, or a string as in "8GiB".
        precision: "fp32", "tf32" or "bf16" as in `fastgeo.stack`, of the backward pass, too.
            Weights stay in their own dtype, and divergences and losses in fp32. "auto" is fp32, or
            bf16 where the processor multiplies in it, networks are stacked, and that was faster.
        batchnorm: "refuse", or "recalibrate" for networks with BatchNorm, or with other buffers
            that they update by themselves in train mode: training updates those of each; along a
            path they are computed anew from training data (`fastgeo.recalibrate`), and optimisation
            takes the statistics of each batch.
        output: name of the logits [B, ..., C] in what the module returns, an attribute or key;
            "logits" is also a tensor by itself, what is named "out", or else the first tensor of a
            tuple or list.
        mask: name of one of the inputs, of the logits' shape without C, as attention_mask is for a
            language model: rows where it is 0 do not count. Rows whose label is -100 never count.

    Raises:
        ValueError: a chunk below 1, a size that is none, or both.
    """

    engine: Literal["auto", "stacked", "vmap", "loop"] = "auto"
    channels_last: bool | None = None
    chunk: int | None = None
    memory_budget: int | str | None = None
    precision: Literal["fp32", "tf32", "bf16", "auto"] = "fp32"
    batchnorm: Literal["refuse", "recalibrate"] = "refuse"
    output: str = "logits"
    mask: str | None = None

    def __post_init__(self) -> None:
        if self.chunk is not None and self.chunk < 1:
            raise ValueError(f"chunk must be at least 1, got {self.chunk}")
        if self.chunk is not None and self.memory_budget is not None:
            raise ValueError("chunk and memory_budget both bound the memory; give one of them")
        if self.memory_budget is not None:
            bytes_of(self.memory_budget)


def way(engine: str, channels_last: bool | None, chunk: int | None, precision: str) -> str:
    """How networks are evaluated, in words: "stacked, channels-last, 4 at a time, bf16"."""
    layout = ", channels-last" if channels_last else ""
    few = f", {chunk} at a time" if chunk else ""
    return f"{engine}{layout}{few}" + (", bf16" if precision == "bf16" else "")


def bytes_of(memory: int | str) -> int:
    """8589934592 of "8GiB"; of a number, the number.

    Raises:
        ValueError: anything that is not a positive size.
    """
    parts = re.fullmatch(r"\s*([\d.]+)\s*([kmg]i?|)b?\s*", str(memory).lower())
    try:
        size = int(float(parts[1]) * UNITS[parts[2]]) if parts else 0
    except ValueError:
        size = 0
    if size < 1:
        raise ValueError(f"a memory budget is a size as in 8GiB, 500MB, or bytes, got {memory!r}")
    return size


def size_of(number: int) -> str:
    """A number of bytes, as `bytes_of` reads it."""
    for unit in ("GiB", "MiB", "KiB"):
        if number >= UNITS[unit[:2].lower()]:
            return f"{number / UNITS[unit[:2].lower()]:.3g}{unit}"
    return f"{number}B"
