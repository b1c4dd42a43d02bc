"""Space-filling curves: the order in which Point Transformer V3 reads voxels.

Wu et al., "Point Transformer V3", section 4.1; the Hilbert curve after Skilling, "Programming the
Hilbert curve" (2004). Codes are int64 with the cloud's number in the bits above 3 * depth.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_core.errors import DataError

MAX_DEPTH = 16  # bits per axis
# Shift and mask of each step that moves bit i of a number below 2^21 to bit 3 i.
_SPREAD = (
    (32, 0x1F00000000FFFF),
    (16, 0x1F0000FF0000FF),
    (8, 0x100F00F00F00F00F),
    (4, 0x10C30C30C30C30C3),
    (2, 0x1249249249249249),
)


def depth_of(grid_coord: Tensor, clouds: int) -> int:
    """Bits per axis that the voxels of a batch need.

    Args:
        grid_coord: integer [N, 3], not negative.
        clouds: how many clouds the batch has.

    Raises:
        DataError: a coordinate is negative, or more bits are needed than codes have.
    """
    low, high = (int(value) for value in grid_coord.aminmax())
    if low < 0:
        raise DataError(f"grid_coord holds {low}: voxel coordinates must not be negative")
    depth = high.bit_length()
    if depth > MAX_DEPTH or 3 * depth + clouds.bit_length() > 63:
        raise DataError(
            f"grid_coord reaches {high} in a batch of {clouds} clouds: at most "
            f"{2**MAX_DEPTH - 1} can be ordered. Use larger voxels, or cut the scene into chunks"
        )
    return depth


def serialize(grid_coord: Tensor, batch: Tensor, depth: int, curves: Sequence[str]) -> Tensor:
    """Codes int64 [K, N] of voxels [N, 3] of clouds `batch` [N] along K curves."""
    high = batch.long() << 3 * depth
    return torch.stack([high | encode(grid_coord, depth, curve) for curve in curves])


def encode(grid_coord: Tensor, depth: int, curve: str) -> Tensor:
    """Codes int64 [N] of voxels, integer [N, 3] in [0, 2^depth), along one curve.

    Every curve has the prefix property: code(x; depth) >> 3 = code(x >> 1; depth - 1).
    """
    x, y, z = grid_coord.long().unbind(1)
    if curve.endswith("-trans"):
        x, y = y, x
    if curve.startswith("hilbert"):
        return _from_gray(_interleave(*_hilbert_axes([x, y, z], depth)), 3 * depth)
    return _interleave(x, y, z)


def sort_codes(code: Tensor) -> tuple[Tensor, Tensor]:
    """Order and its inverse, int64 [K, N], of each row of codes [K, N].

    `code[k, order[k]]` ascends, and `inverse[k, order[k, i]] = i`. The sort is stable: voxels that
    coincide keep the order of their rows.
    """
    order = torch.sort(code, dim=1, stable=True).indices
    places = torch.arange(code.shape[1], device=code.device).expand_as(order)
    return order, torch.empty_like(order).scatter_(1, order, places)


def _interleave(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """Bit i of x at bit 3 i + 2, of y at 3 i + 1, of z at 3 i."""
    return _spread(x) << 2 | _spread(y) << 1 | _spread(z)


def _spread(x: Tensor) -> Tensor:
    for shift, mask in _SPREAD:
        x = (x | x << shift) & mask
    return x


def _hilbert_axes(axes: list[Tensor], depth: int) -> list[Tensor]:
    """Skilling's transform of coordinates to the Gray code's bits per axis.

    For every bit from the top: an axis with this bit set inverts the lower bits of axis 0; one
    without it exchanges its lower bits with those of axis 0.
    """
    axes = list(axes)
    for bit in reversed(range(depth)):
        low = (1 << bit) - 1
        for a in range(3):
            is_set = -(axes[a] >> bit & 1)  # all ones, or 0
            flip = (is_set | axes[0] ^ axes[a]) & low
            if a:
                axes[a] = axes[a] ^ flip & ~is_set
            axes[0] = axes[0] ^ flip if a else axes[0] ^ is_set & low
    return axes


def _from_gray(code: Tensor, bits: int) -> Tensor:
    shift = 1
    while shift < bits:
        code = code ^ code >> shift
        shift <<= 1
    return code
