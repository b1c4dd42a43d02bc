"""Batches of voxels: what they are made from, and what is refused."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_network import voxels

from lora_core.errors import DataError
from scenesplat_lora.network.point_batch import PointBatch, cloud_of_rows, voxels_of

BATCH = voxels(30, 20)


def test_the_clouds_come_from_offset_or_batch() -> None:
    cloud = cloud_of_rows(BATCH.offset)
    assert cloud.tolist() == [0] * 30 + [1] * 20
    mapping = {"feat": BATCH.feat, "grid_coord": BATCH.grid_coord, "batch": cloud}
    made = PointBatch.from_mapping(mapping)
    assert torch.equal(made.offset, BATCH.offset)
    assert made.sizes == [30, 20]
    with pytest.raises(DataError, match="batch does not ascend"):
        PointBatch.from_mapping({**mapping, "batch": cloud.flip(0)})


def test_a_range_of_rows_is_one_cloud() -> None:
    part = BATCH.rows(25, 99)
    assert part.sizes == [25]
    assert torch.equal(part.feat, BATCH.feat[25:])
    assert part.coord is not None
    assert torch.equal(part.coord, BATCH.grid_coord[25:] * 0.02)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"feat": torch.zeros(50)}, r"feat is float32 \[50\]"),
        ({"feat": torch.zeros(0, 3)}, "with N > 0"),
        ({"feat": torch.zeros(50, 3).long()}, "feat is int64"),
        ({"grid_coord": torch.zeros(50, 3)}, r"grid_coord is float32 \[50, 3\], expected integers"),
        ({"grid_coord": torch.zeros(49, 3).int()}, r"expected integers \[50, 3\]"),
        ({"coord": torch.zeros(50, 2)}, r"coord is float32 \[50, 2\]"),
        ({"offset": torch.tensor([30, 40])}, "offset ends at 40, expected 50"),
        ({"offset": torch.tensor([30, 30, 50])}, "cloud 1 of the batch has no rows"),
        ({"offset": torch.tensor([60, 50])}, "cloud 1 of the batch has no rows"),
        ({"offset": torch.tensor([])}, "offset is float32"),
    ],
)
def test_what_does_not_fit_together_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        replace(BATCH, **changes)


def test_a_mapping_without_voxels_says_what_is_missing() -> None:
    with pytest.raises(DataError, match=r"lacks grid_coord .*offset .*; it has feat, color"):
        PointBatch.from_mapping({"feat": BATCH.feat, "color": BATCH.feat})
    with pytest.raises(DataError, match="grid_size is 0"):
        voxels_of(torch.zeros(2, 3), 0.0)
