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
from scenesplat_lora.scenes.grid_sample import _changes
from scenesplat_lora.scenes.scene import highest, lowest
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


def test_rows_with_a_value_are_found_wherever_it_stands() -> None:
    rows = torch.zeros(40, 64, dtype=torch.float16)
    rows[torch.arange(0, 40, 2), torch.arange(20) * 3] = 1e-7  # the least that is not zero
    rows[1] = -0.0
    rows[3, 60] = float("nan")
    assert torch.equal(some_value(rows), (rows != 0).any(dim=1))
    assert some_value(rows).sum() == 21


# -- half precision until the loss -----------------------------------------------------------------


def test_features_keep_half_precision_and_the_loss_sees_the_same_numbers() -> None:
    scene = made_scene(300)
    half = to_tensor(scene, rng())
    whole = to_tensor(scene | {"lang_feat": scene["lang_feat"].astype(np.float32)}, rng())
    assert (half["lang_feat"].dtype, whole["lang_feat"].dtype) == (torch.float16, torch.float32)
    assert torch.equal(half["valid_feat_mask"], whole["valid_feat_mask"])
    pred = torch.nn.functional.normalize(torch.randn(300, half["lang_feat"].shape[1]), dim=1)
    terms = [Term("CosineSimilarity"), Term("L2Loss")]

    def loss(batch: dict[str, Any]) -> torch.Tensor:
        return objective._distilled(terms, lambda _: pred, batch | {"progress": 0.0})[0]

    assert torch.equal(loss(half), loss(whole))
    # Taken as they are, half-precision targets have lengths in half precision: another loss.
    direct = distillation_loss(pred, half["lang_feat"], half["valid_feat_mask"], None, terms)[0]
    assert not torch.equal(direct, loss(whole))


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
