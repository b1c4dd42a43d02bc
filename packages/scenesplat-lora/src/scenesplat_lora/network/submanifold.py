"""Submanifold convolution: a sparse 3D convolution whose output voxels are its input voxels.

Graham et al., "3D Semantic Segmentation with Submanifold Sparse Convolutional Networks" (2018);
the result is that of `SubMConv3d` of spconv 2, whose weight layout [out, x, y, z, in] is kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lora_core.errors import DataError
from scenesplat_lora.network import accelerators

BLOCK = 4096  # rows whose sums are made together on a processor: its cache holds them
Pairs = tuple[int, Tensor, Tensor]


@dataclass(frozen=True)
class NeighbourMap:
    """The neighbours of every voxel in a cubic kernel.

    Attributes:
        kernel_size: k, odd.
        pairs: (offset, targets, sources) for the k^3 offsets but the centre: row `sources[i]` is
            at the offset from row `targets[i]`. They come block by block of targets that lie side
            by side in space; a target occurs once in each.
        grid_coord, batch: integer [N, 3] and [N]: the voxels that this was made of.
        unique: no two voxels coincide.
        spconv_tables: what spconv keeps of them, where it is used.
    """

    kernel_size: int
    pairs: tuple[Pairs, ...]
    grid_coord: Tensor
    batch: Tensor
    unique: bool
    spconv_tables: dict[str, Any] = field(default_factory=dict, repr=False)


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
    keys, order = torch.sort(keys, stable=True)
    unique = bool((keys[1:] != keys[:-1]).all())
    rows = BLOCK if keys.device.type == "cpu" else len(keys)
    places = _blocks(_pairs(keys, strides, kernel_size, unique), len(keys), rows)
    pairs = tuple((i, order.index_select(0, a), order.index_select(0, b)) for i, a, b in places)
    return NeighbourMap(kernel_size, pairs, grid_coord, batch, unique)


def _pairs(
    keys: Tensor, strides: tuple[int, int, int], kernel_size: int, unique: bool
) -> Iterator[Pairs]:
    """(offset, targets, sources) of each offset: places among the keys, which ascend.

    Of equal keys the first is the source. Queries that ascend as well are found five times as fast
    as others, and of those along z only the first is searched for: the place of key + 1 is the next
    one, or the same where key is not there.
    """
    radius = kernel_size // 2
    offsets = list(product(range(-radius, radius + 1), repeat=3))
    centre = len(offsets) // 2
    places = found = keys
    for index, offset in enumerate(offsets[: centre if unique else None]):
        if index == centre:
            continue
        queries = keys + sum(o * s for o, s in zip(offset, strides, strict=True))
        along_z = unique and offset[2] > -radius
        places = places + found if along_z else torch.searchsorted(keys, queries)
        nearest = places.clamp(max=len(keys) - 1)
        found = keys.index_select(0, nearest) == queries
        targets = found.nonzero().flatten()
        sources = nearest.index_select(0, targets)
        yield index, targets, sources
        if unique:  # source and target exchanged are the pairs of the opposite offset
            yield len(offsets) - 1 - index, sources, targets


def _blocks(pairs: Iterable[Pairs], count: int, rows: int) -> Iterator[Pairs]:
    """The pairs of all offsets for the first `rows` targets, then for the next ones."""
    pairs = [pair for pair in pairs if len(pair[1])]
    if count <= rows:
        yield from pairs
        return
    ends = torch.arange(rows, count + rows, rows)
    cuts = [[0, *torch.searchsorted(t, ends.to(t.device)).tolist()] for _, t, _ in pairs]
    for block in range(len(ends)):
        for (index, targets, sources), cut in zip(pairs, cuts, strict=True):
            part = slice(cut[block], cut[block + 1])
            if part.start < part.stop:
                yield index, targets[part], sources[part]


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
            wide = feat.to(dtype)
            fast = accelerators.spconv_fits(wide, neighbours)
            function = accelerators.spconv_convolve if fast else convolve
            out = function(wide, self.weight.to(dtype), bias, neighbours)
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
        taps = _taps(weight)
        centre = taps[len(taps) // 2].T
        out = feat @ centre if bias is None else torch.addmm(bias, feat, centre)
        for index, targets, sources in neighbours.pairs:
            out.index_add_(0, targets, feat.index_select(0, sources) @ taps[index].T)
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
    taps = _taps(weight)
    out = grad @ taps[len(taps) // 2]
    pairs: Iterable[Pairs] = neighbours.pairs
    if neighbours.unique:  # every pair is there in both directions: sum by blocks, too
        pairs = ((len(taps) - 1 - index, b, a) for index, a, b in pairs)
    for index, targets, sources in pairs:
        out.index_add_(0, sources, grad.index_select(0, targets) @ taps[index])
    return out


def _weight_gradient(
    grad: Tensor, feat: Tensor, weight: Tensor, neighbours: NeighbourMap
) -> Tensor:
    out = torch.zeros_like(weight, memory_format=torch.contiguous_format)
    taps = _taps(out)
    taps[len(taps) // 2].copy_(grad.T @ feat)
    for index, targets, sources in neighbours.pairs:
        taps[index].addmm_(grad.index_select(0, targets).T, feat.index_select(0, sources))
    return out


def _taps(weight: Tensor) -> tuple[Tensor, ...]:
    """The matrix [out, in] of each offset, as views."""
    return weight.flatten(1, 3).unbind(1)
