"""Settings on the command line: `--options epoch=50 lora.r=8 hooks.1.type=Save`.

Words are read as the official launcher reads them, and never evaluated: `__import__("os")` is text.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from lora_core.errors import ConfigError, listing

MAX_DEPTH = 40  # of brackets in brackets
_CLOSING = {"(": ")", "[": "]"}


def parse_options(words: Sequence[str]) -> dict[str, Any]:
    """`["a.b=1", "c=x"]` as `{"a.b": 1, "c": "x"}`.

    A value loses outer quotes and all spaces; then it is a whole number, a number, true or false
    in any case, a list `1,2,3` or `[...]`, a tuple `(...)`, or text. `None` stays text.

    Raises:
        ConfigError: words without `=`, empty parts of a key, a key that stands twice, brackets that
            do not close; all of them together.
    """
    options: dict[str, Any] = {}
    problems = []
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not all(key.split(".")):
            problems.append(f"--options {word!r}: expected NAME=VALUE such as lora.r=8")
        elif key in options:
            problems.append(f"--options {word!r}: {key} is given twice")
        else:
            try:
                options[key] = parse_value(text)
            except ConfigError as error:
                problems.append(f"--options {word!r}: {error}")
    if problems:
        raise ConfigError(listing(problems))
    return options


def parse_value(text: str) -> Any:
    """One value as the launcher reads it; see `parse_options`."""
    return _value(text.strip("'\"").replace(" ", ""), 0)


def _value(text: str, depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise ConfigError("brackets are nested too deeply")
    parts = _split(text)
    if len(text) > 1 and _CLOSING.get(text[0]) == text[-1] and len(parts) == 1:
        items = [_value(part, depth + 1) for part in _split(text[1:-1]) if part]
        return tuple(items) if text[0] == "(" else items
    if len(parts) > 1:
        return [_value(part, depth + 1) for part in parts if part]
    return _scalar(text.strip("'\""))


def _split(text: str) -> list[str]:
    """Cut at the commas outside of brackets."""
    parts, begin, open_brackets = [], 0, ""
    for index, letter in enumerate(text):
        if letter in _CLOSING:
            open_brackets += _CLOSING[letter]
        elif letter in ")]":
            if not open_brackets.endswith(letter):
                raise ConfigError(f"{letter!r} closes no bracket")
            open_brackets = open_brackets[:-1]
        elif letter == "," and not open_brackets:
            parts.append(text[begin:index])
            begin = index + 1
    if open_brackets:
        raise ConfigError(f"a bracket is not closed, {open_brackets[-1]!r} is missing")
    return [*parts, text[begin:]]


def _scalar(text: str) -> Any:
    if "_" not in text:  # Python would take 1_000 for a number
        for kind in (int, float):
            try:
                return kind(text)
            except ValueError:
                continue
    return {"true": True, "false": False}.get(text.lower(), text)


# -- putting them over a file's settings -----------------------------------------------------------


def apply_options(values: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with `options` over them, `{"a.b": value}`; what was computed from them stays.

    Dotted keys make the dicts that are missing; whole numbers count the items of lists.

    Raises:
        ConfigError: an item beyond a list's end, or a part of something that has no parts; all
            such options together.
    """
    result = copy.deepcopy(dict(values))
    problems = []
    for key, value in options.items():
        try:
            _put(result, key, value)
        except ConfigError as error:
            problems.append(f"--options {key}: {error}")
    if problems:
        raise ConfigError(listing(problems))
    return result


def _put(values: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    target: Any = values
    for number, part in enumerate(path):
        place = ".".join(path[:number])
        if isinstance(target, list):
            target = target[_item(target, part, place)]
        elif isinstance(target, dict):
            target = target.setdefault(part, {})
        else:
            raise ConfigError(_no_parts(place, target))
    place = ".".join(path)
    if isinstance(target, list):
        target[_item(target, last, place)] = value
    elif isinstance(target, dict):
        target[last] = value
    else:
        raise ConfigError(_no_parts(place, target))


def _item(items: list[Any], part: str, place: str) -> int:
    if not part.isdecimal() or int(part) >= len(items):
        raise ConfigError(
            f"{place} is a list of {len(items)} items, counted from 0: there is no item {part!r}"
        )
    return int(part)


def _no_parts(place: str, value: Any) -> str:
    kind = "a tuple, which is replaced as a whole" if isinstance(value, tuple) else "a single value"
    return f"{place} is {value!r:.60}, {kind}"
