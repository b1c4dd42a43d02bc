"""Pictures to patches: the recorded sizes, levels and patches, and what the sizes promise."""

import json

import numpy as np
import pytest
import torch
from isaac_texts import GOLDENS, noise

from isaac_lora.pictures.pixels import normalise, patches, preprocess, resize
from isaac_lora.pictures.target_size import (
    PictureRules,
    num_tokens,
    patch_grid,
    target_size,
    token_grid,
)
from lora_core.errors import ConfigError, DataError
from lora_core.testing import load_golden

GOLDEN = load_golden(GOLDENS / "preprocess")
SMALL = PictureRules(4, 64, 16, 2)
ISAAC = PictureRules()
SIZES = json.loads((GOLDENS / "preprocess/sizes.json").read_text())
ISAAC_SIZES = json.loads((GOLDENS / "preprocess/isaac_0_1_target_sizes.json").read_text())


@pytest.mark.parametrize(
    ("rules", "row"),
    [(SMALL, row) for row in SIZES] + [(ISAAC, row) for row in ISAAC_SIZES["rows"]],
    ids=lambda value: "" if isinstance(value, PictureRules) else f"{value['h']}x{value['w']}",
)
def test_sizes_are_those_recorded(rules: PictureRules, row: dict) -> None:
    assert tuple(target_size(row["h"], row["w"], rules)) == (row["target_h"], row["target_w"])
    assert list(patch_grid(row["h"], row["w"], rules)) == row["patch_grid"]
    assert num_tokens(row["h"], row["w"], rules) == row["tokens"]


def test_the_recorded_rules_are_isaacs_defaults() -> None:
    assert ISAAC_SIZES["patch_size"] == ISAAC.patch_size
    assert ISAAC_SIZES["max_num_patches"] == ISAAC.max_num_patches
    assert ISAAC_SIZES["min_num_patches"] == ISAAC.min_num_patches
    assert ISAAC_SIZES["pixel_shuffle_scale"] == ISAAC.pixel_shuffle_scale


@pytest.mark.parametrize("number", range(3))
def test_levels_and_patches_are_those_recorded(number: int) -> None:
    io = GOLDEN.io
    picture, size = io[f"image{number}"], io[f"resized{number}"].shape[:2]
    assert torch.equal(resize(picture, tuple(size)), io[f"resized{number}"])
    made, grid = preprocess(picture.numpy(), SMALL)
    assert made.dtype == torch.uint8
    torch.testing.assert_close(normalise(made), io[f"patches{number}"], rtol=0, atol=1e-6)
    assert list(grid) == io[f"grid{number}"].tolist()
    assert list(token_grid(grid, SMALL)) == io[f"token_grid{number}"].tolist()


def test_every_size_stays_within_the_bounds_that_it_can_meet() -> None:
    draw = np.random.default_rng(1)
    for height, width in draw.integers(1, 4000, (300, 2)).tolist():
        grid = patch_grid(height, width, ISAAC)
        assert grid.height % 2 == grid.width % 2 == 0
        assert grid.cells <= ISAAC.max_num_patches
        if min(height, width) > 100:
            assert grid.cells >= 256


def test_without_a_least_number_a_small_picture_is_only_rounded_up() -> None:
    rules = PictureRules(min_num_patches=None)
    assert tuple(target_size(33, 10, rules)) == (64, 32)


@pytest.mark.fault("D05")
@pytest.mark.parametrize(("height", "width"), [(1, 5000), (5000, 1), (1, 1), (7, 33)])
def test_extreme_shapes_become_whole_patches(height: int, width: int) -> None:
    made, grid = preprocess(noise(height, width), ISAAC)
    assert made.shape == (grid.cells, 768)
    assert made.dtype == torch.uint8


def test_patches_go_row_by_row_with_colours_last() -> None:
    pixels = torch.arange(4 * 6 * 3).reshape(4, 6, 3)
    made = patches(pixels, 2)
    assert made.shape == (6, 12)
    assert made[4].tolist() == pixels[2:4, 2:4].flatten().tolist()  # second row, second column


def test_levels_are_scaled_to_minus_one_and_one() -> None:
    assert normalise(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1.0, 1.0]


def test_levels_are_scaled_in_place_to_the_same_bits_and_stay_as_they_are() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(normalise(levels), (levels.to(torch.float32) / 255.0 - 0.5) / 0.5)
    floats = levels.float()
    assert torch.equal(normalise(floats), normalise(levels))
    assert floats[255] == 255


def test_a_picture_beyond_the_limit_is_refused_by_its_size_alone() -> None:
    assert target_size(6000, 10_000, ISAAC).cells > 0
    with pytest.raises(DataError, match="10001 x 6000 pixels are more than 60 million"):
        target_size(6000, 10_001, ISAAC)
    with pytest.raises(DataError, match="empty picture"):
        target_size(0, 5, ISAAC)


def test_rules_that_no_picture_can_satisfy_are_refused_together() -> None:
    with pytest.raises(ConfigError, match="patch_size is 0") as told:
        PictureRules(0, -1)
    assert "max_num_patches is -1" in str(told.value)
    with pytest.raises(ConfigError, match="min_num_patches is 300: more than"):
        PictureRules(16, 256, 300)
    with pytest.raises(ConfigError, match="takes 4"):
        PictureRules(16, 3, None, 2)


def test_pictures_of_floats_are_refused_not_cut_to_whole_numbers() -> None:
    with pytest.raises(ValueError, match="expected uint8"):
        resize(torch.rand(4, 4, 3), (8, 8))
