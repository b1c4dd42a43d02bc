"""Names of modules: without wrappers, as files have them, and as PEFT matches them."""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn

from lora_core.errors import ConfigError, UserError

Rename = Callable[[str], str]
Value = TypeVar("Value")

PATIENCE = 10.0  # seconds; the patterns for thousands of modules take less than one

# Attributes behind which torch.compile, FSDP1 and activation checkpointing put a module.
_HIDDEN = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, DataParallel and torch.compile."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def clean(path: str) -> str:
    """A module path or state-dict key without the components that wrappers inside a model add."""
    return ".".join(part for part in path.split(".") if part not in _HIDDEN)


def file_paths(model: nn.Module, rename: Rename | None = None) -> dict[str, str]:
    """Live path -> path in files, for every module of an unwrapped model.

    Raises:
        ValueError: `rename` gives two modules one name.
    """
    paths = {path: clean(path) for path, _ in model.named_modules() if _is_own(path)}
    if rename is None:
        return paths
    renamed = {live: rename(path) for live, path in paths.items()}
    owner: dict[str, str] = {}
    for live, path in renamed.items():
        if owner.setdefault(path, live) != live:
            raise ValueError(f"rename gives {owner[path]} and {live} the same name {path}")
    return renamed


def _is_own(path: str) -> bool:
    """Whether a module belongs to the base: neither a part of an adapter nor a mere wrapper."""
    parts = path.split(".")
    return parts[-1] not in _HIDDEN and not any(part.startswith("lora_") for part in parts)


def join(path: str, name: str) -> str:
    """`path.name`, for the root `name`."""
    return f"{path}.{name}" if path else name


@contextmanager
def in_time(patterns: str, kind: type[UserError] = ConfigError) -> Iterator[None]:
    """End the matching of expressions that would try for ever, as (a+)+b does on aaaa...

    The matcher looks for signals while it tries, so a timer can end it. Only the main thread has
    one, and not on Windows: elsewhere there is no limit.

    Raises:
        UserError: of this `kind`, after `PATIENCE` seconds; the block must change nothing.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(
        signal, "setitimer"
    ):
        yield
        return

    def stop(*_: object) -> None:
        raise kind(
            f"matching {patterns} takes more than {PATIENCE:g} s: an expression that repeats a "
            "repetition, such as (a+)+, tries for ever. Write it without nested + and *"
        )

    handler = signal.signal(signal.SIGALRM, stop)
    left, interval = signal.setitimer(signal.ITIMER_REAL, PATIENCE)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, left, interval)
        signal.signal(signal.SIGALRM, handler or signal.SIG_DFL)


# PEFT's rules


def first_match(patterns: Mapping[str, Value], name: str, default: Value) -> Value:
    """The value of the first pattern that a module name ends with, as rank_pattern is read."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def exactly(name: str) -> str:
    """A pattern for `first_match` that hits this name and no other."""
    return "^" + re.escape(name)


def targets(names: Iterable[str], everything: Iterable[str]) -> list[str] | str:
    """`target_modules` that hit these names and no other.

    PEFT takes a list entry for every module whose name *ends* with it. So the list is only right
    where no other module does; else it is one regular expression for whole names.
    """
    names = sorted(names)
    others = set(everything) - set(names)
    endings = tuple(f".{name}" for name in names)
    return only(names) if any(other.endswith(endings) for other in others) else names


def only(names: Iterable[str]) -> str:
    """A regular expression for whole names that matches these and no other."""
    return f"^(?:{'|'.join(map(re.escape, sorted(names)))})$"


def is_target(config: Mapping[str, Any], name: str) -> bool:
    """Whether PEFT would adapt a module of this name (`layers_to_transform` and all)."""
    excluded = config.get("exclude_modules") or []
    if _hits(excluded, name) or any(
        re.match(rf"(^|.*\.){kept}($|\..*)", name) for kept in config.get("modules_to_save") or []
    ):
        return False
    wanted = config.get("target_modules") or []
    if not _hits(wanted, name):
        return False
    layers = config.get("layers_to_transform")
    if isinstance(wanted, str) or layers is None or layers == []:
        return True
    index = _layer_index(config.get("layers_pattern") or [], name)
    return index is not None and index in ([layers] if isinstance(layers, int) else layers)


def _hits(wanted: str | Sequence[str], name: str) -> bool:
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return any(name == entry or name.endswith(f".{entry}") for entry in wanted)


def _layer_index(patterns: str | Sequence[str], name: str) -> int | None:
    """The number of the block that a module lies in."""
    if not patterns:
        found = re.match(r".*?\.[^.]*\.(\d+)\.", name)
        return int(found[1]) if found else None
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        found = re.match(rf"(?:^|.*?\.)(?:{pattern})\.(\d+)\.", name)
        if found:
            return int(found[1])
    return None
