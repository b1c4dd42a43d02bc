"""The generated data set: meshes to prepare, reproducible, apart from what the base has seen."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from midi3d_lora import demo
from midi3d_lora.demo_base import scenes
from midi3d_lora.meshes.mesh_loading import read_meshes

FEW = {"train": 2, "val": 1, "test": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return demo.write(tmp_path_factory.mktemp("demo") / "data", FEW)


def content(folder: Path) -> dict[Path, bytes]:
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_same_call_writes_the_same_files(folder: Path, tmp_path: Path) -> None:
    assert content(demo.write(tmp_path / "again", FEW)) == content(folder)


def test_every_object_of_every_scene_is_a_mesh_where_it_stands(folder: Path) -> None:
    for split, count in FEW.items():
        written = sorted((folder / demo.MESHES / split).iterdir())
        assert [path.name for path in written] == [f"{split}_{i:03}" for i in range(count)]
        for number, path in enumerate(written):
            notes: list[str] = []
            files = sorted(path.iterdir())
            found = [mesh for file in files for mesh in read_meshes(file, notes)]
            assert notes == []
            for mesh, true in zip(found, demo.scene_of(split, number).meshes(), strict=True):
                assert np.allclose(mesh.vertices, true.vertices, atol=1e-6)
                assert np.array_equal(mesh.faces, true.faces)


def test_the_base_in_the_folder_is_the_packaged_one(folder: Path) -> None:
    copied, packaged = content(folder / demo.MODEL), content(demo.base_model())
    assert copied == packaged
    halves = ("transformer/diffusion_pytorch_model", "vae/diffusion_pytorch_model")
    for name in halves:
        tensors = load_file(demo.base_model() / f"{name}.safetensors")
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert sum(map(len, packaged.values())) < 4_000_000


def test_no_scene_is_in_two_splits_or_among_those_of_the_base() -> None:
    made = [
        *(demo.scene_of(split, i) for split in demo.SPLITS for i in range(4)),
        *scenes.held_out(4, scenes.OUTDOORS),
    ]
    corners = {np.concatenate([m.vertices for m in one.meshes()]).tobytes() for one in made}
    assert len(corners) == len(made)
