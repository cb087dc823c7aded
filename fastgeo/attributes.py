"""The attributes of a module, to find and undo what its forward assigns."""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn


class Attributes:
    """What the attributes of a module and of its submodules are at the moment.

    Covers parameters, buffers and submodules, and what is in the dicts and lists among them; not
    what is changed in place in a tensor.
    """

    def __init__(self, module: nn.Module):
        self._kept = [
            (held, held.copy())
            for layer in module.modules()
            for held in (vars(layer), *vars(layer).values())
            if isinstance(held, dict | list)
        ]

    def restore(self) -> dict[Any, Any]:
        """Undo what was assigned; (name or index -> value) of it."""
        assigned = {}
        for held, before in self._kept:
            now = _items(held)
            old = _items(before)
            new = {key: value for key, value in now.items() if value is not old.get(key, held)}
            if not new and len(now) == len(old):
                continue
            assigned |= new or dict.fromkeys(old.keys() - now.keys())
            held.clear()
            held.update(before) if isinstance(held, dict) else held.extend(before)
        return assigned


def _items(held: dict | list) -> dict:
    return held if isinstance(held, dict) else dict(enumerate(held))


@contextlib.contextmanager
def unchanged(module: nn.Module) -> Iterator[None]:
    """Undo what the module's forward assigns: values of other networks, or of a traced graph."""
    attributes = Attributes(module)
    try:
        yield
    finally:
        attributes.restore()
