"""The adapted weight itself: what an adapter adds to it, and DoRA's norms of it.

Shapes as in `functional.Branch`; G groups of a convolution have G independent pairs. Weights whose
first axis is the input, (V, dim) of an embedding and (Cin, Cout / G, ..) of a transposed
convolution, are `transposed`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

Rows: TypeAlias = tuple[tuple[int, int], ...]


def blocks(rows: Rows | None, r: int, do: int) -> Iterator[tuple[slice, slice, slice]]:
    """For each block of a fused weight: its rows of A, its rows of the weight, its rows of B.

    Without `rows` there is one block, all do rows. A block's rows of A are its columns of h.
    """
    offset = 0
    for j, (start, stop) in enumerate(rows or ((0, do),)):
        of_B = slice(offset, offset + stop - start)
        yield slice(j * r, (j + 1) * r), slice(start, stop), of_B
        offset = of_B.stop


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Within the block every operation on `device` runs in the dtype of its operands."""
    kind = device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return contextlib.nullcontext()


def delta(
    A: Tensor,
    B: Tensor,
    scale: float,
    shape: Sequence[int],
    rows: Rows | None = None,
    groups: int = 1,
    transposed: bool = False,
) -> Tensor:
    """`s B A` in the shape of the weight that it changes; differentiable.

    Args:
        rows: blocks of a fused weight; the other rows are zero.
        groups: G independent pairs, one per group of a convolution.
        transposed: the weight's first axis is the input.
    """
    with without_autocast(A.device):
        if rows is not None:
            return scale * _block_rows(A, B, rows, shape[0])
        grouped_A = A.reshape(groups, A.shape[0] // groups, -1)
        grouped_B = B.reshape(groups, B.shape[0] // groups, -1)
        change = grouped_B @ grouped_A  # [G, do / G, elements of one output unit]
        change = scale * change if change.requires_grad else change.mul_(scale)
    change = change.view(groups, grouped_B.shape[1], *A.shape[1:])
    return (change.transpose(1, 2) if transposed else change).reshape(*shape)


def _block_rows(A: Tensor, B: Tensor, rows: Rows, out_features: int) -> Tensor:
    """The products of the blocks at their rows, zeros elsewhere: (do, di)."""
    pieces, end = [], 0
    in_order = sorted(blocks(rows, B.shape[1], out_features), key=lambda block: block[1].start)
    for of_A, out, of_B in in_order:
        pieces += [A.new_zeros(out.start - end, A.shape[1]), B[of_B] @ A[of_A]]
        end = out.stop
    return torch.cat([*pieces, A.new_zeros(out_features - end, A.shape[1])])


def as_matrix(weight: Tensor, groups: int = 1, transposed: bool = False) -> Tensor:
    """The weight as (do, elements of one output unit), whatever its first axis is."""
    if transposed:
        grouped = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
        weight = grouped.transpose(1, 2).flatten(0, 1)
    return weight.flatten(1)


def over_weight(
    values: Tensor, shape: Sequence[int], groups: int = 1, transposed: bool = False
) -> Tensor:
    """One value per output unit, (do), in a form that broadcasts over a weight of this shape."""
    if transposed:  # each group of input rows has its own output columns
        values = values.view(groups, 1, -1).expand(-1, shape[0] // groups, -1).flatten(0, 1)
    return values.reshape(*values.shape, *[1] * (len(shape) - values.dim()))


def dora_ratio(magnitude: Tensor, norm: Tensor) -> Tensor:
    """m / n for m, n (do); rows that are zero stay zero."""
    return magnitude / norm.clamp_min(torch.finfo(norm.dtype).tiny)


def weight_norm(weight: Tensor, A: Tensor, B: Tensor, scale: float, groups: int = 1) -> Tensor:
    """Row norms n (do) of `V = W + s B A` without forming V; no gradient flows through them.

    `n^2 = |W_o|^2 + 2 s sum_j B_oj (W A^T)_oj + s^2 sum_j (B (A A^T))_oj B_oj`, for each of the G
    groups. weight (do, di / G, ..), A (G r, di / G, ..), B (do, r, ..).
    """
    with torch.no_grad(), without_autocast(weight.device):
        W = weight.to(A.dtype).reshape(groups, weight.shape[0] // groups, -1)
        A = A.detach().reshape(groups, A.shape[0] // groups, -1)
        B = B.detach().reshape(groups, B.shape[0] // groups, -1)
        cross = (W @ A.mT * B).sum(-1)
        square = (B @ (A @ A.mT) * B).sum(-1)
        n2 = (W * W).sum(-1) + 2 * scale * cross + scale**2 * square
        return n2.clamp_min(0).sqrt().flatten()
