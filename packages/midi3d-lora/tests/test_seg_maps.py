"""Maps of instances: grey, palette and colour; what is background, and what is no map at all."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lora_core.errors import DataError
from midi3d_lora.conditioning.seg_maps import read_seg_map, seg_map

COLOURS = [(0, 0, 255), (255, 0, 0), (255, 0, 255), (0, 255, 0), (0, 255, 255), (255, 255, 0)]


def stripes(values: list, side: int = 30) -> np.ndarray:
    """Vertical stripes, one per value."""
    made = np.array(values)
    index = np.arange(side * len(values)) // side
    return np.broadcast_to(made[index], (side, *made[index].shape)).astype(np.uint8).copy()


def test_colours_are_ordered_as_the_official_conversion_to_grey_orders_them() -> None:
    picture = Image.fromarray(stripes([(0, 0, 0), *reversed(COLOURS)]))
    seg = seg_map(picture)
    grey = np.asarray(picture.convert("L"))
    assert np.unique(grey)[1:].tolist() == [29, 76, 105, 150, 179, 226]
    assert seg.labels == tuple(r << 16 | g << 8 | b for r, g, b in COLOURS)
    for i, value in enumerate(np.unique(grey)[1:]):
        assert np.array_equal(seg.mask(i) > 0, grey == value)
    assert seg.names[:2] == ("0000ff", "ff0000")


def test_colours_of_one_brightness_stay_apart() -> None:
    twins = [(0, 0, 255), (97, 0, 0)]
    picture = Image.fromarray(stripes([(0, 0, 0), *twins]))
    assert len(np.unique(np.asarray(picture.convert("L")))) == 2  # the official split merges them
    assert seg_map(picture).labels == (0x0000FF, 0x610000)


@pytest.mark.parametrize("mode", ["L", "I;16", "RGB", "array"])
def test_grey_values_are_labels_whatever_the_mode(mode: str) -> None:
    values = stripes([0, 3, 29, 1])
    pictures: dict[str, Any] = {
        "L": Image.fromarray(values),
        "I;16": Image.fromarray(values.astype(np.uint16)),
        "RGB": Image.fromarray(values).convert("RGB"),
        "array": values,
    }
    seg = seg_map(pictures[mode])
    assert seg.labels == (1, 3, 29)
    assert seg.names == ("1", "3", "29")
    assert seg.index.dtype == np.int32
    assert np.array_equal(np.array([0, 1, 3, 29])[seg.index], values)


def test_labels_beyond_a_byte_keep_their_values() -> None:
    values = stripes([0, 1, 2]).astype(np.uint16) * 1000
    assert seg_map(Image.fromarray(values)).labels == (1000, 2000)


def palette(colours: list[tuple[int, int, int]]) -> Image.Image:
    made = Image.fromarray(stripes(list(range(len(colours)))), mode="P")
    made.putpalette([channel for colour in colours for channel in colour])
    return made


def test_palette_indices_are_labels_in_the_order_of_brightness() -> None:
    made = palette([(0, 0, 0), (255, 255, 0), (0, 0, 255)])
    seg = seg_map(made)
    assert seg.labels == (2, 1)
    assert np.array_equal(seg.mask(0) > 0, np.asarray(made) == 2)


def test_background_of_a_palette_is_black_wherever_it_stands() -> None:
    assert seg_map(palette([(255, 0, 0), (0, 0, 0), (0, 255, 0)])).labels == (0, 2)
    assert seg_map(palette([(255, 0, 0), (0, 0, 255)])).labels == (1,)  # no black: index 0


def test_equal_colours_of_a_palette_stay_apart() -> None:
    assert seg_map(palette([(0, 0, 0), (9, 9, 9), (9, 9, 9)])).labels == (1, 2)


def test_what_is_transparent_is_background() -> None:
    values = stripes([(0, 0, 0, 255), (255, 0, 0, 255), (0, 255, 0, 0)])
    assert seg_map(Image.fromarray(values)).labels == (0xFF0000,)


def test_one_instance_that_fills_the_picture_is_one_instance() -> None:
    seg = seg_map(np.full((20, 20), 255, np.uint8))
    assert seg.labels == (255,)
    assert (seg.mask(0) == 255).all()


def test_a_binary_map_is_one_instance() -> None:
    assert seg_map(Image.fromarray(stripes([0, 255])).convert("1")).labels == (255,)


def test_small_instances_are_left_out_and_told() -> None:
    values = stripes([0, 5])
    values[0, 0] = 9
    seg = seg_map(values)
    assert seg.labels == (5,)
    assert seg.notes == ("instance 9 is left out: 1 of 1800 pixels",)
    assert seg.index[0, 0] == 0
    assert seg_map(values, smallest_share=0).labels == (5, 9)


def test_only_small_instances_are_an_error() -> None:
    values = np.zeros((100, 100), np.uint8)
    values[0, :2] = 1
    with pytest.raises(DataError, match="none remains"):
        seg_map(values)


def test_nothing_but_background_is_an_error() -> None:
    with pytest.raises(DataError, match="no instance"):
        seg_map(np.zeros((20, 20), np.uint8))


def test_a_photograph_in_the_place_of_a_map_is_an_error_that_says_so() -> None:
    photo = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    with pytest.raises(DataError, match=r"expected at most 32.*photograph"):
        seg_map(Image.fromarray(photo))
    assert len(seg_map(stripes(list(range(40))), max_instances=39)) == 39


@pytest.mark.parametrize("picture", [np.ones((9, 9), np.float32), np.ones(9, np.uint8),
                                     np.ones((9, 9, 3), np.uint16), np.ones((0, 9), np.uint8),
                                     Image.new("F", (9, 9))])  # fmt: skip
def test_fractions_and_other_shapes_are_refused(picture: object) -> None:
    with pytest.raises(DataError):
        seg_map(picture)  # type: ignore[arg-type]


def test_a_map_saved_with_losses_is_refused_and_named(tmp_path: Path) -> None:
    Image.fromarray(stripes([0, 128, 255])).save(tmp_path / "seg.jpg")
    with pytest.raises(DataError, match=r"seg.jpg: .*JPEG"):
        read_seg_map(tmp_path / "seg.jpg")


def test_a_file_is_read_upright_and_named_in_errors(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned a quarter
    Image.fromarray(stripes([0, 128, 255])).save(tmp_path / "seg.png", exif=exif)
    assert read_seg_map(tmp_path / "seg.png").size == (90, 30)
    Image.new("L", (20, 20)).save(tmp_path / "empty.png")
    with pytest.raises(DataError, match=r"empty.png: no instance"):
        read_seg_map(tmp_path / "empty.png")
