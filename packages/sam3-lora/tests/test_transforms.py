"""Pictures, boxes and masks in the model's input."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from lora_core.pictures.masks import Object, trim
from sam3_lora.transforms import (
    Placement,
    drawn_placement,
    filling,
    jittered,
    network_input,
    place_boxes,
    place_mask,
    place_picture,
    preprocess,
)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def disc(size: tuple[int, int], x: float, y: float, radius: float) -> Object:
    rows, columns = np.mgrid[: size[0], : size[1]] + 0.5
    mask = (columns - x) ** 2 + (rows - y) ** 2 <= radius**2
    return trim(mask, (0, 0), size, "")


def test_the_official_sides_are_drawn_and_1008_never() -> None:
    generator = rng()
    places = [drawn_placement((1008, 1008), generator) for _ in range(600)]
    sides = {place.content for place in places}
    assert sides == {(side, side) for side in range(480, 993, 32)}
    for place in places:
        (height, width), (left, top) = place.content, place.offset
        assert 0 <= left <= 1008 - width
        assert 0 <= top <= 1008 - height
    assert len({place.offset for place in places}) > 500
    assert any(place.offset[0] != place.offset[1] for place in places)


def test_every_offset_can_be_drawn_the_last_too() -> None:
    generator = rng(1)
    places = [drawn_placement((14, 14), generator) for _ in range(2000)]
    free = {14 - place.content[0] - place.offset[0] for place in places}
    assert 0 in free
    assert {place.offset[0] for place in places} >= {0, 1, 2, 3}


@pytest.mark.parametrize("size", [(14, 14), (84, 336), (672, 1008)])
def test_other_inputs_have_the_same_shares(size: tuple[int, int]) -> None:
    generator = rng()
    for _ in range(50):
        place = drawn_placement(size, generator)
        shares = [side / 1008 for side in range(480, 993, 32)]
        assert place.content in {(round(size[0] * s), round(size[1] * s)) for s in shares}
        assert place.size == size


def test_a_picture_is_resized_as_pil_does_and_lies_on_black() -> None:
    rgb = rng().integers(0, 256, (33, 57, 3), dtype=np.uint8)
    placed = place_picture(rgb, Placement((20, 30), (4, 7), (42, 56)))
    assert placed.shape == (42, 56, 3)
    assert placed.dtype == torch.uint8
    resized = Image.fromarray(rgb).resize((30, 20), Image.Resampling.BILINEAR)
    assert (placed[7:27, 4:34].numpy() == np.array(resized)).all()
    around = torch.ones(42, 56, dtype=torch.bool)
    around[7:27, 4:34] = False
    assert (placed[around] == 0).all()


def test_the_network_reads_bytes_as_floats_from_minus_one_to_one() -> None:
    rgb = torch.from_numpy(rng().integers(0, 256, (2, 28, 42, 3), dtype=np.uint8))
    rgb[0, 0, 0] = torch.tensor([0, 51, 255])
    seen = network_input(list(rgb))
    assert seen.shape == (2, 3, 28, 42)
    assert seen.dtype == torch.float32
    assert seen.is_contiguous()
    assert seen[0, :, 0, 0].tolist() == pytest.approx([-1, -0.6, 1], abs=1e-6)
    for one, picture in zip(seen, rgb, strict=True):
        # As official training has it, a picture at a time.
        expected = picture.permute(2, 0, 1).contiguous().float().div(255).sub(0.5).div(0.5)
        assert torch.equal(one, expected)


def test_a_validation_picture_fills_the_input() -> None:
    rgb = np.full((10, 30, 3), 255, np.uint8)
    assert (preprocess(rgb, (28, 42)) == 1).all()


def test_boxes_are_shares_of_the_input() -> None:
    place = Placement((20, 40), (10, 5), (50, 100))
    boxes = place_boxes([(0, 0, 30, 10), (15, 5, 30, 10)], (10, 30), place)
    assert boxes.dtype == torch.float32
    # The picture covers x from 10 to 50 of 100 and y from 5 to 25 of 50.
    expected = torch.tensor([[0.30, 0.30, 0.40, 0.40], [0.40, 0.40, 0.20, 0.20]])
    assert (boxes - expected).abs().max() < 1e-6
    assert place_boxes([], (10, 30), place).shape == (0, 4)


def test_mirroring_twice_is_nothing() -> None:
    size, place = (12, 20), filling((28, 28))
    mirrored = place._replace(mirrored=True)
    rgb = rng().integers(0, 256, (*size, 3), dtype=np.uint8)
    assert torch.equal(place_picture(rgb[:, ::-1], mirrored), place_picture(rgb, place))
    one, two = (2.0, 3.0, 7.0, 9.0), (13.0, 3.0, 18.0, 9.0)
    assert torch.equal(place_boxes([one], size, mirrored), place_boxes([two], size, place))
    item = disc(size, 5, 6, 3)
    assert (place_mask(item.mirrored(), mirrored) == place_mask(item, place)).all()


@pytest.mark.parametrize(
    ("old", "new"),
    [((480, 640), (112, 112)), ((50, 31), (98, 70)), ((64, 64), (32, 32)), ((7, 9), (84, 84))],
)
def test_masks_are_resized_as_official_training_does(
    old: tuple[int, int], new: tuple[int, int]
) -> None:
    """The whole mask, bilinear with antialias, rounded: slower, and what the window must equal."""
    generator = rng(sum(old))
    for _ in range(10):
        x, y = generator.uniform(0, old[1]), generator.uniform(0, old[0])
        item = disc(old, x, y, generator.uniform(0.1, 0.6) * min(old))
        whole = torch.from_numpy(item.mask).float()[None, None]
        slow = F.interpolate(whole, size=new, mode="bilinear", antialias=True)[0, 0]
        differ = place_mask(item, filling(new)) != (slow.round() > 0).numpy()
        # An exact half is a matter of rounding.
        assert ((slow[torch.from_numpy(differ)] - 0.5).abs() < 1e-5).all()
        assert differ.mean() < 0.01


def test_a_mask_lies_where_its_box_lies() -> None:
    place = Placement((60, 40), (30, 11), (84, 98))
    item = disc((90, 120), 70, 30, 25)
    rows, columns = np.nonzero(place_mask(item, place))
    (box,) = place_boxes([(45, 5, 95, 55)], (90, 120), place).double()
    cx, cy, w, h = (box * torch.tensor([98, 84, 98, 84])).tolist()
    assert (columns.min(), columns.max() + 1) == pytest.approx((cx - w / 2, cx + w / 2), abs=1)
    assert (rows.min(), rows.max() + 1) == pytest.approx((cy - h / 2, cy + h / 2), abs=1)


def test_masks_at_every_border_and_empty_ones_are_placed() -> None:
    size = (30, 40)
    full = trim(np.ones(size, dtype=bool), (0, 0), size, "")
    place = Placement((21, 17), (3, 5), (42, 42))
    expected = np.zeros((42, 42), np.uint8)
    expected[5:26, 3:20] = 1
    assert (place_mask(full, place) == expected).all()
    empty = trim(np.zeros(size, dtype=bool), (0, 0), size, "")
    assert not place_mask(empty, place).any()


def test_an_example_box_is_drawn_as_somebody_might() -> None:
    box, generator = (100.0, 50.0, 180.0, 90.0), rng()
    drawn = np.array([jittered(box, (400, 600), 0.1, 20, generator) for _ in range(2000)])
    noise = drawn - np.array(box)
    assert noise.std(0) == pytest.approx([8, 4, 8, 4], rel=0.1)
    assert np.abs(noise.mean(0)).max() < 0.6


def test_the_noise_of_an_example_box_is_bounded_and_stays_in_the_picture() -> None:
    generator = rng()
    box = (0.0, 0.0, 600.0, 400.0)
    large = np.array([jittered(box, (400, 600), 0.5, 20, generator) for _ in range(50)])
    assert np.abs(large - box).max() <= 20
    assert (large >= 0).all()
    assert (large <= [600, 400, 600, 400]).all()
    assert (large != box).any()


def test_an_example_box_that_would_vanish_stays_as_it_is() -> None:
    thin, generator = (10.0, 10.0, 11.0, 11.0), rng()
    drawn = {jittered(thin, (40, 40), 5.0, 20, generator) for _ in range(100)}
    assert thin in drawn
    assert all(x1 > x0 and y1 > y0 for x0, y0, x1, y1 in drawn)
    assert jittered(thin, (40, 40), 0.0, 20, generator) == thin
