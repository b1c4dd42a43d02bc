"""The noise level as a token."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MAX_PERIOD = 10000.0


def timestep_embedding(timestep: Tensor, width: int) -> Tensor:
    """e(t) = [sin(t w_i), cos(t w_i)], w_i = 10000^(-i / h), h = width / 2.

    Args:
        timestep: [B], t = 1000 sigma, in 0..1000.

    Returns:
        float32 [B, width].
    """
    half = width // 2
    index = torch.arange(half, dtype=torch.float32, device=timestep.device)
    # In this order, as diffusers: t magnifies the rounding of the frequencies a thousand times.
    frequency = torch.exp(-math.log(MAX_PERIOD) * index / half)
    angle = timestep.float()[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


class TimestepEmbedding(nn.Module):
    """Linear, GELU, Linear; keys `linear_1`, `linear_2`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(width, 4 * width)
        self.linear_2 = nn.Linear(4 * width, width)

    def forward(self, embedding: Tensor) -> Tensor:
        """[B, W] -> [B, W]."""
        result: Tensor = self.linear_2(F.gelu(self.linear_1(embedding)))
        return result
