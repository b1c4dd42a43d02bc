"""Meshes to files: names, order, coordinates, and what stays when something goes wrong."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trimesh

from lora_core.errors import CheckpointError, ConfigError, NumericError
from midi3d_lora.meshes.extraction import Mesh
from midi3d_lora.meshes.mesh_files import (
    check_scene_path,
    instance_name,
    write_instances,
    write_scene,
)


def tetrahedron(shift: float) -> Mesh:
    corners = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]], np.float32)
    faces = np.array([[0, 2, 1], [0, 1, 3], [0, 3, 2], [1, 2, 3]], np.int32)
    return Mesh(0.3 * corners + np.float32(shift), faces)


def test_a_scene_has_one_named_geometry_for_each_instance(tmp_path: Path) -> None:
    meshes = {29: tetrahedron(0.1), 105: tetrahedron(-0.4), 76: tetrahedron(0.5)}
    write_scene(tmp_path / "scene.glb", meshes)
    scene = trimesh.load(tmp_path / "scene.glb", force="scene")
    assert list(scene.geometry) == ["instance_29", "instance_105", "instance_76"]
    for label, mesh in meshes.items():
        geometry = scene.geometry[f"instance_{label}"]
        assert np.array_equal(geometry.vertices.astype(np.float32), mesh.vertices)
        assert np.array_equal(geometry.faces, mesh.faces)
        assert geometry.volume > 0
        transform, _ = scene.graph[f"instance_{label}"]
        assert np.array_equal(transform, np.eye(4))


def test_empty_instances_are_told_and_recorded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    description = write_scene(tmp_path / "scene.glb", {1: None, 2: tetrahedron(0.2)})
    assert "without instance_1, where the model left no surface" in capsys.readouterr().out
    recorded = json.loads(description.read_text())
    assert recorded["scene"] == "scene.glb"
    empty, full = recorded["instances"]
    assert empty == {"label": 1, "name": "instance_1", "vertices": 0, "faces": 0}
    assert (full["label"], full["vertices"], full["faces"]) == (2, 4, 4)
    np.testing.assert_allclose(full["box"], [[0.2] * 3, [0.5] * 3], rtol=1e-6)
    assert list(trimesh.load(tmp_path / "scene.glb", force="scene").geometry) == ["instance_2"]


def test_a_scene_of_empty_instances_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "scene.glb"
    path.write_bytes(b"earlier")
    with pytest.raises(NumericError, match="none of 2 instances has a surface"):
        write_scene(path, {1: None, 2: None})
    assert path.read_bytes() == b"earlier"
    assert list(tmp_path.iterdir()) == [path]


def test_the_same_meshes_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a.glb", "b.glb"):
        write_scene(tmp_path / name, {1: tetrahedron(0.0)})
    assert (tmp_path / "a.glb").read_bytes() == (tmp_path / "b.glb").read_bytes()


@pytest.mark.parametrize("file_format", ["glb", "obj", "ply", "stl"])
def test_instances_are_written_each_by_itself(tmp_path: Path, file_format: str) -> None:
    meshes: Any = {"chair": tetrahedron(0.1), 2: None, 3: tetrahedron(0.4)}
    written = write_instances(tmp_path / "objects", meshes, file_format)
    names = [f"instance_chair.{file_format}", f"instance_3.{file_format}"]
    assert [path.name for path in written] == names
    for path, shift in zip(written, (0.1, 0.4), strict=True):
        mesh = trimesh.load(path, force="mesh")
        np.testing.assert_allclose(mesh.bounds, [[shift] * 3, [shift + 0.3] * 3], atol=1e-6)


def test_labels_that_are_no_file_names_are_refused() -> None:
    assert instance_name("255-0-0") == "instance_255-0-0"
    for label in ("../x", "a/b", "", ".hidden", "a\nb"):
        with pytest.raises(ConfigError, match="instance label"):
            instance_name(label)


def test_labels_of_one_name_are_refused(tmp_path: Path) -> None:
    meshes: Any = {1: tetrahedron(0), "1": tetrahedron(0)}
    with pytest.raises(ConfigError, match="two of them have the same name"):
        write_scene(tmp_path / "a.glb", meshes)


def test_outputs_that_cannot_be_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"written as \.glb, so name it scene\.glb"):
        check_scene_path(tmp_path / "scene.obj")
    (tmp_path / "folder.glb").mkdir()
    with pytest.raises(ConfigError, match="there is a folder of this name"):
        write_scene(tmp_path / "folder.glb", {1: tetrahedron(0)})
    with pytest.raises(ConfigError, match="expected one of glb, obj, ply, stl"):
        write_instances(tmp_path, {}, "fbx")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(CheckpointError, match="cannot write"):
        write_scene(tmp_path / "file" / "scene.glb", {1: tetrahedron(0)})
