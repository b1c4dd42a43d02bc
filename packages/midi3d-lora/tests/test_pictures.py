"""Scenes in pieces: the official pictures of instances, padding, crops, and sizes."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lora_core.errors import DataError
from lora_core.testing import load_golden
from midi3d_lora.conditioning.pictures import (
    ScenePictures,
    cut_out,
    pad_border,
    resized_map,
    resized_picture,
    split,
    square_crop,
    to_square,
)
from midi3d_lora.conditioning.seg_maps import seg_map

GOLDENS = Path(__file__).parent / "goldens"
PIPELINE, PARTS = load_golden(GOLDENS / "pipeline"), load_golden(GOLDENS / "parts")


def numbers(golden: object, name: str) -> np.ndarray:
    return golden.io[name].numpy()  # type: ignore[attr-defined]


def scene(name: str = "") -> ScenePictures:
    return split(numbers(PIPELINE, f"{name}rgb"), seg_map(numbers(PIPELINE, f"{name}seg")))


# -- recorded --------------------------------------------------------------------------------------


def test_the_split_is_the_official_one_pixel_by_pixel() -> None:
    pictures, masks = numbers(PIPELINE, "instance_rgb"), numbers(PIPELINE, "instance_mask")
    made = list(scene())
    assert len(made) == len(pictures) == 3
    for (instance, whole, mask), wanted, wanted_mask in zip(made, pictures, masks, strict=True):
        assert np.array_equal(instance, wanted)
        assert np.array_equal(mask, wanted_mask)
        assert np.array_equal(whole, numbers(PIPELINE, "rgb"))


def test_padding_of_a_square_is_the_official_one_pixel_by_pixel() -> None:
    padded = pad_border(scene("pad.square."))
    assert np.array_equal(padded.picture, numbers(PIPELINE, "pad.square.padded_rgb"))
    wanted = numbers(PIPELINE, "pad.square.padded_seg")
    labels = np.array([0, *padded.seg.labels], dtype=wanted.dtype)
    assert np.array_equal(labels[padded.seg.index], wanted)


def test_instance_pictures_are_those_of_the_official_training_data() -> None:
    config = PARTS.config
    size = (config["height"], config["width"])
    picture = resized_picture(numbers(PARTS, "rgb"), size)
    ids = resized_map(numbers(PARTS, "idmap"), size)
    np.testing.assert_allclose(picture / 255, numbers(PARTS, "scene"), atol=1e-7)
    seg = seg_map(ids, smallest_share=config["small_image_proportion"])
    kept = numbers(PARTS, "kept")
    assert seg.labels == tuple(n for n, keep in zip(config["labels"], kept, strict=True) if keep)
    assert len(seg.notes) == (~kept).sum() > 0
    for i in range(len(seg)):
        mask = seg.mask(i)
        assert np.array_equal(mask / 255, numbers(PARTS, "part_mask")[i])
        np.testing.assert_allclose(
            cut_out(picture, mask) / 255, numbers(PARTS, "part_rgb")[i], atol=1e-7
        )


def test_square_crops_are_the_official_ones() -> None:
    config = PARTS.config
    for i, rgb in enumerate(numbers(PARTS, "part_rgb")):
        mask = numbers(PARTS, "part_mask")[i]
        crop, crop_mask = square_crop(
            rgb.transpose(2, 0, 1), mask, config["crop"], config["padding_ratio"]
        )
        np.testing.assert_allclose(crop, numbers(PARTS, "crop_rgb")[i], atol=5e-6)
        assert np.array_equal(crop_mask, numbers(PARTS, "crop_mask")[i])


# -- padding ---------------------------------------------------------------------------------------


def touching(height: int, width: int) -> ScenePictures:
    ids = np.zeros((height, width), dtype=np.uint8)
    ids[height // 2 :, width // 2 - 2 : width // 2 + 2] = 1  # touches the bottom
    return split(np.full((height, width, 3), 7, dtype=np.uint8), seg_map(ids))


@pytest.mark.parametrize("shape", [(60, 80), (80, 60), (40, 120)])
def test_padding_gives_space_where_instances_touch_whatever_the_shape(
    shape: tuple[int, int],
) -> None:
    before = touching(*shape)
    after = pad_border(before)
    height, width = after.seg.size
    assert height == width
    rows = np.flatnonzero((after.seg.index > 0).any(1))
    # L = 2 (H - 1 - H//2), and H' = 1.25 L: a tenth of H' is free below what was the border.
    reach = 2 * (shape[0] - 1 - shape[0] // 2)
    wanted = int(reach / 4 * 5)
    assert rows[-1] == (wanted - shape[0]) // 2 + shape[0] - 1
    assert wanted - rows[-1] >= wanted // 10
    assert (after.seg.index > 0).sum() == (before.seg.index > 0).sum()
    inside = after.picture[after.seg.index > 0]
    assert (inside == 7).all()


def test_rows_belong_to_the_height_and_columns_to_the_width() -> None:
    ids = np.zeros((60, 100), dtype=np.uint8)
    ids[30, 20:80] = 1  # within 0.8 of the width around the middle, but 60 > 0.8 * 60
    padded = pad_border(split(np.zeros((60, 100, 3), dtype=np.uint8), seg_map(ids, 32, 0)))
    assert padded.seg.size == (100, 100)  # H' = 75 < W = 100; L = 60 leaves the width alone
    rows = np.flatnonzero((padded.seg.index > 0).any(1))
    assert rows.tolist() == [30 + (75 - 60) // 2]


def test_a_square_scene_stays_and_another_is_extended_right_and_below() -> None:
    square = scene()
    assert to_square(square) is square
    wide = touching(20, 50)
    made = to_square(wide)
    assert made.picture.shape == (50, 50, 3)
    assert np.array_equal(made.picture[:20], wide.picture)
    assert (made.picture[20:] == 255).all()
    assert (made.seg.index[20:] == 0).all()
    assert made.scene is made.picture


def test_a_scene_of_its_own_is_moved_too() -> None:
    seg = touching(20, 50).seg
    picture, whole = (np.full((20, 50, 3), n, dtype=np.uint8) for n in (1, 2))
    made = to_square(split(picture, seg, whole))
    assert (made.scene[:20] == 2).all()
    assert (made.picture[:20] == 1).all()


# -- sizes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(64, 64), (7, 90), (48, 64), (100, 33)])
def test_maps_are_resized_as_pillow_does_nearest(size: tuple[int, int]) -> None:
    ids = numbers(PARTS, "idmap")
    wanted = Image.fromarray(ids).resize((size[1], size[0]), Image.Resampling.NEAREST)
    assert np.array_equal(resized_map(ids, size), np.asarray(wanted))


def test_pictures_of_other_sizes_than_the_map_are_refused_together() -> None:
    seg = touching(20, 50).seg
    wrong = np.zeros((50, 20, 3), dtype=np.uint8)
    with pytest.raises(DataError, match="picture has 20 x 50 pixels, the map") as told:
        split(wrong, seg, wrong[:, :, 0])
    assert "scene: uint8 [50, 20], expected uint8 [H, W, 3]" in str(told.value)


def test_an_empty_mask_has_no_crop() -> None:
    with pytest.raises(DataError, match="without pixels"):
        square_crop(np.zeros((3, 9, 9), np.float32), np.zeros((9, 9), np.float32))
