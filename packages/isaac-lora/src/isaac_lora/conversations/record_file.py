"""The records of a conversation file as JSON values: a list, or one record on each line.

What a file is instead is said once, for the file; what is wrong in a record is not looked at here.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from isaac_lora.json_words import kind
from lora_core.data_file import MAX_JSON, keys_once, open_regular, read_json_of_many
from lora_core.errors import DataError, one_line
from lora_core.settings.types import shown

EXPECTED = 'expected a list of records, [{"conversations": [...]}, ...], or one record per line'
KEYS = 6  # of an object that are named
_BETWEEN = re.compile(r"[ \t\r\n,]*")  # records of a list


def read_values(path: Path) -> list[Any]:
    """The records of a file, as JSON values.

    Raises:
        DataError: no such file, not JSON, no list of records, or a key that stands twice in an
            object, with its line or record.
    """
    if _begins_with_object(path):
        return _lines_or_one_object(path)
    try:
        content, _ = read_json_of_many(path)
    except DataError:
        _refuse_doubled_key(path)
        raise
    if not isinstance(content, list):
        raise DataError(f"{one_line(path)}: it holds {kind(content)}: {EXPECTED}")
    return content


# -- a list ----------------------------------------------------------------------------------------


def _refuse_doubled_key(path: Path) -> None:
    """Name the record of a list in which a key stands twice, if that is what is wrong with a file.

    Raises:
        DataError: it is; with the line on which the record begins.
    """
    try:
        if path.stat().st_size > MAX_JSON:
            return
        text = path.read_text("utf-8-sig")
        at, number, line, counted = text.index("[") + 1, 0, 1, 0
        while text[at := _end_of_gap(text, at)] != "]":
            line += text.count("\n", counted, at)
            place = f"{one_line(path)}:{line}: record {number}"
            decoder = json.JSONDecoder(object_pairs_hook=keys_once(place))
            _, after = decoder.raw_decode(text, at)
            counted, at, number = at, after, number + 1
    except DataError:  # a ValueError too
        raise
    except (OSError, ValueError, IndexError, RecursionError):
        return  # something else is wrong, which has been found


def _end_of_gap(text: str, at: int) -> int:
    found = _BETWEEN.match(text, at)
    return at if found is None else found.end()


# -- records on lines ------------------------------------------------------------------------------


def _begins_with_object(path: Path) -> bool:
    """Whether a file begins with "{", as JSON Lines do."""
    try:
        with open_regular(path) as file:
            return file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"{"
    except OSError as error:
        raise DataError(f"{one_line(path)}: cannot be read: {error.strerror}") from None


def _lines_or_one_object(path: Path) -> list[Any]:
    """The values of JSON Lines.

    Raises:
        DataError: as `_lines`; or the file is one object that is no record, on a line or on many.
    """
    try:
        values = list(_lines(path))
    except DataError as error:
        try:
            content, _ = read_json_of_many(path)
        except DataError:  # lines were meant
            raise error from None
        raise _one_object(path, content) from None
    if len(values) == 1 and isinstance(values[0], dict) and not _is_record(values[0]):
        raise _one_object(path, values[0])
    return values


def _is_record(content: dict[str, Any]) -> bool:
    """Whether a record is meant, whose only fault may be a misspelt name."""
    return any(key.lower().startswith("conv") for key in content)


def _one_object(path: Path, content: dict[str, Any]) -> DataError:
    remedy = ""
    lists = [key for key, value in content.items() if isinstance(value, list)]
    if _is_record(content):
        remedy = "; put [ and ] around it"
    elif {"images", "annotations"} <= content.keys():
        remedy = "; a COCO data set becomes conversations with `isaac-lora prepare coco`"
    elif len(lists) == 1:
        remedy = f"; if {shown(lists[0])} holds the records, save that list alone"
    keys = ", ".join(map(shown, islice(content, KEYS))) + ", ..." * (len(content) > KEYS)
    what = f"one object, of {keys}" if keys else "an empty object"
    return DataError(f"{one_line(path)}: it holds {what}: {EXPECTED}{remedy}")


def _lines(path: Path) -> Iterator[Any]:
    """The values of JSON Lines; empty lines are passed over.

    Raises:
        DataError: too large, not UTF-8, or a line that is no JSON, with its place.
    """
    with open_regular(path) as file:
        if (length := os.fstat(file.fileno()).st_size) > MAX_JSON:
            raise DataError(
                f"{one_line(path)}: {length / 1e9:.1f} GB of JSON are more than "
                f"{MAX_JSON / 1e9:.1f}: split the data set"
            )
        for number, line in enumerate(file, start=1):
            place = f"{one_line(path)}:{number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError:
                raise DataError(f"{place}: not UTF-8 text") from None
            if text.strip():
                yield _value(text, place)


def _value(text: str, place: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=keys_once(place))
    except DataError:  # a ValueError too
        raise
    except json.JSONDecodeError as error:
        raise DataError(
            f"{place}:{error.colno}: not JSON: {error.msg}; expected a list of records, or one "
            "whole record per line"
        ) from None
    except RecursionError:
        raise DataError(f"{place}: nested too deeply") from None
    except ValueError:  # Python refuses to read integers of thousands of digits
        raise DataError(f"{place}: holds a number of thousands of digits") from None
