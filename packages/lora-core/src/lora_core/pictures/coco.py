"""COCO JSON: where it lies, and what is in it, checked before anything uses it.

Segmentations may be outlines, uncompressed or compressed run lengths. What becomes of an annotation
is its package's business: `read_coco` hands over one after the other.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any, NamedTuple

from lora_core.data_file import is_label, is_whole, not_finite, read_json_of_many
from lora_core.errors import DataError, one_line
from lora_core.pictures.encodings import Shape, ring_of
from lora_core.pictures.masks import Size
from lora_core.pictures.reading import Reading, inside, key_of
from lora_core.settings.types import shown

ROBOFLOW = "_annotations.coco.json"


class CocoFile(NamedTuple):
    """An annotation file and the folders in which its pictures may lie."""

    path: Path
    folders: tuple[Path, ...]


def find_coco(root: Path, splits: dict[str, tuple[str, ...]]) -> dict[str, CocoFile]:
    """COCO files of a data root by split name, or as "all"; empty if there are none.

    Known: `<split>/_annotations.coco.json` beside its pictures;
    `annotations/instances_<split>.json` with the pictures in `<split>/`, `images/<split>/` or
    `images/`; and one JSON in the root.

    Args:
        splits: split -> names under which it is known.

    Raises:
        DataError: several files, and no telling which is which, or what one of them is for.
    """
    found = {
        split: CocoFile(root / name / ROBOFLOW, (root / name,))
        for split, names in splits.items()
        for name in reversed(names)
        if (root / name / ROBOFLOW).is_file()
    }
    if found:
        return found
    files = sorted((root / "annotations").glob("*.json")) or sorted(root.glob("*.json"))
    files = [path for path in files if path.name.startswith("instances")] or files
    for path in files:
        split, folder = _split_of(path, splits)
        if split in found:
            raise DataError(
                f"{path.parent.absolute()}: {found[split].path.name} and {path.name} both look "
                f"like split {split!r}; name them instances_train.json and instances_val.json"
            )
        folders = (root / folder, root / "images" / folder, root / "images", root)
        found[split] = CocoFile(path, folders if folder else folders[2:])
    if {"train", "all"} <= found.keys():
        raise DataError(
            f"{found['all'].path.absolute()}: the name says no split, beside that of "
            f"{found['train'].path.name}: name it instances_val.json, or move it elsewhere"
        )
    return found


def _split_of(path: Path, splits: dict[str, tuple[str, ...]]) -> tuple[str, str]:
    """Split that a file name speaks of, or "all", and the word that says so ("val2017")."""
    for word in re.split(r"[^a-z0-9]+", path.stem.lower()):
        for split, names in splits.items():
            if word.rstrip("0123456789") in names:
                return split, word
    return "all", ""


class Annotation(NamedTuple):
    """One annotation whose references hold; what else is in it is not checked yet."""

    image: object  # id of a picture that can be used
    category: object  # id, or None in a file without categories
    label: str  # name of the category; "object" without one
    crowd: bool  # a region of many objects
    size: Size  # of the picture
    item: dict[str, Any]  # as it was read; all numbers are finite
    where: str  # file and record, for messages


class Coco(NamedTuple):
    """The pictures and categories of a COCO file."""

    pictures: dict[object, Picture]  # by id
    names: dict[object, str]  # of the categories, by id
    categories: list[dict[str, Any]]  # as they were read


def read_coco(file: CocoFile, reading: Reading, take: Callable[[Annotation], object]) -> Coco:
    """Read one COCO file; problems are collected.

    Args:
        take: called with each annotation of a picture that can be used, in the file's order; what
            it raises as a DataError is collected as the fault of that picture.

    Raises:
        DataError: the file as a whole cannot be used.
    """
    path = file.path
    content, finite = read_json_of_many(path)
    if not isinstance(content, dict):
        raise DataError(
            f"{one_line(path)}: expected an object with images, annotations and categories"
        )
    images, annotations = (_list(content, name, path) for name in ("images", "annotations"))
    categories = content.get("categories")
    names = _categories(categories, path)
    _find_doubled_ids(annotations, "annotation", path, reading)
    _find_doubled_ids([_renamed(item) for item in images], "image", path, reading)
    pictures = _pictures(images, file, finite, reading)
    for number, item in enumerate(annotations):
        where = f"{one_line(path)}: annotation {_name(item, number)}"
        with reading.collecting(where, _owner(item, pictures) or where):
            if not finite and (wrong := not_finite(item)):
                raise DataError(wrong)
            annotation = _checked(item, names, pictures, where)
            if annotation is not None:
                take(annotation)
    return Coco(pictures, names, categories or [])


def _owner(annotation: Any, pictures: dict[object, Picture]) -> str:
    """The sample that an annotation belongs to, or ""."""
    identity = annotation.get("image_id") if isinstance(annotation, dict) else None
    known = _is_id(identity) and identity in pictures
    return pictures[identity].key if known else ""


def _find_doubled_ids(items: list[Any], what: str, path: Path, reading: Reading) -> None:
    """Report ids that stand twice: which of the two is meant elsewhere cannot be known."""
    ids = [item["id"] for item in items if isinstance(item, dict) and _is_id(item.get("id"))]
    twice = [shown(identity) for identity, count in Counter(ids).items() if count > 1]
    if twice:
        names = ", ".join(twice[:20]) + (f" and {len(twice) - 20} more" if twice[20:] else "")
        reading.problems.append(f"{one_line(path)}: {what} ids that stand twice: {names}")


def _is_id(value: object) -> bool:
    return is_whole(value) or isinstance(value, str)


def _other_type(value: object, known: Container[object]) -> str:
    """Where an id stands as text or 1.0 in one place and as a number in the other: "; ..."."""
    if type(value) is float and value in known:
        return f"; there is the number {value:.0f}: write whole numbers (pandas adds the .0)"
    if isinstance(value, str) and re.fullmatch("-?[0-9]{1,18}", value) and int(value) in known:
        return f"; there is the number {int(value)}: write both in one way"
    if is_whole(value) and str(value) in known:
        return f"; there is the text {str(value)!r}: write both in one way"
    return ""


def _list(content: dict[str, Any], name: str, path: Path) -> list[Any]:
    value = content.get(name)
    if not isinstance(value, list):
        raise DataError(f'{one_line(path)}: "{name}" is missing or not a list')
    return value


def _name(item: Any, number: int) -> str:
    """How a record is called in messages: its id, or its place in the list."""
    known = isinstance(item, dict) and _is_id(item.get("id"))
    return shown(item["id"]) if known else f"number {number + 1} (without id)"


def _categories(items: Any, path: Path) -> dict[object, str]:
    if items is None:
        return {}
    if not isinstance(items, list):
        raise DataError(f'{one_line(path)}: "categories" is not a list')
    names: dict[object, str] = {}
    for number, item in enumerate(items):
        identity = item.get("id") if isinstance(item, dict) else None
        if not _is_id(identity):
            what = "has no id" if identity is None else f"has the id {shown(identity)}"
            raise DataError(
                f"{one_line(path)}: category number {number + 1} {what}, "
                "expected a whole number or text"
            )
        if item["id"] in names:
            raise DataError(f"{one_line(path)}: the category id {shown(item['id'])} stands twice")
        name = item.get("name", item["id"])
        if not is_whole(name) and not is_label(name):
            where = f"{one_line(path)}: category {shown(item['id'])}"
            raise DataError(f"{where}: name {shown(name)}, expected text")
        names[item["id"]] = str(name)
    return names


class Picture(NamedTuple):
    """An image record's file; the size is None where it is unusable, which is reported."""

    key: str
    path: Path
    size: Size | None
    item: dict[str, Any]  # the record as it was read


def _pictures(
    items: list[Any], file: CocoFile, finite: bool, reading: Reading
) -> dict[object, Picture]:
    """Image id -> its picture."""
    folder = _folder(items, file)
    found: dict[object, Picture] = {}
    named: list[tuple[object, dict[str, Any], Path, str]] = []
    paths: dict[Path, object] = {}
    for number, item in enumerate(items):
        where = f"{one_line(file.path)}: image {_name(item, number)}"
        with reading.collecting(where, sample=where):
            if not isinstance(item, dict):
                raise DataError("expected an object with id and file_name")
            identity = _renamed(item).get("id")
            if not _is_id(identity):
                raise DataError(f"its id is {shown(identity)}, expected a whole number or text")
            found[identity] = Picture(where, file.path, None, item)
            if not finite and (wrong := not_finite(item)):
                raise DataError(wrong)
            path = inside(folder, _file_name(item), reading)
            if path in paths:
                reading.problems.append(
                    f"{where}: {one_line(path.name)} is image {shown(paths[path])} already"
                )
                continue
            paths[path] = identity
            named.append((identity, item, path, where))
    reading.measure(paths)
    for identity, item, path, where in named:
        key = key_of(path, reading.root)
        found[identity] = Picture(key, path, None, item)
        with reading.collecting(where, sample=key):
            size = reading.size_of(path, _declared(item), "it says")
            found[identity] = Picture(key, path, size, item)
    return found


def _renamed(item: Any) -> dict[str, Any]:
    """An image record with its id; one exporter writes image_id."""
    if not isinstance(item, dict):
        return {}
    return item if "id" in item else {**item, "id": item.get("image_id")}


def _file_name(item: dict[str, Any]) -> Any:
    """What an image record calls its file; LVIS 1 has only COCO's address of it, of which
    folder and name are taken: train2017/000000000030.jpg."""
    address = item.get("coco_url")
    if "file_name" in item or not isinstance(address, str):
        return item.get("file_name")
    return "/".join(address.split("/")[-2:])


def _folder(items: list[Any], file: CocoFile) -> Path:
    """The first folder in which the first named picture lies; else the first that exists."""
    names = [name for item in items if isinstance(item, dict) and (name := _file_name(item))]
    if names and isinstance(names[0], str) and "\0" not in names[0]:
        first = names[0].replace("\\", "/")
        for folder in file.folders:
            if os.path.exists(folder / first):  # false for names that are too long
                return folder
    return next((folder for folder in file.folders if folder.is_dir()), file.folders[-1])


def _declared(item: dict[str, Any]) -> Size | None:
    """(height, width) that the image record states, or None if it states none."""
    height, width = item.get("height"), item.get("width")
    if height is None and width is None:
        return None
    if not is_whole(height) or not is_whole(width):
        raise DataError(f"height {shown(height)}, width {shown(width)}: expected whole numbers")
    return height, width


def _checked(
    item: Any, categories: dict[object, str], pictures: dict[object, Picture], where: str
) -> Annotation | None:
    """The annotation, if its picture can be used.

    Raises:
        DataError: it refers to nothing.
    """
    if not isinstance(item, dict):
        raise DataError("expected an object")
    image, category = item.get("image_id"), item.get("category_id")
    if not _is_id(image) or image not in pictures:
        other = _other_type(image, pictures)
        raise DataError(f"image_id {shown(image)} is not among the images{other}")
    size = pictures[image].size
    if size is None:
        return None  # the picture itself is reported
    if category is None and not categories:
        label = "object"
    elif _is_id(category) and not categories:
        label = f"category_{category}"
    elif _is_id(category) and category in categories:
        label = categories[category]
    else:
        other = _other_type(category, categories)
        raise DataError(f"category_id {shown(category)} is not among the categories{other}")
    crowd = item.get("iscrowd")
    if crowd not in (None, 0, 1):
        raise DataError(f"iscrowd {shown(crowd)}, expected 0 or 1")
    return Annotation(image, category, label, bool(crowd), size, item, where)


def shape_of(segmentation: Any, size: Size, label: str, where: str) -> Shape:
    """An annotation's outlines, checked, or its run lengths, which are checked in decoding.

    Raises:
        DataError: no mask, or one that means nothing.
    """
    if isinstance(segmentation, dict):
        stated, counts = segmentation.get("size"), segmentation.get("counts")
        if stated != list(size):
            swapped = "; height and width are swapped" if stated == [size[1], size[0]] else ""
            raise DataError(f"run lengths: size {shown(stated)}, expected {list(size)}{swapped}")
        if not isinstance(counts, str | list):
            raise DataError("run lengths: counts are missing")
        return Shape("counts", counts, label, where)
    if not segmentation or not isinstance(segmentation, list):
        raise DataError("it has no segmentation: masks are needed, a bbox is not enough")
    if not isinstance(segmentation[0], list):  # one outline that is not wrapped in a list
        segmentation = [segmentation]
    rings = [ring for part in segmentation for ring in _rings(part)]
    return Shape("parts", [ring_of(points, size) for points in rings], label, where)


def _rings(part: Any, deeper: int = 1) -> list[Any]:
    """The outlines in a part: itself, or those in it if it is nested one level too deep."""
    nested = isinstance(part, list) and any(
        isinstance(item, list) and (len(item) != 2 or isinstance(item[0], list)) for item in part
    )
    if not (nested and deeper):
        return [part]
    return [ring for item in part for ring in _rings(item, deeper - 1)]
