"""Transforms of scenes: the recorded results, and what each of them promises."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_scenes import made_scene

from lora_core.errors import ConfigError, DataError
from lora_core.testing import load_golden
from scenesplat_lora.scenes.grid_sample import voxelise
from scenesplat_lora.transforms import (
    build_transform,
    compose,
    evaluation_fragments,
    evaluation_transforms,
    training_transforms,
    validation_transforms,
)
from scenesplat_lora.transforms.geometry import (
    box_filter,
    distort,
    flip,
    quaternion_product,
    rotate,
    rotation_matrix,
    trilinear,
)

CASE = load_golden(Path(__file__).parent / "goldens" / "transforms")
IO = {name: tensor.numpy() for name, tensor in CASE.io.items()}
CASES = {case["tag"]: case["transform"] for case in CASE.config["cases"]}


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def recorded_scene() -> dict[str, Any]:
    return {name[3:]: array.copy() for name, array in IO.items() if name.startswith("in.")}


def matrices(quat: np.ndarray) -> np.ndarray:
    """Rotation matrices [N, 3, 3] of unit quaternions (w, x, y, z) [N, 4]."""
    w, x, y, z = quat.astype(np.float64).T
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return np.moveaxis(np.array(rows), 2, 0)


@pytest.mark.parametrize("tag", [tag for tag in CASES if tag != "autocontrast"])
def test_recorded_results_are_met(tag: str) -> None:
    scene = recorded_scene()
    before = {name: array.copy() for name, array in scene.items()}
    after = build_transform(CASES[tag])(scene, rng())
    expected = {n.partition(".")[2]: a for n, a in IO.items() if n.startswith(f"{tag}.")}
    assert expected
    for name, array in before.items():
        np.testing.assert_array_equal(scene[name], array)  # what was given stays
        found, wanted = after[name], expected.get(name, array)
        assert found.dtype == wanted.dtype
        if name == "quat" and tag == "flip_xy":  # q and -q are one rotation
            found = found * np.sign((found * wanted).sum(axis=1, keepdims=True))
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


# -- geometry --------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", ["x", "y", "z"])
def test_a_rotation_turns_positions_normals_and_gaussians_alike(axis: Any) -> None:
    scene = made_scene(30) | {"pc_coord": rng(1).random((7, 3)), "pc_segment": np.zeros(7)}
    matrix = rotation_matrix(axis, 0.7)
    assert np.linalg.det(matrix) == pytest.approx(1)
    turned = rotate(scene, 0.7, axis, (1, 2, 3))
    centre = np.array([1, 2, 3])
    for name in ("coord", "pc_coord"):
        expected = (scene[name] - centre) @ matrix.T + centre
        np.testing.assert_allclose(turned[name], expected, atol=1e-5)
    np.testing.assert_allclose(turned["normal"], scene["normal"] @ matrix.T, atol=1e-6)
    expected = matrix @ matrices(scene["quat"])
    np.testing.assert_allclose(matrices(turned["quat"]), expected, atol=1e-6)


def test_a_quaternion_product_is_the_product_of_the_rotations() -> None:
    a, b = made_scene(2, seed=5)["quat"].astype(np.float64)
    product = quaternion_product(a, b[None])
    expected = matrices(a[None]) @ matrices(b[None])
    np.testing.assert_allclose(matrices(product), expected, atol=1e-6)


@pytest.mark.parametrize("axis", ["x", "y"])
def test_a_flip_mirrors_gaussians_as_matrices_do(axis: str) -> None:
    scene = made_scene(30)
    mirror = np.diag([-1.0 if a == axis else 1.0 for a in "xyz"])
    flipped = flip(scene, axis)
    np.testing.assert_array_equal(flipped["coord"], scene["coord"] @ mirror.astype(np.float32))
    expected = mirror @ matrices(scene["quat"]) @ mirror
    np.testing.assert_allclose(matrices(flipped["quat"]), expected, atol=1e-6)
    np.testing.assert_array_equal(flip(flipped, axis)["quat"], scene["quat"])


def test_flips_of_x_and_y_are_independent() -> None:
    step = build_transform({"type": "RandomFlip", "p": 0.5})
    scene = made_scene(3)
    signs = {tuple(np.sign(step(scene, rng(s))["coord"][0, :2])) for s in range(50)}
    assert len(signs) == 4


def test_random_rotations_cover_their_range_and_their_probability() -> None:
    spec = {"type": "RandomRotate", "angle": [-0.25, 0.25], "axis": "z", "center": [0, 0, 0]}
    step = build_transform(spec | {"p": 0.5})
    scene = made_scene(2) | {"coord": np.array([[1, 0, 0], [0, 0, 0]], np.float32)}
    turned = [step(scene, rng(seed))["coord"][0] for seed in range(400)]
    angles = np.array([math.atan2(y, x) for x, y, _ in turned])
    assert np.abs(angles).max() <= math.pi / 4
    assert angles.min() < -0.7
    assert angles.max() > 0.7
    assert 0.4 < (angles == 0).mean() < 0.6


def test_scale_changes_gaussians_as_much_as_positions() -> None:
    scene = made_scene(9)
    scaled = build_transform({"type": "RandomScale", "scale": [0.9, 1.1]})(scene, rng())
    factor = scaled["scale"] / scene["scale"]
    np.testing.assert_allclose(factor, factor[0, 0], rtol=1e-5)
    np.testing.assert_allclose(scaled["coord"], scene["coord"] * factor[0, 0], rtol=1e-4)
    assert 0.9 <= factor[0, 0] <= 1.1


def test_jitter_is_clipped_and_moves_centres_only() -> None:
    scene = made_scene(5000)
    step = build_transform({"type": "RandomJitter", "sigma": 0.005, "clip": 0.01})
    moved = step(scene, rng())["coord"] - scene["coord"]
    assert np.abs(moved).max() <= 0.01 + 1e-6
    assert 0.004 < moved.std() < 0.005
    assert step(scene, rng())["quat"] is scene["quat"]


def test_elastic_distortion_is_smoothed_noise_between_nodes() -> None:
    coord = made_scene(40, side=1.5)["coord"]
    low, step = coord.min(axis=0), 0.2
    nodes = np.floor((coord.max(axis=0) - low) / np.float32(step)).astype(int) + 3
    noise = np.pad(rng(3).standard_normal((*nodes, 3), dtype=np.float32), ((1, 1),) * 3 + ((0, 0),))
    for axis in (0, 1, 2, 0, 1, 2):  # brute force: shifted copies of a zero-padded grid
        noise = (noise + np.roll(noise, 1, axis) + np.roll(noise, -1, axis)) / 3
        noise[[0, -1]] = noise[:, [0, -1]] = noise[:, :, [0, -1]] = 0
    noise = noise[1:-1, 1:-1, 1:-1]
    ticks = [np.linspace(low[a] - step, low[a] + step * (nodes[a] - 2), nodes[a]) for a in range(3)]
    expected = np.zeros((40, 3))
    for number, point in enumerate(coord):
        hats = [np.maximum(0, 1 - np.abs(ticks[a] - point[a]) / step) for a in range(3)]
        expected[number] = np.einsum("i,j,k,ijkc->c", *hats, noise)
    found = distort(coord, step, 0.4, rng(3))
    np.testing.assert_allclose(found, coord + 0.4 * expected, atol=1e-5)
    assert np.abs(found - coord).max() > 0.01


def test_interpolation_meets_the_nodes_and_the_last_border() -> None:
    values = rng().standard_normal((3, 4, 5, 2))
    at = np.array([[0, 0, 0], [2, 3, 4], [1, 2, 2.5]], dtype=float)
    expected = [values[0, 0, 0], values[2, 3, 4], (values[1, 2, 2] + values[1, 2, 3]) / 2]
    np.testing.assert_allclose(trilinear(values, at), expected)


def test_the_box_filter_sees_zeros_beyond_the_border() -> None:
    np.testing.assert_allclose(box_filter(np.array([3.0, 6, 9]), 0), [3, 6, 5])


def test_a_scene_too_large_to_distort_says_so() -> None:
    coord = np.array([[0, 0, 0], [900, 900, 100]], dtype=np.float32)
    with pytest.raises(ConfigError, match="ElasticDistortion: 4502 x 4502 x 502 nodes"):
        distort(coord, 0.2, 0.4, rng())


# -- colours ---------------------------------------------------------------------------------------


def test_auto_contrast_stretches_each_channel() -> None:
    scene = {"color": np.array([[50, 7, 0], [100, 7, 255], [150, 7, 51]], np.float32)}
    step = build_transform({"type": "ChromaticAutoContrast", "p": 1.0, "blend_factor": 0.3})
    color = step(scene, rng())["color"]
    np.testing.assert_allclose(color[:, 0], [35, 0.7 * 100 + 0.3 * 127.5, 0.7 * 150 + 76.5])
    np.testing.assert_array_equal(color[:, 1], [7, 7, 7])  # nothing to stretch
    np.testing.assert_allclose(color[:, 2], [0, 255, 51])


@pytest.mark.parametrize("kind", ["ChromaticTranslation", "ChromaticJitter"])
def test_colour_noise_stays_in_range_and_has_its_probability(kind: str) -> None:
    scene = made_scene(300)
    step = build_transform({"type": kind, "p": 0.5})
    results = [step(scene, rng(seed))["color"] for seed in range(60)]
    changed = [not np.array_equal(color, scene["color"]) for color in results]
    assert 15 < sum(changed) < 45
    assert all(color.min() >= 0 and color.max() <= 255 for color in results)
    inner = (scene["color"] > 80) & (scene["color"] < 170)
    shift = (results[changed.index(True)] - scene["color"])[inner]
    assert 0 < np.abs(shift).max() < (12.76 if kind == "ChromaticTranslation" else 70)
    spread = [len(np.unique(np.round(c - scene["color"], 2)[:, 0][inner[:, 0]])) for c in results]
    assert (max(spread) == 1) == (kind == "ChromaticTranslation")  # one shift for all, or each


# -- sampling --------------------------------------------------------------------------------------


def test_dropout_keeps_four_of_five_rows_of_every_array() -> None:
    scene = made_scene(101) | {"row": np.arange(101), "pc_coord": np.zeros((101, 3))}
    spec = {"type": "RandomDropout", "dropout_ratio": 0.2, "dropout_application_ratio": 1.0}
    kept = build_transform(spec)(scene, rng())
    assert len(set(kept["row"].tolist())) == 80
    for name in made_scene(2):
        np.testing.assert_array_equal(kept[name], scene[name][kept["row"]])
    assert len(kept["pc_coord"]) == 101
    assert len(build_transform(spec)(made_scene(1), rng())["coord"]) == 1


def test_a_crop_is_the_nearest_rows_and_leaves_small_scenes_alone() -> None:
    scene = made_scene(100) | {"row": np.arange(100)}
    step = build_transform({"type": "SphereCrop", "point_max": 30, "mode": "random"})
    crop = step(scene, rng())
    centre = crop["coord"][0]
    outside = np.setdiff1d(np.arange(100), crop["row"])
    distance = np.linalg.norm(scene["coord"] - centre, axis=1)
    assert len(crop["row"]) == 30
    assert distance[crop["row"]].max() <= distance[outside].min()
    assert step(made_scene(30), rng())["coord"].shape == (30, 3)


# -- tensors and whole lists -----------------------------------------------------------------------


@pytest.mark.fault("P27")
def test_tensors_have_the_networks_types_and_empty_features_are_not_learned() -> None:
    scene = made_scene(20) | {"name": "room_1"}
    scene["lang_feat"][1] = 0  # marked valid
    tensors = build_transform({"type": "ToTensor"})(scene, rng())
    assert tensors["segment"].dtype == torch.int64
    assert (tensors["lang_feat"].dtype, tensors["coord"].dtype) == (torch.float16, torch.float32)
    assert tensors["valid_feat_mask"].dtype == torch.bool
    assert tensors["valid_feat_mask"].tolist() == [i % 4 != 0 and i != 1 for i in range(20)]
    assert tensors["name"] == "room_1"


def test_the_training_list_gives_what_the_network_takes() -> None:
    scene = made_scene(3000) | {"name": "room_1"}
    batch = compose(training_transforms(point_max=500))(scene, rng(4))
    assert batch["feat"].shape == (500, 11)
    assert batch["offset"].tolist() == [500]
    assert batch["lang_feat"].shape == (500, 6)
    assert batch["name"] == "room_1"
    assert (batch["grid_coord"] >= 0).all()
    assert len(torch.unique(batch["grid_coord"], dim=0)) == 500
    again = compose(training_transforms(point_max=500))(scene, rng(4))
    assert all(torch.equal(batch[name], again[name]) for name in batch if name != "name")
    other = compose(training_transforms(point_max=500))(scene, rng(5))
    assert not torch.equal(batch["feat"], other["feat"])


def test_features_are_colour_opacity_quaternion_scale() -> None:
    batch = compose(validation_transforms())(made_scene(50, side=50.0), rng())
    scene, color = made_scene(50, side=50.0), batch["feat"][:, :3]
    assert color.min() >= -1
    assert color.max() <= 1
    rows = voxelise(build_transform({"type": "CenterShift"})(scene, rng())["coord"], 0.02).order
    expected = [scene["color"] / 127.5 - 1, scene["opacity"], scene["quat"], scene["scale"]]
    np.testing.assert_allclose(batch["feat"], np.concatenate(expected, 1)[rows], atol=1e-6)


@pytest.mark.fault("P40")
def test_evaluation_gives_every_gaussian_a_prediction() -> None:
    scene = made_scene(2000, side=0.4)
    whole = compose(evaluation_transforms())(scene, rng())
    np.testing.assert_array_equal(whole["origin_segment"], scene["segment"])
    assert len(whole["origin_coord"]) == len(whole["inverse"]) == 2000
    seen = np.zeros(len(whole["coord"]), dtype=int)
    count = 0
    for fragment in evaluation_fragments(whole, rng()):
        np.add.at(seen, fragment["index"].numpy(), 1)
        assert fragment["feat"].shape == (len(fragment["index"]), 11)
        count += 1
    assert count > 1
    assert (seen[whole["inverse"]] >= 1).all()
    near = np.linalg.norm(whole["coord"][whole["inverse"]] - _shifted(scene), axis=1)
    assert near.max() < 0.01 * math.sqrt(3) + 1e-6


def _shifted(scene: dict[str, Any]) -> np.ndarray:
    return build_transform({"type": "CenterShift"})(scene, rng())["coord"]


def test_all_faults_of_a_list_are_told_together_with_the_nearest_names() -> None:
    specs = [{"type": "CenterShfit"}, {"type": "RandomFlip", "prob": 1}, {"p": 1}]
    with pytest.raises(ConfigError) as error:
        compose(specs, "data.train.transform")
    lines = str(error.value).splitlines()
    assert "data.train.transform[0]" in lines[0]
    assert "did you mean 'CenterShift'" in lines[0]
    assert "RandomFlip has no argument 'prob'" in lines[1]
    assert "expected dict(type=" in lines[2]


def test_fragments_do_not_belong_into_a_list() -> None:
    with pytest.raises(ConfigError, match="mode 'test'"):
        build_transform({"type": "GridSample", "mode": "test"})


def test_an_array_that_a_scene_has_not_is_named() -> None:
    step = build_transform({"type": "Collect", "keys": ["coord", "normals"]})
    with pytest.raises(DataError, match=r"room_1: Collect asks for 'normals'.*'normal'"):
        step(made_scene(3) | {"name": "room_1"}, rng())
