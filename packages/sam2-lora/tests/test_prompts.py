import numpy as np
import pytest
from scipy import ndimage

from sam2_lora.prompts import (
    EMPTY_SHARE,
    Click,
    box_of,
    center_click,
    center_correction,
    jittered,
    random_correction,
    random_pixel,
)


def blob(seed: int, shape: tuple[int, int] = (60, 90)) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(size=shape)
    return ndimage.gaussian_filter(noise, 5) > 0.01


def deepest(region: np.ndarray) -> tuple[tuple[int, int], float]:
    """The definition, on the whole padded picture."""
    distance = ndimage.distance_transform_edt(np.pad(region, 1))[1:-1, 1:-1]
    y, x = np.unravel_index(distance.argmax(), region.shape)
    return (int(x), int(y)), distance.max()


def test_boxes_hold_first_and_last_pixel() -> None:
    mask = np.zeros((10, 20), dtype=bool)
    mask[3:5, 7:16] = True
    assert box_of(mask).tolist() == [7, 3, 15, 4]


def test_jitter_stays_within_a_tenth_and_twenty_pixels_and_the_picture() -> None:
    rng = np.random.default_rng(0)
    small, large = np.array([10, 20, 40, 60], np.float32), np.array([0, 0, 900, 1023], np.float32)
    moved = np.stack([jittered(small, 0.1, (1024, 1024), rng) for _ in range(2000)])
    limits = np.array([3, 4, 3, 4])
    assert (np.abs(moved - small) <= limits + 1e-4).all()
    assert (np.abs(moved - small).max(0) > 0.98 * limits).all()
    assert (np.abs(moved.mean(0) - small) < 0.1 * limits).all()
    moved = np.stack([jittered(large, 0.1, (1024, 1024), rng) for _ in range(500)])
    assert np.abs(moved - large).max() <= 20
    assert moved.min() >= 0
    assert moved.max() <= 1023
    assert (jittered(small, 0.0, (1024, 1024), rng) == small).all()


@pytest.mark.parametrize("seed", range(10))
def test_random_clicks_lie_inside(seed: int) -> None:
    rng, mask = np.random.default_rng(seed), blob(seed)
    for _ in range(50):
        x, y = random_pixel(mask, rng)
        assert mask[y, x]


def test_all_pixels_are_equally_likely() -> None:
    mask = np.zeros((4, 5), dtype=bool)
    mask[1, 2] = mask[3, 0] = mask[0, 4] = True
    rng = np.random.default_rng(0)
    hits = [random_pixel(mask, rng) for _ in range(3000)]
    for xy in ((2, 1), (0, 3), (4, 0)):
        assert abs(hits.count(xy) / 3000 - 1 / 3) < 0.03


@pytest.mark.parametrize("seed", range(10))
def test_corrections_lie_on_errors_with_the_right_label(seed: int) -> None:
    rng, target, prediction = np.random.default_rng(seed), blob(seed), blob(seed + 100)
    for _ in range(50):
        click = random_correction(prediction, target, rng, empty_share=0.0)
        x, y = click.xy
        assert prediction[y, x] != target[y, x]
        assert click.label == target[y, x]


def test_some_corrections_ignore_the_prediction() -> None:
    target = np.zeros((20, 20), dtype=bool)
    target[:10] = True
    rng = np.random.default_rng(0)
    perfect = target.copy()
    labels = [random_correction(perfect, target, rng).label for _ in range(4000)]
    assert abs(np.mean(labels) - EMPTY_SHARE) < 0.02


def test_without_errors_the_background_is_clicked() -> None:
    rng, target = np.random.default_rng(0), blob(0)
    click = random_correction(target, target, rng, empty_share=0.0)
    assert click.label == 0
    assert not target[click.xy[1], click.xy[0]]
    full = np.ones((3, 3), dtype=bool)
    assert random_correction(full, full, rng, empty_share=0.0).label == 1
    empty = np.zeros((3, 3), dtype=bool)
    assert random_correction(empty, empty, rng).label == 0


@pytest.mark.parametrize("seed", range(10))
def test_the_first_click_is_the_pixel_farthest_from_the_border(seed: int) -> None:
    mask = blob(seed)
    assert center_click(mask) == Click(deepest(mask)[0], 1)


def test_the_picture_ends_at_its_border() -> None:
    assert center_click(np.ones((5, 9), dtype=bool)) == Click((2, 2), 1)
    corner = np.zeros((9, 9), dtype=bool)
    corner[:3, :3] = True
    assert center_click(corner) == Click((1, 1), 1)


@pytest.mark.parametrize("seed", range(20))
def test_the_thicker_error_is_corrected_in_its_middle(seed: int) -> None:
    prediction, target = blob(seed), blob(seed + 100)
    (missed, deep), (false, wide) = deepest(target & ~prediction), deepest(prediction & ~target)
    expected = Click(missed, 1) if deep > wide else Click(false, 0)
    assert center_correction(prediction, target) == expected


def test_thickness_counts_and_not_area() -> None:
    target, prediction = np.zeros((2, 40, 40), dtype=bool)
    target[0:2, :] = True  # 80 pixels missed, two thick
    prediction[20:25, 20:25] = True  # 25 false ones, five thick
    assert center_correction(prediction, target) == Click((22, 22), 0)


def test_a_perfect_prediction_is_corrected_in_the_background() -> None:
    target = blob(3)
    click = center_correction(target, target)
    assert click == Click(deepest(~target)[0], 0)
    full = np.ones((5, 5), dtype=bool)
    assert center_correction(full, full) == Click((2, 2), 1)
