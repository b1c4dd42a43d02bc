"""What the depth model sees of a picture: the whole of it, squashed to a square.

This is the preprocessing that the depth branch of Isaac was written with, not that of
Depth-Anything itself, which keeps the aspect ratio: here each part of the square must belong to the
same part of the picture as the token that gets its depth.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

MEAN = (0.485, 0.456, 0.406)  # of ImageNet, R, G, B
STD = (0.229, 0.224, 0.225)


def depth_pixels(picture: NDArray[np.uint8], size: int) -> Tensor:
    """Scale to 0..1, resize bilinearly with antialiasing, normalise; on the CPU.

    Always divides by 255. (The original does only where the brightest value is above 1.5, and so
    shows the depth model another picture where nearly all is black.)

    Args:
        picture: RGB, uint8 [H, W, 3], as it lies in the file, before Isaac's own resize.
        size: S, side of the square, pixels.

    Returns:
        float32 [1, 3, S, S].

    Raises:
        ValueError: another dtype or shape, or no pixels.
    """
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or not picture.size:
        raise ValueError(
            f"expected an RGB picture uint8 [H, W, 3], not {picture.dtype} {list(picture.shape)}"
        )
    # Channel by channel: a picture of 60 megapixels has 720 MB as float32.
    channels = [_resized(picture[..., channel], size) for channel in range(3)]
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return ((torch.cat(channels) - mean) / std)[None]


def _resized(channel: NDArray[np.uint8], size: int) -> Tensor:
    """uint8 [H, W] -> float32 [1, S, S] in 0..1."""
    scaled = torch.from_numpy(channel.astype(np.float32)).div_(255)
    return F.interpolate(
        scaled[None, None], size=(size, size), mode="bilinear", align_corners=False, antialias=True
    )[0]
