"""Meshes become points in one frame, uniform by area, the same for the same seed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from mesh_shapes import box, obj_text

from lora_core.errors import DataError
from midi3d_lora.meshes.mesh_loading import Mesh
from midi3d_lora.scenes.scene_frame import fit_frame, turn
from midi3d_lora.sources.prepare_meshes import (
    mesh_files,
    place,
    read_instances,
    sample_mesh,
    sampling_rng,
)


def corners(mesh: Mesh) -> np.ndarray:
    points = mesh.corners().reshape(-1, 3)
    return np.array([points.min(axis=0), points.max(axis=0)])


def saved(path: Path, *meshes: Mesh) -> Path:
    first, text = 1, ""
    for mesh in meshes:
        text += obj_text(mesh, first)
        first += len(mesh.vertices)
    path.write_text(text)
    return path


# -- instances -------------------------------------------------------------------------------------


def test_each_of_several_files_is_an_instance_in_sorted_order(tmp_path: Path) -> None:
    saved(tmp_path / "b.obj", box(name="x"), box((2, 2, 2), (3, 3, 3), name="y"))
    saved(tmp_path / "a.obj", box())
    (tmp_path / "a.mtl").write_text("newmtl grey\n")
    (tmp_path / ".hidden.obj").write_text("")
    found = read_instances(mesh_files(tmp_path), [])
    assert [mesh.name for mesh in found] == ["a", "b"]
    assert [len(mesh.faces) for mesh in found] == [12, 24]


@pytest.mark.fault("P13")
def test_each_geometry_of_a_single_file_is_an_instance_with_a_name_of_its_own(
    tmp_path: Path,
) -> None:
    path = saved(tmp_path / "a.obj", box(name="cup"), box((2, 2, 2), (3, 3, 3), name="table"))
    assert [mesh.name for mesh in read_instances([path], [])] == ["cup", "table"]
    other = saved(tmp_path / "sub_a.obj", box())
    assert [m.name for m in read_instances([path, path, other], [])] == ["a", "a_2", "sub_a"]


@pytest.mark.fault("P08")
def test_problems_of_all_files_are_told_together(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.obj").write_text("v 0 0 0\n")
    with pytest.raises(DataError, match=r"no faces in a.obj\n.*no faces in b.obj"):
        read_instances(mesh_files(tmp_path), [])


@pytest.mark.fault("P13")
def test_an_open_mesh_is_warned_about_by_name(tmp_path: Path) -> None:
    (tmp_path / "leaf.obj").write_text("v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\n")
    notes: list[str] = []
    read_instances(mesh_files(tmp_path), notes)
    assert notes[0].startswith("not closed, or faces turned both ways")
    assert notes[0].endswith(": leaf")


# -- the frame -------------------------------------------------------------------------------------


def test_a_scene_is_normalised_as_a_whole() -> None:
    meshes = [box((100, 0, 0), (104, 2, 2)), box((104, 0, 0), (108, 1, 1))]
    (first, second), frame = place(meshes, "y", 0.0, True)
    assert frame is not None
    assert frame.centre == (104.0, 1.0, 1.0)
    assert frame.scale == pytest.approx(0.95 / 4)
    both = np.concatenate([corners(first), corners(second)])
    np.testing.assert_allclose(both.min(axis=0), [-0.95, -0.2375, -0.2375])
    np.testing.assert_allclose(both.max(axis=0), [0.95, 0.2375, 0.2375])
    np.testing.assert_allclose(corners(second)[0, 0], corners(first)[1, 0], atol=1e-12)


def test_vertices_that_no_face_uses_do_not_move_the_frame() -> None:
    mesh = box()
    far = Mesh("far", np.concatenate([mesh.vertices, [[900.0, 0, 0]]]), mesh.faces)
    placed, _ = place([far], "y", 0.0, True)
    np.testing.assert_allclose(corners(placed[0]), [[-0.95] * 3, [0.95] * 3])


def test_z_up_becomes_y_up_and_the_front_faces_the_camera() -> None:
    up, front = np.array([0, 0, 1]), np.array([0, -1, 0])
    np.testing.assert_allclose(turn("z", 0) @ up, [0, 1, 0], atol=1e-15)
    np.testing.assert_allclose(turn("z", 0) @ front, [0, 0, 1], atol=1e-15)
    np.testing.assert_allclose(turn("y", 90) @ [0, 0, 1], [1, 0, 0], atol=1e-15)
    for up_axis in "yz":
        assert np.linalg.det(turn(up_axis, 33.0)) == pytest.approx(1)


@pytest.mark.fault("P07", "P13")
def test_without_normalising_other_units_are_refused_with_their_range() -> None:
    same, frame = place([box((-0.5, -0.5, -0.5), (0.5, 0.5, 1))], "y", 0.0, False)
    assert frame is None
    np.testing.assert_allclose(corners(same[0]), [[-0.5] * 3, [0.5, 0.5, 1]])
    with pytest.raises(DataError, match=r"x -500\.\.500, y 0\.\.800, z 0\.\.1.*--normalize"):
        place([box((-500, 0, 0), (500, 800, 1))], "y", 0.0, False)
    with pytest.raises(ValueError, match="half-extent 0"):
        fit_frame(np.ones(3), np.ones(3))


# -- sampling --------------------------------------------------------------------------------------


def test_points_lie_on_the_faces_uniformly_with_their_normals() -> None:
    mesh = box((0, 0, 0), (4, 1, 1))
    values = sample_mesh(mesh, 20000, np.random.default_rng(0)).astype(np.float64)
    points, normals = values[:, :3], values[:, 3:]
    axis = np.abs(normals).argmax(axis=1)
    sign = normals[np.arange(len(axis)), axis]
    np.testing.assert_array_equal(np.abs(normals).sum(axis=1), 1)
    side = np.where(sign > 0, np.array([4, 1, 1])[axis], 0)
    np.testing.assert_allclose(points[np.arange(len(axis)), axis], side, atol=1e-6)
    # Areas 4, 4, 4, 4, 1, 1 of 18.
    share = np.bincount(axis, minlength=3) / len(axis)
    np.testing.assert_allclose(share, [2 / 18, 8 / 18, 8 / 18], atol=0.015)
    np.testing.assert_allclose(points.mean(axis=0), [2, 0.5, 0.5], atol=0.04)
    top = points[(axis == 1) & (sign > 0)]
    cells = np.histogram2d(top[:, 0], top[:, 2], bins=(4, 2), range=[(0, 4), (0, 1)])[0]
    np.testing.assert_allclose(cells / len(top), 1 / 8, atol=0.02)


@pytest.mark.fault("P15")
def test_the_same_seed_gives_the_same_bytes_whatever_else_is_prepared() -> None:
    first = sample_mesh(box(), 500, sampling_rng(42, "scene_0001", 0))
    again = sample_mesh(box(), 500, sampling_rng(42, "scene_0001", 0))
    assert first.tobytes() == again.tobytes()
    assert first.dtype == np.float32
    for other in (
        sampling_rng(43, "scene_0001", 0),
        sampling_rng(42, "scene_0002", 0),
        sampling_rng(42, "scene_0001", 1),
    ):
        assert first.tobytes() != sample_mesh(box(), 500, other).tobytes()
