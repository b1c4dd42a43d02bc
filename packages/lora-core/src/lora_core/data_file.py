"""Files of a data set, which nobody vouches for: regular ones only, and JSON as JSON is meant."""

from __future__ import annotations

import json
import math
import os
import re
import stat
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

from lora_core.errors import DataError, one_line
from lora_core.settings.types import shown

MAX_JSON = 2**31  # bytes; COCO's own files have 0.5 GB


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading. A pipe or device would block for ever, or act.

    Raises:
        DataError: no such file, or not a regular one.
        OSError: it cannot be opened.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise DataError(f"{one_line(path)}: not a regular file")
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        file = os.fdopen(os.open(path, flags), "rb")
    except FileNotFoundError:
        raise DataError(f"{one_line(path.absolute())}: no such file") from None
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):  # exchanged meanwhile
        file.close()
        raise DataError(f"{one_line(path)}: not a regular file")
    return file


def read_json(path: Path) -> Any:
    """The value in a JSON file of one sample, with or without byte-order mark.

    Raises:
        DataError: as `read_json_of_many`; or NaN or Infinity, with its place.
    """
    content, finite = read_json_of_many(path)
    if not finite:
        wrong = not_finite(content) or "holds NaN or Infinity, which JSON does not have"
        raise DataError(f"{one_line(path)}: {wrong}")
    return content


def read_json_of_many(path: Path) -> tuple[Any, bool]:
    """The value in a JSON file, and whether all its numbers are finite, as JSON demands.

    Raises:
        DataError: missing, too large, not JSON (with line and column), or nested too deeply.
    """
    constants: list[str] = []

    def constant(name: str) -> float:
        constants.append(name)
        return float(name)

    data = _json_bytes(path)
    try:
        content = json.loads(
            data.decode("utf-8-sig"),
            parse_constant=constant,
            object_pairs_hook=keys_once(one_line(path)),
        )
        return content, not constants
    except DataError:  # a ValueError too
        raise
    except UnicodeDecodeError:
        raise DataError(f"{one_line(path)}: {_encoding(data)}") from None
    except RecursionError:
        raise DataError(f"{one_line(path)}: nested too deeply") from None
    except json.JSONDecodeError as error:
        hint = ""
        if error.msg == "Extra data":
            hint = "; if it is JSON Lines, put its lines into one list"
        elif "\0" in error.doc[:4]:
            hint = f"; {_encoding(data)}"
        place = f"{one_line(path)}:{error.lineno}:{error.colno}"
        raise DataError(f"{place}: not JSON: {error.msg}{hint}") from None
    except ValueError:  # Python refuses to read integers of thousands of digits
        raise DataError(f"{one_line(path)}: holds a number of thousands of digits") from None


def keys_once(place: str) -> Callable[[list[tuple[str, Any]]], dict[str, Any]]:
    """An `object_pairs_hook` of `json.loads` that refuses a key that stands twice.

    Args:
        place: file, and line if there is one, for the message of the DataError.
    """

    def made(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):  # Python would keep the last and lose the others
            twice = next(key for key, count in Counter(k for k, _ in pairs).items() if count > 1)
            raise DataError(f"{place}: the key {shown(twice)} stands twice in one object")
        return found

    return made


def _json_bytes(path: Path) -> bytes:
    try:
        with open_regular(path) as file:
            length = os.fstat(file.fileno()).st_size
            if length > MAX_JSON:
                raise DataError(
                    f"{one_line(path)}: {length / 1e9:.1f} GB of JSON are more than "
                    f"{MAX_JSON / 1e9:.1f}: split the data set"
                )
            return file.read()
    except OSError as error:
        raise DataError(f"{one_line(path)}: cannot be read: {error.strerror}") from None


def _encoding(data: bytes) -> str:
    """Why a file is no UTF-8 text, from its first bytes."""
    if data.startswith(b"\x1f\x8b"):
        return "gzip: unpack it"
    if data.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in data[:4]:
        return "UTF-16 text: save it as UTF-8"
    return "not UTF-8 text"


def not_finite(value: Any, place: str = "") -> str:
    """The first NaN or Infinity in a JSON value, as "bbox[2] is nan", or ""."""
    if isinstance(value, float) and not math.isfinite(value):
        return f"{place or 'it'} is {value}, expected a finite number"
    items: Iterable[tuple[str, Any]] = ()
    if isinstance(value, dict):
        items = ((f"{place}.{key}" if place else str(key), item) for key, item in value.items())
    elif isinstance(value, list):
        items = ((f"{place}[{number}]", item) for number, item in enumerate(value))
    return next((found for inner, item in items if (found := not_finite(item, inner))), "")


def is_label(value: object) -> TypeGuard[str]:
    """Whether a JSON value can be the name of a class: text that can be written."""
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


def is_whole(value: object) -> TypeGuard[int]:
    """Whether a JSON value is an integer (true and false are not)."""
    return type(value) is int


# -- data sets that are written --------------------------------------------------------------------


@contextmanager
def new_tree(output: Path) -> Iterator[Path]:
    """The path of a folder to make, which becomes `output` when the block ends without error.

    An older `output` is kept until that has worked, and put back if it has not.

    Raises:
        DataError: it, or something in it, cannot be written.
    """
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{output.name[:60]}.", dir=output.parent) as new:
            tree, old = Path(new) / "tree", Path(new) / "old"
            yield tree
            if output.exists():
                output.rename(old)
            try:
                tree.rename(output)
            except OSError:
                if old.exists():
                    old.rename(output)
                raise
    except OSError as error:
        file = one_line(error.filename or output)  # it may be a picture that is gone meanwhile
        raise DataError(f"{output}: cannot be written: {file}: {error.strerror}") from error
