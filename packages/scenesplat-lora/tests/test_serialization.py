"""Codes along the space-filling curves: the recorded ones, and what makes them curves."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from lora_core.errors import DataError
from lora_core.testing import load_golden
from scenesplat_lora.network.point_batch import cloud_of_rows, voxels_of
from scenesplat_lora.network.ptv3_config import CURVES
from scenesplat_lora.network.serialization import depth_of, encode, serialize, sort_codes

CASE = load_golden(Path(__file__).parent / "goldens" / "serialization")


def cube(depth: int) -> Tensor:
    """All voxels of a cube."""
    return torch.cartesian_prod(*[torch.arange(2**depth)] * 3)


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("depth", CASE.config["depths"])
def test_codes_are_the_recorded_ones(depth: int, curve: str) -> None:
    grid, batch = CASE.io[f"d{depth}.grid_coord"], CASE.io[f"d{depth}.batch"]
    (code,) = serialize(grid, batch, depth, [curve])
    assert torch.equal(code, CASE.io[f"d{depth}.code.{curve}"])


@pytest.mark.parametrize("curve", CURVES)
def test_codes_of_a_full_cube_are_the_recorded_ones(curve: str) -> None:
    code = encode(CASE.io["dense4.grid_coord"], 2, curve)
    assert torch.equal(code, CASE.io[f"dense4.code.{curve}"])


def test_a_batch_is_ordered_as_recorded() -> None:
    grid = CASE.io["point.grid_coord"]
    batch = cloud_of_rows(CASE.io["point.offset"])
    assert torch.equal(batch, CASE.io["point.batch"])
    depth = depth_of(grid, clouds=3)
    assert depth == CASE.config["point_depth"]
    code = serialize(grid, batch, depth, CASE.config["orders"])
    assert torch.equal(code, CASE.io["point.code"])
    order, inverse = sort_codes(code)
    assert torch.equal(code.gather(1, order), CASE.io["point.code"].sort(1).values)
    assert torch.equal(order, CASE.io["point.order"])
    assert torch.equal(inverse, CASE.io["point.inverse"])


def test_positions_become_the_recorded_voxels() -> None:
    grid = voxels_of(CASE.io["gridsize.coord"], CASE.config["gridsize"])
    assert torch.equal(grid, CASE.io["gridsize.grid_coord"])


def test_neighbours_on_a_hilbert_curve_are_neighbours_in_space() -> None:
    grid = cube(depth=4)
    for curve in ("hilbert", "hilbert-trans"):
        along = grid[encode(grid, 4, curve).argsort()]
        assert ((along[1:] - along[:-1]).abs().sum(1) == 1).all()


@pytest.mark.parametrize("curve", CURVES)
def test_codes_number_every_voxel_once_and_keep_their_prefix(curve: str) -> None:
    grid = cube(depth=4)
    code = encode(grid, 4, curve)
    assert torch.equal(code.sort().values, torch.arange(2**12))
    assert torch.equal(code >> 3, encode(grid >> 1, 3, curve))


@pytest.mark.fault("P24")
def test_voxels_that_coincide_keep_the_order_of_their_rows() -> None:
    code = serialize(torch.ones(200, 3, dtype=torch.int32), torch.zeros(200).long(), 1, CURVES)
    order, inverse = sort_codes(code)
    assert torch.equal(order, torch.arange(200).expand(4, 200))
    assert torch.equal(inverse, order)


def test_one_voxel_at_the_origin_needs_no_bits() -> None:
    grid = torch.zeros(1, 3, dtype=torch.int64)
    assert depth_of(grid, clouds=1) == 0
    assert serialize(grid, torch.zeros(1).long(), 0, CURVES).tolist() == [[0]] * 4


@pytest.mark.fault("P22")
@pytest.mark.parametrize(("value", "clouds"), [(-1, 1), (2**16, 1), (2**16 - 1, 2**15)])
def test_voxels_beyond_the_codes_are_refused(value: int, clouds: int) -> None:
    with pytest.raises(DataError, match=f"grid_coord .*{value}"):
        depth_of(torch.full((2, 3), value), clouds)
