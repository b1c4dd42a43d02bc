"""COCO JSON as records: every annotation is a box, a mask or both, of something that has a name.

"area" is not used; it follows from the mask or the box.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

from lora_core.data_file import is_whole
from lora_core.errors import DataError, one_line
from lora_core.pictures import coco
from lora_core.pictures.coco import Annotation, CocoFile, Picture
from lora_core.pictures.masks import Size
from lora_core.pictures.reading import Reading
from lora_core.settings.types import shown
from sam3_lora.config import Dataset
from sam3_lora.queries import Phrases, name_phrases
from sam3_lora.records import Entry, Record, are_corners, box_in, leaves, mask_in

SUSPICIOUS = 5  # boxes from which on corners instead of widths are told apart for sure


class Split(NamedTuple):
    """One annotation file with its pictures."""

    records: list[Record]
    phrases: Phrases


def read_split(file: CocoFile, reading: Reading, settings: Dataset) -> Split:
    """The records of one COCO file, in the order of their keys; problems are collected.

    Raises:
        DataError: the file as a whole cannot be used.
    """
    entries: dict[object, list[tuple[object, Entry]]] = {}  # by image: category, annotation
    seen: Counter[object] = Counter()  # annotations by category
    boxes = _Boxes()

    def take(annotation: Annotation) -> None:
        seen[annotation.category] += 1
        entry = _entry(annotation, reading, boxes, settings.keep_crowd)
        if entry is not None:
            entries.setdefault(annotation.image, []).append((annotation.category, entry))

    content = coco.read_coco(file, reading, take)
    path = one_line(file.path)
    boxes.tell(reading, path)
    phrases = name_phrases(content, seen.keys(), settings, path)
    numbers = list(content.pictures)
    whole = all(is_whole(identity) for identity in numbers)
    for number, identity in enumerate(numbers, start=1):
        picture = content.pictures[identity]
        if picture.size is None:
            continue
        with reading.collecting(f"{path}: image {shown(identity)}", picture.key):
            named = [
                entry._replace(phrase=phrases.by_category[category])
                for category, entry in entries.get(identity, [])
            ]
            record = Record(
                key=picture.key,
                image=picture.path,
                image_id=identity if whole and is_whole(identity) else number,
                size=picture.size,
                entries=tuple(named),
                absent=_listed(picture, "neg_category_ids", phrases),
                partial=frozenset(_listed(picture, "not_exhaustive_category_ids", phrases) or ()),
            )
            reading.records.append(record)
    reading.records.sort(key=lambda record: record.key)
    return Split(reading.records, phrases)


def _entry(
    annotation: Annotation, reading: Reading, boxes: _Boxes, keep_crowd: bool
) -> Entry | None:
    """An annotation with its box and mask checked; None if its box has no width or height.

    Raises:
        DataError: it means nothing.
    """
    item, size = annotation.item, annotation.size
    bbox = item.get("bbox")
    shape, shape_size = mask_in(item.get("segmentation"), size, annotation.where)
    box = None
    if bbox not in (None, []):
        box = box_in(bbox, size)
        boxes.count(bbox, size)
        if box is None:
            reading.notes["boxes without width or height, left out"] += 1
            return None
    elif shape is None:
        raise DataError("it has neither bbox nor segmentation")
    if shape_size != size:
        reading.notes["masks written for another size than their picture's, resized"] += 1
    return Entry("", box, shape, shape_size, annotation.crowd and not keep_crowd)


def _listed(picture: Picture, name: str, phrases: Phrases) -> tuple[str, ...] | None:
    """Phrases of a list of category ids in an image record, as LVIS has them; None without it.

    Raises:
        DataError: it is no list of categories.
    """
    ids = picture.item.get(name)
    if ids is None:
        return None
    if not isinstance(ids, list) or not all(is_whole(one) or isinstance(one, str) for one in ids):
        raise DataError(f"{name} is {shown(ids)}, expected a list of category ids")
    return tuple(dict.fromkeys(phrases.by_category[i] for i in ids if i in phrases.by_category))


@dataclass
class _Boxes:
    """What the boxes of a file have in common, to tell corners from widths."""

    total: int = 0
    leaving: int = 0  # that go beyond their picture
    corners: int = 0  # that would be boxes as x0, y0, x1, y1

    def count(self, bbox: list[float], size: Size) -> None:
        self.total += 1
        self.leaving += leaves(bbox, size)
        self.corners += are_corners(bbox, size)

    def tell(self, reading: Reading, where: str) -> None:
        """Note boxes that are cut, or that the file most likely does not mean as COCO does."""
        suspected = self.corners == self.total and 5 * self.leaving >= self.total
        text = (
            f"{where}: {self.leaving} of {self.total} boxes leave their picture as [x, y, width, "
            "height], and all would fit as x0, y0, x1, y1: write widths and heights, as COCO does"
        )
        if self.leaving and suspected and self.total >= SUSPICIOUS:
            reading.problems.append(text)
        elif self.leaving:
            what = "boxes that leave their picture, cut"
            if suspected:
                what += " (are they x0, y0, x1, y1? COCO has [x, y, width, height])"
            reading.notes[what] += self.leaving
