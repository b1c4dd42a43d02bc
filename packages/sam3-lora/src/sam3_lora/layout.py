"""The folder that training reads: train/, valid/ and test/, each with its pictures and
`_annotations.coco.json`, as Roboflow exports them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_core.data_file import read_json
from lora_core.errors import DataError, one_line
from lora_core.pictures.coco import ROBOFLOW
from sam3_lora.records import Box, Entry, Record, decoded

FOLDERS = {"train": "train", "val": "valid", "test": "test"}  # by split
DIGITS = 6  # of widths and heights, whose differences have a dozen


def file_names(records: Sequence[Record]) -> dict[Path, str]:
    """What each picture is called below its split's folder: its path below what all share."""
    folders = {str(record.image.parent) for record in records}
    if not folders:
        return {}
    common = os.path.commonpath(folders)
    return {record.image: record.image.relative_to(common).as_posix() for record in records}


def check_name(name: str) -> None:
    """Refuse what cannot stand in a COCO file that is read on every system.

    Raises:
        DataError: such a name.
    """
    if name == ROBOFLOW:
        raise DataError(f"{name}: a picture with the name of the annotation file: rename it")
    if ":" in name or "\\" in name or not name.isprintable():
        raise DataError(
            f"{one_line(name)}: a colon, a backslash or a control character in the name of the "
            "picture: rename it"
        )


def write_split(
    folder: Path,
    records: Sequence[Record],
    names: Mapping[Path, str],
    numbers: Mapping[str, int],
    link: bool,
) -> int:
    """Write the pictures of one split and their annotation file.

    Args:
        names: of the pictures below the folder.
        numbers: class -> its number.
        link: give the pictures a second name where the file system can, instead of copying.

    Returns:
        How many pictures were copied.
    """
    folder.mkdir()
    copied = 0
    for record in records:
        target = folder / names[record.image]
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists():  # nothing may be written through a link
            raise DataError(f"{one_line(record.image)}: another picture has its name: rename it")
        if not (link and _linked(record.image, target)):
            shutil.copyfile(record.image, target)
            copied += 1
    text = json.dumps(content(records, names, numbers), allow_nan=False)
    (folder / ROBOFLOW).write_text(text + "\n", encoding="ascii")
    return copied


def strangers(folder: Path) -> list[Path]:
    """Files in a split's folder that `write_split` did not write there, sorted.

    Raises:
        DataError: its annotation file is gone or damaged.
    """
    images = read_json(folder / ROBOFLOW).get("images", [])
    own = {folder / image["file_name"] for image in images} | {folder / ROBOFLOW}
    return sorted({path for path in folder.rglob("*") if not path.is_dir()} - own)


def _linked(picture: Path, target: Path) -> bool:
    """Whether a picture could get a second name."""
    try:
        os.link(os.path.realpath(picture), target)
    except OSError:  # another disk, or a file system without links
        return False
    return True


def content(
    records: Sequence[Record], names: Mapping[Path, str], numbers: Mapping[str, int]
) -> dict[str, Any]:
    """The COCO file of one split; pictures and annotations are numbered from 1."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, record in enumerate(records, start=1):
        images.append({"id": number, **image(record, names[record.image], numbers)})
        for entry in record.entries:
            item = annotation(entry, record.size)
            if item is not None:
                identity = {"id": len(annotations) + 1, "image_id": number}
                annotations.append({**identity, "category_id": numbers[entry.phrase], **item})
    # A class is its own supercategory: one that is the supercategory of others may be passed over.
    categories = [
        {"id": number, "name": name, "supercategory": name}
        for number, name in sorted((number, name) for name, number in numbers.items())
    ]
    info = {"description": "written by sam3-lora prepare"}
    return {"info": info, "images": images, "annotations": annotations, "categories": categories}


def image(record: Record, name: str, numbers: Mapping[str, int]) -> dict[str, Any]:
    """A picture as COCO has it, with LVIS's lists where the record has them."""
    item: dict[str, Any] = {
        "file_name": name,
        "height": record.size[0],
        "width": record.size[1],
    }
    if record.absent is not None:
        item["neg_category_ids"] = [numbers[phrase] for phrase in record.absent]
    if record.absent is not None or record.partial:
        item["not_exhaustive_category_ids"] = sorted(numbers[phrase] for phrase in record.partial)
    return item


def annotation(entry: Entry, size: tuple[int, int]) -> dict[str, Any] | None:
    """An object as COCO has it; None if it covers nothing.

    Raises:
        DataError: its mask cannot be decoded.
    """
    box = entry.box
    if box is None:
        instance = decoded(entry, size)
        if instance is None:
            return None
        box = instance.box
    x, y, width, height = box[0], box[1], box[2] - box[0], box[3] - box[1]
    return {
        "bbox": [x, y, round(width, DIGITS), round(height, DIGITS)],
        "area": area(entry, box, size),
        "segmentation": segmentation(entry),
        "iscrowd": int(entry.crowd),
    }


def segmentation(entry: Entry) -> Any:
    """Outlines or run lengths as COCO has them; [] without a mask."""
    if entry.shape is None:
        return []
    if entry.shape.kind == "parts":
        return [ring.ravel().tolist() for ring in entry.shape.data]
    return {"size": list(entry.shape_size), "counts": entry.shape.data}


def area(entry: Entry, box: Box, size: tuple[int, int]) -> float:
    """Pixels of the picture that the mask covers, as pycocotools counts; of the box without one."""
    if entry.shape is None:
        return round((box[2] - box[0]) * (box[3] - box[1]), DIGITS)
    from pycocotools import mask as coco_mask

    height, width = entry.shape_size
    written = segmentation(entry)
    if isinstance(written, list):
        runs = coco_mask.merge(coco_mask.frPyObjects(written, height, width))
    elif isinstance(written["counts"], list):
        runs = coco_mask.frPyObjects(written, height, width)
    else:
        runs = {**written, "counts": written["counts"].encode("ascii")}
    return float(coco_mask.area(runs)) * (size[0] * size[1]) / (height * width)
