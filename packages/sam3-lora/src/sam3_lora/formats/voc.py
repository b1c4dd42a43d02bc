"""Pascal VOC: an XML file for each picture.

Annotations/x.xml with JPEGImages/x.jpg and ImageSets/Main/{train,val,trainval,test}.txt; also
annotations/ with images/, and XML files beside the pictures, in folders of the splits.

VOC counts pixels from 1 and includes the last: the box from (1, 1) to (W, H) is the whole picture.
Files with decimal points count from 0, as the programs that write them do.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from lora_core.errors import DataError, one_line
from lora_core.pictures.masks import Size
from lora_core.pictures.reading import Reading, inside, key_of
from lora_core.settings.types import shown
from sam3_lora.formats.annotated import (
    SPLITS,
    Part,
    by_stem,
    lines_of,
    number,
    once,
    outlined,
    pictures_below,
    placed,
)
from sam3_lora.formats.xml_file import Element, read_xml
from sam3_lora.records import Box, Entry, Record

FOLDERS = (("Annotations", "JPEGImages"), ("Annotations", "images"), ("annotations", "images"))
SIDES = ("xmin", "ymin", "xmax", "ymax")
FIRST = 1.0  # VOC's number of the first pixel


class Place(NamedTuple):
    """One split."""

    annotations: Path  # folder of XML files
    pictures: Path  # folder of pictures
    sets: tuple[Path, ...] = ()  # files that list its names; none: all
    without: tuple[Path, ...] = ()  # files that list names of other splits


def find(root: Path) -> dict[str, Place]:
    """The splits of ImageSets/Main, or of folders of that name; "all" without any."""
    for folder, pictures in FOLDERS:
        place = Place(root / folder, root / pictures)
        if place.pictures.is_dir() and _has_xml(place.annotations):
            return _by_sets(root / "ImageSets", place)
    found = {
        split: Place(root / name, root / name)
        for split, names in SPLITS.items()
        for name in reversed(names)
        if _has_xml(root / name)
    }
    return found or ({"all": Place(root, root)} if _has_xml(root) else {})


def _has_xml(folder: Path) -> bool:
    return folder.is_dir() and any(folder.glob("*.xml"))


def _by_sets(folder: Path, whole: Place) -> dict[str, Place]:
    """The splits that the first of the folders of sets has; trainval is what is not in val."""
    for sets in (folder / "Main", folder / "Segmentation", folder):
        train, both, val, test = (
            sets / f"{name}.txt" for name in ("train", "trainval", "val", "test")
        )
        found = {"val": val, "test": test} | {"train": train if train.is_file() else both}
        there = {split: whole._replace(sets=(f,)) for split, f in found.items() if f.is_file()}
        if "train" in there and not train.is_file() and val.is_file():
            there["train"] = there["train"]._replace(without=(val,))
        if there:
            return there
    return {"all": whole}


# -- reading ---------------------------------------------------------------------------------------


def read(place: Place, reading: Reading) -> Part:
    """The records of one split; problems are collected. Classes are numbered by their names.

    Raises:
        DataError: no such folder.
    """
    pictures = by_stem(pictures_below(place.pictures, reading, deeper=False), reading)
    reading.measure(pictures.values())
    annotated: dict[Path, Path] = {}
    for file in _files(place, reading):
        key = key_of(file, reading.root)
        with reading.collecting(sample=key):
            reading.stay_inside(file, reading.root)
            root = read_xml(file)
            if root.name != "annotation":
                raise DataError(f"{one_line(file)}: <{root.name[:40]}>, expected <annotation>")
            picture = _picture(root, file, place, pictures, reading)
            if picture in annotated:
                other = one_line(annotated[picture].name)
                raise DataError(
                    f"{one_line(file)}: {one_line(picture.name)} is annotated by {other} already"
                )
            annotated[picture] = file
            _read_one(root, file, picture, reading)
    if not place.sets and (left := len(set(pictures.values()) - annotated.keys())):
        reading.notes["pictures without XML file, left out"] += left
    names = sorted({entry.phrase for record in reading.records for entry in record.entries})
    return Part(reading.records, {name: k for k, name in enumerate(names, start=1)})


def _files(place: Place, reading: Reading) -> list[Path]:
    """The XML files of a split, sorted."""
    if not place.sets:
        return sorted(place.annotations.glob("*.xml"))
    without = {name for file in place.without for name, _ in _names(file)}
    found: dict[Path, None] = {}
    for file in place.sets:
        for name, where in _names(file):
            if name in without:
                continue
            with reading.collecting(where, sample=where):
                path = inside(place.annotations, f"{name}.xml", reading)
                if not path.exists():
                    raise DataError(f"{one_line(path)}: no such file")
                if path in found:
                    reading.notes[f"names that stand twice in {file}"] += 1
                found[path] = None
    return sorted(found)


def _names(file: Path) -> list[tuple[str, str]]:
    """The names in a set, with their places; behind a name may stand 1 or -1, as VOC has it."""
    found = []
    for line, text in enumerate(lines_of(file), start=1):
        name, _, rest = text.rpartition(" ")
        name = name.strip() if name and rest in ("-1", "0", "1") else text
        if name:
            found.append((name, f"{one_line(file)}: line {line}"))
    return found


def _picture(
    root: Element, file: Path, place: Place, pictures: dict[str, Path], reading: Reading
) -> Path:
    """The picture that an XML file is about: that of its own name, else that which it names.

    Raises:
        DataError: there is none, or it is not clear which.
    """
    own, named = pictures.get(file.stem), root.word("filename")
    if own is None:
        try:
            path = inside(place.pictures, named or file.stem, reading)
        except DataError as error:
            raise DataError(f"{one_line(file)}: {error}") from None
        found = path if path.is_file() else pictures.get(named)  # some leave the suffix out
        if found is None:
            hint = reading.hint(file.stem, pictures)
            raise DataError(f"{one_line(file)}: {one_line(path)}: no such picture{hint}")
        return found
    meant = pictures.get(Path(named.replace("\\", "/")).stem, own) if named else own
    if meant != own and not (file.parent / f"{meant.stem}.xml").exists():
        raise DataError(
            f"{one_line(file)}: <filename> is {shown(named)}, but {one_line(own.name)} is called "
            "as the file: which is meant?"
        )
    return own


def _read_one(root: Element, file: Path, picture: Path, reading: Reading) -> None:
    """Add the record of one picture; objects that mean nothing are collected."""
    key = key_of(picture, reading.root)
    with reading.collecting(one_line(file), key):
        size = reading.size_of(picture, _declared(root), "<size> says")
        objects = root.all("object")
        decimal = any("." in side for item in objects for side in _sides(item).values())
        found = []
        for count, item in enumerate(objects, start=1):
            where = f"{one_line(file)}:{item.line}: object {count}"
            with reading.collecting(where, key):
                found.append(_object(item, 0.0 if decimal else FIRST, size, where, reading))
        reading.records.append(Record(key, picture, 0, size, once(found, reading)))


def _declared(root: Element) -> Size | None:
    """(height, width) that <size> states; None where it states none, or 0 as some programs do."""
    stated = root.one("size")
    if stated is None:
        return None
    height, width = (number(stated.word(n) or "0", f"<{n}>") for n in ("height", "width"))
    if not height and not width:
        return None
    if height % 1 or width % 1:
        raise DataError(f"<size>: {width:g} x {height:g}, expected whole numbers")
    return int(height), int(width)


def _sides(item: Element) -> dict[str, str]:
    """The texts of the box's sides, as far as they are there."""
    box = next(iter(item.all("bndbox")), None)
    return {} if box is None else {child.name: child.text.strip() for child in box.children}


def _object(item: Element, first: float, size: Size, where: str, reading: Reading) -> Entry | None:
    """One <object>; None if it covers nothing.

    Raises:
        DataError: it means nothing.
    """
    label = " ".join(item.word("name").split())
    if not label:
        raise DataError("it has no <name>")
    outline = item.one("polygon")
    if outline is not None and outline.children:
        return outlined(_points(outline, first), label, size, where, reading)
    if item.one("bndbox") is None:
        raise DataError("it has no <bndbox>")
    box = placed(_corners(item, first), size, reading)
    return None if box is None else Entry(label, box, None, size, False)


def _corners(item: Element, first: float) -> Box:
    """x0, y0, x1, y1 in pixels, counted from 0; the first pixel has the number `first`."""
    texts = _sides(item)
    if set(SIDES) - texts.keys() or len(item.all("bndbox")[0].children) != len(texts):
        raise DataError(
            f"<bndbox> holds {shown(', '.join(texts))}: expected xmin, ymin, xmax, ymax, each once"
        )
    x0, y0, x1, y1 = (number(texts[side], f"<{side}>") for side in SIDES)
    if x1 < x0 or y1 < y0:
        raise DataError(f"<bndbox> from ({x0:g}, {y0:g}) to ({x1:g}, {y1:g}): its end is before it")
    if x1 == x0 or y1 == y0:  # a click that became no box, rather than a line of one pixel
        return x0, y0, x1, y1
    return x0 - first, y0 - first, x1, y1


def _points(outline: Element, first: float) -> list[float]:
    """Vertices <x1>, <y1>, <x2>, ... in pixels."""
    texts = {child.name: child.text.strip() for child in outline.children}
    half = len(texts) // 2
    names = [f"{axis}{k}" for k in range(1, half + 1) for axis in "xy"]
    if set(names) != texts.keys() or len(texts) != len(outline.children):
        raise DataError("<polygon>: expected x1, y1, x2, y2, ...")
    return [number(texts[name], f"<{name}>") - first / 2 for name in names]
