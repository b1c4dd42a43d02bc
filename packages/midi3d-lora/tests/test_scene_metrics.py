"""Scores of scenes: recorded official values, ICP that undoes known motions, empty instances."""

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from lora_core.errors import DataError
from lora_core.testing import load_golden
from midi3d_lora.meshes.metrics import (
    Rigid,
    box_iou,
    compare,
    compare_aligned,
    fit_rigid,
    icp,
    mean_scores,
    score_scene,
    stretch,
)

GOLDEN = load_golden(Path(__file__).parent / "goldens" / "metrics")
EMPTY = np.zeros((0, 3))


def cloud(seed: int, n: int = 400) -> NDArray[np.float64]:
    """Points on an L-shaped bracket: without symmetry, so that there is one right rotation."""
    rng = np.random.default_rng(seed)
    points = rng.uniform(0, 1, (n, 3)) * [1.0, 0.2, 0.3]
    points[: n // 3] = rng.uniform(0, 1, (n // 3, 3)) * [0.2, 0.7, 0.3]
    return points - points.mean(0)


def motion(degrees: float, shift: float) -> Rigid:
    axis = np.array([1.0, -2.0, 0.5]) / np.linalg.norm([1.0, -2.0, 0.5])
    rotation = Rotation.from_rotvec(math.radians(degrees) * axis).as_matrix()
    return Rigid(rotation, shift * np.array([1.0, 0.5, -1.0]))


@pytest.mark.parametrize("case", [0, 1])
def test_scores_are_the_official_ones(case: int) -> None:
    io = {name: tensor[case].numpy() for name, tensor in GOLDEN.io.items()}
    scores = compare(io["pred"], io["gt"], GOLDEN.config["tau"])
    assert scores.chamfer == pytest.approx(io["chamfer"], abs=1e-6)
    assert scores.predicted_to_true == pytest.approx(io["chamfer_pred_to_gt"], abs=1e-6)
    assert scores.true_to_predicted == pytest.approx(io["chamfer_gt_to_pred"], abs=1e-6)
    assert scores.f_score == pytest.approx(io["fscore"], abs=1e-6)
    assert box_iou(io["pred"], io["gt"]) == pytest.approx(io["iou_bbox"], abs=1e-6)


def test_nearest_distances_are_those_of_all_pairs() -> None:
    ours, theirs = cloud(0, 90), cloud(1, 70) + 0.05
    pairs = ((ours[:, None] - theirs[None]) ** 2).sum(-1)
    scores = compare(ours, theirs, 0.1)
    assert scores.predicted_to_true == pytest.approx(pairs.min(1).mean(), rel=1e-12)
    assert scores.true_to_predicted == pytest.approx(pairs.min(0).mean(), rel=1e-12)
    assert scores.precision == (pairs.min(1) < 0.01).mean()
    assert scores.recall == (pairs.min(0) < 0.01).mean()


def test_fit_recovers_a_known_motion_exactly() -> None:
    source, known = cloud(2), motion(140, 0.8)
    found = fit_rigid(source, known(source))
    assert np.linalg.norm(found.rotation - known.rotation) < 1e-12
    np.testing.assert_allclose(found.translation, known.translation, atol=1e-12)


@pytest.mark.parametrize("flatten", [lambda p: p * [1, 1, 0], lambda p: p * [-1, 1, 1]])
def test_fit_never_mirrors(
    flatten: Callable[[NDArray[np.float64]], NDArray[np.float64]],
) -> None:
    source = cloud(3)
    rotation = fit_rigid(source, flatten(source)).rotation
    assert np.linalg.det(rotation) == pytest.approx(1)
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-12)


def test_icp_undoes_a_known_rigid_motion() -> None:
    target, known = cloud(4), motion(12, 0.05)
    found = icp(known(target), target, iterations=200, tolerance=0)
    assert np.linalg.norm(found.rotation @ known.rotation - np.eye(3)) < 1e-6
    np.testing.assert_allclose(found(known(target)), target, atol=1e-6)


def test_alignment_helps_nearly_aligned_clouds_of_other_points() -> None:
    predicted, true = motion(8, 0.1)(cloud(5)), cloud(6)
    plain, aligned = compare(predicted, true, 0.05), compare_aligned(predicted, true, 0.05)
    assert aligned.chamfer < 0.5 * plain.chamfer
    assert aligned.f_score > plain.f_score + 0.1


def test_iterations_never_raise_the_mean_squared_distance() -> None:
    source, target = motion(25, 0.2)(cloud(7)), cloud(8)
    errors = [
        compare(icp(source, target, n, tolerance=0)(source), target).predicted_to_true
        for n in range(8)
    ]
    assert all(after <= before + 1e-12 for before, after in itertools.pairwise(errors))
    assert errors[-1] < 0.5 * errors[0]


def test_boxes_apart_touching_and_flat() -> None:
    unit = np.array([[0.0, 0, 0], [1, 1, 1]])
    assert box_iou(unit, unit) == 1
    assert box_iou(unit + np.array([0.5, 0, 0]), unit) == pytest.approx(1 / 3)
    assert box_iou(unit + 1, unit) == 0
    assert box_iou(unit - 5, unit) == 0
    flat = unit * [1, 1, 0]
    assert box_iou(flat, flat) == 1
    assert box_iou(flat, flat + np.array([0, 0, 1])) == 0
    assert box_iou(flat, unit) == 0


def test_stretching_fills_the_box_per_axis_and_centres_flat_axes() -> None:
    stretched = stretch(cloud(9) * [3, 1, 0] + [5, 5, 5])
    np.testing.assert_allclose(stretched.min(0), [-0.95, -0.95, 0], atol=1e-12)
    np.testing.assert_allclose(stretched.max(0), [0.95, 0.95, 0], atol=1e-12)


def test_scores_of_a_perfect_scene() -> None:
    scene = [cloud(10), cloud(11) + 0.5]
    scores = score_scene(scene, scene)
    for name, value in scores.items():
        expected = 0 if "chamfer" in name or name == "empty_objects" else 1
        assert value == pytest.approx(expected, abs=1e-12), name


def test_objects_are_judged_by_shape_and_the_scene_by_place() -> None:
    up = np.array([0.0, 0, 1])
    true = [cloud(12), cloud(13) + up]
    swapped = [true[0] + 1.5 * up, true[1] - 1.5 * up]
    scores = score_scene(swapped, true)
    assert scores["object_chamfer"] == pytest.approx(0, abs=1e-12)
    assert scores["object_f_score"] == 1
    assert scores["scene_chamfer"] > 0.1
    assert scores["box_iou"] == 0


def test_an_instance_without_a_surface_is_a_miss_and_leaves_the_others() -> None:
    true = [cloud(14), cloud(15) + 1]
    scores = score_scene([true[0], EMPTY], true)
    assert scores["object_chamfer"] == pytest.approx(0, abs=1e-12)
    assert scores["object_f_score"] == scores["box_iou"] == 0.5
    assert scores["empty_objects"] == 1
    assert scores["scene_chamfer"] > 0.1


def test_a_scene_without_any_surface_has_no_distance_and_no_f_score() -> None:
    scores = score_scene([EMPTY], [cloud(16)])
    assert math.isnan(scores["scene_chamfer"])
    assert math.isnan(scores["object_chamfer_icp"])
    assert scores["scene_f_score"] == scores["scene_f_score_icp"] == scores["box_iou"] == 0


def test_means_leave_out_what_does_not_exist() -> None:
    means = mean_scores([{"a": 1.0, "b": math.nan}, {"a": 3.0, "b": 5.0}])
    assert means == {"a": 2.0, "b": 5.0}
    assert math.isnan(mean_scores([{"a": math.nan}])["a"])


def test_points_that_cannot_be_compared_are_refused() -> None:
    good = cloud(17)
    broken = good.copy()
    broken[3, 1] = np.nan
    with pytest.raises(DataError, match=r"predicted points: shape \[400, 2\]"):
        compare(good[:, :2], good)
    with pytest.raises(DataError, match="true points: 1 of 400 are NaN"):
        compare(good, broken)
    with pytest.raises(DataError, match="nothing to compare with"):
        compare(good, EMPTY)
    with pytest.raises(DataError, match="1 predicted instances for 2 true"):
        score_scene([good], [good, good])
    with pytest.raises(DataError, match="a true instance has no points"):
        score_scene([good], [EMPTY])
    with pytest.raises(DataError, match="nothing to align"):
        icp(EMPTY, good)
    with pytest.raises(DataError, match="no scores"):
        mean_scores([])
