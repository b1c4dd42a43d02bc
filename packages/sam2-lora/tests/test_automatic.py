"""The automatic grid: its filters one by one, tiles put together again, and a whole run."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from sam2_lora import automatic
from sam2_lora.automatic import (
    Grid,
    Instance,
    grid_points,
    instance_of,
    mask_boxes,
    segment,
    stability_score,
    suppress,
)
from sam2_lora.model import load, set_image_size


@pytest.fixture
def network(golden_base: Path) -> Any:
    return load(golden_base)


def picture(height: int = 96, width: int = 160) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def iou(a: list[float], b: list[float]) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    common = max(0.0, width) * max(0.0, height)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return common / (sum(areas) - common)


def test_suppression_equals_the_definition_taken_word_for_word() -> None:
    rng = np.random.default_rng(0)
    corner, side = rng.uniform(0, 60, (80, 2)), rng.uniform(5, 50, (80, 2))
    boxes = np.concatenate([corner, corner + side], 1)
    scores = rng.permutation(80) / 80
    expected: list[int] = []
    for index in np.argsort(-scores):
        if all(iou(boxes[index], boxes[other]) <= 0.5 for other in expected):
            expected.append(int(index))
    found = suppress(torch.from_numpy(boxes), torch.from_numpy(scores), 0.5)
    assert 0 < len(expected) < 80
    assert found.tolist() == expected


def test_suppression_of_nothing_is_nothing() -> None:
    assert suppress(torch.zeros(0, 4), torch.zeros(0), 0.5).tolist() == []


def test_mask_boxes_hold_the_masks_exactly() -> None:
    masks = torch.zeros(3, 9, 12, dtype=torch.bool)
    masks[0, 2:5, 3:11] = True
    masks[1, 8, 0] = True
    assert mask_boxes(masks).tolist() == [[3, 2, 11, 5], [0, 8, 1, 9], [0, 0, 0, 0]]


def test_stability_is_the_iou_of_the_two_thresholds() -> None:
    logits = torch.tensor(
        [[[2.0, 0.5], [-0.5, -3.0]], [[9.0, 9.0], [-9.0, -9.0]], [[-9.0] * 2] * 2]
    )
    assert stability_score(logits).tolist() == pytest.approx([1 / 3, 1.0, 0.0])


def test_grid_points_are_evenly_spaced_in_the_original_and_inside_the_model() -> None:
    points = grid_points((64, 256), (256, 1600), 20)
    assert 300 <= len(points) <= 500
    x, y = points[:, 0].unique() * 1600 / 256, points[:, 1].unique() * 256 / 64
    assert x.diff().mean().item() == pytest.approx(y.diff().mean().item(), rel=0.1)
    assert points.min() > 0
    assert points[:, 0].max() < 256
    assert points[:, 1].max() < 64
    assert len(points.unique(dim=0)) == len(points)


def test_a_mask_that_better_ones_cover_is_dropped() -> None:
    whole, left, right, apart = np.zeros((4, 20, 20), dtype=bool)
    whole[5:15, 5:15] = left[5:15, 5:10] = right[5:15, 12:20] = apart[0:3, 0:3] = True
    found = [instance_of(mask, score) for mask, score in
             ((left, 0.8), (whole, 0.9), (right, 0.7), (apart, 0.6))]  # fmt: skip
    kept = automatic._drop_covered(found, 0.5)
    assert [instance.score for instance in kept] == [
        0.9,
        0.7,
        0.6,
    ]  # right: 30 of 80 pixels covered
    assert len(automatic._drop_covered(found, 1.0)) == 4


@pytest.mark.parametrize(
    ("size", "side"), [((100, 260), 64), ((64, 64), 64), ((65, 640), 64), ((50, 60), 0)]
)
def test_tiles_cover_every_pixel_and_overlap(size: tuple[int, int], side: int) -> None:
    tiles = list(automatic._tiles(size, side, 0.25))
    seen = np.zeros(size, dtype=int)
    for x0, y0, x1, y1 in tiles:
        assert 0 <= x0 < x1 <= size[1]
        assert 0 <= y0 < y1 <= size[0]
        seen[y0:y1, x0:x1] += 1
    assert seen.min() >= 1
    starts = sorted({tile.x0 for tile in tiles})
    assert all(b - a <= 0.75 * side for a, b in pairwise(starts))


def test_objects_cut_by_tiles_are_put_together_pixel_by_pixel() -> None:
    size = (100, 200)
    long, small, corner = np.zeros((3, *size), dtype=bool)
    long[30:40, 10:190] = True  # through three tiles
    small[60:70, 65:72] = True  # wholly inside a strip that two tiles see
    corner[45:80, 120:175] = True
    tiles = list(automatic._tiles(size, 80, 0.25))
    found = []
    for x0, y0, x1, y1 in tiles:
        views = [mask[y0:y1, x0:x1] for mask in (long, small, corner)]
        found.append([instance_of(view, 0.9, 1.0) for view in views if view.any()])
    assert sum(map(len, found)) > 6
    joined = automatic._join(tiles, found, 0.5)
    masks = sorted((instance.mask(size) for instance in joined), key=lambda mask: mask.sum())
    assert len(masks) == 3
    for mask, truth in zip(masks, (small, long, corner), strict=True):
        assert (mask == truth).all()


def test_neighbours_that_disagree_in_the_common_strip_stay_apart() -> None:
    tiles = [automatic._Tile(0, 0, 60, 50), automatic._Tile(40, 0, 100, 50)]
    left = Instance((10, 5, 58, 15), np.ones((10, 48), dtype=bool), 0.9)
    right = Instance((2, 14, 40, 30), np.ones((16, 38), dtype=bool), 0.9)
    assert len(automatic._join(tiles, [[left], [right]], 0.5)) == 2


def test_an_instance_gives_its_mask_back_and_an_empty_one_nothing() -> None:
    mask = np.zeros((12, 17), dtype=bool)
    mask[3:7, 5] = mask[4, 2:9] = True
    instance = instance_of(mask, 0.5)
    assert instance.box == (2, 3, 9, 7)
    assert (instance.mask((12, 17)) == mask).all()
    assert not instance_of(np.zeros((12, 17), dtype=bool), 0.5).mask((12, 17)).any()


OPEN = Grid(points_per_side=4, min_score=0, min_stability=0, min_object_score=-99, max_area=1,
            max_box_iou=1, max_overlap=1)  # fmt: skip


def test_a_run_keeps_what_passes_every_filter(network: Any) -> None:
    everything = segment(network, picture(), OPEN)
    assert len(everything) > 3
    assert [i.score for i in everything] == sorted((i.score for i in everything), reverse=True)
    for instance in everything:
        x0, y0, x1, y1 = instance.box
        assert 0 <= x0 < x1 <= 160
        assert 0 <= y0 < y1 <= 96
        assert instance.crop.shape == (y1 - y0, x1 - x0)
        assert instance.crop[0].any()
        assert instance.crop[:, -1].any()

    scores = sorted(instance.score for instance in everything)
    middle = scores[len(scores) // 2]
    better = segment(network, picture(), Grid(**{**vars(OPEN), "min_score": middle}))
    assert 0 < len(better) < len(everything)
    assert min(instance.score for instance in better) >= middle
    assert segment(network, picture(), Grid(**{**vars(OPEN), "min_object_score": 99})) == []
    assert segment(network, picture(), Grid(**{**vars(OPEN), "min_stability": 1.01})) == []
    assert segment(network, picture(), Grid(**{**vars(OPEN), "min_area": 10**6})) == []


def test_a_run_in_tiles_sees_the_whole_picture_and_not_more(network: Any) -> None:
    set_image_size(network, (64, 64))
    found = segment(network, picture(96, 300), OPEN, tile=64)
    assert max(instance.box[2] for instance in found) > 290
    assert max(instance.box[3] for instance in found) <= 96
    assert all(instance.mask((96, 300)).sum() == instance.crop.sum() for instance in found)


def test_a_picture_that_fits_is_not_cut(network: Any) -> None:
    whole, tiled = segment(network, picture(), OPEN), segment(network, picture(), OPEN, tile=160)
    assert [instance.box for instance in whole] == [instance.box for instance in tiled]
