"""`prepare`: splats to scenes, labels to language features, scenes to chunks; shards and kills."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import made_scenes
import numpy as np
import pytest
import torch

from lora_core.errors import ConfigError, DataError
from scenesplat_lora import prepare
from scenesplat_lora.language.text_embeddings import text_embeddings, write_text_embeddings
from scenesplat_lora.prepare_lang_feat import class_features, nearest_labels
from scenesplat_lora.prepare_ply import placed
from scenesplat_lora.scenes.chunking import Chunks, cut_scene
from scenesplat_lora.scenes.facts import scene_facts
from scenesplat_lora.scenes.files import list_scenes, read_scene, write_scene
from scenesplat_lora.scenes.grid_sample import voxelise
from scenesplat_lora.scenes.ply import write_gaussians
from scenesplat_lora.scenes.values import LAYOUTS

CHUNK = ["--split", "train", "--chunk_minimum_size", "20", "--grid_size", "0.05"]


def tree(root: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too."""
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def write_scenes(root: Path, count: int = 3, rows: int = 1000) -> None:
    for number in range(count):
        scene = made_scenes.made_scene(rows, seed=number, side=8.0)
        write_scene(root / "train" / f"scene{number}", scene)


def texts(root: Path, classes: int = 5) -> str:
    names = [f"thing{i}" for i in range(classes)]
    text = text_embeddings(names, torch.eye(classes, 6) + 0.1)
    write_text_embeddings(root / "classes.npz", text)
    return str(root / "classes.npz")


# -- ply -------------------------------------------------------------------------------------------


def test_splats_become_scenes_with_z_up_in_metres(tmp_path: Path) -> None:
    scene = made_scenes.made_scene(50)
    for name in ("hall", "attic"):
        file = tmp_path / "splats" / name / "point_cloud" / "iteration_30000" / "point_cloud.ply"
        file.parent.mkdir(parents=True)
        write_gaussians(file, scene)
    out = tmp_path / "data"
    flags = ["ply", "--source", str(tmp_path / "splats"), "--output", str(out)]
    assert prepare.main([*flags, "--up", "y_down", "--unit", "0.5"]) == 0
    names = [folder.name for folder in list_scenes(out, "train")]
    assert names == ["attic", "hall"]
    made = read_scene(out / "train" / "hall")
    x, y, z = (0.5 * scene["coord"]).T
    assert np.allclose(made["coord"], np.stack([x, z, -y], axis=1), atol=1e-6)
    assert np.allclose(made["scale"], 0.5 * scene["scale"], atol=1e-6)
    assert (made["quat"][:, 0] >= 0).all()
    manifest = json.loads((out / "train" / "manifest_ply.json").read_text())
    assert manifest["scenes"]["hall"]["made"]["rows"] == 50


@pytest.mark.parametrize(
    ("up", "vector"),
    [
        ("y", (0, 1, 0)),
        ("y_down", (0, -1, 0)),
        ("x", (1, 0, 0)),
        ("x_down", (-1, 0, 0)),
        ("z_down", (0, 0, -1)),
    ],
)
def test_the_axis_that_is_up_becomes_z(up: str, vector: tuple[int, int, int]) -> None:
    scene = made_scenes.made_scene(4) | {"coord": np.array([vector] * 4, np.float32)}
    turned = placed(scene, up)
    assert np.allclose(turned["coord"], [[0, 0, 1]] * 4, atol=1e-6)


def test_a_second_run_does_nothing_and_another_setting_is_refused(tmp_path: Path) -> None:
    write_gaussians(tmp_path / "hall.ply", made_scenes.made_scene(50))
    out = tmp_path / "data"
    flags = ["ply", "--source", str(tmp_path / "hall.ply"), "--output", str(out)]
    prepare.main(flags)
    before, when = tree(out), (out / "train" / "hall" / "coord.npy").stat().st_mtime_ns
    prepare.main(flags)
    assert tree(out) == before
    assert (out / "train" / "hall" / "coord.npy").stat().st_mtime_ns == when
    with pytest.raises(DataError, match=r"hall: prepared with other settings.*--overwrite"):
        prepare.main([*flags, "--unit", "2"])
    prepare.main([*flags, "--unit", "2", "--overwrite"])
    assert tree(out) != before


def test_scenes_that_were_not_made_here_are_never_replaced(tmp_path: Path) -> None:
    write_gaussians(tmp_path / "scene0.ply", made_scenes.made_scene(50))
    write_scenes(tmp_path, 1)
    before = tree(tmp_path / "train")
    flags = ["ply", "--source", str(tmp_path / "scene0.ply"), "--output", str(tmp_path)]
    with pytest.raises(DataError, match="was not made here"):
        prepare.main([*flags, "--overwrite"])
    assert tree(tmp_path / "train") == before


def test_a_damaged_splat_does_not_stop_the_others(tmp_path: Path) -> None:
    (tmp_path / "a.ply").write_bytes(b"ply\nformat ascii 1.0\nend_header\n")
    write_gaussians(tmp_path / "b.ply", made_scenes.made_scene(50))
    with pytest.raises(DataError, match=r"a\.ply.*vertex"):
        prepare.main(["ply", "--source", str(tmp_path), "--output", str(tmp_path / "data")])
    assert [s.name for s in list_scenes(tmp_path / "data", "train")] == ["b"]


# -- lang-feat -------------------------------------------------------------------------------------


def test_features_are_the_texts_of_labels(tmp_path: Path) -> None:
    write_scenes(tmp_path, 1)
    folder = tmp_path / "train" / "scene0"
    segment = np.load(folder / "segment.npy")
    (folder / "lang_feat.npy").unlink()
    (folder / "valid_feat_mask.npy").unlink()
    flags = ["lang-feat", "--data_root", str(tmp_path), "--text", texts(tmp_path)]
    assert prepare.main(flags) == 0
    scene = read_scene(folder, wanted=["lang_feat"])
    expected = (torch.eye(5, 6) + 0.1).numpy()
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    assert np.array_equal(scene["valid_feat_mask"], segment >= 0)
    assert np.allclose(scene["lang_feat"][segment >= 0], expected[segment[segment >= 0]], atol=1e-3)
    assert (scene["lang_feat"][segment < 0] == 0).all()
    facts = scene_facts(folder, wanted=["lang_feat"], width=6)
    assert (facts["valid"], facts["empty"]) == ((segment >= 0).sum(), 0)


def test_features_that_were_not_made_here_stay(tmp_path: Path) -> None:
    write_scenes(tmp_path, 1)
    flags = ["lang-feat", "--data_root", str(tmp_path), "--text", texts(tmp_path)]
    with pytest.raises(DataError, match=r"lang_feat\.npy: is there already"):
        prepare.main(flags)


def test_a_label_without_a_text_is_told(tmp_path: Path) -> None:
    write_scenes(tmp_path, 1)
    for name in ("lang_feat", "valid_feat_mask"):
        (tmp_path / "train" / "scene0" / f"{name}.npy").unlink()
    flags = ["lang-feat", "--data_root", str(tmp_path), "--text", texts(tmp_path, 3)]
    with pytest.raises(
        DataError, match=r"scene0: label 4, but there are 3 classes \(0 is thing0\)"
    ):
        prepare.main(flags)


def test_labels_may_come_from_a_labelled_cloud() -> None:
    scene: dict[str, Any] = {
        "coord": np.array([[0, 0, 0], [1, 0, 0], [5, 0, 0]], np.float32),
        "pc_coord": np.array([[0.05, 0, 0], [0.01, 0, 0], [1, 0, 0.02]], np.float32),
        "pc_segment": np.array([2, -1, 4]),
    }
    assert nearest_labels(scene, 0.1).tolist() == [2, 4, -1]
    scene["pc_segment"][:] = -1
    assert nearest_labels(scene, 0.1).tolist() == [-1, -1, -1]


def test_several_texts_of_a_class_count_by_their_mean() -> None:
    features = torch.tensor([[1.0, 0], [0, 1], [0, -2]])
    table = class_features(text_embeddings(["a", "b"], features, [0, 0, 1]))
    assert np.allclose(table, [[0.7071, 0.7071], [0, -1]], atol=1e-3)


# -- chunks and shards -----------------------------------------------------------------------------


def test_chunks_are_those_of_cut_scene_and_keep_scales_as_they_are(tmp_path: Path) -> None:
    write_scenes(tmp_path, 1)
    folder = tmp_path / "train" / "scene0"
    np.save(folder / "scale.npy", np.full((1000, 3), 5.0, np.float32))
    words = ["chunk", "--data_root", str(tmp_path), *CHUNK, "--layout", "kitti360"]
    assert prepare.main(words) == 0
    split = "train_grid5.0cm_chunk6x6_stride3x3"
    made = list_scenes(tmp_path, split)
    # Just below 8 m x 8 m: origins 0 and 3, below 8 + 3 - 6, along both axes.
    assert [one.name for one in made] == [f"scene0_{number}" for number in range(4)]
    assert np.array_equal(np.load(made[0] / "scale.npy")[0], [5, 5, 5])
    scene = read_scene(made[0], LAYOUTS["kitti360"], ["lang_feat", "normal"])
    assert np.allclose(scene["scale"], 0.5)
    valid = scene["lang_feat"][scene["valid_feat_mask"]].astype(np.float32)
    assert np.allclose(np.linalg.norm(valid, axis=1), 1, atol=1e-2)
    cells = voxelise(scene["coord"] - read_scene(folder)["coord"].min(0), 0.05)
    assert (cells.count == 1).all()
    whole = read_scene(folder, wanted=["lang_feat"])
    rows = len(next(cut_scene(whole, Chunks(minimum=20), np.random.default_rng(0)))["coord"])
    assert len(scene["coord"]) <= rows


def test_four_shards_in_any_order_equal_one_run(tmp_path: Path) -> None:
    for name in ("one", "four"):
        write_scenes(tmp_path / name, 6)
        words = ["chunk", "--data_root", str(tmp_path / name), *CHUNK]
        for shard in (2, 0, 3, 1) if name == "four" else (0,):
            count = "4" if name == "four" else "1"
            prepare.main([*words, "--num_shards", count, "--shard_id", str(shard)])
    assert tree(tmp_path / "one") == tree(tmp_path / "four")
    manifest = json.loads(
        (
            tmp_path / "one" / "train_grid5.0cm_chunk6x6_stride3x3" / "manifest_chunk.json"
        ).read_text()
    )
    assert sorted(manifest["scenes"]) == [f"scene{i}" for i in range(6)]


def test_a_shard_that_is_killed_and_run_again_changes_nothing(tmp_path: Path) -> None:
    for name in ("whole", "killed"):
        write_scenes(tmp_path / name, 6, rows=2000)
    words = ["chunk", *CHUNK, "--num_shards", "2"]
    whole = [*words, "--data_root", str(tmp_path / "whole")]
    killed = [*words, "--data_root", str(tmp_path / "killed")]
    for shard in ("0", "1"):
        prepare.main([*whole, "--shard_id", shard])
    split = tmp_path / "killed" / "train_grid5.0cm_chunk6x6_stride3x3"
    child = os.fork()
    if not child:
        prepare.main([*killed, "--shard_id", "0"])
        os._exit(0)
    deadline = time.monotonic() + 60
    while not list(split.glob("scene*_0")):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    # What a process that dies in the middle of a scene leaves: a folder that is not whole.
    (split / f".scene4_0.{os.getpid()}").mkdir(parents=True, exist_ok=True)
    records = split / ".records" / "chunk"
    (records / "scene4.json").unlink(missing_ok=True)
    (records / "scene4.begun").write_text("{}")
    for shard in ("1", "0"):
        prepare.main([*killed, "--shard_id", shard])
    assert tree(tmp_path / "whole") == tree(tmp_path / "killed")


def test_a_scene_without_a_large_enough_chunk_is_told(tmp_path: Path) -> None:
    write_scenes(tmp_path, 2)
    words = ["chunk", "--data_root", str(tmp_path), "--split", "train"]
    with pytest.raises(DataError, match=r"(?s)scene0: no chunk has 10000.*scene1: no chunk"):
        prepare.main(words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["chnk"], "did you mean 'chunk'"),
        (["chunk", "--split", "a", "--num_shards", "2", "--shard_id", "2"], "must be 0 to 1"),
        (["chunk", "--split", "a", "--chunk_range", "6"], "two lengths"),
        (["ply", "--source", "a", "--unit", "0"], "metres above 0"),
        (["ply", "--source", "a", "--split", "../x"], "name of one folder"),
    ],
)
def test_settings_that_cannot_work_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        prepare.main(words)


def test_help_lists_the_steps(capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare.main([]) == 0
    said = capsys.readouterr().out
    assert all(step in said for step in prepare.STEPS)
