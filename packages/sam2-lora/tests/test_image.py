import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sam2_lora.image import (
    MEAN,
    STD,
    preprocess,
    to_model_boxes,
    to_model_points,
    upscale_logits,
)

CASE = Path(__file__).parent / "goldens" / "preprocess"

CASES = json.loads((CASE / "config.json").read_text())["cases"]


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_file(CASE / "io.safetensors")


@pytest.mark.parametrize("name", CASES)
def test_preprocess_is_the_official_transform(golden: dict, name: str) -> None:
    side = CASES[name]["resolution"]
    result = preprocess(golden[f"{name}.image"], (side, side))
    torch.testing.assert_close(result, golden[f"{name}.pixel_values"], rtol=0, atol=1e-6)
    from_array = preprocess(golden[f"{name}.image"].numpy(), (side, side))
    assert torch.equal(from_array, result)


@pytest.mark.parametrize("name", CASES)
def test_coordinates_and_masks_go_the_official_way(golden: dict, name: str) -> None:
    case = CASES[name]
    original, side = (case["height"], case["width"]), case["resolution"]
    points = to_model_points(golden[f"{name}.points"], original, (side, side))
    torch.testing.assert_close(points, golden[f"{name}.points_model"], rtol=0, atol=1e-5)
    boxes = to_model_boxes(golden[f"{name}.box"].numpy(), original, (side, side))
    assert np.abs(boxes.reshape(1, 2, 2) - golden[f"{name}.box_model"].numpy()).max() <= 1e-5
    logits = upscale_logits(golden[f"{name}.low_res"], original)[:, :1]
    torch.testing.assert_close(logits, golden[f"{name}.logits_orig"], rtol=0, atol=1e-5)


def test_rectangles_scale_each_axis_by_itself() -> None:
    rgb = np.zeros((50, 400, 3), dtype=np.uint8)
    assert preprocess(rgb, (64, 96)).shape == (3, 64, 96)
    point = to_model_points(np.array([[100.0, 25.0]]), (50, 400), (64, 96))
    assert point.tolist() == [[24.0, 32.0]]


@pytest.mark.parametrize("size", [(1, 1), (1, 900), (900, 1)])
def test_extreme_shapes_are_resized(size: tuple[int, int]) -> None:
    rgb = np.full((*size, 3), 255, dtype=np.uint8)
    pixels = preprocess(rgb, (32, 64))
    white = (1 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(pixels, white[:, None, None].expand(3, 32, 64))


def test_half_precision_logits_are_upscaled_in_float32() -> None:
    assert upscale_logits(torch.ones(1, 3, 4, 4).bfloat16(), (9, 7)).dtype == torch.float32


@pytest.mark.parametrize("size", [(64, 96), (40, 90), (17, 31)])
def test_preprocessing_in_place_gives_the_same_bits_and_leaves_the_picture(
    size: tuple[int, int],
) -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (40, 90, 3), dtype=np.uint8)
    before = rgb.copy()
    pixels = torch.tensor(rgb).permute(2, 0, 1)[None].float() / 255
    pixels = torch.nn.functional.interpolate(
        pixels, size=size, mode="bilinear", antialias=True, align_corners=False
    )
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    slow = (pixels[0] - mean) / std
    read_only = rgb.copy()
    read_only.flags.writeable = False
    for given in (rgb, torch.tensor(rgb), read_only):
        assert torch.equal(preprocess(given, size), slow)
    np.testing.assert_array_equal(rgb, before)
