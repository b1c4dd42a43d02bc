"""YOLO: a text file for each picture, with a line for each object and numbers as shares of it.

    class cx cy width height            a box by its centre
    class x1 y1 x2 y2 x3 y3 ...         an outline

data.yaml names the classes and says where the splits lie; classes.txt may name them instead. The
labels of .../images/x.jpg are .../labels/x.txt, else x.txt beside the picture. A picture without
labels is one without objects. Shares are of the upright picture, as YOLO's own programs take them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from lora_core.data_file import is_whole
from lora_core.errors import ConfigError, DataError, near, one_line
from lora_core.pictures.masks import Size
from lora_core.pictures.reading import Reading, inside, key_of
from lora_core.settings import file as yaml_file
from lora_core.settings.types import shown
from sam3_lora.formats.annotated import (
    SPLITS,
    Part,
    lines_of,
    number,
    once,
    outlined,
    pictures_below,
    placed,
)
from sam3_lora.records import Entry, Record

SETTINGS = ("data.yaml", "data.yml", "dataset.yaml", "dataset.yml")
CLASSES = "classes.txt"
FAR = 2.0  # a share beyond this is none: pixels, most likely


class Place(NamedTuple):
    """One split, and the classes."""

    root: Path
    sources: tuple[Path, ...]  # folders of pictures, or text files that list them
    names: Mapping[int, str]  # index -> class
    named_in: Path  # the file that says so
    boxes_only: bool  # key points stand behind the boxes


# -- where it lies ---------------------------------------------------------------------------------


def find(root: Path) -> dict[str, Place]:
    """The splits that data.yaml tells of, or that the folders' names do.

    Raises:
        DataError: data.yaml is damaged, or leads to nothing.
    """
    file = _first(root, *SETTINGS)
    classes = _first(root, CLASSES, f"labels/{CLASSES}")
    if file is None and classes is None:
        return {}
    settings = _settings(file) if file else {}
    if file is None or "names" not in settings:
        if classes is None:
            raise DataError(f'{file}: no "names": say what the classes are called, in their order')
        named_in = classes
        names = {index: name for index, name in enumerate(lines_of(named_in)) if name}
    else:
        named_in, names = file, _names(settings["names"], settings.get("nc"), file)
    sources = _listed(root, file, settings) if file else {}
    return {
        split: Place(root, found, names, named_in, "kpt_shape" in settings)
        for split, found in (sources or _by_folders(root)).items()
    }


def _first(root: Path, *names: str) -> Path | None:
    return next((root / name for name in names if (root / name).is_file()), None)


def _settings(file: Path) -> dict[str, Any]:
    try:
        return yaml_file.read(file).values
    except ConfigError as error:  # syntax, tags, depth: with line and column
        raise DataError(str(error)) from None


def _names(value: Any, count: Any, file: Path) -> dict[int, str]:
    """Index -> name, from a list, or from a mapping of indices."""
    where = f"{one_line(file)}: names"
    if not isinstance(value, list | dict) or not value:
        raise DataError(f"{where}: {shown(value)}, expected a list, or index: name")
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    found: dict[int, str] = {}
    for index, name in pairs:
        if not re.fullmatch("0|[1-9][0-9]{0,5}", str(index)):
            raise DataError(f"{where}: the index {shown(index)}, expected 0, 1, 2, ...")
        text = str(name).lower() if isinstance(name, bool) else str(name)
        if name is None or isinstance(name, list | dict) or not text.strip():
            raise DataError(f"{where}: class {index} is {shown(name)}, expected a name")
        found[int(index)] = text.strip()
    if is_whole(count) and count != len(found):
        raise DataError(f"{where}: {len(found)} names, but nc says {count} classes")
    return found


def _listed(root: Path, file: Path, settings: dict[str, Any]) -> dict[str, tuple[Path, ...]]:
    """What data.yaml says of the splits."""
    base = root
    if isinstance(settings.get("path"), str):  # often that of another machine
        steps = PurePosixPath(settings["path"].replace("\\", "/"))
        if not steps.is_absolute() and ".." not in steps.parts and (root / steps).is_dir():
            base = root / steps
    found: dict[str, tuple[Path, ...]] = {}
    for split, keys in SPLITS.items():
        for key in keys:
            value = settings.get(key)
            if value in (None, "", []):
                continue
            where = f"{one_line(file)}: {key}"
            items = value if isinstance(value, list) else [value]
            found[split] = tuple(_below(item, (base, root), root, where) for item in items)
            break
    return found


def _below(text: Any, starts: tuple[Path, ...], root: Path, where: str) -> Path:
    """A file or folder that data.yaml names, below the root.

    Leading ".." are passed over: Roboflow writes ../train/images for what lies beside data.yaml.

    Raises:
        DataError: it is elsewhere, or not there.
    """
    steps = PurePosixPath(text.replace("\\", "/")) if isinstance(text, str) else PurePosixPath("/")
    parts = list(steps.parts)
    while parts and parts[0] == "..":
        parts.pop(0)
    if steps.is_absolute() or ".." in parts or not parts or "\0" in str(text) or ":" in str(text):
        raise DataError(
            f"{where}: {shown(text)}, expected a path below {root.absolute()}, such as images/train"
        )
    for start in starts:
        if (start / Path(*parts)).exists():
            return start / Path(*parts)
    raise DataError(f"{where}: {one_line(starts[0] / Path(*parts))}: no such file or folder")


def _by_folders(root: Path) -> dict[str, tuple[Path, ...]]:
    """train/images or images/train by their names; else images/, or the root, as it is."""
    found: dict[str, tuple[Path, ...]] = {}
    for split, names in SPLITS.items():
        for name in names:
            for folder in (root / name / "images", root / "images" / name):
                if folder.is_dir() and split not in found:
                    found[split] = (folder,)
    whole = root / "images" if (root / "images").is_dir() else root
    return found or {"all": (whole,)}


# -- reading ---------------------------------------------------------------------------------------


def read(place: Place, reading: Reading) -> Part:
    """The records of one split; problems are collected.

    Raises:
        DataError: no pictures, or no labels at all.
    """
    pictures = [one for source in place.sources for one in _pictures(source, place, reading)]
    pictures = list(dict.fromkeys(pictures))
    labels = {picture: label_of(picture, place.root) for picture in pictures}
    if pictures and not any(label.exists() for label in labels.values()):
        expected = one_line(next(iter(labels.values())))
        raise DataError(f"{expected}: no such file, nor labels of any of {len(pictures)} pictures")
    _tell_shared(labels, reading)
    reading.measure(pictures)
    for picture, label in labels.items():
        key = key_of(picture, reading.root)
        with reading.collecting(sample=key):
            size = reading.size_of(picture)
            entries: tuple[Entry, ...] = ()
            if label.exists():
                reading.stay_inside(label, place.root)
                entries = _objects(label, place, size, key, reading)
            else:
                reading.notes["pictures without a label file: taken as without objects"] += 1
            reading.records.append(Record(key, picture, 0, size, entries))
    _tell_orphans(labels, reading)
    numbers: dict[str, int] = {}
    for index, name in sorted(place.names.items()):
        numbers.setdefault(name, index + 1)
    return Part(reading.records, numbers)


def label_of(picture: Path, root: Path) -> Path:
    """Where a picture's labels are: labels/ instead of the last images/ in its path below root."""
    parts = list(picture.relative_to(root).parts)
    if "images" in parts[:-1]:
        last = max(k for k, part in enumerate(parts[:-1]) if part == "images")
        parts[last] = "labels"
    return (root / Path(*parts)).with_suffix(".txt")


def _pictures(source: Path, place: Place, reading: Reading) -> list[Path]:
    """The pictures of a folder, or those that a text file lists."""
    if source.is_dir():
        return pictures_below(source, reading)
    found = []
    reading.stay_inside(source, place.root)
    for line, text in enumerate(lines_of(source), start=1):
        where = f"{one_line(source)}:{line}"
        with reading.collecting(where, sample=where):
            if text:  # from the list, as programs of today have it, or from the root
                paths = [inside(start, text, reading) for start in (source.parent, place.root)]
                found.append(paths[0] if paths[0].exists() else paths[1])
    return found


def _tell_shared(labels: dict[Path, Path], reading: Reading) -> None:
    """Report pictures that would have the same labels, such as x.jpg and x.png."""
    first: dict[Path, Path] = {}
    for picture, label in labels.items():
        other = first.setdefault(label, picture)
        if other != picture:
            reading.problems.append(
                f"{one_line(picture)}: {one_line(other.name)} has the same label file; keep one"
            )


def _tell_orphans(labels: dict[Path, Path], reading: Reading) -> None:
    """Report label files without any picture, where labels have folders of their own."""
    folders = {
        label.parent: picture.parent
        for picture, label in labels.items()
        if label.parent != picture.parent
    }
    for place, images in folders.items():
        if not place.is_dir() or not images.is_dir():
            continue
        stems = {path.stem for path in images.iterdir()}
        for path in sorted(place.glob("*.txt")):
            if path.stem not in stems and path.name != CLASSES:
                text = f"{one_line(path)}: no picture {one_line(path.stem)} in {one_line(images)}"
                reading.bad.append((key_of(path, reading.root), text))


def _objects(
    label: Path, place: Place, size: Size, key: str, reading: Reading
) -> tuple[Entry, ...]:
    """The objects of a label file; what is wrong is collected line by line."""
    found = []
    for line, text in enumerate(lines_of(label), start=1):
        where = f"{one_line(label)}:{line}"
        with reading.collecting(where, key):
            if text:
                found.append(_object(text.split(), place, size, where, reading))
    return once(found, reading)


def _object(
    words: list[str], place: Place, size: Size, where: str, reading: Reading
) -> Entry | None:
    """The object of one line; None if it covers nothing.

    Raises:
        DataError: the line means nothing.
    """
    count = len(words)
    if count == 6:
        raise DataError("6 numbers: are they predictions with a confidence? Labels have none")
    if count < 5 or (count % 2 == 0 and not place.boxes_only):
        raise DataError(
            f"{count} numbers, expected class cx cy width height, or class x1 y1 x2 y2 x3 y3 ..."
        )
    label = _class(words[0], place)
    shares = [number(word, "the number") for word in words[1:]]
    if place.boxes_only:
        shares = shares[:4]
    if wrong := [share for share in shares if abs(share) > FAR]:
        raise DataError(f"{wrong[0]:g}: expected shares of the picture, 0 to 1; are these pixels?")
    if len(shares) > 4:
        points = [share * size[1 - k % 2] for k, share in enumerate(shares)]
        return outlined(points, label, size, where, reading)
    x, y, width, height = (share * size[1 - k % 2] for k, share in enumerate(shares))
    if min(width, height) < 0:
        raise DataError("a width or height below 0")
    corners = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
    box = placed(corners, size, reading)
    return None if box is None else Entry(label, box, None, size, False)


def _class(word: str, place: Place) -> str:
    """The name of a class from its index, which some programs write as 2.0."""
    index = re.fullmatch(r"([0-9]{1,9})(\.0*)?", word, re.ASCII)
    if index and int(index[1]) in place.names:
        return place.names[int(index[1])]
    known = ", ".join(f"{index} {name}" for index, name in list(place.names.items())[:5])
    hint = near(word, place.names.values()) if not index else ""
    raise DataError(
        f"class {shown(word)}: {one_line(place.named_in.name)} has {len(place.names)} classes, "
        f"{one_line(known)}{', ...' if len(place.names) > 5 else ''}{hint and '; ' + hint}"
    )
