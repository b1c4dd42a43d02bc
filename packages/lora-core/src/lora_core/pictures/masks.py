"""Objects: masks cut to their boxes, their parts, and what they look like at another size."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from lora_core.errors import DataError

Mask = NDArray[np.bool_]
Size = tuple[int, int]  # (height, width)

TINY = 1e-9  # an exact half, or a tie, must not depend on rounding
EIGHT_NEIGHBOURS = np.ones((3, 3), dtype=bool)


class UnclearKind(DataError):
    """Mask values of which nobody said what they mean."""


@dataclass(frozen=True, eq=False)
class Object:
    """One thing to segment: its mask, cut to its bounding box, and its class.

    A picture may hold hundreds; cut masks keep them small and make what is done with them fast.
    """

    crop: Mask  # [h, w]; touches all four sides of the box, or is empty
    origin: tuple[int, int]  # (x, y) of the crop's top left pixel
    size: Size  # of the picture
    label: str

    @property
    def mask(self) -> Mask:
        """The mask in the whole picture, bool [H, W]."""
        full = np.zeros(self.size, dtype=bool)
        full[self.window] = self.crop
        return full

    @property
    def window(self) -> tuple[slice, slice]:
        """Rows and columns of the picture that the crop covers."""
        x, y = self.origin
        return slice(y, y + self.crop.shape[0]), slice(x, x + self.crop.shape[1])

    @property
    def area(self) -> int:
        """Number of foreground pixels."""
        return int(np.count_nonzero(self.crop))

    def mirrored(self) -> Object:
        """The object in the picture mirrored left-right."""
        x, y = self.origin
        x = self.size[1] - x - self.crop.shape[1]
        return replace(self, crop=self.crop[:, ::-1], origin=(x, y))


def trim(crop: Mask, origin: tuple[int, int], size: Size, label: str) -> Object:
    """An object from a mask [h, w] at `origin` (x, y); parts outside the picture are cut off."""
    x, y = origin
    top, left = max(0, -y), max(0, -x)
    crop = crop[top : max(top, size[0] - y), left : max(left, size[1] - x)]
    x, y = x + left, y + top
    rows, columns = np.flatnonzero(crop.any(1)), np.flatnonzero(crop.any(0))
    if not len(rows):
        return Object(np.zeros((0, 0), dtype=bool), (0, 0), size, label)
    crop = crop[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return Object(crop, (x + int(columns[0]), y + int(rows[0])), size, label)


def components(item: Object) -> list[Object]:
    """The connected parts of an object (pixels touch at sides or corners), in reading order."""
    if not item.crop.size:
        return []
    numbered, _ = ndimage.label(item.crop, structure=EIGHT_NEIGHBOURS)
    x, y = item.origin
    return [
        Object(
            numbered[window] == number,
            (x + window[1].start, y + window[0].start),
            item.size,
            item.label,
        )
        for number, window in enumerate(ndimage.find_objects(numbered), start=1)
    ]


def union(objects: Iterable[Object]) -> list[Object]:
    """One object per class, all of that class together; in the order of the classes' names."""
    together: dict[str, list[Object]] = {}
    for item in objects:
        together.setdefault(item.label, []).append(item)
    result = []
    for label, parts in sorted(together.items()):
        full = np.zeros(parts[0].size, dtype=bool)
        for part in parts:
            full[part.window] |= part.crop
        result.append(trim(full, (0, 0), parts[0].size, label))
    return result


def resized(item: Object, size: Size) -> Mask:
    """The mask at another size, bool [height, width]: pixels of which half or more is covered.

    Coverage is the exact share of area. An object that is too thin to cover half of any pixel keeps
    the pixel that it covers most: with an empty target it would be trained as "there is nothing",
    and its prompt would be punished.
    """
    height, width = size
    rows = _target_range(item.window[0], item.size[0], height)
    columns = _target_range(item.window[1], item.size[1], width)
    x, y = item.origin
    share = _average(item.crop, rows * (item.size[0] / height) - y)
    share = _average(share.T, columns * (item.size[1] / width) - x).T
    half = share >= 0.5 - TINY
    if share.size and not half.any():
        half.flat[(share >= share.max() - TINY).argmax()] = True
    full = np.zeros(size, dtype=bool)
    full[rows[0] : rows[-1], columns[0] : columns[-1]] = half
    return full


def _target_range(window: slice, old: int, new: int) -> NDArray[np.int64]:
    """Edges of the new pixels that `window` of the old ones touches."""
    return np.arange(window.start * new // old, -(-window.stop * new // old) + 1)


def _average(values: NDArray, edges: NDArray[np.floating]) -> NDArray[np.float64]:
    """Mean over the rows between successive edges; 0 outside. With S the running sum of rows,
    linear between whole numbers: (S(b) - S(a)) / (b - a)."""
    kind = np.int32 if values.dtype == bool else np.float64
    total = np.zeros((len(values) + 1, values.shape[1]), dtype=kind)
    np.cumsum(values, axis=0, dtype=kind, out=total[1:])
    inside = np.clip(edges, 0, len(values))
    low = np.minimum(inside.astype(np.int64), max(len(values) - 1, 0))
    part = (inside - low)[:, None]
    at_edges = total[low] * (1 - part) + total[np.minimum(low + 1, len(values))] * part
    return np.diff(at_edges, axis=0) / np.diff(edges)[:, None]


# -- mask files ------------------------------------------------------------------------------------


def binary_object(
    values: NDArray[np.integer], evident: bool, label: str, setting: str = "--mask_kind"
) -> list[Object]:
    """The foreground of a mask of 0 and one other value; nothing if there is none.

    Args:
        evident: take only 1 or 255 for foreground, since nobody said what the values mean.
        setting: the flag that says it, for the message.

    Raises:
        UnclearKind: other values; a soft or lossy mask has many.
    """
    found = np.unique(values)
    others = found[found != 0]
    if len(others) > 1 or (evident and len(others) and others[0] not in (1, 255)):
        raise UnclearKind(
            f"mask values {listed(found)}, expected "
            + ("0 and 1, or 0 and 255" if evident else "0 and one other")
            + f"; say what they mean with {setting} instances (one id per object) or labels (one "
            "index per class); soft edges and JPEG masks must be thresholded first"
        )
    return (
        [trim(values > 0, (0, 0), (values.shape[0], values.shape[1]), label)] if len(others) else []
    )


def objects_by_value(values: NDArray[np.integer], labels: bool) -> list[Object]:
    """One object for each value but 0, in increasing order: ids of objects, or indices of classes.

    Raises:
        DataError: a value below 0 or above 65535.
    """
    if values.min() < 0 or values.max() > 65535:
        raise DataError(f"mask values from {values.min()} to {values.max()}, expected 0 to 65535")
    size = (values.shape[0], values.shape[1])
    result = []
    for value, window in enumerate(ndimage.find_objects(values.astype(np.int32)), start=1):
        if window is not None:
            label = f"class_{value}" if labels else "object"
            origin = (window[1].start, window[0].start)
            result.append(Object(values[window] == value, origin, size, label))
    return result


def listed(values: NDArray[np.integer], limit: int = 6) -> str:
    """The first few numbers of an array, for a message."""
    text = ", ".join(str(value) for value in values[:limit].tolist())
    return text + (f", ... ({len(values)} different)" if len(values) > limit else "")
