"""Cutting serialized clouds into patches of voxels that attend to each other.

Wu et al., "Point Transformer V3", section 4.2. A cloud that is no multiple of the patch size fills
its last patch with copies from the patch before. Copies are attended to and attend, but what is
read back are the originals.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PatchTable:
    """Where the voxels of a serialized batch stand in patches.

    Attributes:
        pad: int64 [N'], serialized position of each padded one.
        unpad: int64 [N], padded position of each serialized one.
        cu_seqlens: int32 [P + 1], where the patches begin in the padded sequence, and its end.
        sizes: (patches, length) of each group of patches of one length, longest first.
        grouped: int64 [N'], padded positions, group by group; None where this is 0, 1, 2, ...
    """

    pad: Tensor
    unpad: Tensor
    cu_seqlens: Tensor
    sizes: tuple[tuple[int, int], ...]
    grouped: Tensor | None


def fixed_patch_size(sizes: list[int], patch_size: int) -> int:
    """The patch size of a batch without varying lengths: no patch is longer than a cloud."""
    return min(*sizes, patch_size) if sizes else patch_size


def partition(sizes: list[int], patch_size: int, device: torch.device | str = "cpu") -> PatchTable:
    """Cut clouds of these sizes into patches.

    A cloud of n <= K voxels is one patch. A larger one has ceil(n / K) patches of K, and the padded
    positions i >= n repeat position i - K.

    Args:
        sizes: voxels of each cloud, in the order of the serialized sequence.
        patch_size: K.
    """
    pads, unpads, lengths = [], [], []
    start = padded_start = 0
    for n in sizes:
        padded = n if n <= patch_size else -(-n // patch_size) * patch_size
        pad = torch.arange(start, start + padded)
        pad[n:] -= patch_size
        pads.append(pad)
        unpads.append(torch.arange(padded_start, padded_start + n))
        lengths += [min(n, patch_size)] * (padded // min(n, patch_size)) if n else []
        start, padded_start = start + n, padded_start + padded
    length = torch.tensor(lengths, dtype=torch.int64)
    ends = torch.cumsum(length, 0)
    cu_seqlens = torch.cat([ends.new_zeros(1), ends]).int()
    groups, grouped = _by_length(length, ends)
    return PatchTable(
        torch.cat(pads).to(device),
        torch.cat(unpads).to(device),
        cu_seqlens.to(device),
        groups,
        None if grouped is None else grouped.to(device),
    )


def _by_length(length: Tensor, ends: Tensor) -> tuple[tuple[tuple[int, int], ...], Tensor | None]:
    """Patches of one length can be one batch of attention: sizes of the groups, their positions."""
    groups, positions = [], []
    for size in length.unique().flip(0).tolist():
        starts = (ends - length)[length == size]
        groups.append((len(starts), size))
        positions.append((starts[:, None] + torch.arange(size)).flatten())
    return tuple(groups), torch.cat(positions) if len(groups) > 1 else None
