"""The exact way between pictures and the model's input."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

MEAN = (0.485, 0.456, 0.406)  # of ImageNet, as the official transform
STD = (0.229, 0.224, 0.225)

Coordinates = TypeVar("Coordinates", Tensor, NDArray[np.floating])


def as_tensor(rgb: NDArray[np.uint8]) -> Tensor:
    """A picture as a tensor: of the same memory, or a copy if that is read-only.

    PIL's pictures are, and torch warns of such tensors.
    """
    return torch.from_numpy(rgb) if rgb.flags.writeable else torch.tensor(rgb)


def preprocess(rgb: Tensor | NDArray[np.uint8], size: tuple[int, int]) -> Tensor:
    """The official transform: scaled to 0..1, resized directly to `size`, normalised.

    Bilinear with antialias on the float values, without keeping the aspect ratio and without
    padding. Resizing the 8-bit values instead would differ by up to 0.015.

    Args:
        rgb: uint8 [H, W, 3].
        size: (height, width) of the model's input.

    Returns:
        float32 [3, height, width], on the device of the picture.
    """
    if not isinstance(rgb, Tensor):
        rgb = as_tensor(rgb)
    # In place from here on: new memory costs more than the arithmetic.
    pixels = rgb.permute(2, 0, 1)[None].to(torch.float32, copy=True).div_(255)
    pixels = F.interpolate(pixels, size=size, mode="bilinear", antialias=True, align_corners=False)
    mean, std = (
        torch.tensor(values, device=pixels.device)[:, None, None] for values in (MEAN, STD)
    )
    return pixels[0].sub_(mean).div_(std)


def to_model_points(
    xy: Coordinates, original_hw: tuple[int, int], size: tuple[int, int]
) -> Coordinates:
    """Points (x, y) [..., 2] in the picture's pixels to the model's; x' = x / W_picture * W_model.

    There is no half-pixel shift: the prompt encoder adds its 0.5 itself.
    """
    scale = [size[1] / original_hw[1], size[0] / original_hw[0]]
    if isinstance(xy, Tensor):
        return xy * torch.tensor(scale, dtype=xy.dtype, device=xy.device)
    return xy * np.asarray(scale, dtype=xy.dtype)


def to_model_boxes(
    boxes: Coordinates, original_hw: tuple[int, int], size: tuple[int, int]
) -> Coordinates:
    """Boxes (x0, y0, x1, y1) [..., 4] in the picture's pixels to the model's."""
    corners = boxes.reshape(*boxes.shape[:-1], 2, 2)
    return to_model_points(corners, original_hw, size).reshape(boxes.shape)


def upscale_logits(low_res: Tensor, original_hw: tuple[int, int]) -> Tensor:
    """Mask logits [N, M, h, w] at the picture's size, float32 [N, M, H, W]; the mask is > 0."""
    return F.interpolate(low_res.float(), size=original_hw, mode="bilinear", align_corners=False)
