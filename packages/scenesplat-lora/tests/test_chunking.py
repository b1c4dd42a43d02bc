"""Scenes cut into columns: the recorded windows exactly, and what the official code loses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from made_scenes import made_scene

from lora_core.errors import ConfigError
from lora_core.testing import load_golden
from scenesplat_lora.scenes.chunking import Chunks, cut_scene, one_per_cell, windows
from scenesplat_lora.scenes.grid_sample import voxelise

CASE = load_golden(Path(__file__).parent / "goldens" / "chunking")


@pytest.mark.parametrize("name", CASE.config["cases"])
def test_windows_and_folders_are_the_recorded_ones(name: str) -> None:
    most = CASE.config["cases"][name]["max_chunk_num"]
    chunks = Chunks(minimum=CASE.config["chunk_minimum_size"], most=most)
    found = windows(CASE.io["coord"].numpy(), chunks)
    folders = [f"{chunks.split('train')}/sc_{number}" for number in range(len(found))]
    assert folders == CASE.config["folders"][name]
    for rows, folder in zip(found, folders, strict=True):
        recorded = CASE.io[f"{name}.{Path(folder).name}.index"].numpy()
        np.testing.assert_array_equal(rows, recorded)


def test_the_official_split_has_its_name() -> None:
    assert Chunks(grid_size=0.01).split("train") == "train_grid1.0cm_chunk6x6_stride3x3"


@pytest.mark.parametrize("side", [0.0, 1.0, 2.9])
def test_a_small_scene_is_one_chunk(side: float) -> None:
    scene = made_scene(50, side=side)
    (rows,) = windows(scene["coord"], Chunks(minimum=1))
    np.testing.assert_array_equal(rows, np.arange(50))


@pytest.mark.fault("P29")
def test_every_row_is_in_some_chunk() -> None:
    coord = made_scene(3000, side=17.3)["coord"]
    found = windows(coord, Chunks(minimum=1))
    np.testing.assert_array_equal(np.unique(np.concatenate(found)), np.arange(3000))


def test_chunks_keep_coordinates_and_get_unit_features() -> None:
    scene = made_scene(400, side=8.0)
    scene["coord"] += 100
    for chunk in cut_scene(scene, Chunks(minimum=1), np.random.default_rng(0)):
        assert chunk["coord"].min() >= 100
        norm = np.linalg.norm(chunk["lang_feat"].astype(np.float32), axis=1)
        np.testing.assert_allclose(norm[chunk["valid_feat_mask"]], 1, atol=2e-3)
        assert (norm[~chunk["valid_feat_mask"]] == 0).all()
        assert chunk["lang_feat"].dtype == np.float16
        assert {len(value) for value in chunk.values()} == {len(chunk["coord"])}
    assert np.linalg.norm(scene["lang_feat"].astype(np.float32), axis=1).max() > 1.5


def test_one_row_per_cell_prefers_usable_features() -> None:
    scene = made_scene(500, side=1.0) | {"row": np.arange(500)}
    voxels = voxelise(scene["coord"] - scene["coord"].min(axis=0), 0.2)
    inverse = voxels.inverse()
    seen: set[int] = set()
    for seed in range(40):
        kept = one_per_cell(scene, 0.2, np.random.default_rng(seed))
        np.testing.assert_array_equal(np.sort(inverse[kept["row"]]), np.arange(len(voxels.count)))
        for row in kept["row"]:
            members = np.flatnonzero(inverse == inverse[row])
            usable = scene["valid_feat_mask"][members]
            assert scene["valid_feat_mask"][row] == usable.any()
            assert usable.any() or row == members[0]
        seen |= set(kept["row"].tolist())
    assert seen >= set(np.flatnonzero(scene["valid_feat_mask"] & (voxels.count[inverse] < 8)))


@pytest.mark.parametrize(
    "wrong", [{"range": (0, 6)}, {"stride": (3,)}, {"most": 0}, {"minimum": 0}]
)
def test_impossible_chunks_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="chunk"):
        Chunks(**wrong)  # type: ignore[arg-type]
