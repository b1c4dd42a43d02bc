"""Submanifold convolution: a sparse 3D convolution whose output voxels are its input voxels.

Graham et al., "3D Semantic Segmentation with Submanifold Sparse Convolutional Networks" (2018);
the result is that of `SubMConv3d` of spconv 2, whose weight layout [out, x, y, z, in] is kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lora_core.errors import DataError

BLOCK = 2**18  # numbers of a block of gathered features: it stays in a processor's cache


@dataclass(frozen=True)
class NeighbourMap:
    """The neighbours of every voxel in a cubic kernel.

    Attributes:
        kernel_size: k, odd.
        pairs: for each of the k^3 offsets but the centre, (offset, targets, sources): source row
            `sources[i]` stands at the offset from target row `targets[i]`. A target occurs once.
    """

    kernel_size: int
    pairs: tuple[tuple[int, Tensor, Tensor], ...]


# -- neighbours ----------------------------------------------------------------------------------


def find_neighbours(grid_coord: Tensor, batch: Tensor, kernel_size: int) -> NeighbourMap:
    """Find the neighbours of each voxel; those of other clouds are none.

    Voxels that coincide, as they do in mixed scenes, each convolve for themselves: the centre is
    the row itself, and a neighbouring place is the lowest row there.

    Args:
        grid_coord: integer [N, 3].
        batch: integer [N], the cloud of each voxel.
        kernel_size: odd.

    Raises:
        DataError: the batch spans more places than an int64 can number.
    """
    keys, strides = _keys(grid_coord, batch, kernel_size // 2)
    sorted_keys, rows = torch.sort(keys, stable=True)
    unique = bool((sorted_keys[1:] != sorted_keys[:-1]).all())
    offsets = list(product(range(-(kernel_size // 2), kernel_size // 2 + 1), repeat=3))
    centre = len(offsets) // 2
    pairs = []
    for index, offset in enumerate(offsets[: centre if unique else None]):
        if index == centre:
            continue
        step = sum(o * s for o, s in zip(offset, strides, strict=True))
        targets, sources = _lookup(sorted_keys, rows, step)
        pairs.append((index, targets, sources))
        if unique:  # source and target exchanged are the pairs of the opposite offset
            pairs.append((len(offsets) - 1 - index, sources, targets))
    return NeighbourMap(kernel_size, tuple(pairs))


def _keys(grid_coord: Tensor, batch: Tensor, radius: int) -> tuple[Tensor, tuple[int, int, int]]:
    """One number per voxel, and what it grows by along x, y and z.

    The box has a margin of `radius`, so that no neighbour of a voxel has a number of another place.
    """
    grid = grid_coord.long()
    grid = grid - grid.amin(0) + radius
    _, y_size, z_size = sizes = [int(size) + radius + 1 for size in grid.amax(0)]
    if math.prod(sizes) * (int(batch.max()) + 1) >= 2**63:
        raise DataError(
            f"grid_coord spans {' x '.join(map(str, sizes))} voxels, more than can be numbered: "
            "use larger voxels, or cut the scene into chunks"
        )
    strides = (y_size * z_size, z_size, 1)
    keys = batch.long() * sizes[0]
    for axis, size in enumerate((y_size, z_size, 1)):
        keys = (keys + grid[:, axis]) * size
    return keys, strides


def _lookup(keys: Tensor, rows: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """Rows (a, b) with key(b) = key(a) + step, from keys in ascending order.

    Queries that ascend as well are found five times as fast as others.
    """
    queries = keys + step
    places = torch.searchsorted(keys, queries).clamp_(max=len(keys) - 1)
    found = (keys[places] == queries).nonzero().flatten()
    return rows[found], rows[places[found]]


# -- convolution ---------------------------------------------------------------------------------


class SubmanifoldConv(nn.Module):
    """out[p] = bias + sum over offsets o of W[:, o] f[p + o]; a cross-correlation, in float32.

    Attributes:
        weight: [out, k, k, k, in], the first k along `grid_coord[:, 0]`.
        bias: [out], or None.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, bias: bool) -> None:
        super().__init__()
        shape = (out_channels, *[kernel_size] * 3, in_channels)
        self.weight = nn.Parameter(torch.empty(shape))
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        self.reset_parameters()

    @property
    def kernel_size(self) -> int:
        return self.weight.shape[1]

    def reset_parameters(self) -> None:
        """Kaiming uniform with a = sqrt(5), as spconv and torch's own convolutions."""
        bound = 1 / math.sqrt(self.weight[0].numel())
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, feat: Tensor, neighbours: NeighbourMap) -> Tensor:
        """Features [N, in] -> [N, out], of the same dtype."""
        # The official model computes in float32 under autocast too: sums of 125 rows are long.
        dtype = torch.promote_types(feat.dtype, torch.float32)
        bias = None if self.bias is None else self.bias.to(dtype)
        with torch.autocast(feat.device.type, enabled=False):
            out = convolve(feat.to(dtype), self.weight.to(dtype), bias, neighbours)
        return out.to(feat.dtype)

    def extra_repr(self) -> str:
        out, k, *_, channels = self.weight.shape
        return f"{channels}, {out}, kernel_size={k}, bias={self.bias is not None}"


def convolve(feat: Tensor, weight: Tensor, bias: Tensor | None, neighbours: NeighbourMap) -> Tensor:
    """The convolution as one differentiable function; all of one dtype.

    Backward needs the features only where the weight is trained, and nothing that was gathered.
    """
    out: Tensor = _Convolution.apply(feat, weight, bias, neighbours)
    return out


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, feat: Tensor, weight: Tensor, bias: Tensor | None, neighbours: NeighbourMap
    ) -> Tensor:
        ctx.neighbours = neighbours
        ctx.save_for_backward(feat if ctx.needs_input_grad[1] else None, weight)
        taps = weight.flatten(1, 3).unbind(1)  # each [out, in]
        centre = taps[len(taps) // 2].T
        out = feat @ centre if bias is None else torch.addmm(bias, feat, centre)
        for index, targets, sources in neighbours.pairs:
            _add_product(out, targets, feat, sources, taps[index].T)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        feat, weight = ctx.saved_tensors
        grad = grad.contiguous()
        needs_feat, needs_weight, needs_bias, _ = ctx.needs_input_grad
        return (
            _feature_gradient(grad, weight, ctx.neighbours) if needs_feat else None,
            _weight_gradient(grad, feat, weight, ctx.neighbours) if needs_weight else None,
            grad.sum(0) if needs_bias else None,
            None,
        )


def _feature_gradient(grad: Tensor, weight: Tensor, neighbours: NeighbourMap) -> Tensor:
    taps = weight.flatten(1, 3).unbind(1)
    out = grad @ taps[len(taps) // 2]
    for index, targets, sources in neighbours.pairs:
        _add_product(out, sources, grad, targets, taps[index])
    return out


def _weight_gradient(
    grad: Tensor, feat: Tensor, weight: Tensor, neighbours: NeighbourMap
) -> Tensor:
    out = torch.zeros_like(weight, memory_format=torch.contiguous_format)
    taps = out.flatten(1, 3).unbind(1)
    taps[len(taps) // 2].copy_(grad.T @ feat)
    for index, targets, sources in neighbours.pairs:
        for block in _blocks(len(targets), max(weight.shape), grad.device):
            taps[index].addmm_(grad[targets[block]].T, feat[sources[block]])
    return out


def _add_product(out: Tensor, to: Tensor, feat: Tensor, rows: Tensor, matrix: Tensor) -> None:
    """out[to] += feat[rows] @ matrix."""
    for block in _blocks(len(rows), max(matrix.shape), out.device):
        out.index_add_(0, to[block], feat.index_select(0, rows[block]) @ matrix)


def _blocks(rows: int, width: int, device: torch.device) -> Iterator[slice]:
    """Cut rows so that a processor's cache holds what is gathered; a GPU takes them at once."""
    step = max(1, BLOCK // width) if device.type == "cpu" else max(1, rows)
    return (slice(start, start + step) for start in range(0, rows, step))
