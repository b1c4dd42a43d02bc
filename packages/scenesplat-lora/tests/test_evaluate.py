"""`evaluate`: both definitions of the scores, the base beside LoRA, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import use_fixtures as made

from lora_core.errors import CheckpointError, ConfigError, DataError
from scenesplat_lora import evaluate
from scenesplat_lora.labelling import Labelling, label_scene
from scenesplat_lora.language.text_embeddings import text_embeddings
from scenesplat_lora.language.zero_shot import vote
from scenesplat_lora.lora import load_lora_checkpoint
from scenesplat_lora.metrics import Confusion, epoch_scores, final_scores
from scenesplat_lora.scenes.files import list_scenes, read_scene
from scenesplat_lora.scenes.grid_sample import voxelise
from scenesplat_lora.transforms.geometry import center_shift


@pytest.fixture
def flags(tmp_path: Path) -> list[str]:
    made.write_rooms(tmp_path)
    words = made.write_model(tmp_path)
    out = str(tmp_path / "out")
    return [*words, *made.GRIDS, "--data_root", str(tmp_path), "--output", out]


def results(tmp_path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    return content


def by_hand(tmp_path: Path, adapter: Path | None = None, k: int = 25) -> Confusion:
    model, table = made.model(), Confusion(made.CLASSES)
    if adapter:
        load_lora_checkpoint(model, adapter)
    for folder in list_scenes(tmp_path, "val"):
        scene = read_scene(folder)
        labels = label_scene(model, scene, made.texts(), Labelling(0.05, 0.1))
        voted = vote(labels, scene["coord"], None, scene["valid_feat_mask"], k)
        table.add(scene["segment"], voted)
    return table


def test_the_base_is_scored_beside_its_lora(
    tmp_path: Path, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    made.write_adapter(tmp_path / "lora.pth")
    assert evaluate.main([*flags, "--adapter", str(tmp_path / "lora.pth")]) == 0
    held = results(tmp_path)
    assert list(held["models"]) == ["base", "LoRA"]
    excluded = ["wall", "floor"]
    for name, adapter in (("base", None), ("LoRA", tmp_path / "lora.pth")):
        table = by_hand(tmp_path, adapter)
        assert held["models"][name]["tester"] == final_scores(table, excluded)
        assert held["models"][name]["evaluator"] == epoch_scores(table, excluded)
    assert held["models"]["base"] != held["models"]["LoRA"]
    said = capsys.readouterr().out
    assert all(word in said for word in ("tester", "evaluator", "IoU base", "IoU LoRA", "chair"))


@pytest.mark.fault("P41")
def test_a_labelled_cloud_is_scored_where_there_is_one(tmp_path: Path, flags: list[str]) -> None:
    for folder in list_scenes(tmp_path, "val"):
        points = read_scene(folder)
        np.save(folder / "pc_coord.npy", points["coord"][:50])
        np.save(folder / "pc_segment.npy", np.full(50, 3))
    assert evaluate.main(flags) == 0
    one = results(tmp_path)["models"]["model"]["classes"]
    assert one["table"]["points"] == 100
    assert one["chair"] == {"IoU": None, "Acc": None, "points": 0} or one["chair"]["points"] == 0
    again = [*flags, "--overwrite", "--points", "gaussians"]
    assert evaluate.main(again) == 0
    assert results(tmp_path)["models"]["model"]["classes"]["wall"]["points"] > 0


def test_an_evaluation_that_is_there_stays(tmp_path: Path, flags: list[str]) -> None:
    assert evaluate.main(flags) == 0
    with pytest.raises(ConfigError, match="--overwrite"):
        evaluate.main(flags)


def test_faults_of_all_scenes_come_together(tmp_path: Path, flags: list[str]) -> None:
    for name, value in (("room0", 9), ("room1", 7)):
        np.save(tmp_path / "val" / name / "segment.npy", np.full(400, value))
    with pytest.raises(DataError, match=r"(?s)room0.*label 9.*room1.*label 7"):
        evaluate.main(flags)


def test_texts_of_another_width_are_refused_before_weights_are_read(
    tmp_path: Path, flags: list[str]
) -> None:
    made.write_text_embeddings(tmp_path / "classes.npz", made.texts(width=12))
    with pytest.raises(ConfigError, match=r"width 12, the model features of width 24"):
        evaluate.main(flags)


def test_a_class_that_is_excluded_must_exist(flags: list[str]) -> None:
    with pytest.raises(ConfigError, match="did you mean 'chair'"):
        evaluate.main([*flags, "--excluded", "chairs"])


def test_a_missing_adapter_is_told_first(tmp_path: Path, flags: list[str]) -> None:
    with pytest.raises(CheckpointError, match=r"no\.pth does not exist"):
        evaluate.main([*flags, "--adapter", str(tmp_path / "no.pth")])


# -- labels of a scene -----------------------------------------------------------------------------


def test_labels_do_not_depend_on_earlier_scenes_or_on_the_order_of_texts(tmp_path: Path) -> None:
    made.write_rooms(tmp_path)
    scenes = [read_scene(folder) for folder in list_scenes(tmp_path, "val")]
    how = Labelling(0.05, 0.1)
    first = label_scene(made.model(), scenes[1], made.texts(), how)
    label_scene(made.model(), scenes[0], made.texts(), how)
    assert np.array_equal(first, label_scene(made.model(), scenes[1], made.texts(), how))
    turned = made.texts()
    order = [4, 2, 0, 1, 3]
    other = text_embeddings([turned.names[i] for i in order], turned.features[order])
    labels = label_scene(made.model(), scenes[1], other, how)
    assert np.array_equal(np.array(order)[labels], first)


def test_gaussians_of_one_cell_have_one_label(tmp_path: Path) -> None:
    made.write_rooms(tmp_path, 1)
    scene = read_scene(list_scenes(tmp_path, "val")[0])
    labels = label_scene(made.model(), scene, made.texts(), Labelling(0.5, 0.5))
    rng = np.random.default_rng(0)
    cells = voxelise(center_shift(scene, rng)["coord"], 0.5).inverse()
    assert labels.shape == (400,)
    assert (labels >= 0).all()
    assert len(np.unique(labels)) > 1
    assert len(np.unique(np.stack([cells, labels]), axis=1).T) == len(np.unique(cells))


def test_a_threshold_rejects(tmp_path: Path) -> None:
    made.write_rooms(tmp_path, 1)
    scene = read_scene(list_scenes(tmp_path, "val")[0])
    labels = label_scene(made.model(), scene, made.texts(), Labelling(0.05, 0.1, threshold=0.9))
    assert (labels == -1).all()
    assert torch.sigmoid(torch.tensor(1.0)) < 0.9
