"""One picture of a data set with what is annotated on it, and the collecting of what is wrong.

A record holds annotations as they were read; masks are decoded when they are asked for, so that
tens of thousands of pictures are ready within seconds.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple

import numpy as np

from lora_core.errors import DataError, listing
from sam2_lora.config import MaskKind
from sam2_lora.encodings import (
    decode_bitmap,
    decode_counts,
    decode_parts,
    decode_polygon,
    decode_runs,
)
from sam2_lora.image import (
    SUFFIXES,
    has_more_frames,
    open_picture,
    orientation,
    read_mask,
    upright_size,
)
from sam2_lora.masks import Object, Size, binary_object, objects_by_value, trim


class Shape(NamedTuple):
    """One annotation of a picture, not decoded yet."""

    kind: Literal["runs", "counts", "bitmap", "polygon", "parts", "rectangle"]
    data: Any
    label: str
    where: str  # file and record, for messages

    def decode(self, size: Size) -> Object:
        """The annotation's mask in a picture of `size` (height, width)."""
        match self.kind:
            case "runs":
                return decode_runs(self.data, size, self.label)
            case "counts":
                return decode_counts(self.data, size, self.label)
            case "bitmap":
                return decode_bitmap(self.data[0], self.data[1], size, self.label)
            case "polygon":
                return decode_polygon(self.data, size, self.label)
            case "parts":
                return decode_parts(self.data, size, self.label)
            case "rectangle":
                x0, y0, x1, y1 = self.data
                filled = np.ones((y1 - y0 + 1, x1 - x0 + 1), dtype=bool)
                return trim(filled, (x0, y0), size, self.label)


@dataclass(frozen=True)
class Record:
    """A picture and its annotations."""

    key: str  # unique in the data set: the picture's path below the data root, with "/"
    image: Path
    size: Size  # (height, width) of the upright picture
    shapes: tuple[Shape, ...] = ()
    mask: Path | None = None  # a mask file instead of shapes
    mask_kind: MaskKind = "auto"
    merged: bool = False  # an annotation holds all of its class: its parts are the objects

    @property
    def objects(self) -> list[Object]:
        """The annotations' masks, decoded anew at each access; empty ones are left out.

        Raises:
            DataError: annotations cannot be decoded; one line for each.
        """
        if self.mask is not None:
            return self._mask_objects(self.mask)
        found, problems = [], []
        for shape in self.shapes:
            try:
                item = shape.decode(self.size)
            except DataError as error:
                problems.append(f"{shape.where}: {error}")
                continue
            if item.crop.size:
                found.append(item)
        if problems:
            raise DataError("\n".join(problems))
        return found

    def _mask_objects(self, path: Path) -> list[Object]:
        values = read_mask(path)
        if values.shape != self.size:
            raise DataError(f"{path}: {_sizes(values.shape, self.size)}")
        try:
            if self.mask_kind in {"auto", "binary"}:
                return binary_object(values, evident=self.mask_kind == "auto", label="object")
            return objects_by_value(values, labels=self.mask_kind == "labels")
        except DataError as error:
            raise type(error)(f"{path}: {error}") from None


@dataclass
class Reading:
    """What reading a data set gave: its records, and all that is wrong or was passed over."""

    records: list[Record] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)  # what was passed over -> how often

    @contextmanager
    def collecting(self, where: str = "") -> Iterator[None]:
        """Add a DataError raised inside to the problems instead of stopping."""
        try:
            yield
        except DataError as error:
            self.problems.append(f"{where}: {error}" if where else str(error))

    def size_of(self, picture: Path, declared: Size | None = None, source: str = "") -> Size:
        """(height, width) of a picture from its header, which must be what `source` declares.

        Raises:
            DataError: no readable picture, or another size.
        """
        with open_picture(picture) as opened:
            size, stored = upright_size(opened), (opened.height, opened.width)
            turned = orientation(opened) != 1
            if has_more_frames(opened):
                self.notes["pictures with several frames or pages: the first is used"] += 1
        if declared is None or declared == size:
            return size
        reason = ""
        if turned and declared == stored:
            reason = (
                "; the picture's EXIF orientation turns it, and annotations must mean the upright "
                "picture: save it without the tag, or annotate what viewers show"
            )
        elif declared == size[::-1]:
            reason = "; width and height seem to be swapped"
        raise DataError(f"{source}: {_sizes(declared, size)} {picture}{reason}")

    def said(self) -> list[str]:
        """The notes as lines for people."""
        return [f"{count} {what}" for what, count in self.notes.items()]

    def stop_if_wrong(self, what: str) -> None:
        """Raise one DataError for all problems.

        Raises:
            DataError: there are any; holds the first 20 and the total.
        """
        if self.problems:
            count = len(self.problems)
            title = f"{what}: {count} problem{'s' if count > 1 else ''}"
            raise DataError(f"{title}\n{listing(self.problems)}")


def _sizes(found: tuple[int, ...], expected: Size) -> str:
    return (
        f"{found[1]} x {found[0]} pixels (width x height), "
        f"but {expected[1]} x {expected[0]} in the picture"
    )


def key_of(picture: Path, root: Path) -> str:
    """A picture's path below the data root, with "/"."""
    return picture.relative_to(root).as_posix()


def pictures_in(folder: Path, reading: Reading) -> dict[str, Path]:
    """Name -> path of the pictures directly in a folder, sorted by name.

    Raises:
        DataError: no such folder.
    """
    if not folder.is_dir():
        raise DataError(f"{folder.absolute()}: no such folder")
    found: dict[str, Path] = {}
    for name in sorted(os.listdir(folder)):
        path = folder / name
        if name.startswith("."):
            continue
        if path.suffix.lower() not in SUFFIXES:
            reading.notes[f"files in {folder} that are no pictures"] += 1
            continue
        with reading.collecting():
            _stay_inside(path, folder)
            found[name] = path
    return found


def inside(folder: Path, name: object) -> Path:
    """The file `name` below `folder`, as an annotation file names it.

    Raises:
        DataError: no text, an absolute path, a URL, "..", or a link that leads outside.
    """
    if not isinstance(name, str) or not name or "\0" in name:
        raise DataError(f"file name {name!r}: expected text")
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or ":" in name:
        raise DataError(f"file name {name!r}: must be a path below {folder}")
    full = folder / path
    _stay_inside(full, folder)
    return full


def _stay_inside(path: Path, folder: Path) -> None:
    """Refuse links that lead out of the folder; the folder itself may be a link.

    Raises:
        DataError: such a link.
    """
    below = [path, *path.parents][: len(path.parts) - len(folder.parts)]
    linked = any(part.is_symlink() for part in below)  # resolving every path would be slow
    if linked and not path.resolve().is_relative_to(folder.resolve()):
        raise DataError(f"{path}: a link that leads out of {folder}; copy the file")


def read_json(path: Path) -> Any:
    """The value in a JSON file, with or without byte-order mark.

    Raises:
        DataError: missing, not JSON (with line and column), or nested too deeply.
    """
    try:
        data = path.read_bytes()
        return json.loads(data.decode("utf-8-sig"))
    except FileNotFoundError:
        raise DataError(f"{path.absolute()}: no such file") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        kind = "gzip: unpack it" if data.startswith(b"\x1f\x8b") else "not UTF-8 text"
        raise DataError(f"{path}: {kind}") from None
    except RecursionError:
        raise DataError(f"{path}: nested too deeply") from None
    except json.JSONDecodeError as error:
        hint = ""
        if error.msg == "Extra data":
            hint = "; if it is JSON Lines, put its lines into one list"
        place = f"{path}:{error.lineno}:{error.colno}"
        raise DataError(f"{place}: not JSON: {error.msg}{hint}") from None


def is_whole(value: object) -> bool:
    """Whether a JSON value is an integer (true and false are not)."""
    return type(value) is int
