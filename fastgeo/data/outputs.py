"""Outputs of a network: the logits in what it returns, and which of their rows count."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastgeo.data.inputs import Inputs

IGNORED = -100  # a target whose row does not count, as in torch's cross-entropy


def logits_in(outputs: Any, name: str | None = "logits") -> Any:
    """The tensor of that name, a key or attribute, in what one call of a module returned.

    "logits" is also a tensor by itself, one named "out", or else the first of a tuple or list; None
    is all that was returned. TypeError, which says what that is, where there is no such tensor.
    """
    if name is None or (name == "logits" and isinstance(outputs, Tensor)):
        return outputs
    found = [_named(outputs, name)]
    if name == "logits":
        found.append(_named(outputs, "out"))
        found += outputs if isinstance(outputs, tuple | list) else ()
    for value in found:
        if isinstance(value, Tensor):
            return value
    raise TypeError(
        f"the module must return {name}, one tensor [B, ..., C], got {_described(outputs)}; name "
        "another of its outputs with output= (on the command line --output)"
    )


def logits_of(outputs: Tensor) -> Tensor:
    """Logits [N, B, ..., C] as [N, rows, C].

    Raises:
        ValueError: fewer dimensions, or fewer than two classes.
    """
    shape = list(outputs.shape[1:])
    if outputs.ndim < 3:
        raise ValueError(
            f"the module must return logits [B, ..., C], got {shape}; where that is one logit z of "
            "a binary classifier, return torch.stack([torch.zeros_like(z), z], -1), whose softmax "
            "has the same probabilities"
        )
    if outputs.shape[-1] < 2:
        raise ValueError(
            "the module must return logits [B, ..., C] of at least two classes, since the softmax "
            f"of one is always 1, got {shape}; of one logit z of a binary classifier return "
            "torch.cat([torch.zeros_like(z), z], -1), whose softmax has the same probabilities"
        )
    return outputs.flatten(1, -2)


def rows_that_count(
    inputs: Inputs, targets: Any, mask: str | None, *, look: bool = True
) -> Tensor | None:
    """[B, ...], where the input of that name is not 0 and targets, if they are classes, are not
    -100. ValueError if there is no such input, or of another shape.

    Args:
        look: give None where all rows count, which a host has to wait for; else where nothing says
            that one does not.
    """
    counted = None
    if isinstance(targets, Tensor) and not (targets.is_floating_point() or targets.is_complex()):
        counted = targets.long() != IGNORED  # of uint8, 156 equals -100
        counted = None if look and counted.all() else counted
    if mask is None:
        return counted
    entry = _named(inputs, mask)
    if not isinstance(entry, Tensor):
        got = _described(inputs)
        raise ValueError(f"mask {mask!r} must name a tensor among the inputs, got {got}")
    if counted is None:
        return entry != 0
    check_rows(counted, entry.shape)
    return (entry != 0) & counted.to(entry.device)


def check_rows(counted: Tensor | None, rows: torch.Size) -> None:
    """ValueError unless those that count, [B, ...], are of these rows."""
    if counted is not None and counted.shape != rows:
        raise ValueError(
            "a mask, and targets of which some are -100, must have the shape of the logits without "
            f"their last axis, got {list(counted.shape)} for {list(rows)}"
        )


def label_rows(
    what: str, labels: Tensor, outputs: Tensor, counted: Tensor | None = None, *, check: bool = True
) -> Tensor:
    """Labels [B, ...] as [R], -100 where a row does not count, for outputs [N, B, ..., C].

    Raises:
        ValueError: labels of another shape or type, or if `check`, for which a CPU waits for a GPU,
            beyond the classes where they count; it begins with `what`.
    """
    *rows, classes = outputs.shape[1:]
    if list(labels.shape) != rows or labels.is_floating_point() or labels.is_complex():
        raise ValueError(
            f"{what}: labels must be integers {rows}, got {labels.dtype} {list(labels.shape)}"
        )
    check_rows(counted, labels.shape)
    labels = labels.long() if counted is None else labels.long().masked_fill(~counted, IGNORED)
    own = labels[labels != IGNORED] if check else labels[:0]
    if own.numel() and (own.min() < 0 or own.max() >= classes):
        raise ValueError(
            f"{what}: labels must be within 0..{classes - 1}, or -100 where a row does not count, "
            f"got {int(own.min())}..{int(own.max())}"
        )
    return labels.flatten()


def opened(outputs: Any) -> Any:
    """What a module returned as what pytree looks into: mappings and dataclasses as a dict."""
    if isinstance(outputs, Mapping):
        return dict(outputs)
    return vars(outputs) if dataclasses.is_dataclass(outputs) else outputs


def _named(value: Any, name: str) -> Any:
    """A key of a mapping, or an attribute of anything but a tensor; None if there is none."""
    if isinstance(value, Mapping):
        return value[name] if name in value else None
    return None if isinstance(value, Tensor) else getattr(value, name, None)


def _described(value: Any) -> str:
    """'dict of loss, scores', 'tuple of int, str', or the type alone."""
    inside = [type(v).__name__ for v in value] if isinstance(value, tuple | list) else opened(value)
    names = ", ".join(map(str, inside)) if isinstance(inside, dict | list) else ""
    return type(value).__name__ + (f" of {names}" if names else "")
