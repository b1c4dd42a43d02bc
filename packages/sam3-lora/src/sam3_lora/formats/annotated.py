"""What every form comes to: records of pictures, with boxes and outlines checked in one way."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lora_core.data_file import open_regular
from lora_core.errors import DataError, one_line
from lora_core.pictures.encodings import Shape, ring_of
from lora_core.pictures.files import SUFFIXES
from lora_core.pictures.masks import Size
from lora_core.pictures.reading import Reading, key_of
from lora_core.settings.types import shown
from sam3_lora.records import Box, Entry, Record

# Split -> names under which it is known.
SPLITS = {
    "train": ("train", "training"),
    "val": ("valid", "val", "validation"),
    "test": ("test", "testing"),
}
MAX_TEXT = 2**26  # bytes of a text file of labels or names
DIGITS = 3  # of coordinates: a thousandth of a pixel
ZERO = "boxes without width or height, left out"
CUT = "boxes that leave their picture, cut"
DOUBLED = "objects that stand twice in their picture, left out"
_NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?", re.ASCII)


class Part(NamedTuple):
    """One split of a data set."""

    records: list[Record]
    numbers: dict[str, int]  # name of a class -> its number; in the order of the numbers
    notes: tuple[str, ...] = ()  # on the classes


# -- boxes and outlines ----------------------------------------------------------------------------


def placed(corners: Sequence[float], size: Size, reading: Reading) -> Box | None:
    """A box (x0, y0, x1, y1) in pixels, cut to the picture; None without width or height.

    Raises:
        DataError: it lies outside of the picture.
    """
    x0, y0, x1, y1 = (round(value, DIGITS) for value in corners)
    if x1 <= x0 or y1 <= y0:
        reading.notes[ZERO] += 1
        return None
    box = (max(x0, 0.0), max(y0, 0.0), min(x1, float(size[1])), min(y1, float(size[0])))
    if box[2] <= box[0] or box[3] <= box[1]:
        raise DataError(
            f"a box from ({x0:g}, {y0:g}) to ({x1:g}, {y1:g}) lies outside of the picture of "
            f"{size[1]} x {size[0]} (width x height)"
        )
    if min(x0, y0) < -1 or x1 > size[1] + 1 or y1 > size[0] + 1:  # more than a rounded pixel
        reading.notes[CUT] += 1
    return box


def outlined(
    points: Sequence[float], label: str, size: Size, where: str, reading: Reading
) -> Entry | None:
    """An object from the outline x, y, x, y, ... in pixels; None if it encloses nothing.

    Raises:
        DataError: it is no outline, or lies outside of the picture.
    """
    ring = ring_of(list(points), size)
    box = placed((*ring.min(0).tolist(), *ring.max(0).tolist()), size, reading)
    if box is None:
        return None
    ring = np.clip(ring, 0, (size[1], size[0])).round(DIGITS)
    return Entry(label, box, Shape("parts", [ring], "", where), size, False)


def once(entries: Iterable[Entry | None], reading: Reading) -> tuple[Entry, ...]:
    """The objects in their order, each of those that stand twice once."""
    found: dict[object, Entry] = {}
    for entry in entries:
        if entry is None:
            continue
        outline = entry.shape.data[0].tobytes() if entry.shape else None
        if found.setdefault((entry.phrase, entry.box, outline), entry) is not entry:
            reading.notes[DOUBLED] += 1
    return tuple(found.values())


def number(text: str, what: str) -> float:
    """A number as people write it in ASCII; Python's own reading takes nan, 1_0 and more.

    Raises:
        DataError: anything else, or one that is not finite.
    """
    value = float(text) if len(text) < 100 and _NUMBER.fullmatch(text) else math.nan
    if not math.isfinite(value):
        raise DataError(f"{what} {shown(text)}: expected a finite number")
    return value


# -- files -----------------------------------------------------------------------------------------


def lines_of(path: Path) -> list[str]:
    """The lines of a text file, without the blanks around them.

    Raises:
        DataError: no such file, not a regular one, too large, or no UTF-8 text.
    """
    try:
        with open_regular(path) as file:
            if os.fstat(file.fileno()).st_size > MAX_TEXT:
                raise DataError(f"{one_line(path)}: more than {MAX_TEXT >> 20} MB of text")
            text = file.read().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(f"{one_line(path)}: not UTF-8 text") from None
    except OSError as error:
        raise DataError(f"{one_line(path)}: cannot be read: {error.strerror}") from None
    return [line.strip() for line in text.split("\n")]  # splitlines knows ends that files do not


def pictures_below(folder: Path, reading: Reading, deeper: bool = True) -> list[Path]:
    """All pictures in a folder and the folders in it, sorted; hidden ones are passed over.

    Args:
        deeper: look into the folders in it, too.

    Raises:
        DataError: no such folder.
    """
    if not folder.is_dir():
        raise DataError(f"{folder.absolute()}: no such folder")
    found = []
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if deeper and not name.startswith("."))
        for name in sorted(names):
            path = Path(place) / name
            if path.suffix.lower() not in SUFFIXES or name.startswith("."):
                continue
            with reading.collecting(sample=key_of(path, reading.root)):
                reading.stay_inside(path, reading.root)
                found.append(path)
    return found


def by_stem(pictures: Iterable[Path], reading: Reading) -> dict[str, Path]:
    """Name without suffix -> picture, of one folder; two of one name are a problem."""
    found: dict[str, Path] = {}
    for path in pictures:
        other = found.setdefault(path.stem, path)
        if other != path:
            reading.problems.append(
                f"{one_line(path)}: {one_line(other.name)} has the same name; keep one of them"
            )
    return found
