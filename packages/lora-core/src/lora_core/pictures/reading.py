"""Reading the annotations of a data set: its records, and the collecting of what is wrong."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from lora_core.errors import DataError, listing, near, one_line
from lora_core.pictures.files import SUFFIXES, Header, read_header
from lora_core.pictures.masks import Size
from lora_core.report import plural
from lora_core.settings.types import shown
from lora_core.validate import validate


@dataclass
class Reading:
    """What reading a data set gave: its records, and all that is wrong or was passed over."""

    root: Path  # of the data set
    follow_links: bool = False  # take files that links outside of it lead to
    records: list[Any] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)  # of the data set as a whole
    bad: list[tuple[str, str]] = field(default_factory=list)  # sample, what is wrong with it
    notes: Counter[str] = field(default_factory=Counter)  # what was passed over -> how often
    cut: bool = False  # its validation split is a share of the training pictures
    headers: dict[Path, Header | str] = field(default_factory=dict)  # or what is wrong
    links_flag: str = "--follow_links"  # what a package calls `follow_links`

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
            kind="picture header 1",
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
        raise DataError(f"{source}: {sizes_differ(declared, size)} {one_line(picture)}{reason}")

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
                f"{self.links_flag} true"
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

    def good(self) -> list[Any]:
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


def sizes_differ(found: tuple[int, ...], expected: Size) -> str:
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
