"""The voxels of one stage, with all that depends on them alone and is worked out once.

The encoder and the decoder of a stage share one: its orders, patches and neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from scenesplat_lora.network.patches import PatchTable, fixed_patch_size, partition
from scenesplat_lora.network.point_batch import PointBatch, cloud_of_rows
from scenesplat_lora.network.serialization import depth_of, serialize, sort_codes
from scenesplat_lora.network.submanifold import NeighbourMap, find_neighbours


@dataclass(frozen=True)
class PatchRows:
    """Which rows stand in the patches along one curve.

    Attributes:
        gather: int64 [N'], the row at each place of the groups of patches.
        back: int64 [N], the place of each row.
        sizes: (patches, length) of each group.
    """

    gather: Tensor
    back: Tensor
    sizes: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class PointSet:
    """Serialized voxels of several clouds.

    Attributes:
        grid_coord: integer [N, 3].
        batch: int64 [N], the cloud of each row.
        sizes: rows of each cloud.
        depth: bits per axis of the codes.
        code: int64 [K, N], along each curve.
        order, inverse: int64 [K, N]: the rows sorted by code, and the place of each row there.
        coord: float [N, 3], or None.
    """

    grid_coord: Tensor
    batch: Tensor
    sizes: list[int]
    depth: int
    code: Tensor
    order: Tensor
    inverse: Tensor
    coord: Tensor | None = None
    _neighbours: dict[int, NeighbourMap] = field(default_factory=dict, repr=False)
    _tables: dict[int, PatchTable] = field(default_factory=dict, repr=False)
    _patch_rows: dict[tuple[int, int], PatchRows] = field(default_factory=dict, repr=False)

    def neighbours(self, kernel_size: int) -> NeighbourMap:
        """Neighbours of each voxel in a cube of odd `kernel_size`."""
        if kernel_size not in self._neighbours:
            self._neighbours[kernel_size] = find_neighbours(
                self.grid_coord, self.batch, kernel_size
            )
        return self._neighbours[kernel_size]

    def patch_rows(self, curve: int, patch_size: int, varlen: bool = True) -> PatchRows:
        """The rows in patches along curve `curve` (modulo the number of curves).

        Args:
            varlen: False: no patch is longer than the smallest cloud.
        """
        size = patch_size if varlen else fixed_patch_size(self.sizes, patch_size)
        key = (curve % len(self.order), size)
        if key not in self._patch_rows:
            if size not in self._tables:
                self._tables[size] = partition(self.sizes, size, self.order.device)
            self._patch_rows[key] = _patch_rows(
                self._tables[size], self.order[key[0]], self.inverse[key[0]]
            )
        return self._patch_rows[key]


def _patch_rows(table: PatchTable, order: Tensor, inverse: Tensor) -> PatchRows:
    gather, back = order[table.pad], table.unpad[inverse]
    if table.grouped is not None:
        place = torch.empty_like(table.grouped)
        place[table.grouped] = torch.arange(len(place), device=place.device)
        gather, back = gather[table.grouped], place[back]
    return PatchRows(gather, back, table.sizes)


def point_set(
    points: PointBatch, curves: Sequence[str], permutation: Tensor | None = None
) -> PointSet:
    """Serialize a batch along these curves.

    Args:
        permutation: int64 [K], which curve takes each place; None: as they are.

    Raises:
        DataError: coordinates that cannot be ordered.
    """
    batch = cloud_of_rows(points.offset)
    depth = depth_of(points.grid_coord, len(points.offset))
    code = serialize(points.grid_coord, batch, depth, curves)
    if permutation is not None:
        code = code[permutation.to(code.device)]
    order, inverse = sort_codes(code)
    return PointSet(
        points.grid_coord, batch, points.sizes, depth, code, order, inverse, points.coord
    )
