"""One picture of a data set with what is annotated on it, and the collecting of what is wrong.

A record holds annotations as they were read; masks are decoded when they are asked for, so that
tens of thousands of pictures are ready within seconds.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lora_core.errors import DataError, listing, near, one_line
from lora_core.report import plural
from lora_core.settings.types import shown
from lora_core.validate import validate
from sam2_lora.config import MaskKind
from sam2_lora.encodings import (
    decode_bitmap,
    decode_counts,
    decode_parts,
    decode_polygon,
    decode_runs,
)
from sam2_lora.image import SUFFIXES, Header, read_header, read_mask
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

    key: str  # unique in its split: the picture's path below the data root, with "/"
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
            DataError: as `decoded`.
        """
        return self.decoded()[0]

    def decoded(self) -> tuple[list[Object], int]:
        """The annotations' masks, and how many annotations cover no pixel.

        Raises:
            DataError: annotations cannot be decoded; one line for each.
        """
        if self.mask is not None:
            return self._mask_objects(self.mask), 0
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
        return found, len(self.shapes) - len(found)

    def check_size(self, pixels: NDArray[np.generic]) -> None:
        """Refuse a picture [H, W, ...] of another size than the annotations mean.

        Raises:
            DataError: it was exchanged after its header was read, or the header is wrong.
        """
        if pixels.shape[:2] != self.size:
            raise DataError(
                f"{one_line(self.image)}: {pixels.shape[1]} x {pixels.shape[0]} pixels "
                f"(width x height), expected {self.size[1]} x {self.size[0]} as its header said: "
                "was the picture exchanged, or is it damaged?"
            )

    def _mask_objects(self, path: Path) -> list[Object]:
        values = read_mask(path)
        if values.shape != self.size:
            raise DataError(f"{one_line(path)}: {_sizes(values.shape, self.size)}")
        try:
            if self.mask_kind in {"auto", "binary"}:
                return binary_object(values, evident=self.mask_kind == "auto", label="object")
            return objects_by_value(values, labels=self.mask_kind == "labels")
        except DataError as error:
            raise type(error)(f"{one_line(path)}: {error}") from None


@dataclass
class Reading:
    """What reading a data set gave: its records, and all that is wrong or was passed over."""

    root: Path  # of the data set
    follow_links: bool = False  # take files that links outside of it lead to
    records: list[Record] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)  # of the data set as a whole
    bad: list[tuple[str, str]] = field(default_factory=list)  # sample, what is wrong with it
    notes: Counter[str] = field(default_factory=Counter)  # what was passed over -> how often
    cut: bool = False  # its validation split is a share of the training pictures
    headers: dict[Path, Header | str] = field(default_factory=dict)  # or what is wrong

    @contextmanager
    def collecting(self, where: str = "", sample: str = "") -> Iterator[None]:
        """Collect a DataError raised inside instead of stopping.

        Args:
            where: file and record, for the message.
            sample: whose fault it is, so that the others can do without it; "": of the whole.
        """
        try:
            yield
        except DataError as error:
            text = f"{where}: {error}" if where else str(error)
            if sample:
                self.bad.append((sample, text))
            else:
                self.problems.append(text)

    def measure(self, pictures: Iterable[Path]) -> None:
        """Read the headers of pictures, all at once: alone, each would wait for the disk."""
        paths = [path for path in dict.fromkeys(pictures) if path not in self.headers]
        outcomes = validate(
            paths,
            read_header,
            kind="sam2 header 1",
            root=self.root,
            files=lambda path: [path],
            what="headers of pictures",
        )
        for path, outcome in zip(paths, outcomes, strict=True):
            if outcome.problem:
                self.headers[path] = outcome.problem
                continue
            size, stored, turned, several = outcome.value
            self.headers[path] = Header(tuple(size), tuple(stored), turned, several)
            if several:
                self.notes["pictures with several frames or pages, of which the first is used"] += 1

    def size_of(self, picture: Path, declared: Size | None = None, source: str = "") -> Size:
        """(height, width) of a picture from its header, which must be what `source` declares.

        Raises:
            DataError: no readable picture, or another size.
        """
        if picture not in self.headers:
            self.measure([picture])
        header = self.headers[picture]
        if isinstance(header, str):
            raise DataError(header)
        size = header.size
        if declared is None or declared == size:
            return size
        reason = ""
        if header.turned and declared == header.stored:
            reason = (
                "; the picture's EXIF orientation turns it, and annotations must mean the upright "
                "picture: save it without the tag, or annotate what viewers show"
            )
        elif declared == size[::-1]:
            reason = "; width and height seem to be swapped"
        raise DataError(f"{source}: {_sizes(declared, size)} {one_line(picture)}{reason}")

    def stay_inside(self, path: Path, folder: Path) -> None:
        """Refuse links that lead out of the folder; the folder itself may be a link.

        Raises:
            DataError: such a link.
        """
        if self.follow_links:
            return
        below = [path, *path.parents][: len(path.parts) - len(folder.parts)]
        linked = any(map(os.path.islink, below))  # resolving every path would be slow
        if linked and not Path(os.path.realpath(path)).is_relative_to(folder.resolve()):
            raise DataError(
                f"{one_line(path)}: a link that leads out of {folder}; copy the file, or add "
                "--follow_links true"
            )

    def hint(self, name: str, known: Iterable[str]) -> str:
        """ "; did you mean ...?" for the problems that are shown; comparing names is slow."""
        guess = near(name, known) if len(self.bad) < 20 else ""
        return guess and f"; {guess}"

    def said(self) -> list[str]:
        """The notes as lines for people."""
        return [f"{what}: {count}" for what, count in self.notes.items()]

    def add(self, other: Reading) -> None:
        """Take over what another reading of the same data set found, but for its records."""
        self.problems += other.problems
        self.bad += other.bad
        self.notes += other.notes

    def good(self) -> list[Record]:
        """The records with which nothing was wrong."""
        bad = {sample for sample, _ in self.bad}
        return [record for record in self.records if record.key not in bad]

    def stop_if_wrong(self) -> None:
        """Raise one DataError for all problems of the data set as a whole.

        Raises:
            DataError: there are any; holds the first 20, those of samples too, and the total.
        """
        if self.problems:
            problems = [*self.problems, *(reason for _, reason in self.bad)]
            title = f"{self.root.absolute()}: {plural(len(problems), 'problem')}"
            raise DataError(f"{title}\n{listing(problems)}")


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
        DataError: no such folder, or none that can be listed.
    """
    if not folder.is_dir():
        raise DataError(f"{folder.absolute()}: no such folder")
    found: dict[str, Path] = {}
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise DataError(f"{folder.absolute()}: cannot be listed: {error.strerror}") from None
    for name in names:
        path = folder / name
        if name.startswith("."):
            continue
        if path.suffix.lower() not in SUFFIXES:
            is_folder = path.is_dir()
            what = f"folders in {folder}, which are not looked into"
            reading.notes[what if is_folder else f"files in {folder} that are no pictures"] += 1
            continue
        with reading.collecting(sample=key_of(path, reading.root)):
            reading.stay_inside(path, folder)
            found[name] = path
    return found


def inside(folder: Path, name: object, reading: Reading) -> Path:
    """The file `name` below `folder`, as an annotation file names it.

    Raises:
        DataError: no text, an absolute path, a URL, "..", or a link that leads outside.
    """
    if not isinstance(name, str):
        raise DataError(f"file name {shown(name)}: expected text")
    if not _can_be_file(name):
        raise DataError(f"file name {shown(name)}: no file can have it")
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or ":" in name:
        raise DataError(f"file name {shown(name)}: must be a path below {one_line(folder)}")
    full = folder / path
    reading.stay_inside(full, folder)
    return full


def _can_be_file(name: str) -> bool:
    try:
        data = os.fsencode(name)
    except UnicodeEncodeError:  # half of a character, which JSON can write
        return False
    parts = data.replace(b"\\", b"/").split(b"/")
    return bool(data) and b"\0" not in data and max(map(len, parts)) < 256 and len(data) < 4096
