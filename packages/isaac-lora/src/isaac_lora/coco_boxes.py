"""COCO files as pictures with named boxes, checked; what is wrong with annotations is collected.

A box is [x, y, width, height] in pixels of the upright picture, and cut at its edges. Crowds are
regions of many things, which no single box means: they are left out. An annotation without a bbox
has the box around its segmentation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lora_core.data_file import is_label
from lora_core.errors import DataError, one_line
from lora_core.pictures.coco import Annotation, Coco, CocoFile, read_coco, shape_of
from lora_core.pictures.masks import Size
from lora_core.pictures.reading import Reading
from lora_core.settings.types import shown

SUSPICIOUS = 5  # boxes from which on corners instead of widths are told apart for sure
Box = tuple[float, float, float, float]  # x0, y0, x1, y1 in pixels


class Thing(NamedTuple):
    """An annotated object."""

    name: str
    box: Box


@dataclass(frozen=True)
class Picture:
    """A picture and what is annotated on it.

    Attributes:
        key: its path below the data root, with "/".
        image: its file.
        size: (height, width) of the upright picture.
        things: in the file's order.
        names: of all categories that were looked for.
    """

    key: str
    image: Path
    size: Size
    things: tuple[Thing, ...]
    names: tuple[str, ...]


def read_boxes(file: CocoFile, reading: Reading) -> None:
    """Add the pictures of a COCO file to `reading.records`, in the order of their keys.

    Raises:
        DataError: the file as a whole cannot be used.
    """
    things: dict[object, list[tuple[object, Box]]] = {}
    used: set[object] = set()
    boxes = _Boxes()

    def take(annotation: Annotation) -> None:
        used.add(annotation.category)
        if annotation.crowd:
            reading.notes["crowds, left out"] += 1
            return
        bbox = annotation.item.get("bbox")
        if bbox in (None, []):
            bbox = _around_mask(annotation)
        boxes.count(bbox, annotation.size)
        box = box_in(bbox, annotation.size)
        if box is None:
            reading.notes["boxes without width or height, left out"] += 1
        else:
            things.setdefault(annotation.image, []).append((annotation.category, box))

    content = read_coco(file, reading, take)
    boxes.tell(reading, one_line(file.path))
    names = _names(content, used, one_line(file.path))
    listed = tuple(dict.fromkeys(names.values()))
    for identity, picture in content.pictures.items():
        if picture.size is None:
            continue  # it is reported
        with reading.collecting(one_line(picture.path), picture.key):
            if not is_label(picture.key):
                raise DataError("no name that JSON can hold: rename the picture")
            found = tuple(Thing(names[c], box) for c, box in things.get(identity, []))
            reading.records.append(Picture(picture.key, picture.path, picture.size, found, listed))
    reading.records.sort(key=lambda record: record.key)


def _names(content: Coco, used: Iterable[object], where: str) -> dict[object, str]:
    """Category -> what it is called, without the placeholder that Roboflow adds.

    Raises:
        DataError: a name that cannot be asked for.
    """
    used = set(used)
    if not content.names:  # a file that does not say what its boxes show
        return dict.fromkeys(used or {None}, "object")
    placeholder = _placeholder(content, used)
    names = {
        identity: " ".join(name.split())
        for identity, name in content.names.items()
        if identity != placeholder
    }
    for identity, name in names.items():
        if not name or not name.isprintable() or "<image>" in name.lower():
            raise DataError(
                f"{where}: category {shown(identity)} is called {shown(name)}, which cannot be "
                "asked for: name it in words"
            )
    return names


def _placeholder(content: Coco, used: set[object]) -> object:
    """Id of the category that Roboflow adds: without annotations, supercategory of all others."""
    above = {item["id"]: item.get("supercategory") for item in content.categories}
    named = Counter(name for name in above.values() if isinstance(name, str))
    for identity, name in content.names.items():
        others = named[name] - (above[identity] == name)
        if identity not in used and others == len(above) - 1 > 0:
            return identity
    return None


# -- boxes -----------------------------------------------------------------------------------------


def _around_mask(annotation: Annotation) -> list[float]:
    """[x, y, width, height] around an annotation's mask; without width where it covers nothing.

    Raises:
        DataError: it has no mask, or one that means nothing.
    """
    segmentation = annotation.item.get("segmentation")
    if segmentation in (None, [], {}):
        raise DataError("it has neither bbox nor segmentation")
    shape = shape_of(segmentation, annotation.size, "", annotation.where)
    if shape.kind == "parts":  # outlines, whose corners need no pixels
        corners = np.concatenate(shape.data)
        return [*corners.min(0).tolist(), *np.ptp(corners, axis=0).tolist()]
    mask = shape.decode(annotation.size)
    return [*mask.origin, mask.crop.shape[1], mask.crop.shape[0]]


def box_in(bbox: Any, size: Size) -> Box | None:
    """COCO's [x, y, width, height] as corners, cut to the picture; None without width or height.

    Raises:
        DataError: it is no such box, or lies outside of the picture.
    """
    if not _is_box(bbox):
        raise DataError(f"bbox {shown(bbox)}: expected the numbers [x, y, width, height]")
    x, y, width, height = map(float, bbox)
    if min(width, height) < 0:
        raise DataError(f"bbox {shown(bbox)}: a width or height below 0{_hint(bbox, size)}")
    if x + width == x or y + height == y:
        return None
    box = (max(x, 0.0), max(y, 0.0), min(x + width, size[1]), min(y + height, size[0]))
    if box[2] <= box[0] or box[3] <= box[1]:
        raise DataError(
            f"bbox {shown(bbox)}: it lies outside of the picture of {size[1]} x {size[0]} "
            f"(width x height){_hint(bbox, size)}"
        )
    return box


def _is_box(bbox: Any) -> bool:
    """Whether a JSON value is a list of four numbers; integers may be of any length there."""
    numbers = isinstance(bbox, list) and all(type(value) in (int, float) for value in bbox)
    return numbers and len(bbox) == 4 and max(map(abs, bbox)) <= 1e9


def _hint(bbox: list[float], size: Size) -> str:
    if not _are_corners(bbox, size):
        return ""
    return "; are these corners x0, y0, x1, y1? COCO has [x, y, width, height]"


def _are_corners(bbox: list[float], size: Size) -> bool:
    """Whether four numbers would be a box in the picture as x0, y0, x1, y1."""
    x0, y0, x1, y1 = bbox
    return 0 <= x0 < x1 <= size[1] and 0 <= y0 < y1 <= size[0]


@dataclass
class _Boxes:
    """What the boxes of a file have in common, to tell corners from widths."""

    total: int = 0
    leaving: int = 0  # that go beyond their picture by more than a rounded pixel
    corners: int = 0  # that would be boxes as x0, y0, x1, y1

    def count(self, bbox: Any, size: Size) -> None:
        if not _is_box(bbox):
            return
        x, y, width, height = bbox
        self.total += 1
        self.leaving += min(x, y) < -1 or x + width > size[1] + 1 or y + height > size[0] + 1
        self.corners += _are_corners(bbox, size)

    def tell(self, reading: Reading, where: str) -> None:
        """Note boxes that are cut, or that the file most likely does not mean as COCO does."""
        suspected = self.corners == self.total >= SUSPICIOUS and 5 * self.leaving >= self.total
        if self.leaving and suspected:
            reading.problems.append(
                f"{where}: {self.leaving} of {self.total} boxes leave their picture as [x, y, "
                "width, height], and all would fit as x0, y0, x1, y1: write widths and heights, as "
                "COCO does"
            )
        elif self.leaving:
            reading.notes["boxes that leave their picture, cut"] += self.leaving
