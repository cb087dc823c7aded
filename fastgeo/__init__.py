"""Geodesics between trained networks: every network on the path in one pass."""

import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastgeo._public import *  # noqa: F403

    __version__: str


FUNCTIONS = ("evaluate", "optimize", "plane", "recalibrate")  # which are in modules of their names


class _Package(ModuleType):
    """The public names are imported when one of them is first asked for.

    Torch takes seconds to import, and `fastgeo --help` needs none of it.
    """

    def __getattr__(self, name: str) -> Any:
        if name == "__version__":
            metadata = import_module("importlib.metadata")
            try:
                return metadata.version("fastgeo")
            except metadata.PackageNotFoundError:
                return "not installed"  # a working copy
        own = name == "__all__" or not name.startswith("__")
        if own and (name in FUNCTIONS or find_spec(f"fastgeo.{name}") is None):
            public = vars(import_module("fastgeo._public"))
            names = public["__all__"]
            vars(self).update({one: public[one] for one in names}, __all__=names)
            if name in vars(self):
                return vars(self)[name]
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        # Python sets a module that it has imported, which would hide the function of its name.
        if not (isinstance(value, ModuleType) and name in FUNCTIONS):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self.__all__})


sys.modules[__name__].__class__ = _Package
