"""Depth is pooled to the tokens and coded as the recorded cases say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from isaac_lora.depth.encoding import encode_depth, pool_depth, token_grid
from isaac_lora.depth.preprocessing import depth_pixels
from lora_core.testing.goldens import load_golden

GOLDENS = Path(__file__).parent / "goldens"
ENCODING = load_golden(GOLDENS / "depth_encoding").io
ESTIMATOR = load_golden(GOLDENS / "depth_estimator").io


@pytest.mark.parametrize("case", ["a", "b", "c"])
def test_pooling_and_sinusoids_are_the_recorded_ones(case: str) -> None:
    wanted = ENCODING[f"{case}.encoding"][0]
    rows, columns = ENCODING[f"{case}.grid"].tolist()
    pooled = pool_depth(ENCODING[f"{case}.depth_map"][0], (rows, columns))
    torch.testing.assert_close(
        pooled.view(1, rows, columns), ENCODING[f"{case}.pooled"], atol=1e-5, rtol=0
    )
    found = encode_depth(pooled, wanted.shape[1])
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=0)
    exact = encode_depth(ENCODING[f"{case}.pooled"].flatten(), wanted.shape[1])
    torch.testing.assert_close(exact, wanted, atol=3e-6, rtol=0)  # one bit of 16 periods


def test_an_odd_number_of_channels_ends_with_a_zero() -> None:
    found = encode_depth(torch.tensor([1.0, 2.0]), 15)
    assert found.shape == (2, 15)
    assert not found[:, -1].any()
    assert torch.equal(found[:, :14], encode_depth(torch.tensor([1.0, 2.0]), 14))


def test_sines_come_before_cosines_from_fast_to_slow() -> None:
    found = encode_depth(torch.tensor([0.5]), 4)[0]
    phases = torch.tensor([0.5, 0.5 / 100.0])  # 10000^(-1/2)
    torch.testing.assert_close(found, torch.cat([phases.sin(), phases.cos()]))


def test_half_precision_around_the_encoding_does_not_reach_it() -> None:
    values = torch.linspace(0, 100, 7)
    with torch.autocast("cpu", torch.bfloat16):
        found = encode_depth(values, 16)
    assert found.dtype == torch.float32
    assert torch.equal(found, encode_depth(values, 16))


def test_the_grid_is_the_one_after_the_shuffle() -> None:
    assert token_grid(6, 8, 2) == (3, 4)
    assert token_grid(6, 8, 1) == (6, 8)
    with pytest.raises(ValueError, match="6 x 7 patches do not divide by 2"):
        token_grid(6, 7, 2)


def test_each_cell_is_the_mean_of_its_part_in_row_major_order() -> None:
    depth = torch.arange(16.0).view(4, 4)
    assert pool_depth(depth, (2, 1)).tolist() == [3.5, 11.5]
    assert pool_depth(depth, (1, 2)).tolist() == [6.5, 8.5]


def test_no_picture_gives_an_encoding_of_no_tokens() -> None:
    assert encode_depth(torch.zeros(0), 8).shape == (0, 8)


# -- what the depth model sees ---------------------------------------------------------------------


@pytest.mark.parametrize("number", [0, 1])
def test_the_input_of_the_depth_model_is_the_recorded_one(number: int) -> None:
    wanted = ESTIMATOR[f"preprocessed{number}"]
    found = depth_pixels(ESTIMATOR[f"image{number}"].numpy(), wanted.shape[-1])
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


def test_a_nearly_black_picture_is_scaled_like_every_other() -> None:
    dark = depth_pixels(np.ones((5, 5, 3), np.uint8), 14)
    black = depth_pixels(np.zeros((5, 5, 3), np.uint8), 14)
    torch.testing.assert_close(dark[0, 0] - black[0, 0], torch.full((14, 14), 1 / 255 / 0.229))


def test_a_view_of_a_larger_picture_that_cannot_be_written_is_read() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (9, 12, 3)).astype(np.uint8)
    view = picture[::-1, 2:8]
    view.flags.writeable = False
    assert torch.equal(depth_pixels(view, 14), depth_pixels(view.copy(), 14))


@pytest.mark.parametrize(
    "picture",
    [
        np.zeros((4, 4, 3), np.float32),
        np.zeros((3, 4, 4), np.uint8),
        np.zeros((4, 4), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
    ],
)
def test_what_is_no_rgb_picture_of_bytes_is_refused(picture: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"expected an RGB picture uint8 \[H, W, 3\]"):
        depth_pixels(picture, 14)
