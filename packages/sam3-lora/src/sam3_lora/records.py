"""One picture of a COCO file with what is annotated on it.

A record holds annotations as they were read; masks are decoded when they are asked for, so that
tens of thousands of pictures are ready within seconds. Boxes are (x0, y0, x1, y1) in pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import numpy as np
from numpy.typing import NDArray

from lora_core.data_file import is_whole
from lora_core.errors import DataError, one_line
from lora_core.pictures.coco import shape_of
from lora_core.pictures.encodings import Shape, decode_counts
from lora_core.pictures.files import MAX_PIXELS, read_image
from lora_core.pictures.masks import Object, Size, resized, trim
from lora_core.settings.types import shown

Box = tuple[float, float, float, float]  # x0, y0, x1, y1


class Entry(NamedTuple):
    """One annotation of a picture, not decoded yet."""

    phrase: str
    box: Box | None  # within the picture; None: that of the mask
    shape: Shape | None  # None: no mask is known
    shape_size: Size  # of the picture that the mask was written for
    crowd: bool  # a region of many objects: nothing is trained on it


class Instance(NamedTuple):
    """One object of a picture."""

    phrase: str
    box: Box
    mask: Object | None  # None: unknown, or not asked for
    crowd: bool
    filled: bool = False  # the annotation's mask is empty: this is its box, filled

    @property
    def lies_apart(self) -> bool:
        """Whether mask and box lie apart, by more than a rounded pixel."""
        if self.mask is None:
            return False
        x0, y0, x1, y1 = box_of(self.mask)
        left, top, right, bottom = self.box
        return max(left - x1, x0 - right, top - y1, y0 - bottom) > 1


@dataclass(frozen=True)
class Record:
    """A picture and its annotations.

    Attributes:
        key: the picture's path below its folder, with "/".
        image_id: number of the picture in results: that of its file where it is a whole number.
        size: (height, width) of the upright picture.
        entries: its annotations, in the file's order.
        absent: phrases that are known to be absent; None: all those that no annotation has.
        partial: phrases of which not every object is annotated.
    """

    key: str
    image: Path
    image_id: int
    size: Size
    entries: tuple[Entry, ...] = ()
    absent: tuple[str, ...] | None = None
    partial: frozenset[str] = frozenset()

    def instances(self, masks: bool = True, crowds: bool = True) -> tuple[list[Instance], int]:
        """The annotated objects, and how many annotations cover nothing and are left out.

        Args:
            masks: decode masks, also where the box alone would do.
            crowds: give crowd regions too.

        Raises:
            DataError: masks that cannot be decoded; one line for each.
        """
        every = [one for _, one in self.decoded_entries(masks, crowds)]
        found = [one for one in every if one is not None]
        return found, len(every) - len(found)

    def decoded_entries(
        self, masks: bool = True, crowds: bool = True
    ) -> list[tuple[int, Instance | None]]:
        """Index of each entry and its object, None where it covers nothing; as `instances`."""
        every: list[tuple[int, Instance | None]] = []
        problems: list[str] = []
        for number, entry in enumerate(self.entries):
            if entry.crowd and not crowds:
                continue
            try:
                every.append((number, decoded(entry, self.size, masks)))
            except DataError as error:
                where = entry.shape.where if entry.shape else one_line(self.image)
                problems.append(f"{where}: {error}")
        if problems:
            raise DataError("\n".join(problems))
        return every

    def pixels(self) -> NDArray[np.uint8]:
        """The upright picture, uint8 [H, W, 3].

        Raises:
            DataError: it cannot be read, or was exchanged after its header was read.
        """
        rgb = read_image(self.image)
        if rgb.shape[:2] != self.size:
            raise DataError(
                f"{one_line(self.image)}: {rgb.shape[1]} x {rgb.shape[0]} pixels "
                f"(width x height), expected {self.size[1]} x {self.size[0]} as its header said: "
                "was the picture exchanged, or is it damaged?"
            )
        return rgb


# -- masks -----------------------------------------------------------------------------------------


def decoded(entry: Entry, size: Size, masks: bool = True) -> Instance | None:
    """The object that an annotation means; None if it covers nothing.

    An empty mask is replaced by the filled box, as in official training.

    Raises:
        DataError: the mask cannot be decoded.
    """
    box, crowd = entry.box, entry.crowd
    if entry.shape is None or (box is not None and not masks):
        assert box is not None  # an annotation without both is refused when it is read
        return Instance(entry.phrase, box, None, crowd)
    mask = decode(entry.shape, entry.shape_size)
    if mask.crop.size and entry.shape_size != size:
        mask = trim(resized(mask, size), (0, 0), size, "")
    if mask.crop.size:
        return Instance(entry.phrase, box or box_of(mask), mask, crowd)
    if box is None:
        return None
    return Instance(entry.phrase, box, filled(box, size), crowd, filled=True)


def decode(shape: Shape, size: Size) -> Object:
    """An annotation's mask; outlines are filled as pycocotools does, so that scores are COCO's.

    The outlines were checked when they were read: what pycocotools does with other ones is
    undefined.
    """
    if shape.kind != "parts":
        return shape.decode(size)
    from pycocotools import mask as coco_mask

    outlines = [ring.ravel().tolist() for ring in shape.data]
    runs = coco_mask.merge(coco_mask.frPyObjects(outlines, *size))
    return decode_counts(runs["counts"], size)


def box_of(mask: Object) -> Box:
    """The box around a mask's pixels."""
    x, y = mask.origin
    height, width = mask.crop.shape
    return float(x), float(y), float(x + width), float(y + height)


def filled(box: Box, size: Size) -> Object:
    """The pixels that a box touches."""
    x0, y0 = math.floor(box[0]), math.floor(box[1])
    inside = np.ones((math.ceil(box[3]) - y0, math.ceil(box[2]) - x0), dtype=bool)
    return trim(inside, (x0, y0), size, "")


def run_lengths(mask: Object) -> dict[str, Any]:
    """COCO's compressed run lengths of a mask, {"size": [H, W], "counts": bytes}."""
    from pycocotools import mask as coco_mask

    runs: dict[str, Any] = coco_mask.encode(np.asfortranarray(mask.mask, dtype=np.uint8))
    return runs


# -- what a COCO file may say ----------------------------------------------------------------------


def mask_in(segmentation: Any, size: Size, where: str) -> tuple[Shape | None, Size]:
    """An annotation's mask, checked as far as it can be without decoding it, and its picture's
    size: run lengths may be written for a picture of another size.

    Raises:
        DataError: it means nothing.
    """
    if segmentation is None or segmentation in ([], {}):
        return None, size
    written = size
    if isinstance(segmentation, dict):
        stated = segmentation.get("size")
        if _is_size(stated) and stated != [size[1], size[0]]:  # swapped is an error
            written = stated[0], stated[1]
    return shape_of(segmentation, written, "", where), written


def _is_size(value: Any) -> TypeGuard[list[int]]:
    if not isinstance(value, list) or len(value) != 2 or not all(map(is_whole, value)):
        return False
    return min(value) > 0 and math.prod(value) <= MAX_PIXELS


def box_in(bbox: Any, size: Size) -> Box | None:
    """COCO's [x, y, width, height], cut to the picture; None without width or height.

    Cut as corners: official training cuts x, y, width and height one by one, so that a box from
    x = -4 keeps its width there.

    Raises:
        DataError: it is no such box, or lies outside of the picture.
    """
    if not is_box(bbox):
        raise DataError(f"bbox {shown(bbox)}: expected the numbers [x, y, width, height]")
    if max(map(abs, bbox)) > 1e9:
        raise DataError(f"bbox {shown(bbox)}: {_outside(size)}")
    x, y, width, height = map(float, bbox)
    if min(width, height) < 0:
        raise DataError(f"bbox {shown(bbox)}: a width or height below 0{_corners_hint(bbox, size)}")
    if x + width == x or y + height == y:
        return None
    box = (max(x, 0.0), max(y, 0.0), min(x + width, size[1]), min(y + height, size[0]))
    if box[2] <= box[0] or box[3] <= box[1]:
        raise DataError(f"bbox {shown(bbox)}: {_outside(size)}{_corners_hint(bbox, size)}")
    return box


def leaves(bbox: list[float], size: Size) -> bool:
    """Whether [x, y, width, height] goes beyond the picture by more than a rounded pixel."""
    x, y, width, height = bbox
    return min(x, y) < -1 or x + width > size[1] + 1 or y + height > size[0] + 1


def are_corners(bbox: list[float], size: Size) -> bool:
    """Whether four numbers would be a box in the picture as x0, y0, x1, y1."""
    x0, y0, x1, y1 = bbox
    return 0 <= x0 < x1 <= size[1] and 0 <= y0 < y1 <= size[0]


def _corners_hint(bbox: list[float], size: Size) -> str:
    if not are_corners(bbox, size):
        return ""
    return "; are these corners x0, y0, x1, y1? COCO has [x, y, width, height]"


def _outside(size: Size) -> str:
    return f"it lies outside of the picture of {size[1]} x {size[0]} (width x height)"


def is_box(bbox: Any) -> bool:
    """Whether a JSON value is a list of four numbers."""
    numbers = isinstance(bbox, list) and all(type(value) in (int, float) for value in bbox)
    return numbers and len(bbox) == 4
