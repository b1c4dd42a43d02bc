"""Names of a package that are loaded on first use, so that importing it costs nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def loader(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """The `__getattr__` of a package: `__getattr__ = loader(__name__, {"Config": "config"})`.

    Args:
        homes: public name -> the module in the package that has it; a module is its own home. No
            other name may be that of a module: importing that would put it in its place.
    """

    def load(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        home = import_module(f"{package}.{homes[name]}")
        value = home if name == homes[name] else getattr(home, name)
        setattr(sys.modules[package], name, value)
        return value

    return load
