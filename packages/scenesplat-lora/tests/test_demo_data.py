"""The generated data set: official layout, reproducible, and apart from what the base has seen."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lora_core.errors import DataError
from scenesplat_lora import demo
from scenesplat_lora.demo_base import rooms
from scenesplat_lora.language.text_embeddings import read_text_embeddings
from scenesplat_lora.network.official import load_official
from scenesplat_lora.scenes.files import list_scenes, read_scene

FEW = {"train": 2, "val": 1, "test": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return demo.write(tmp_path_factory.mktemp("demo") / "data", FEW)


def content(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_same_call_writes_the_same_files(folder, tmp_path) -> None:
    assert content(demo.write(tmp_path / "again", FEW)) == content(folder)


def test_every_scene_can_be_trained_on_and_evaluated(folder) -> None:
    for split, count in FEW.items():
        scenes = list_scenes(folder, split)
        assert [scene.name for scene in scenes] == [f"{split}_{i:03}" for i in range(count)]
        for scene in scenes:
            notes: list[str] = []
            found = read_scene(scene, wanted=("lang_feat", "segment"), notes=notes)
            assert notes == []
            assert found["lang_feat"].shape == (len(found["coord"]), rooms.WIDTH)
            assert found["segment"].max() < len(rooms.CLASSES)


def test_text_embeddings_are_those_of_the_classes(folder) -> None:
    found = read_text_embeddings(folder / demo.TEXTS)
    assert found.names == rooms.CLASSES
    assert torch.allclose(found.features, demo.texts().features, atol=1e-6)
    scene = read_scene(list_scenes(folder, "test")[0], wanted=("lang_feat",))
    rows = scene["valid_feat_mask"]
    nearest = (scene["lang_feat"][rows].astype(np.float32) @ found.features.numpy().T).argmax(1)
    assert (nearest == scene["segment"][rows]).mean() > 0.99


def test_the_base_in_the_folder_needs_nothing_beside_it(folder, tmp_path) -> None:
    alone = tmp_path / "base.safetensors"
    alone.write_bytes((folder / demo.BASE).read_bytes())
    packaged = load_official(demo.base_checkpoint()).state_dict()
    found = load_official(alone).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in packaged.items())


def test_no_room_is_in_two_splits_or_among_those_of_the_base() -> None:
    everything = [
        *(demo.room_of(split, i)["coord"].tobytes() for split in demo.SPLITS for i in range(4)),
        *(room["coord"].tobytes() for room in rooms.held_out(4, rooms.NIGHT)),
    ]
    assert len(set(everything)) == len(everything)


def test_a_room_that_exists_is_not_overwritten(folder) -> None:
    before = content(folder)
    with pytest.raises(DataError, match=r"train_000.*exists already"):
        demo.write(folder, FEW)
    assert content(folder) == before
