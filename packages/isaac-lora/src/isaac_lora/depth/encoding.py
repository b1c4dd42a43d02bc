"""From a depth map to what is added to the projected image tokens.

    v = alpha · mean of the map d over a token's part of the picture,   d in 0..1, larger is nearer
    e = [sin(v w_0), ..., sin(v w_{h-1}), cos(v w_0), ..., cos(v w_{h-1})],   w_i = 10000^(-i/h)

with h = C // 2 for C channels. All sines come before all cosines; an odd C has a zero at its end.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

BASE = 10000.0  # of the wavelengths


def token_grid(patch_rows: int, patch_columns: int, shuffle: int) -> tuple[int, int]:
    """Rows and columns of an image's tokens: its patch grid after the pixel shuffle.

    The depth of a token is pooled over this grid. (The original takes the grid before the shuffle,
    which has shuffle² times too many cells.)

    Args:
        patch_rows, patch_columns: before the shuffle. shuffle: its factor r.

    Raises:
        ValueError: the shuffle does not divide the grid.
    """
    if patch_rows % shuffle or patch_columns % shuffle:
        raise ValueError(f"{patch_rows} x {patch_columns} patches do not divide by {shuffle}")
    return patch_rows // shuffle, patch_columns // shuffle


def pool_depth(depth: Tensor, grid: tuple[int, int]) -> Tensor:
    """Mean depth of each token, row after row: [S, S] -> float32 [rows · columns].

    The map belongs to the picture squashed to a square, so that equal parts of its sides belong to
    equal parts of the picture's, whatever the picture's shape.
    """
    return F.adaptive_avg_pool2d(depth[None].float(), grid).flatten()


def encode_depth(values: Tensor, channels: int) -> Tensor:
    """Sinusoids of depth values, on their device: [T] -> float32 [T, channels].

    Args:
        values: v above, the alpha included.
        channels: C, the decoder's hidden size.
    """
    half = channels // 2
    index = torch.arange(half, device=values.device, dtype=torch.float32)
    frequencies = torch.exp(index * (-math.log(BASE) / max(half, 1)))
    # In half precision, 100 is known to 0.06 only: with a phase like that nothing could be learned.
    with torch.autocast(values.device.type, enabled=False):
        phases = values.float()[:, None] * frequencies  # [T, h]
        encoding = torch.cat([phases.sin(), phases.cos()], dim=1)
    return F.pad(encoding, (0, channels - 2 * half))
