"""COCO JSON: where it lies, and its pictures and annotations as records.

Taken: outlines, uncompressed and compressed run lengths. Crowd annotations are left out and
counted. "bbox" and "area" are not used; both follow from the mask.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

from lora_core.errors import DataError
from sam2_lora.encodings import decode_counts, ring_of
from sam2_lora.masks import Size
from sam2_lora.records import Reading, Record, Shape, inside, is_whole, key_of, read_json

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
        DataError: several files, and no telling which is which.
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
    return found


def _split_of(path: Path, splits: dict[str, tuple[str, ...]]) -> tuple[str, str]:
    """Split that a file name speaks of, or "all", and the word that says so ("val2017")."""
    for word in re.split(r"[^a-z0-9]+", path.stem.lower()):
        for split, names in splits.items():
            if word.rstrip("0123456789") in names:
                return split, word
    return "all", ""


def read_coco(file: CocoFile, root: Path) -> Reading:
    """Records of one COCO file, sorted by key; problems are collected."""
    reading = Reading()
    path = file.path
    with reading.collecting():
        content = read_json(path)
        if not isinstance(content, dict):
            raise DataError(f"{path}: expected an object with images, annotations and categories")
        images, annotations = (_list(content, name, path) for name in ("images", "annotations"))
        categories = _categories(content.get("categories"), path)
        pictures = _pictures(images, file, reading)
        shapes: dict[object, list[Shape]] = {number: [] for number in pictures}
        for number, annotation in enumerate(annotations):
            where = f"{path}: annotation {_name(annotation, number)}"
            with reading.collecting(where):
                _add(annotation, categories, pictures, shapes, where, reading)
        reading.records += [
            Record(key_of(picture, root), picture, size, tuple(shapes[number]))
            for number, (picture, size) in pictures.items()
            if size is not None
        ]
        reading.records.sort(key=lambda record: record.key)
    return reading


def _list(content: dict[str, Any], name: str, path: Path) -> list[Any]:
    value = content.get(name)
    if not isinstance(value, list):
        raise DataError(f'{path}: "{name}" is missing or not a list')
    return value


def _name(item: Any, number: int) -> str:
    """How a record is called in messages: its id, or its place in the list."""
    known = isinstance(item, dict) and isinstance(item.get("id"), int | str)
    return repr(item["id"]) if known else f"number {number + 1} (without id)"


def _categories(items: Any, path: Path) -> dict[object, str]:
    if items is None:
        return {}
    if not isinstance(items, list):
        raise DataError(f'{path}: "categories" is not a list')
    names: dict[object, str] = {}
    for number, item in enumerate(items):
        if not isinstance(item, dict) or not isinstance(item.get("id"), int | str):
            raise DataError(f"{path}: category number {number + 1} has no id")
        if item["id"] in names:
            raise DataError(f"{path}: the category id {item['id']!r} stands twice")
        names[item["id"]] = str(item.get("name", item["id"]))
    return names


def _pictures(
    items: list[Any], file: CocoFile, reading: Reading
) -> dict[object, tuple[Path, Size | None]]:
    """Image id -> path and size; the size is None where the picture is unusable (and reported)."""
    folder = _folder(items, file)
    found: dict[object, tuple[Path, Size | None]] = {}
    paths: dict[Path, object] = {}
    for number, item in enumerate(items):
        where = f"{file.path}: image {_name(item, number)}"
        with reading.collecting(where):
            if not isinstance(item, dict):
                raise DataError("expected an object with id and file_name")
            identity = item.get("id", item.get("image_id"))  # one exporter writes image_id
            if not is_whole(identity) and not isinstance(identity, str):
                raise DataError(f"its id is {identity!r}, expected a whole number or text")
            if identity in found:
                raise DataError("the id stands twice")
            found[identity] = (file.path, None)
            picture = inside(folder, item.get("file_name"))
            if picture in paths:
                raise DataError(f"{picture.name} is image {paths[picture]!r} already")
            paths[picture] = identity
            size = reading.size_of(picture, _declared(item), "it says")
            found[identity] = (picture, size)
    return found


def _folder(items: list[Any], file: CocoFile) -> Path:
    """The first folder in which the first named picture lies; else the first that exists."""
    names = [item["file_name"] for item in items if isinstance(item, dict) and "file_name" in item]
    if names and isinstance(names[0], str) and "\0" not in names[0]:
        first = names[0].replace("\\", "/")
        for folder in file.folders:
            if (folder / first).exists():
                return folder
    return next((folder for folder in file.folders if folder.is_dir()), file.folders[-1])


def _declared(item: dict[str, Any]) -> Size | None:
    """(height, width) that the image record states, or None if it states none."""
    height, width = item.get("height"), item.get("width")
    if height is None and width is None:
        return None
    if type(height) is not int or type(width) is not int:
        raise DataError(f"height {height!r}, width {width!r}: expected whole numbers")
    return height, width


def _add(
    item: Any,
    categories: dict[object, str],
    pictures: dict[object, tuple[Path, Size | None]],
    shapes: dict[object, list[Shape]],
    where: str,
    reading: Reading,
) -> None:
    """Check one annotation and put it to its picture."""
    if not isinstance(item, dict):
        raise DataError("expected an object")
    image, category = item.get("image_id"), item.get("category_id")
    if not isinstance(image, int | str) or image not in pictures:
        raise DataError(f"image_id {image!r} is not among the images")
    size = pictures[image][1]
    if size is None:
        return  # the picture itself is reported
    if category is None and not categories:
        label = "object"
    elif isinstance(category, int | str) and category in categories:
        label = categories[category]
    else:
        raise DataError(f"category_id {category!r} is not among the categories")
    if item.get("iscrowd") == 1:
        reading.notes["crowd annotations left out"] += 1
        return
    shapes[image].append(_shape(item.get("segmentation"), size, label, where))


def _shape(segmentation: Any, size: Size, label: str, where: str) -> Shape:
    """An annotation's outlines or run lengths, checked.

    Raises:
        DataError: no mask, or one that cannot be decoded.
    """
    if isinstance(segmentation, dict):
        stated, counts = segmentation.get("size"), segmentation.get("counts")
        if stated != list(size):
            swapped = "; height and width are swapped" if stated == [size[1], size[0]] else ""
            raise DataError(f"run lengths: size {stated!r}, expected {list(size)}{swapped}")
        if not isinstance(counts, str | list):
            raise DataError("run lengths: counts are missing")
        decode_counts(counts, size)
        return Shape("counts", counts, label, where)
    if not segmentation or not isinstance(segmentation, list):
        raise DataError("it has no segmentation: masks are needed, a bbox is not enough")
    if not isinstance(segmentation[0], list):  # one outline that is not wrapped in a list
        segmentation = [segmentation]
    parts = [ring_of(points, size) for points in segmentation]
    return Shape("parts", parts, label, where)
