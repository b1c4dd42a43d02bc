"""Frequency embedding of coordinates.

Mildenhall et al., "NeRF", equation 4, with the coordinate itself in front.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class FrequencyEmbedding(nn.Module):
    """φ(p) = [p, sin(p_c f_j), cos(p_c f_j)] with f_j = 2^j, or 2^j π, for j = 0 ... F-1.

    The coordinate c is the slow index of both halves: sin(x f_0) ... sin(x f_{F-1}), sin(y f_0) ...
    """

    def __init__(
        self, num_frequencies: int, include_pi: bool = False, in_channels: int = 3
    ) -> None:
        super().__init__()
        self.num_frequencies = num_frequencies
        self.scale = math.pi if include_pi else 1.0
        self.out_channels = in_channels * (2 * num_frequencies + 1)

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] coordinates to float32 [..., C (2F + 1)].

        Always float32: bfloat16 has 8 bits, and x f reaches 128, where it steps by a half. There is
        no buffer of frequencies, which a model built on `meta` would never get filled.
        """
        x = x.float()
        j = torch.arange(self.num_frequencies, device=x.device, dtype=torch.float32)
        angles = (x[..., None] * (self.scale * torch.exp2(j))).flatten(-2)  # [..., C F]
        return torch.cat([x, angles.sin(), angles.cos()], dim=-1)
