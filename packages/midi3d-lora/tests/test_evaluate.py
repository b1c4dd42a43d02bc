"""`evaluate`: base beside LoRA and a merged model at the same noise; what is refused and kept."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import known_scenes as made
import numpy as np
import pytest
import trimesh

from lora_core.config import parse
from lora_core.errors import CheckpointError, ConfigError, DataError
from lora_core.testing.console import check_light
from midi3d_lora import evaluate
from midi3d_lora.meshes.extraction import Mesh
from midi3d_lora.meshes.metrics import score_scene
from midi3d_lora.scene_scores import remembered, scene_seed, surface_points

SMALL = ["--image_size", "56", "--num_points", "200"]


@pytest.fixture
def flags(tmp_path: Path) -> list[str]:
    data = made.write_scene_folders(tmp_path / "data")
    words = ["--data_dir", str(data), "--output", str(tmp_path / "out")]
    return [*made.QUICK, *made.WITH_BLOCKS, *SMALL, *words]


def results(tmp_path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    return content


def options(flags: list[str]) -> evaluate.Options:
    return parse(evaluate.Options, flags, prog="midi3d-lora evaluate")


def test_help_answers_without_heavy_libraries() -> None:
    check_light("midi3d-lora", ["evaluate", "--help"])


def test_models_differ_only_by_what_they_make_of_the_same_noise(
    tmp_path: Path, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = str(made.write_adapter(tmp_path / "lora_weights.pth"))
    words = ["--lora_path", adapter, "--merged_model", str(made.MODEL), "--save_meshes"]
    assert evaluate.main([*flags, *words]) == 0
    models = results(tmp_path)["models"]
    assert list(models) == ["base", "LoRA", "merged"]
    assert models["base"] == models["merged"]  # the same weights
    assert models["base"]["mean"] != models["LoRA"]["mean"]
    scenes = models["LoRA"]["scenes"]
    assert list(scenes) == ["scene_0000", "scene_0001"]
    chamfers = [scene["scene_chamfer"] for scene in scenes.values()]
    assert models["LoRA"]["mean"]["scene_chamfer"] == pytest.approx(np.mean(chamfers))
    said = capsys.readouterr().out
    assert all(word in said for word in ("scene_f_score", "box_iou", "base", "LoRA", "merged"))
    for name in models:
        assert (tmp_path / "out" / name / "scene_0001.glb").exists()


def test_a_stopped_evaluation_goes_on_where_it_was(tmp_path: Path, flags: list[str]) -> None:
    assert evaluate.main([*flags, "--max_scenes", "1"]) == 0
    first = tmp_path / "out" / "scores" / "model" / "scene_0000.json"
    kept = json.loads(first.read_text())
    kept["result"]["box_iou"] = 0.625
    first.write_text(json.dumps(kept))
    (tmp_path / "out" / "evaluation.json").unlink()
    assert evaluate.main(flags) == 0
    scenes = results(tmp_path)["models"]["model"]["scenes"]
    assert list(scenes) == ["scene_0000", "scene_0001"]
    assert scenes["scene_0000"]["box_iou"] == 0.625
    # What was found with other settings, or of other data, is not taken over.
    assert evaluate.main([*flags, "--overwrite", "--tau", "0.2"]) == 0
    assert results(tmp_path)["models"]["model"]["scenes"]["scene_0000"]["box_iou"] != 0.625
    for damaged in ("", "[]", '{"key": 3}'):
        first.write_text(damaged)
        assert remembered(options(flags), "model", tmp_path / "data" / "scene_0000") is None


def test_the_noise_of_a_scene_is_its_own(flags: list[str]) -> None:
    first, other = options(flags), options([*flags, "--seed", "3"])
    seeds = [scene_seed(one, name) for one in (first, other) for name in ("a", "b")]
    assert len(set(seeds)) == 4
    assert scene_seed(options([*flags, "--max_scenes", "1"]), "a") == seeds[0]


def test_points_of_generated_surfaces_are_scored(flags: list[str]) -> None:
    """Balls of the true sizes and places are right, and one without a surface is a miss."""
    true = [made.ball((0.4 * side, 0, 0), 0.3, 2000)[:, :3] for side in (-1, 1)]
    ball = trimesh.creation.icosphere(4, 0.3)
    meshes: list[Mesh | None] = []
    for side in (-1, 1):
        vertices = (ball.vertices + np.array([0.4 * side, 0, 0])).astype(np.float32)
        meshes.append(Mesh(vertices, ball.faces.astype(np.int32)))
    chosen = options([*flags, "--num_points", "2000"])
    right = score_scene(surface_points(meshes, "a", chosen), true)
    assert right["scene_f_score"] == 1
    assert right["scene_chamfer"] < 1e-3
    half = score_scene(surface_points([meshes[0], None], "a", chosen), true)
    assert half["object_f_score"] == pytest.approx(0.5, abs=0.01)
    assert half["empty_objects"] == 1


def test_scenes_are_looked_at_before_weights_are_read(tmp_path: Path, flags: list[str]) -> None:
    for name, file in (("scene_0000", "seg.png"), ("scene_0001", "surface.npy")):
        (tmp_path / "data" / name / file).unlink()
    with pytest.raises(DataError, match=r"(?s)scene_0000: misses seg.*scene_0001: misses surf"):
        evaluate.main(flags)


def test_an_evaluation_that_is_there_stays(tmp_path: Path, flags: list[str]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "evaluation.json").write_text("{}")
    with pytest.raises(ConfigError, match="--overwrite"):
        evaluate.main(flags)
    assert results(tmp_path) == {}


def test_what_cannot_be_is_refused(tmp_path: Path, flags: list[str]) -> None:
    with pytest.raises(ConfigError) as told:
        options([*flags, "--tau", "0", "--num_points", "0", "--max_scenes", "0"])
    assert all(f"--{name}" in str(told.value) for name in ("tau", "num_points", "max_scenes"))
    with pytest.raises(CheckpointError, match="nowhere"):
        evaluate.main([*flags, "--merged_model", str(tmp_path / "nowhere")])
    shutil.copytree(made.MODEL, tmp_path / "model")
    (tmp_path / "model" / "vae" / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"vae/config.json is missing"):
        evaluate.main([*flags, "--pretrained_model", str(tmp_path / "model")])
