"""A picture's pixels as the vision tower takes them: resized, and cut into patches.

They stay bytes until the tower normalises them: as floats they would take four times as much of the
memory that a data loader's workers share.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from isaac_lora.pictures.target_size import Grid, PictureRules, target_size

MEAN = STD = 0.5  # of values in 0..1: the tower was trained on [-1, 1]


def resize(picture: NDArray[np.uint8] | Tensor, size: tuple[int, int]) -> Tensor:
    """Resize uint8 [H, W, 3] to uint8 [h, w, 3]: bilinear, without antialiasing, on the CPU.

    torch's kernel for uint8 works along the width, then along the height, and rounds to whole
    levels after each. Floats rounded at the end differ by one level in about a sixth of the values,
    so this is done on bytes and never on a GPU.
    """
    levels = torch.as_tensor(picture, device="cpu")
    if levels.dtype != torch.uint8 or levels.ndim != 3 or levels.shape[2] != 3:
        raise ValueError(
            f"a picture of {levels.dtype} {list(levels.shape)}, expected uint8 [H, W, 3]"
        )
    planes = levels.permute(2, 0, 1)[None]
    resized = F.interpolate(planes, size=tuple(size), mode="bilinear", align_corners=False)
    return resized[0].permute(1, 2, 0).contiguous()


def normalise(levels: Tensor) -> Tensor:
    """Levels 0..255, any shape, to float32 in [-1, 1]: (x / 255 - 0.5) / 0.5."""
    # In place: new memory costs more than the arithmetic.
    return levels.to(torch.float32, copy=True).div_(255.0).sub_(MEAN).div_(STD)


def patches(pixels: Tensor, patch_size: int) -> Tensor:
    """Cut [h, w, 3] into patches [N, 3 p²]: patches and the pixels in them row by row, RGB last."""
    p = patch_size
    height, width, channels = pixels.shape
    if height % p or width % p:
        raise ValueError(f"{height} x {width} pixels are not multiples of the patch's {p}")
    blocks = pixels.reshape(height // p, p, width // p, p, channels)
    return blocks.transpose(1, 2).reshape(-1, p * p * channels)


def preprocess(picture: NDArray[np.uint8] | Tensor, rules: PictureRules) -> tuple[Tensor, Grid]:
    """Patches uint8 [N, 3 p²] of a picture uint8 [H, W, 3], and the grid of them, N = h w.

    Raises:
        DataError: no pixels, or too many.
    """
    size = target_size(picture.shape[0], picture.shape[1], rules)
    p = rules.patch_size
    return patches(resize(picture, size), p), Grid(size.height // p, size.width // p)
