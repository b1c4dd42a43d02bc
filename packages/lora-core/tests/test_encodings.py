"""Run lengths, bitmaps and outlines, against goldens, hand-made cases and round trips."""

import base64
import io
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lora_core.errors import DataError
from lora_core.pictures.encodings import (
    decode_bitmap,
    decode_counts,
    decode_parts,
    decode_polygon,
    decode_runs,
    encode_bitmap,
    encode_counts,
    encode_runs,
    ring_of,
)
from lora_core.pictures.masks import trim

CASE = Path(__file__).parent / "goldens" / "severstal"
STRIP = (256, 1600)
# Made by pycocotools from a 9 x 7 mask with a rectangle and a single pixel.
COMPRESSED = ";45000h0M"


def random_masks(count: int = 40) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    masks = [rng.random(rng.integers(1, 40, 2)) < rng.random() for _ in range(count)]
    return [*masks, np.ones((3, 5), bool), np.zeros((4, 2), bool), np.ones((1, 1), bool)]


# -- Kaggle ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", random_masks(), ids=lambda mask: "x".join(map(str, mask.shape)))
def test_run_lengths_round_trip(mask: np.ndarray) -> None:
    item = trim(mask, (0, 0), mask.shape, "a")
    assert (decode_runs(encode_runs(item), mask.shape).mask == mask).all()
    assert (decode_counts(encode_counts(mask), mask.shape).mask == mask).all()


def test_runs_go_down_the_columns_from_one() -> None:
    assert decode_runs("2 2", (3, 2)).mask.tolist() == [[0, 0], [1, 0], [1, 0]]
    assert decode_runs("3 2", (3, 2)).mask.tolist() == [[0, 1], [0, 0], [1, 0]]
    assert not decode_runs("", (3, 2)).mask.any()


@pytest.mark.parametrize(
    ("runs", "reason"),
    [
        ("1 2 3", "3 numbers, expected pairs"),
        ("1 two", "'two' expected digits alone"),
        ("1.5 2", "'1.5' expected digits alone"),
        ("0 2", "start 0, but pixels are counted from 1"),
        ("-4 2", "start -4"),
        ("3 0", "length 0"),
        ("5 3", "the run at 5 goes past the last pixel 6 of a picture of 2 x 3"),
        ("1 99999999999", "the run at 1 goes past"),
        ("9223372036854775807 5", "goes past"),
        ("1 1e30", "'1e30' expected digits alone"),
        ("1 99999999999999999999999", "'99999999999999999999999' is too large"),
        (f"1 {'9' * 100}", r"'9{79}\.\.\. is too large"),
        ("4 2 1 4", "the runs at 1 and 4 overlap"),
    ],
)
def test_bad_runs_are_refused(runs: str, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        decode_runs(runs, (3, 2))


# -- COCO ------------------------------------------------------------------------------------------


def test_compressed_counts_decode() -> None:
    mask = np.zeros((9, 7), dtype=bool)
    mask[2:6, 1:4] = True
    mask[8, 6] = True
    assert (decode_counts(COMPRESSED, (9, 7)).mask == mask).all()
    assert (decode_counts(COMPRESSED.encode(), (9, 7)).mask == mask).all()


@pytest.mark.fault("D22", "D23")
@pytest.mark.parametrize(
    ("counts", "reason"),
    [
        ([3, 2], "sum to 5, expected 2 x 3 = 6"),
        ([3, 2, 90], "sum to 95"),
        ([7, -1], "count -1"),
        ([3.0, 3.0], "expected a string or a list of whole numbers"),
        ([True, 5], "expected a string or a list of whole numbers"),
        (None, "expected a string or a list"),
        ("a\x00", "damaged"),
        ("P" * 30, "damaged|cut off"),
        ("é0", "damaged"),
        ("P", "cut off"),
        ([10**30], "sum to 1000"),
        ([], "sum to 0"),
    ],
)
def test_bad_counts_are_refused(counts: object, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        decode_counts(counts, (3, 2))  # type: ignore[arg-type]


# -- bitmaps ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", random_masks(10), ids=lambda mask: "x".join(map(str, mask.shape)))
def test_bitmaps_round_trip(mask: np.ndarray) -> None:
    item = trim(np.pad(mask, 3, constant_values=True), (5, 7), (80, 90), "a")
    data, origin = encode_bitmap(item)
    assert (decode_bitmap(data, origin, (80, 90)).mask == item.mask).all()


def packed(content: bytes) -> str:
    return base64.b64encode(zlib.compress(content)).decode()


def png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def test_an_opaque_palette_is_read_by_its_colours() -> None:
    picture = Image.fromarray(np.array([[0, 1]], dtype=np.uint8), mode="P")
    picture.putpalette([255, 255, 255, 0, 0, 0])
    assert decode_bitmap(packed(png(picture)), (0, 0), (1, 2)).mask.tolist() == [[True, False]]


def test_crops_outside_the_picture_are_cut() -> None:
    data = packed(png(Image.new("L", (4, 4), 255)))
    assert decode_bitmap(data, (-2, -3), (10, 10)).mask.nonzero()[0].tolist() == [0, 0]
    assert decode_bitmap(data, (8, 9), (10, 10)).area == 2
    assert decode_bitmap(data, (50, 50), (10, 10)).area == 0


@pytest.mark.parametrize(
    "data",
    [
        "!!!",
        base64.b64encode(b"not zlib").decode(),
        packed(b"not a png"),
        packed(png(Image.new("L", (9, 9)))[:40]),
        base64.b64encode(zlib.compress(b"x" * 1000)[:-6]).decode(),
    ],
)
def test_damaged_bitmaps_are_refused(data: str) -> None:
    with pytest.raises(DataError, match="bitmap: "):
        decode_bitmap(data, (0, 0), (9, 9))


def test_a_bitmap_that_is_no_png_is_told_without_an_address_in_memory() -> None:
    with pytest.raises(DataError) as caught:
        decode_bitmap(packed(b"not a png"), (0, 0), (9, 9))
    assert str(caught.value) == "bitmap: what is packed in it is no PNG"


@pytest.mark.fault("P33")
def test_packed_bombs_are_refused() -> None:
    with pytest.raises(DataError, match="larger than 64 MB"):
        decode_bitmap(packed(bytes(70 * 2**20)), (0, 0), (9, 9))
    with pytest.raises(DataError, match="bitmap: more than 150 million"):
        decode_bitmap(packed(png(Image.new("1", (15_000, 15_000)))), (0, 0), (9, 9))


# -- outlines --------------------------------------------------------------------------------------


def square(x0: float, y0: float, x1: float, y1: float) -> np.ndarray:
    return np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]], dtype=np.float64)


def test_a_rectangle_covers_as_many_pixels_as_its_area() -> None:
    item = decode_polygon([square(10, 5, 20, 9)], (30, 30))
    assert item.origin == (10, 5)
    assert item.crop.shape == (4, 10)
    assert item.crop.all()


def test_outlines_hold_the_pixels_whose_centres_are_inside() -> None:
    rng = np.random.default_rng(0)
    x, y = np.meshgrid(np.arange(40) + 0.5, np.arange(30) + 0.5)
    for _ in range(20):
        ring = rng.uniform(-10, 50, (rng.integers(3, 9), 2))  # crosses itself and the border
        inside = np.zeros(x.shape, dtype=bool)
        for (x0, y0), (x1, y1) in zip(ring, np.roll(ring, -1, 0), strict=True):
            crosses = (y0 <= y) != (y1 <= y)
            inside ^= crosses & (x > x0 + (y - y0) * (x1 - x0) / (y1 - y0))
        assert (decode_polygon([ring], (30, 40)).mask == inside).all()


def test_holes_are_cut_and_parts_add_up() -> None:
    outer, inner = square(0, 0, 10, 10), square(2, 2, 6, 6)
    assert decode_polygon([outer, inner], (12, 12)).area == 100 - 16
    assert decode_parts([outer, inner, square(5, 5, 12, 12)], (12, 12)).area == 100 + 49 - 25


@pytest.mark.fault("D20", "D21")
@pytest.mark.parametrize(
    ("points", "reason"),
    [
        ([], "0 numbers"),
        ([1, 2], "2 numbers"),
        ([1, 2, 3, 4], "4 numbers"),
        ([1, 2, 3, 4, 5], "5 numbers"),
        ([1, 2, 3, 4, 5, 6, 7], "7 numbers"),
        ([1, 2, 3, 4, 5, float("nan")], "coordinate nan"),
        ([1, 2, 3, 4, 5, float("inf")], "coordinate inf"),
        ([1, 2, 3, 4, 5, 1e12], r"coordinate 1e\+12 is not near the picture of 40 x 30"),
        (["a", 2, 3, 4, 5, 6], "expected numbers"),
        ([[1, 2], [3]], "expected numbers"),
        ({"x": 1}, "expected numbers"),
        (None, "expected numbers"),
        ([True] * 6, "expected numbers"),
        (["1", "2", "3", "4", "5", "6"], "expected numbers"),
        ([[1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, 12]], "expected numbers"),
    ],
)
def test_bad_outlines_are_refused(points: object, reason: str) -> None:
    with pytest.raises(DataError, match=f"polygon: .*{reason}"):
        ring_of(points, (30, 40))


def test_outlines_may_be_flat_or_pairs() -> None:
    flat = ring_of([1, 2, 3, 4, 5, 6], (30, 40))
    assert (flat == ring_of([[1, 2], [3, 4], [5, 6]], (30, 40))).all()
