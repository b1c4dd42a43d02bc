"""Pooling along the curves, and its way back in the decoder.

Wu et al., "Point Transformer V3", section 4.3 (from Point Transformer V2's grid pooling): voxels
whose codes agree without the last 3 s bits lie in one cube of 2^s voxels' side and become one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from scenesplat_lora.network.point_set import PointSet
from scenesplat_lora.network.serialization import sort_codes


def batch_norm(channels: int) -> nn.BatchNorm1d:
    """As in the stem, all poolings and all unpoolings."""
    return nn.BatchNorm1d(channels, eps=1e-3, momentum=0.01)


@dataclass(frozen=True)
class Clusters:
    """Which fine rows became which pooled row.

    Attributes:
        cluster: int64 [N], the pooled row of each fine row.
        order: int64 [N], the fine rows sorted by it.
        lengths: int64 [M], fine rows of each pooled row.
    """

    cluster: Tensor
    order: Tensor
    lengths: Tensor


def pool_points(
    points: PointSet, stride: int, permutation: Tensor | None = None
) -> tuple[PointSet, Clusters]:
    """Merge the voxels of each cube of `stride` voxels' side.

    Pooled rows are in the order of the first curve. Where the clouds are too small for the stride,
    only voxels that coincide are merged.

    Args:
        stride: a power of two.
        permutation: int64 [K] of the curves of the result.
    """
    shift = stride.bit_length() - 1
    if shift > points.depth:
        shift = 0
    order = points.order[0]
    code = points.code[0, order] >> 3 * shift
    starts = torch.cat([code.new_ones(1, dtype=torch.bool), code[1:] != code[:-1]])
    cluster = torch.empty_like(order).scatter_(0, order, torch.cumsum(starts, 0) - 1)
    heads = starts.nonzero().flatten()
    lengths = torch.diff(heads, append=heads.new_tensor([len(order)]))
    clusters = Clusters(cluster, order, lengths)

    head = order[heads]  # the codes of all rows of a cluster agree, so any row will do
    batch = points.batch[head]
    codes = points.code[:, head] >> 3 * shift
    if permutation is not None:
        codes = codes[permutation.to(codes.device)]
    pooled = PointSet(
        points.grid_coord[head] >> shift,
        batch,
        torch.bincount(batch, minlength=len(points.sizes)).tolist(),
        points.depth - shift,
        codes,
        *sort_codes(codes),
        None if points.coord is None else reduce_rows(points.coord, clusters, "mean"),
    )
    return pooled, clusters


def reduce_rows(feat: Tensor, clusters: Clusters, reduce: str) -> Tensor:
    """Features [N, C] of fine rows -> [M, C], by "mean", "sum", "min" or "max".

    Sorted rows are reduced one after the other, at least in float32: the same bits each time, on
    CUDA too.
    """
    rows = feat.index_select(0, clusters.order)
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    out = torch.segment_reduce(rows, reduce, lengths=clusters.lengths, axis=0, unsafe=True)
    return out.to(feat.dtype)


def spread_rows(feat: Tensor, clusters: Clusters) -> Tensor:
    """Features [M, C] of pooled rows -> [N, C], each row that of its cluster."""
    out: Tensor = _Spread.apply(feat, clusters)
    return out


class _Spread(torch.autograd.Function):
    """Indexing whose gradient is a sum over sorted rows: indexing's own adds in random order."""

    @staticmethod
    def forward(ctx: Any, feat: Tensor, clusters: Clusters) -> Tensor:
        ctx.clusters = clusters
        return feat.index_select(0, clusters.cluster)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return reduce_rows(grad, ctx.clusters, "sum"), None


class SerializedPooling(nn.Module):
    """Linear, reduction over each cube, batch norm, GELU; keys `proj` and `norm.0`."""

    def __init__(
        self, in_channels: int, out_channels: int, stride: int = 2, reduce: str = "mean"
    ) -> None:
        super().__init__()
        self.stride = stride
        self.reduce = reduce
        self.proj = nn.Linear(in_channels, out_channels)
        self.norm = nn.Sequential(batch_norm(out_channels))
        self.act = nn.Sequential(nn.GELU())

    def forward(
        self, feat: Tensor, points: PointSet, permutation: Tensor | None = None
    ) -> tuple[Tensor, PointSet, Clusters]:
        """[N, in] -> [M, out], the pooled voxels, and how to come back."""
        pooled, clusters = pool_points(points, self.stride, permutation)
        return (
            self.act(self.norm(reduce_rows(self.proj(feat), clusters, self.reduce))),
            pooled,
            clusters,
        )


class SerializedUnpooling(nn.Module):
    """Coarse features back on the fine voxels; keys `proj.0`, `proj.1`, `proj_skip.0`, `.1`."""

    def __init__(self, in_channels: int, skip_channels: int, out_channels: int) -> None:
        super().__init__()
        self.proj = _linear_norm_gelu(in_channels, out_channels)
        self.proj_skip = _linear_norm_gelu(skip_channels, out_channels)

    def forward(self, coarse: Tensor, skip: Tensor, clusters: Clusters) -> tuple[Tensor, Tensor]:
        """Coarse [M, in] and the encoder's features [N, skip] -> the sum, the skip branch alone.

        The official network convolves the skip branch alone in the first block of a decoder stage:
        its sparse tensor is not updated here. Released weights are trained that way.
        """
        branch = self.proj_skip(skip)
        return branch + spread_rows(self.proj(coarse), clusters), branch


def _linear_norm_gelu(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(in_channels, out_channels),
        batch_norm(out_channels),
        nn.GELU(),
    )
