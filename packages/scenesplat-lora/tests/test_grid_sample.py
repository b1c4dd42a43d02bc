"""Voxels of a scene: the recorded grid and keys exactly, and one Gaussian per voxel."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from made_scenes import made_scene

from lora_core.errors import ConfigError, DataError
from lora_core.testing import load_golden
from scenesplat_lora.scenes.grid_sample import (
    FNV_OFFSET,
    FNV_PRIME,
    fnv_key,
    fragments,
    grid_sample,
    integer_cells,
    ravel_key,
    sample_labelled_cloud,
    voxelise,
)

CASE = load_golden(Path(__file__).parent / "goldens" / "gridsample")
IO = {name: tensor.numpy() for name, tensor in CASE.io.items()}
SIZE = CASE.config["grid_size"]


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_cells_and_both_keys_are_the_recorded_ones() -> None:
    grid, _ = integer_cells(IO["coord"], SIZE)
    np.testing.assert_array_equal(grid, IO["full_grid_coord"])
    np.testing.assert_array_equal(fnv_key(grid).view(np.int64), IO["fnv_key"])
    np.testing.assert_array_equal(ravel_key(grid).view(np.int64), IO["ravel_key"])


def test_voxels_are_numbered_as_recorded() -> None:
    voxels = voxelise(IO["coord"], SIZE)
    np.testing.assert_array_equal(voxels.inverse(), IO["train.inverse"])
    np.testing.assert_array_equal(voxels.count, IO["train.count"])
    np.testing.assert_allclose(voxels.low[None], IO["train.min_coord"], rtol=0, atol=1e-12)


@pytest.mark.fault("P24")
def test_a_sample_has_one_row_of_each_voxel_in_the_recorded_order() -> None:
    scene = {"coord": IO["coord"], "segment": IO["segment"], "row": np.arange(400)}
    options = {"return_inverse": True, "return_min_coord": True}
    sampled = grid_sample(scene, rng(), grid_size=SIZE, **options)
    np.testing.assert_array_equal(sampled["grid_coord"], IO["train.grid_coord"])
    np.testing.assert_array_equal(sampled["inverse"], IO["train.inverse"])
    np.testing.assert_array_equal(sampled["inverse"][sampled["row"]], np.arange(333))
    np.testing.assert_array_equal(sampled["coord"], IO["coord"][sampled["row"]])
    np.testing.assert_array_equal(sampled["segment"], IO["segment"][sampled["row"]])
    assert sampled["min_coord"].shape == (1, 3)
    assert len(scene["coord"]) == 400


@pytest.mark.fault("P24")
def test_another_draw_takes_other_rows_and_the_same_seed_the_same() -> None:
    scene = {"coord": IO["coord"], "row": np.arange(400)}
    rows = [grid_sample(scene, rng(seed), grid_size=SIZE)["row"] for seed in (1, 1, 2)]
    np.testing.assert_array_equal(rows[0], rows[1])
    assert (rows[0] != rows[2]).any()


def test_fragments_hold_every_row_and_agree_with_the_recorded_ones() -> None:
    parts = list(fragments({"coord": IO["coord"]}, grid_size=SIZE))
    assert len(parts) == CASE.config["n_fragments"]
    inverse = IO["train.inverse"]
    for part in parts:
        np.testing.assert_array_equal(inverse[part["index"]], np.arange(333))
        np.testing.assert_array_equal(part["grid_coord"], IO["test.grid_coord"])
        np.testing.assert_array_equal(part["coord"], IO["coord"][part["index"]])
    seen = np.concatenate([part["index"] for part in parts])
    np.testing.assert_array_equal(np.unique(seen), np.arange(400))
    recorded = IO["test.index"]
    for voxel in range(333):  # the order inside a voxel is free
        assert {p["index"][voxel] for p in parts} == set(recorded[:, voxel])


def test_cells_are_counted_in_float64() -> None:
    below = np.float32(0.7)  # 0.69999999, which float32 division by 0.1 rounds to 7
    assert np.floor(below / np.float32(0.1)) == 7
    coord = np.array([[below, 0, 0], [0, 0, 0]], dtype=np.float32)
    assert integer_cells(coord, 0.1)[0][0, 0] == 6


@pytest.mark.fault("P23")
def test_negative_coordinates_begin_at_cell_0() -> None:
    coord = np.array([[-1.05, -0.01, 2.0], [-0.95, 0.01, 2.0]], dtype=np.float32)
    grid, low = integer_cells(coord, 0.1)
    np.testing.assert_array_equal(grid, [[0, 0, 0], [1, 1, 0]])
    np.testing.assert_allclose(low, [-1.1, -0.1, 2.0], atol=1e-12)


def hash_collision() -> tuple[list[int], list[int]]:
    """Two cells with one FNV hash.

    The prime is p = 2^40 + 435, so p (2^40 - 435) = -435² modulo 2^64: states that differ by
    2^40 - 435 after x and y differ little after the next multiplication, and z makes up for it.
    """
    prime, whole = int(FNV_PRIME), 2**64
    start = int(FNV_OFFSET) * prime % whole
    for x, y in np.ndindex(200, 200):
        state, other = (((start ^ value) * prime) % whole for value in (x, x ^ 1))
        wanted = ((state ^ y) + (2**40 - 435) * (1 if other > state else -1)) % whole
        y_other = other ^ wanted
        z_other = ((state ^ y) * prime ^ wanted * prime) % whole
        if max(y_other, z_other) < 2**20:
            return [x, y, 0], [x ^ 1, y_other, z_other]
    raise AssertionError("no collision found")


def test_two_cells_with_one_hash_stay_two_voxels() -> None:
    a, b = hash_collision()
    assert len(np.unique(fnv_key(np.array([a, b])))) == 1
    cells = np.array([a, b, a, b, [0, 0, 0]])
    voxels = voxelise(cells + 0.5, 1.0)
    assert sorted(voxels.count.tolist()) == [1, 2, 2]
    inverse = voxels.inverse()
    assert inverse[0] == inverse[2]
    assert inverse[1] == inverse[3]
    assert inverse[0] != inverse[1]


@pytest.mark.fault("P18")
def test_a_single_point_is_a_voxel_and_no_point_is_an_error() -> None:
    one = grid_sample({"coord": np.ones((1, 3), np.float32)}, rng())
    np.testing.assert_array_equal(one["grid_coord"], [[0, 0, 0]])
    with pytest.raises(DataError, match="room_7: a scene without points"):
        grid_sample({"coord": np.ones((0, 3), np.float32), "name": "room_7"}, rng())


@pytest.mark.parametrize("size", [0, -1.0, float("nan"), float("inf")])
def test_an_impossible_grid_size_is_refused(size: float) -> None:
    with pytest.raises(ConfigError, match="grid_size"):
        integer_cells(np.zeros((2, 3)), size)


@pytest.mark.fault("P22")
def test_a_grid_too_large_for_the_network_says_which_size_fits() -> None:
    coord = np.array([[0, 0, 0], [2000, 0, 0]], dtype=np.float32)
    with pytest.raises(DataError, match="100001 cells") as error:
        grid_sample({"coord": coord}, rng(), grid_size=0.02)
    least = float(str(error.value).rpartition(">= ")[2])
    grid_sample({"coord": coord}, rng(), grid_size=least)


def test_values_without_a_cell_are_refused() -> None:
    for value in (np.nan, np.inf, 1e30):
        with pytest.raises(DataError, match="no cells"):
            integer_cells(np.array([[0, 0, value]]), 0.02)


def test_rows_of_another_number_are_never_misaligned() -> None:
    scene = made_scene(20) | {"opacity": np.ones((19, 1), np.float32)}
    with pytest.raises(DataError, match=r"opacity \(19, 1\)"):
        grid_sample(scene, rng())


@pytest.mark.fault("P24")
def test_the_labelled_cloud_keeps_a_labelled_point_per_cell() -> None:
    coord = np.array([[0, 0, 0], [0.001, 0, 0], [0.5, 0, 0], [0.501, 0, 0], [0.9, 0, 0]])
    cloud = {"pc_coord": coord, "pc_segment": np.array([-1, 4, 2, 3, -1])}
    scene = made_scene(5) | cloud  # as many rows as the cloud, and yet left alone
    kept = sample_labelled_cloud(scene, rng(), grid_size=0.02)
    assert sorted(kept["pc_segment"].tolist()) == [-1, 2, 4]
    assert len(kept["coord"]) == 5
    assert len(grid_sample(scene, rng(), grid_size=10.0)["pc_coord"]) == 5
