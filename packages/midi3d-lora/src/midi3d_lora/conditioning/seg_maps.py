"""Maps of instances: which pixel of a scene belongs to which instance.

A map may be grey (each value above 0 is an instance), have a palette, or show colours. Instances
are told apart by the raw value: the official pipeline converts to luminance first, which merges
colours that are equally bright and makes instances of the colours under transparent pixels. The
order is by luminance and then by raw value: the official one wherever nothing merges.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from lora_core.errors import DataError, one_line
from lora_core.pictures.files import open_picture

MAX_INSTANCES = 32
SMALLEST_SHARE = 0.001  # of the pixels; the official training data leaves out what is smaller
LOSSY = frozenset({"JPEG", "MPO"})
COLOUR_SHIFT = 24  # bits; a colour is kept as luminance, red, green and blue of 8 bits


@dataclass(frozen=True, eq=False)
class SegMap:
    """The instances of a scene.

    Attributes:
        index: int32 [H, W]; 0 is background, i the instance `labels[i - 1]`.
        labels: raw value of each instance: grey value, palette index, or 0xRRGGBB.
        colours: the labels are colours.
        notes: what was left out, for people.
    """

    index: NDArray[np.int32]
    labels: tuple[int, ...]
    colours: bool = False
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.index.shape[0], self.index.shape[1]

    @property
    def names(self) -> tuple[str, ...]:
        """The labels as people and files name them: `29`, or `ff0000` for a colour."""
        return tuple(_label(label, self.colours) for label in self.labels)

    def mask(self, i: int) -> NDArray[np.uint8]:
        """Instance i, from 0: uint8 [H, W], 255 inside and 0 outside."""
        return np.where(self.index == i + 1, np.uint8(255), np.uint8(0))


def read_seg_map(
    path: str | Path,
    max_instances: int = MAX_INSTANCES,
    smallest_share: float = SMALLEST_SHARE,
) -> SegMap:
    """The upright map in a file.

    Raises:
        DataError: no picture, saved with losses, or as `seg_map`; the file is named.
    """
    path = Path(path)
    with open_picture(path) as opened:
        if opened.format in LOSSY:
            raise DataError(
                f"{one_line(path)}: a map of instances saved as JPEG, which changes its values: "
                "save it as PNG where it was made"
            )
        picture = ImageOps.exif_transpose(opened)
        try:
            return seg_map(picture, max_instances, smallest_share)
        except DataError as error:
            raise DataError(f"{one_line(path)}: {error}") from None


def seg_map(
    picture: Image.Image | NDArray[np.integer],
    max_instances: int = MAX_INSTANCES,
    smallest_share: float = SMALLEST_SHARE,
) -> SegMap:
    """The instances that a picture, or an array [H, W] or [H, W, 3], tells apart.

    Args:
        max_instances: more raw values than this are an error: it is no map of instances.
        smallest_share: instances with fewer than this share of the pixels (0..1) are left out.

    Raises:
        DataError: fractions, no instance, too many values, or only small ones.
    """
    keys, colours = _keys(picture)
    found, inverse, counts = np.unique(keys, return_inverse=True, return_counts=True)
    if len(found) - (found[0] < 0) > max_instances:
        raise DataError(
            f"{len(found) - (found[0] < 0)} different values above background, expected at most "
            f"{max_instances}, one per instance. A photograph in the place of the map, JPEG noise, "
            "or a map resized with smoothing looks like this: resize maps with nearest, save them "
            "as PNG; if it really has so many instances raise --max_instances"
        )
    if found[-1] < 0:
        raise DataError("no instance: all pixels are background (0, black or transparent)")
    keep = (found >= 0) & (counts >= smallest_share * keys.size)
    labels = found & (1 << COLOUR_SHIFT) - 1 if colours else found & (1 << 32) - 1
    notes = tuple(
        f"instance {_label(label, colours)} is left out: {count} of {keys.size} pixels"
        for label, count, small in zip(labels, counts, (found >= 0) & ~keep, strict=True)
        if small
    )
    if not keep.any():
        raise DataError(
            f"every instance has less than {smallest_share:.2%} of the pixels: "
            f"{len(notes)} left out, none remains"
        )
    new = np.where(keep, np.cumsum(keep), 0).astype(np.int32)
    return SegMap(new[inverse].reshape(keys.shape), tuple(labels[keep].tolist()), colours, notes)


def _label(label: int, colours: bool) -> str:
    return f"{label:06x}" if colours else str(label)


def _keys(picture: Image.Image | NDArray[np.integer]) -> tuple[NDArray[np.int64], bool]:
    """Per pixel a number that orders by luminance, then raw value; -1 is background.

    The raw value is in the low bits: 24 of a colour, 32 of anything else.
    """
    if isinstance(picture, np.ndarray):
        grey, colour = picture.ndim == 2, picture.ndim == 3 and picture.shape[2] in (3, 4)
        fits = (grey and picture.dtype.kind in "ui") or (colour and picture.dtype == np.uint8)
        if not fits or not picture.size:
            raise DataError(
                f"{picture.dtype} {list(picture.shape)}, expected integers [H, W] or uint8 "
                "[H, W, 3]"
            )
        if grey:
            return _grey_keys(picture), False
        picture = Image.fromarray(picture)
    if picture.mode == "P":
        return _palette_keys(picture), False
    if picture.mode == "1":
        picture = picture.convert("L")
    if picture.mode in ("RGB", "RGBA", "LA"):
        return _colour_keys(picture)
    values = np.asarray(picture)
    if values.ndim != 2 or values.dtype.kind not in "ui":
        raise DataError(
            f"mode {picture.mode} with values of {values.dtype}: save the map as PNG in grey, with "
            "a palette, or in RGB"
        )
    return _grey_keys(values), False


def _grey_keys(values: NDArray[np.integer]) -> NDArray[np.int64]:
    """The values themselves: int64 [H, W]."""
    keys = values.astype(np.int64)
    if keys.min() < 0 or keys.max() >= 1 << 31:
        raise DataError(f"values from {keys.min()} to {keys.max()}, expected 0 to 2147483647")
    return np.where(keys == 0, -1, keys)


def _palette_keys(picture: Image.Image) -> NDArray[np.int64]:
    """Background is what is transparent or black; without any black it is index 0."""
    index = np.asarray(picture)
    table = np.asarray(picture.convert("RGBA"))  # the library's own reading of the transparency
    luminance = np.asarray(picture.convert("RGB").convert("L")).astype(np.int64)
    black = (table[..., :3] == 0).all(-1)
    clear = table[..., 3] == 0
    background = black | clear if (black | clear).any() else index == 0
    return np.where(background, -1, luminance << 32 | index)


def _colour_keys(picture: Image.Image) -> tuple[NDArray[np.int64], bool]:
    """Grey colours are read as grey values: then the second result is False."""
    rgba = np.asarray(picture.convert("RGBA")).astype(np.int64)
    red, green, blue, alpha = np.moveaxis(rgba, -1, 0)
    background = (alpha == 0) | ((red | green | blue) == 0)
    shown = ~background
    if (red == green)[shown].all() and (green == blue)[shown].all():
        return np.where(background, -1, red), False
    luminance = np.asarray(picture.convert("RGB").convert("L")).astype(np.int64)
    raw = red << 16 | green << 8 | blue
    return np.where(background, -1, luminance << COLOUR_SHIFT | raw), True
