"""What makes samples fast changes no bit of them: each quick form beside the slow one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_scenes import made_scene

from scenesplat_lora import objective
from scenesplat_lora.losses import Term, distillation_loss
from scenesplat_lora.scenes.collate import collate
from scenesplat_lora.scenes.grid_sample import _changes
from scenesplat_lora.scenes.scene import (
    DeferredRows,
    by_column,
    deferred,
    highest,
    lowest,
    stable_order,
    take_rows,
)
from scenesplat_lora.scenes.values import LAYOUTS, MEANING
from scenesplat_lora.transforms import compose, training_transforms
from scenesplat_lora.transforms.color import chromatic_auto_contrast
from scenesplat_lora.transforms.geometry import trilinear
from scenesplat_lora.transforms.tensors import some_value, to_tensor


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def slow_trilinear(values: np.ndarray, at: np.ndarray) -> np.ndarray:
    last = np.array(values.shape[:3]) - 2
    node = np.clip(np.floor(at).astype(np.int64), 0, last)
    share = (at - node).astype(values.dtype)
    total = np.zeros((len(at), values.shape[3]), dtype=values.dtype)
    for corner in np.ndindex(2, 2, 2):
        weight = np.where(corner, share, 1 - share).prod(axis=1)
        i, j, k = (node + corner).T
        total += weight[:, None] * values[i, j, k]
    return total


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_interpolation_node_by_node_is_that_by_three_indices(dtype: Any) -> None:
    values = rng().standard_normal((5, 7, 4, 3)).astype(dtype)
    at = rng(1).uniform(-0.5, 6.5, (3000, 3)).astype(np.float32)
    np.testing.assert_array_equal(trilinear(values, at), slow_trilinear(values, at))


@pytest.mark.parametrize(
    "values",
    [
        rng().standard_normal((500, 3), dtype=np.float32),
        rng().integers(-9, 9, (500, 3)),
        np.array([[1, np.nan, 3], [4, 5, 6]], np.float32),
    ],
    ids=["f32", "i64", "nan"],
)
def test_bounds_column_by_column_are_those_of_all_rows(values: np.ndarray) -> None:
    for quick, slow in ((lowest(values), values.min(0)), (highest(values), values.max(0))):
        np.testing.assert_array_equal(quick, slow)
        assert quick.dtype == slow.dtype


def test_rows_differ_where_any_column_does() -> None:
    rows = rng().integers(0, 2, (400, 3))
    slow = np.concatenate([[True], (rows[1:] != rows[:-1]).any(axis=1)])
    np.testing.assert_array_equal(_changes(rows), slow)


@pytest.mark.parametrize("operation", [np.add, np.subtract, np.multiply])
@pytest.mark.parametrize(("first", "second"), [("f4", "f8"), ("f4", "f4"), ("i8", "i8")])
def test_columns_one_by_one_are_all_of_them(operation: Any, first: str, second: str) -> None:
    values, vector = (rng().normal(0, 9, (300, 3)), rng(1).normal(0, 9, 3))
    values, vector = values.astype(first), vector.astype(second)
    found, slow = by_column(operation, values, vector), operation(values, vector)
    np.testing.assert_array_equal(found, slow)
    assert found.dtype == slow.dtype


@pytest.mark.parametrize("flat", [False, True])
def test_colours_are_stretched_as_all_channels_at_once(flat: bool) -> None:
    color = made_scene(300)["color"]
    color[:, 1] = 7 if flat else color[:, 1]
    low, extent = color.min(axis=0, keepdims=True), np.ptp(color, axis=0, keepdims=True)
    stretched = np.where(extent > 0, (color - low) * (255 / np.where(extent > 0, extent, 1)), color)
    found = chromatic_auto_contrast({"color": color}, rng(), p=1, blend_factor=0.3)["color"]
    np.testing.assert_array_equal(found, ((1 - 0.3) * color + 0.3 * stretched).astype(np.float32))


def test_equal_keys_keep_their_order_and_large_keys_come_last() -> None:
    keys = rng().integers(0, 2**64, 400, dtype=np.uint64)[rng(1).integers(0, 400, 3000)]
    np.testing.assert_array_equal(stable_order(keys), np.argsort(keys, kind="stable"))
    distances = rng().integers(0, 50, 3000).astype(np.float32)
    np.testing.assert_array_equal(stable_order(distances), np.argsort(distances, kind="stable"))


@pytest.mark.parametrize("size", [1e-20, 0.5, 1.0, 1e18])
def test_lengths_of_quaternions_are_those_of_numpy(size: float) -> None:
    values = (rng().standard_normal((4000, 4)) * size).astype(np.float32)
    norm = np.linalg.norm(values.astype(np.float64), axis=1, keepdims=True)
    slow = (values / norm).astype(np.float32)
    slow = np.where(slow[:, :1] < 0, -slow, slow)
    np.testing.assert_array_equal(MEANING["quat"](values, LAYOUTS["generic"], []), slow)


@pytest.mark.parametrize("kind", ["numbers", "truth"])
def test_rows_are_taken_as_an_index_takes_them(tmp_path: Path, kind: str) -> None:
    scene = made_scene(50)
    np.save(tmp_path / "coord.npy", scene["coord"])
    scene["coord"] = np.load(tmp_path / "coord.npy", mmap_mode="r")
    scene["normal"] = np.asfortranarray(scene["normal"])
    rows = rng().permutation(50)[:20] if kind == "numbers" else rng().random(50) < 0.5
    for name, values in take_rows(scene, rows).items():
        assert type(values) is np.ndarray
        np.testing.assert_array_equal(values, scene[name][rows], err_msg=name)
    with pytest.raises(IndexError):
        take_rows(scene, np.array([50]))


def test_rows_with_a_value_are_found_wherever_it_stands() -> None:
    rows = torch.zeros(40, 64, dtype=torch.float16)
    rows[torch.arange(0, 40, 2), torch.arange(20) * 3] = 1e-7  # the least that is not zero
    rows[1] = -0.0
    rows[3, 60] = float("nan")
    assert torch.equal(some_value(rows), (rows != 0).any(dim=1))
    assert some_value(rows).sum() == 21
    assert torch.equal(some_value(rows.numpy()), some_value(rows))


# -- features copied once --------------------------------------------------------------------------


def sampled(scene: dict[str, Any], seed: int) -> dict[str, Any]:
    """A training sample that crops, and leaves out rows at random in one of two seeds."""
    specs = training_transforms(grid_size=0.1, point_max=900)
    specs[1] = specs[1] | {"dropout_application_ratio": 0.5}
    return compose(specs)(scene, rng(seed))


@pytest.mark.parametrize("seed", range(4))
def test_a_batch_of_deferred_features_is_that_of_copied_ones(tmp_path: Path, seed: int) -> None:
    scenes = [made_scene(1500, number) for number in (1, 2)]
    scenes[0]["lang_feat"][1] = 0  # marked valid
    np.save(tmp_path / "features.npy", scenes[0]["lang_feat"])
    mapped = np.load(tmp_path / "features.npy", mmap_mode="r")
    late = [deferred(scenes[0] | {"lang_feat": mapped}), deferred(scenes[1])]
    samples = [sampled(scene, seed) for scene in late]
    assert all(isinstance(sample["lang_feat"], DeferredRows) for sample in samples)
    found, slow = collate(samples), collate([sampled(scene, seed) for scene in scenes])
    assert len(found["lang_feat"]) <= 2 * 900  # cropped
    for name, values in slow.items():
        assert torch.equal(found[name], values), name
        assert found[name].dtype == values.dtype
        assert found[name].is_contiguous()
    found["lang_feat"].zero_()  # the file and the first scene keep theirs
    np.testing.assert_array_equal(mapped, scenes[0]["lang_feat"])
    assert scenes[1]["lang_feat"].any()


def test_half_and_single_precision_are_one_batch_in_single() -> None:
    half, single = made_scene(40, 1), made_scene(30, 2)
    single["lang_feat"] = single["lang_feat"].astype(np.float32)
    scenes = [half, single]
    for scene in (scenes, scenes[::-1]):
        found = collate([sampled(deferred(one), 0) for one in scene])["lang_feat"]
        slow = collate([sampled(one, 0) for one in scene])["lang_feat"]
        assert torch.equal(found, slow)
        assert found.dtype == torch.float32


def test_features_in_another_order_or_type_are_copied_at_once() -> None:
    scene = made_scene(30)
    for features in (np.asfortranarray(scene["lang_feat"]), scene["lang_feat"].astype(">f2")):
        assert deferred(scene | {"lang_feat": features})["lang_feat"] is features
    del scene["lang_feat"]
    assert deferred(scene) is scene


def test_deferred_rows_become_an_array_where_one_is_asked_for() -> None:
    features = made_scene(30)["lang_feat"]
    rows = DeferredRows(features, np.arange(30))[np.array([3, 1, 2])][np.array([True, False, True])]
    assert (rows.shape, rows.ndim, rows.dtype, len(rows)) == ((2, 6), 2, np.float16, 2)
    np.testing.assert_array_equal(np.array(rows), features[[3, 2]])
    np.testing.assert_array_equal(np.asarray(rows, dtype=np.float32), features[[3, 2]])
    with pytest.raises(ValueError, match="must be copied"):
        rows.__array__(copy=False)


# -- half precision until the loss -----------------------------------------------------------------


def test_features_keep_half_precision_and_the_loss_sees_the_same_numbers() -> None:
    scene = made_scene(300)
    half = to_tensor(scene, rng())
    whole = to_tensor(scene | {"lang_feat": scene["lang_feat"].astype(np.float32)}, rng())
    assert (half["lang_feat"].dtype, whole["lang_feat"].dtype) == (torch.float16, torch.float32)
    assert torch.equal(half["valid_feat_mask"], whole["valid_feat_mask"])
    drawn = torch.randn(300, half["lang_feat"].shape[1], generator=torch.Generator().manual_seed(0))
    pred = torch.nn.functional.normalize(drawn, dim=1).requires_grad_()
    terms = [Term("CosineSimilarity"), Term("L2Loss")]

    def loss(batch: dict[str, Any]) -> torch.Tensor:
        return objective._distilled(terms, lambda _: pred, batch | {"progress": 0.0})[0]

    assert torch.equal(loss(half), loss(whole))
    # Taken as they are, half-precision targets have lengths in half precision: other gradients,
    # although the loss may be rounded to the same number.
    direct = distillation_loss(pred, half["lang_feat"], half["valid_feat_mask"], None, terms)[0]
    gradients = [torch.autograd.grad(one, pred)[0] for one in (direct, loss(whole), loss(half))]
    assert not torch.equal(gradients[0], gradients[1])
    assert torch.equal(gradients[1], gradients[2])


def test_the_batch_holds_the_features_once() -> None:
    batch = {"lang_feat": torch.ones(4, 2, dtype=torch.float16)}
    objective.in_float32(batch)
    assert batch["lang_feat"].dtype == torch.float32


def test_tensors_of_mapped_files_are_copies(tmp_path: Path) -> None:
    features = rng().standard_normal((20, 6)).astype(np.float16)
    np.save(tmp_path / "lang_feat.npy", features)
    mapped = np.load(tmp_path / "lang_feat.npy", mmap_mode="r")
    tensors = to_tensor(made_scene(20) | {"lang_feat": mapped}, rng())
    tensors["lang_feat"].zero_()
    np.testing.assert_array_equal(np.load(tmp_path / "lang_feat.npy"), features)


@pytest.mark.parametrize("dtype", [">f2", ">f4", "<f8"])
def test_features_of_other_formats_become_float32_or_stay_half(dtype: str) -> None:
    scene = made_scene(20)
    tensors = to_tensor(scene | {"lang_feat": scene["lang_feat"].astype(dtype)}, rng())
    expected = torch.float16 if dtype == ">f2" else torch.float32
    assert tensors["lang_feat"].dtype == expected
    np.testing.assert_array_equal(tensors["lang_feat"].numpy(), scene["lang_feat"])
