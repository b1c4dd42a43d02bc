"""The types of settings: what a file or a flag may mean by a value, and their names for people."""

from __future__ import annotations

import argparse
import re
from decimal import Decimal
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from lora_core.errors import ConfigError, near
from lora_core.settings.file import Word

LISTS = (list, tuple, set)
_UNCLEAR = "put '{}' in quotes if a name is meant; for a truth value write true or false"


def accept(hint: Any, value: Any, place: str, flag: bool = False) -> Any:
    """Give `value`, the text of a flag or a value of a file, in the type that `hint` asks for.

    Raises:
        ConfigError: another type; the message starts with `place`.
    """
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=hint)
    value = _whole(hint, value) if flag else _as_meant(hint, value, place)
    try:
        if flag:
            return parser.parse_args([f"--value={value}"]).value
        return parser.parse_object({"value": value}).value
    except (argparse.ArgumentError, RecursionError):
        guess = near(value, choices(hint))
        expected = f"expected {say_type(hint)}, not {shown(value)}"
        raise ConfigError(f"{place}: {expected}{guess and '; ' + guess}") from None


def shown(value: Any) -> str:
    """Quote a value for a message, at most 80 characters of it."""
    text = repr(value if not isinstance(value, str) else value[:100])
    return text if len(text) <= 80 else f"{text[:80]}..."


def _as_meant(hint: Any, value: Any, place: str) -> Any:
    """Settle what a file leaves open: names that look like numbers or truth values, 8.0 for 8."""
    allowed = kinds(hint)
    if isinstance(value, list):
        items = [get_args(kind) for kind in allowed if get_origin(kind) in LISTS]
        inner = items[0][0] if items else Any
        return [_as_meant(inner, item, place) for item in value]
    if isinstance(value, Word):
        if bool in allowed:
            return value.lower() in ("yes", "on")
        raise ConfigError(f"{place}: {_UNCLEAR.format(value)}")
    names = str in allowed or any(isinstance(choice, str) for choice in choices(hint))
    if names and value is None and type(None) not in allowed:
        raise ConfigError(f"{place}: put 'null' in quotes if a name is meant")
    if names and isinstance(value, bool) and bool not in allowed:
        raise ConfigError(f"{place}: put '{str(value).lower()}' in quotes if a name is meant")
    if names and isinstance(value, float) and float not in allowed:
        raise ConfigError(f"{place}: put the number {value} in quotes if a name is meant")
    if names and isinstance(value, int) and not {int, float, bool} & set(allowed):
        return str(value)
    return _whole(hint, value)


def _whole(hint: Any, value: Any) -> Any:
    """Give 8 for 8.0, and 10000 for 1e4, where a whole number is expected; 8.5 is to be refused."""
    allowed = kinds(hint)
    if int not in allowed or {float, str} & set(allowed) or isinstance(value, (bool, int)):
        return value
    if not re.fullmatch(r"[-+]?\d{1,15}(\.\d{0,15})?(e\+?\d\d?)?", str(value), re.ASCII | re.I):
        return value
    number = Decimal(str(value))
    return int(number) if number == number.to_integral_value() else value


def refuse_words(value: Any, place: str) -> None:
    """Ask for clarity where any type may stand, as under `trainer`."""
    if isinstance(value, Word):
        raise ConfigError(f"{place}: {_UNCLEAR.format(value)}")
    if isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            refuse_words(item, place)


def kinds(hint: Any) -> tuple[Any, ...]:
    """List the alternatives of a union; any other type stands for itself."""
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def choices(hint: Any) -> list[Any]:
    return [c for kind in kinds(hint) if get_origin(kind) is Literal for c in get_args(kind)]


def say_type(hint: Any) -> str:
    """Name a type for people: `a whole number`, `one of auto, fp32`, `text or null`."""
    names = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "text",
        Path: "a path",
        type(None): "null",
    }
    texts = []
    for kind in kinds(hint):
        if get_origin(kind) is Literal:
            texts.append(f"one of {', '.join(map(str, get_args(kind)))}")
        elif get_origin(kind) in LISTS:
            texts.append(f"a list of {say_type(get_args(kind)[0])}")
        elif get_origin(kind) is dict:
            texts.append("names with their values")
        else:
            texts.append(names.get(kind, str(kind)))
    return " or ".join(texts)


def metavar(hint: Any) -> str:
    names = {bool: "true|false", int: "N", float: "X", str: "TEXT", Path: "PATH"}
    kind = next((kind for kind in kinds(hint) if kind is not type(None)), str)
    if choices(hint):
        return "|".join(map(str, choices(hint)))
    if get_origin(kind) in LISTS:
        item = metavar(get_args(kind)[0])
        return f"{item} [{item} ...]"
    return names.get(kind, "VALUE")
