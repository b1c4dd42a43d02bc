"""Batches of scenes, and scenes mixed into one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from made_scenes import made_scene

from lora_core.errors import DataError
from scenesplat_lora.network.point_batch import PointBatch
from scenesplat_lora.scenes.collate import collate, collate_mixed, mixed_offset
from scenesplat_lora.transforms import compose, validation_transforms


def samples(*sizes: int) -> list[dict[str, Any]]:
    step = compose(validation_transforms(grid_size=1e-4))
    scenes = [made_scene(rows, seed=rows) | {"name": f"room_{rows}"} for rows in sizes]
    return [step(scene, np.random.default_rng(0)) for scene in scenes]


def test_a_batch_is_the_rows_of_all_scenes_and_their_ends() -> None:
    given = samples(5, 3, 7)
    batch = collate(given)
    assert batch["offset"].tolist() == [5, 8, 15]
    assert batch["name"] == ["room_5", "room_3", "room_7"]
    assert torch.equal(batch["feat"][5:8], given[1]["feat"])
    assert PointBatch.from_mapping(batch).sizes == [5, 3, 7]


@pytest.mark.parametrize(
    ("ends", "mixed"),
    [([4], [4]), ([4, 9], [9]), ([4, 9, 12], [9, 12]), ([1, 2, 3, 4], [2, 4])],
)
def test_neighbours_become_one_scene(ends: list[int], mixed: list[int]) -> None:
    assert mixed_offset(torch.tensor(ends)).tolist() == mixed


def test_scenes_are_mixed_as_often_as_asked_and_rows_stay() -> None:
    given = samples(5, 3)
    rng = np.random.default_rng(0)
    batches = [collate_mixed(given, rng, 0.8) for _ in range(200)]
    ones = sum(len(batch["offset"]) == 1 for batch in batches)
    assert 140 < ones < 180
    assert all(batch["offset"][-1] == len(batch["feat"]) == 8 for batch in batches)
    assert all(len(collate_mixed(given, rng, 0.0)["offset"]) == 2 for _ in range(9))


def test_samples_that_do_not_fit_together_are_named() -> None:
    first, second, third = samples(5, 3, 7)
    del second["segment"]
    third["lang_feat"] = third["lang_feat"][:, :4]
    with pytest.raises(DataError) as error:
        collate([first, second, third])
    assert "room_3: segment only" in str(error.value)
    assert "room_7: lang_feat has rows of shape (4,), not (6,)" in str(error.value)


def test_a_scene_without_rows_never_becomes_part_of_a_batch() -> None:
    first, second = samples(5, 3)
    empty = {name: v[:0] if torch.is_tensor(v) else v for name, v in second.items()}
    empty["offset"] = torch.tensor([0])
    with pytest.raises(DataError, match="room_3: no rows are left"):
        collate([first, empty])
    with pytest.raises(DataError, match="at least one scene"):
        collate([])
