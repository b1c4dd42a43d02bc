"""Codes of positions: sines for maps and boxes, rotations for the vision transformer."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def sine_code(position: Tensor, channels: int) -> Tensor:
    """Interleaved sines and cosines: k = 0, 2, .. sin(a_k), k = 1, 3, .. cos(a_k), with

        a_k = 2 pi p / 10000^(2 floor(k / 2) / channels) .

    Args:
        position: p [...], 0 to 1 across the image.

    Returns:
        f32 [..., channels].
    """
    k = torch.arange(channels, device=position.device)
    wavelength = 10000 ** (2 * (k // 2).float() / channels)
    angle = (2 * math.pi) * position.float()[..., None] / wavelength
    return torch.stack([angle[..., 0::2].sin(), angle[..., 1::2].cos()], -1).flatten(-2)


def position_map(height: int, width: int, channels: int, device: torch.device) -> Tensor:
    """Code of each cell of a map: half of the channels for y, then half for x.

    Returns:
        f32 [height, width, channels].
    """
    codes = []
    for cells in (height, width):
        place = torch.arange(1, cells + 1, device=device, dtype=torch.float32)
        codes.append(sine_code(place / (cells + 1e-6), channels // 2))
    rows, columns = codes
    shape = (height, width, channels // 2)
    return torch.cat([rows[:, None].expand(shape), columns[None].expand(shape)], -1)


def box_code(boxes: Tensor, channels: int) -> Tensor:
    """Code of boxes (cx, cy, w, h) [..., 4] in the order cy, cx, w, h: f32 [..., 4 channels]."""
    cx, cy, w, h = boxes.unbind(-1)
    return sine_code(torch.stack([cy, cx, w, h], -1), channels).flatten(-2)


def corners(boxes: Tensor) -> Tensor:
    """Boxes (cx, cy, w, h) as (x0, y0, x1, y1)."""
    centre, size = boxes[..., :2], boxes[..., 2:]
    return torch.cat([centre - 0.5 * size, centre + 0.5 * size], -1)


def rotations(x: Tensor, y: Tensor, head_dim: int, theta: float) -> Tensor:
    """Axial rotary table (arXiv 2403.13298): unit numbers e^(i x f_j), then e^(i y f_j), with

        f_j = theta^(-4 j / head_dim),   j = 0 .. head_dim / 4 - 1 .

    Args:
        x, y: column and row of each of N tokens, [N].

    Returns:
        complex64 [N, head_dim / 2], for `rotate`.
    """
    j = torch.arange(head_dim // 4, device=x.device)
    frequency = theta ** (-4 * j.float() / head_dim)
    angle = torch.cat([x[:, None] * frequency, y[:, None] * frequency], -1)
    return torch.polar(torch.ones_like(angle), angle)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turn the channel pairs (2 i, 2 i + 1) of tokens [B, N, heads, head_dim], in float32."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * table[:, None]).flatten(-2).to(x.dtype)
