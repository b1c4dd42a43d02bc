"""A batch of voxelised clouds, as the network takes it.

All clouds of a batch are one flat list of N rows; `offset` says where each one ends.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lora_core.errors import DataError, listing


@dataclass(frozen=True)
class PointBatch:
    """Voxels of several clouds.

    Attributes:
        feat: float [N, C], the network's input.
        grid_coord: integer [N, 3], not negative: the voxel of each row.
        offset: int64 [B], the number of rows up to the end of each cloud; the last is N.
        coord: float32 [N, 3] in metres, or None. The network only averages it where it pools.

    Raises:
        DataError: all that does not fit together.
    """

    feat: Tensor
    grid_coord: Tensor
    offset: Tensor
    coord: Tensor | None = None

    def __post_init__(self) -> None:
        problems = _wrong_rows(self) or _wrong_offset(self.offset, len(self.feat))
        if problems:
            raise DataError(listing(problems))

    @classmethod
    def from_mapping(cls, batch: Mapping[str, Any]) -> PointBatch:
        """From a collated batch with `feat`, `offset` or `batch`, and `grid_coord`.

        Without `grid_coord` it is made from `coord` and `grid_size`. Other entries, such as
        `lang_feat`, are left out.

        Raises:
            DataError: something is missing or does not fit.
        """
        missing = [name for name in ("feat",) if name not in batch]
        if "grid_coord" not in batch and not {"coord", "grid_size"} <= batch.keys():
            missing.append("grid_coord (or coord with grid_size)")
        if "offset" not in batch and "batch" not in batch:
            missing.append("offset (or batch)")
        if missing:
            raise DataError(
                f"a batch lacks {', '.join(missing)}; it has {', '.join(batch) or 'nothing'}"
            )
        grid = batch.get("grid_coord")
        if grid is None:
            grid = voxels_of(batch["coord"], float(batch["grid_size"]))
        offset = batch.get("offset")
        if offset is None:
            cloud = batch["batch"].long()
            if (cloud[1:] < cloud[:-1]).any():
                raise DataError("batch does not ascend: the rows of a cloud must stand together")
            offset = torch.cumsum(torch.bincount(cloud), 0)
        return cls(batch["feat"], grid, offset.long(), batch.get("coord"))

    @property
    def sizes(self) -> list[int]:
        """Rows of each cloud."""
        ends = [0, *self.offset.tolist()]
        return [end - start for start, end in pairwise(ends)]

    def to(self, device: torch.device | str) -> PointBatch:
        """The batch on a device."""
        coord = None if self.coord is None else self.coord.to(device)
        return PointBatch(
            self.feat.to(device), self.grid_coord.to(device), self.offset.to(device), coord
        )

    def rows(self, start: int, stop: int) -> PointBatch:
        """These rows as one cloud, whatever clouds they are of."""
        stop = min(stop, len(self.feat))
        return replace(
            self,
            feat=self.feat[start:stop],
            grid_coord=self.grid_coord[start:stop],
            offset=self.offset.new_tensor([stop - start]),
            coord=None if self.coord is None else self.coord[start:stop],
        )


def voxels_of(coord: Tensor, grid_size: float) -> Tensor:
    """int32 [N, 3] voxels of positions float [N, 3]: (coord - smallest of the batch) / grid_size.

    Raises:
        DataError: a grid size that is not positive.
    """
    if not grid_size > 0:
        raise DataError(f"grid_size is {grid_size}, expected more than 0 (metres)")
    return ((coord - coord.amin(0)) / grid_size).trunc().int()


def cloud_of_rows(offset: Tensor) -> Tensor:
    """int64 [N]: the number of the cloud that each row is of."""
    sizes = torch.diff(offset, prepend=offset.new_zeros(1))
    return torch.repeat_interleave(torch.arange(len(offset), device=offset.device), sizes)


def _wrong_rows(batch: PointBatch) -> list[str]:
    if batch.feat.ndim != 2 or not batch.feat.is_floating_point() or not len(batch.feat):
        return [f"feat is {_kind(batch.feat)}, expected floating point [N, C] with N > 0"]
    n = len(batch.feat)
    problems = []
    grid = batch.grid_coord
    if grid.shape != (n, 3) or grid.is_floating_point() or grid.dtype == torch.bool:
        problems.append(f"grid_coord is {_kind(grid)}, expected integers [{n}, 3] as feat has rows")
    if batch.coord is not None and batch.coord.shape != (n, 3):
        problems.append(f"coord is {_kind(batch.coord)}, expected [{n}, 3] as feat has rows")
    return problems


def _wrong_offset(offset: Tensor, rows: int) -> list[str]:
    if offset.ndim != 1 or not len(offset) or offset.is_floating_point():
        return [f"offset is {_kind(offset)}, expected integers [B] with B > 0"]
    ends = [0, *offset.tolist()]
    if ends[-1] != rows:
        return [f"offset ends at {ends[-1]}, expected {rows}, the rows of feat"]
    return [
        f"cloud {i} of the batch has no rows (offset {start} to {end}): leave empty clouds out"
        for i, (start, end) in enumerate(pairwise(ends))
        if end <= start
    ]


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
