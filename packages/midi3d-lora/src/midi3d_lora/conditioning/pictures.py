"""The pictures of the instances of a scene: cut out, brought to a square, padded, cropped.

Pictures are RGB uint8 [H, W, 3], masks uint8 [H, W] of 0 and 255. White is the background of
pictures and 0 that of masks and maps, as in the official pipeline.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lora_core.errors import DataError
from midi3d_lora.conditioning.seg_maps import SegMap

Picture = NDArray[np.uint8]
WHITE = 255
SMALLEST = 14  # pixels; one patch of DINOv2
Value = TypeVar("Value", bound=np.generic)


@dataclass(frozen=True, eq=False)
class ScenePictures:
    """One scene of K instances; the pictures of one instance are made when they are asked for.

    Attributes:
        picture: [H, W, 3], out of which the instances are cut.
        scene: [H, W, 3], the whole scene that the encoder sees beside each instance.
        seg: which pixel belongs to which instance.
    """

    picture: Picture
    scene: Picture
    seg: SegMap

    def __len__(self) -> int:
        return len(self.seg)

    def __iter__(self) -> Iterator[tuple[Picture, Picture, Picture]]:
        """For each instance: its picture, the scene, its mask."""
        for i in range(len(self)):
            yield self.instance(i), self.scene, self.mask(i)

    def instance(self, i: int) -> Picture:
        """Instance i, from 0, on white."""
        return cut_out(self.picture, self.seg.mask(i))

    def mask(self, i: int) -> Picture:
        """Where instance i is."""
        return self.seg.mask(i)


def split(picture: Picture, seg: SegMap, scene: Picture | None = None) -> ScenePictures:
    """The instances of a picture.

    Args:
        scene: the whole scene; `picture` itself if it is not given.

    Raises:
        DataError: not RGB of 8 bits, or sizes that differ.
    """
    scene = picture if scene is None else scene
    problems = []
    for name, value in (("picture", picture), ("scene", scene)):
        if value.dtype != np.uint8 or value.ndim != 3 or value.shape[2] != 3:
            problems.append(f"{name}: {value.dtype} {list(value.shape)}, expected uint8 [H, W, 3]")
        elif value.shape[:2] != seg.size:
            problems.append(
                f"{name} has {value.shape[1]} x {value.shape[0]} pixels, the map of instances "
                f"{seg.size[1]} x {seg.size[0]}: they must show the same, pixel by pixel"
            )
    if min(seg.size) < SMALLEST:
        problems.append(f"the map has {seg.size[1]} x {seg.size[0]} pixels, at least 14 are needed")
    if problems:
        raise DataError("\n".join(problems))
    return ScenePictures(picture, scene, seg)


def cut_out(picture: Picture, mask: Picture) -> Picture:
    """The picture where the mask is not 0, white elsewhere."""
    return np.where((mask > 0)[..., None], picture, np.uint8(WHITE))


# -- squares ---------------------------------------------------------------------------------------


def on_canvas(
    values: NDArray[Value], size: tuple[int, int], origin: tuple[int, int], fill: int
) -> NDArray[Value]:
    """The values on a canvas of (height, width), their top left at `origin` (row, column)."""
    canvas = np.full((*size, *values.shape[2:]), fill, dtype=values.dtype)
    (height, width), (top, left) = values.shape[:2], origin
    canvas[top : top + height, left : left + width] = values
    return canvas


def to_square(scene: ScenePictures) -> ScenePictures:
    """The scene extended to a square at the right and the bottom; a square stays as it is.

    Processors squeeze or crop what is not square, and do not do the same to a mask.
    """
    height, width = scene.seg.size
    if height == width:
        return scene
    side = max(height, width)
    return _moved(scene, (side, side), (0, 0))


def pad_border(scene: ScenePictures) -> ScenePictures:
    """Space around the instances of a scene that touch its border, then a square.

    With the rows r and columns c of all instances in a picture W x H:

        L  = 2 max(|r_max - H//2|, |r_min - H//2|, |c_max - W//2|, |c_min - W//2|)
        W' = int(L / 4 * 5)  if L > 0.8 W, else W        and the same for H'

    The picture is put at ((W' - W) // 2, (H' - H) // 2) of a canvas W' x H', which is extended at
    the right and the bottom to a square. "Do image padding" of the official demos; there the halves
    of W and H are exchanged, which is the same for squares only.
    """
    height, width = scene.seg.size
    rows, columns = (np.flatnonzero((scene.seg.index > 0).any(axis)) for axis in (1, 0))
    if not len(rows):
        return to_square(scene)
    middle_row, middle_column = height // 2, width // 2
    reach = 2 * max(
        abs(int(rows[-1]) - middle_row),
        abs(int(rows[0]) - middle_row),
        abs(int(columns[-1]) - middle_column),
        abs(int(columns[0]) - middle_column),
    )
    new_width, new_height = (
        int(reach / 4 * 5) if reach > 0.8 * old else old for old in (width, height)
    )
    side = max(new_width, new_height)
    return _moved(scene, (side, side), ((new_height - height) // 2, (new_width - width) // 2))


def _moved(scene: ScenePictures, size: tuple[int, int], origin: tuple[int, int]) -> ScenePictures:
    picture = on_canvas(scene.picture, size, origin, WHITE)
    same = scene.scene is scene.picture
    return ScenePictures(
        picture,
        picture if same else on_canvas(scene.scene, size, origin, WHITE),
        replace(scene.seg, index=on_canvas(scene.seg.index, size, origin, 0)),
    )


# -- sizes -----------------------------------------------------------------------------------------


def resized_picture(picture: Picture, size: tuple[int, int]) -> Picture:
    """The picture at (height, width), by Pillow's bicubic filter."""
    if picture.shape[:2] == size:
        return picture
    made = Image.fromarray(picture).resize((size[1], size[0]), Image.Resampling.BICUBIC)
    return np.asarray(made)


def resized_map(values: NDArray[Value], size: tuple[int, int]) -> NDArray[Value]:
    """A map of labels [h, w] at (height, width): each pixel takes the value at its centre.

    Pixel i reads place (i + 1/2) h / height, as Pillow's nearest filter does.
    """
    rows, columns = (
        ((2 * np.arange(new) + 1) * old) // (2 * new)
        for old, new in zip(values.shape, size, strict=True)
    )
    return values[rows[:, None], columns]


def nearest(values: NDArray[Value], size: tuple[int, int]) -> NDArray[Value]:
    """[h, w] at (height, width), as torch's "nearest" does it: pixel i reads floor(i h / height).

    In float32, as there: where i h / height is whole, rounding decides between two pixels.
    """
    rows, columns = (
        (np.arange(new, dtype=np.float32) * (np.float32(old) / np.float32(new))).astype(np.int64)
        for old, new in zip(values.shape, size, strict=True)
    )
    return values[
        np.minimum(rows, len(values) - 1)[:, None], np.minimum(columns, values.shape[1] - 1)
    ]


def square_crop(
    picture: NDArray[np.float32], mask: NDArray[np.float32], side: int = 224, border: float = 0.1
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """An instance's own square: float32 [3, side, side] and [side, side].

    The tight box of the mask, extended on both sides of its shorter edge by
    int((long - short) / 2), then all round by int(border · edge): white (1) in the picture, 0 in
    the mask. Bilinear without antialiasing, and nearest. "Crop padded" of the official training
    data; the released model does not use it.

    Args:
        picture: [3, H, W], 0..1.
        mask: [H, W], 0 or 1.

    Raises:
        DataError: the mask is empty.
    """
    rows, columns = (np.flatnonzero((mask > 0).any(axis)) for axis in (1, 0))
    if not len(rows):
        raise DataError("an instance without pixels has no crop")
    window = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    height, width = (part.stop - part.start for part in window)
    extra = abs(int(height) - int(width)) // 2
    pad = [extra, 0] if height < width else [0, extra]  # rows, columns
    edge = max(height + 2 * pad[0], width + 2 * pad[1])
    pads = [(n + int(border * edge),) * 2 for n in pad]
    cut = np.pad(picture[(slice(None), *window)], [(0, 0), *pads], constant_values=1)
    cut_mask = np.pad(mask[window], pads)
    return _bilinear(cut, side), nearest(cut_mask, (side, side))


def _bilinear(values: NDArray[np.float32], side: int) -> NDArray[np.float32]:
    """[C, h, w] -> [C, side, side], at pixel centres, clamped at the border, no antialiasing."""
    for axis in (1, 2):
        length = values.shape[axis]
        place = (np.arange(side) + 0.5) * (length / side) - 0.5
        place = place.clip(0, length - 1)
        low = np.floor(place).astype(np.int64)
        high = np.minimum(low + 1, length - 1)
        weight = (place - low).astype(np.float32).reshape((-1, 1) if axis == 1 else (-1,))
        values = values.take(low, axis) * (1 - weight) + values.take(high, axis) * weight
    return values
