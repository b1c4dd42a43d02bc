"""How annotation files write masks: run lengths, bitmaps, outlines.

Every decoder takes untrusted values: it checks them before it allocates, and says what is wrong.
"""

from __future__ import annotations

import base64
import io
import re
import zlib
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from lora_core.errors import DataError
from lora_core.pictures.files import DAMAGED, TooLarge, open_bounded, said_by
from lora_core.pictures.masks import Mask, Object, Size, trim, union
from lora_core.settings.types import shown

PNG_BYTES = 64 * 2**20  # a bitmap's PNG may not unpack to more


class Shape(NamedTuple):
    """One annotation of a picture, not decoded yet."""

    kind: Literal["runs", "counts", "bitmap", "polygon", "parts", "rectangle"]
    data: Any
    label: str
    where: str  # file and record, for messages

    def decode(self, size: Size) -> Object:
        """The annotation's mask in a picture of `size` (height, width)."""
        match self.kind:
            case "runs":
                return decode_runs(self.data, size, self.label)
            case "counts":
                return decode_counts(self.data, size, self.label)
            case "bitmap":
                return decode_bitmap(self.data[0], self.data[1], size, self.label)
            case "polygon":
                return decode_polygon(self.data, size, self.label)
            case "parts":
                return decode_parts(self.data, size, self.label)
            case "rectangle":
                x0, y0, x1, y1 = self.data
                filled = np.ones((y1 - y0 + 1, x1 - x0 + 1), dtype=bool)
                return trim(filled, (x0, y0), size, self.label)


# -- run lengths -----------------------------------------------------------------------------------


def decode_runs(text: str, size: Size, label: str = "") -> Object:
    """Kaggle's run lengths: "start length ..." pairs, from 1, counted down the columns.

    Raises:
        DataError: an odd count, no integer, a start below 1, a run past the end, or an overlap.
    """
    try:
        numbers = np.array(text.split(), dtype=np.int64)
    except (ValueError, OverflowError):
        wrong = next(word for word in text.split() if not _is_integer(word))
        what = "is too large" if re.fullmatch("[+-]?[0-9]+", wrong) else "expected digits alone"
        raise DataError(f"run lengths: {shown(wrong)} {what}") from None
    if len(numbers) % 2:
        raise DataError(f"run lengths: {len(numbers)} numbers, expected pairs of start and length")
    starts, lengths = numbers[0::2] - 1, numbers[1::2]
    if not len(numbers):
        return trim(np.zeros((0, 0), dtype=bool), (0, 0), size, label)
    if (starts < 0).any():
        raise DataError(f"run lengths: start {starts.min() + 1}, but pixels are counted from 1")
    if (lengths < 1).any():
        raise DataError(f"run lengths: length {lengths.min()}, expected at least 1")
    pixels = size[0] * size[1]
    outside = lengths > pixels - starts
    if outside.any():
        raise DataError(
            f"run lengths: the run at {starts[outside][0] + 1} goes past the last pixel {pixels} "
            f"of a picture of {size[1]} x {size[0]} (width x height)"
        )
    order = np.argsort(starts, kind="stable")
    starts, ends = starts[order], (starts + lengths)[order]
    if (starts[1:] < ends[:-1]).any():
        first = int(np.argmax(starts[1:] < ends[:-1]))
        one, two = starts[first] + 1, starts[first + 1] + 1
        raise DataError(f"run lengths: the runs at {one} and {two} overlap")
    return _fill_runs(starts, ends, size, label)


def _is_integer(word: str) -> bool:
    try:
        return -(2**62) < int(word) < 2**62
    except ValueError:
        return False


def _fill_runs(
    starts: NDArray[np.int64], ends: NDArray[np.int64], size: Size, label: str
) -> Object:
    """Sorted runs [start, end) of pixels numbered down the columns; touches only their columns."""
    height = size[0]
    first, end = int(starts[0]) // height, -(-int(ends[-1]) // height)
    edges = np.stack([starts, ends], 1).ravel() - first * height
    lengths = np.diff(edges, prepend=0, append=(end - first) * height)
    filled = np.repeat(np.arange(len(lengths)) % 2 == 1, lengths)
    return trim(filled.reshape(-1, height).T, (first, 0), size, label)


def encode_runs(item: Object) -> str:
    """The inverse of `decode_runs`."""
    column_wise = np.zeros(item.size[0] * item.size[1] + 2, dtype=np.int8)
    column_wise[1:-1] = item.mask.T.ravel()
    edges = np.flatnonzero(np.diff(column_wise))
    starts, ends = edges[0::2], edges[1::2]
    pairs = np.stack([starts + 1, ends - starts], 1)
    return " ".join(map(str, pairs.ravel().tolist()))


def decode_counts(counts: str | bytes | list[int], size: Size, label: str = "") -> Object:
    """COCO's run lengths: background first, counted from 0 down the columns.

    Args:
        counts: a list of integers, or the same compressed to a string.

    Raises:
        DataError: a damaged string, negative counts, or a sum that is not height x width.
    """
    if isinstance(counts, str | bytes):
        numbers = _decompress(counts, size[0] * size[1])
    elif isinstance(counts, list) and all(type(count) is int for count in counts):
        numbers = counts
    else:
        raise DataError("run lengths: expected a string or a list of whole numbers")
    if any(count < 0 for count in numbers):
        raise DataError(f"run lengths: count {min(numbers)}, expected 0 or more")
    total = sum(numbers)
    if total != size[0] * size[1]:
        raise DataError(
            f"run lengths: the counts sum to {total}, expected {size[1]} x {size[0]} = "
            f"{size[0] * size[1]} pixels"
        )
    edges = np.cumsum(np.array(numbers, dtype=np.int64))
    starts, ends = edges[0::2][: len(edges) // 2], edges[1::2]
    filled = ends > starts
    if not filled.any():
        return trim(np.zeros((0, 0), dtype=bool), (0, 0), size, label)
    return _fill_runs(starts[filled], ends[filled], size, label)


def _decompress(text: str | bytes, limit: int) -> list[int]:
    """COCO's string of counts: groups of 5 bits, low first, as characters from "0".

    Bit 5 of a character says that another follows, bit 4 of the last is the sign; from the fourth
    number on each is the difference to the one two before it.
    """
    data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    numbers: list[int] = []
    value = shift = 0
    for byte in data:
        group = byte - 48
        if not 0 <= group < 64 or shift > 30:
            raise DataError("run lengths: the compressed string is damaged")
        value |= (group & 31) << shift
        shift += 5
        if group & 32:
            continue
        if group & 16:
            value -= 1 << shift
        if len(numbers) > 2:
            value += numbers[-2]
        if abs(value) > limit:
            raise DataError(f"run lengths: count {value} in a picture of {limit} pixels")
        numbers.append(value)
        value = shift = 0
    if shift:
        raise DataError("run lengths: the compressed string is cut off")
    return numbers


def encode_counts(mask: Mask) -> list[int]:
    """COCO's uncompressed run lengths of a mask [H, W]."""
    column_wise = mask.T.ravel()
    edges = np.flatnonzero(np.diff(column_wise)) + 1
    counts = np.diff(np.concatenate([[0], edges, [column_wise.size]])).tolist()
    return [0, *counts] if column_wise.size and column_wise[0] else counts


# -- bitmaps and outlines --------------------------------------------------------------------------


def decode_bitmap(data: str, origin: tuple[int, int], size: Size, label: str = "") -> Object:
    """Supervisely's bitmap: base64 of zlib of a PNG that holds only the crop at `origin` (x, y).

    Foreground is alpha > 0 where there is transparency, else grey > 0. Parts outside the picture
    are cut off.

    Raises:
        DataError: any layer of the packing is damaged or too large.
    """
    try:
        packed = zlib.decompressobj()
        png = packed.decompress(base64.b64decode(data, validate=True), PNG_BYTES)
        if packed.unconsumed_tail or not packed.eof:
            raise DataError("bitmap: cut off, or larger than 64 MB")
        with open_bounded(io.BytesIO(png), ("PNG",)) as picture:
            return trim(_foreground(picture), origin, size, label)
    except DataError:
        raise
    except TooLarge as error:
        raise DataError(f"bitmap: {error}") from None
    except UnidentifiedImageError:  # its text is an address in memory
        raise DataError("bitmap: what is packed in it is no PNG") from None
    except (zlib.error, *DAMAGED) as error:
        raise DataError(f"bitmap: not base64 of zlib of a PNG: {said_by(error)}") from None


def _foreground(picture: Image.Image) -> Mask:
    if picture.has_transparency_data:
        return np.asarray(picture.convert("RGBA"))[..., 3] > 0
    if picture.mode == "P":  # an opaque palette: its colours decide, not their numbers
        picture = picture.convert("L")
    values = np.asarray(picture)
    return np.asarray(values > 0 if values.ndim == 2 else values.any(-1))


def encode_bitmap(item: Object) -> tuple[str, tuple[int, int]]:
    """The inverse of `decode_bitmap`: data and origin (x, y)."""
    file = io.BytesIO()
    Image.fromarray(item.crop.astype(np.uint8) * 255).convert("1").save(file, "PNG")
    return base64.b64encode(zlib.compress(file.getvalue())).decode("ascii"), item.origin


def decode_polygon(rings: Sequence[NDArray[np.float64]], size: Size, label: str = "") -> Object:
    """Fill outlines: a pixel belongs to the object if its centre lies inside (even-odd rule).

    Pixel (x, y) is the square from (x, y) to (x + 1, y + 1), as in COCO, so a rectangle from 10 to
    20 covers ten pixels. Further rings are holes. Drawing libraries include the outline itself,
    which makes small objects too large.

    Args:
        rings: [K, 2] vertices (x, y) each, closed by themselves; finite.
    """
    corners = np.concatenate(rings)
    limit = (size[1], size[0])
    left, top_row = np.clip(np.floor(corners.min(0)), 0, limit).astype(np.int64).tolist()
    right, end_row = np.clip(np.ceil(corners.max(0)), 0, limit).astype(np.int64).tolist()
    height, width = end_row - top_row, right - left
    toggles = np.zeros((height, width + 1), dtype=np.uint8)
    for ring in rings:
        here = ring - (left, top_row)
        there = np.roll(here, -1, axis=0)
        upward = here[:, 1] <= there[:, 1]
        top = np.where(upward[:, None], here, there)
        bottom = np.where(upward[:, None], there, here)
        # the rows whose centre lies in [top, bottom)
        first = np.clip(np.ceil(top[:, 1] - 0.5), 0, height).astype(np.int64)
        last = np.clip(np.ceil(bottom[:, 1] - 0.5), 0, height).astype(np.int64)
        edge = np.repeat(np.arange(len(ring)), last - first)
        row = np.arange(len(edge)) - np.repeat(np.cumsum(last - first) - last, last - first)
        slope = (bottom[edge, 0] - top[edge, 0]) / (bottom[edge, 1] - top[edge, 1])
        x = top[edge, 0] + (row + 0.5 - top[edge, 1]) * slope
        np.add.at(toggles, (row, np.clip(np.ceil(x - 0.5), 0, width).astype(np.int64)), 1)
    inside = np.cumsum(toggles[:, :-1], axis=1, dtype=np.uint8) % 2 == 1
    return trim(inside, (left, top_row), size, label)


def decode_parts(parts: Sequence[NDArray[np.float64]], size: Size, label: str = "") -> Object:
    """An object of several outlines that add up, as COCO stores occluded things."""
    return union([decode_polygon([part], size, label) for part in parts])[0]


def ring_of(points: Any, size: Size) -> NDArray[np.float64]:
    """Check an outline's vertices, given as x, y, x, y, ... or as pairs, and return them [K, 2].

    Raises:
        DataError: fewer than three vertices, an odd count, lists in lists, NaN, or a vertex far
            outside.
    """
    try:
        numbers = np.asarray(points)
    except (TypeError, ValueError, OverflowError):
        numbers = np.empty(0, dtype=object)
    pairs = numbers.ndim == 2 and numbers.shape[1] == 2
    if numbers.dtype.kind not in "iuf" or not (numbers.ndim == 1 or pairs):
        raise DataError("polygon: expected numbers x, y, x, y, ... or pairs of them")
    flat = numbers.astype(np.float64).ravel()
    if len(flat) < 6 or len(flat) % 2:
        raise DataError(f"polygon: {len(flat)} numbers, expected three or more pairs of x and y")
    limit = 2 * max(size)
    if not (np.abs(flat) <= limit).all():  # false for NaN too
        worst = flat[~(np.abs(flat) <= limit)][0]
        raise DataError(
            f"polygon: coordinate {worst:g} is not near the picture of {size[1]} x {size[0]} "
            "(width x height)"
        )
    return flat.reshape(-1, 2)
