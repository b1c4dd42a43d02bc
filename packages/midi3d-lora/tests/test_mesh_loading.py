"""Meshes are read where their scenes place them; what is damaged or hostile is refused by name."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import trimesh
from mesh_shapes import box, obj_text

from lora_core.errors import DataError
from midi3d_lora.meshes.mesh_loading import Mesh, checked, joined, outward, places, read_meshes


def written(path: Path, *meshes: Mesh, transform: np.ndarray | None = None) -> Path:
    """The meshes as a file of trimesh's; a scene of nodes where the format has them."""
    scene = trimesh.Scene()
    for mesh in meshes:
        one = trimesh.Trimesh(mesh.vertices, mesh.faces, process=False)
        scene.add_geometry(one, geom_name=mesh.name, node_name=mesh.name, transform=transform)
    if path.suffix in (".glb", ".gltf"):
        scene.export(path)
    else:
        scene.to_mesh().export(path)
    return path


def problem(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        read_meshes(path, [])
    assert str(caught.value).startswith(f"{path}: ")
    return str(caught.value).removeprefix(f"{path}: ")


def extent(mesh: Mesh) -> list[list[float]]:
    points = mesh.corners().reshape(-1, 3)
    return [points.min(axis=0).tolist(), points.max(axis=0).tolist()]


# -- what is read ----------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".obj", ".ply", ".stl", ".off", ".glb"])
def test_every_format_gives_the_same_mesh(tmp_path: Path, suffix: str) -> None:
    path = written(tmp_path / f"a{suffix}", box((-1, 0, 2), (1, 0.5, 4)))
    (mesh,) = read_meshes(path, [])
    assert extent(mesh) == [[-1, 0, 2], [1, 0.5, 4]]
    assert len(mesh.faces) == 12
    assert outward(mesh)[1]


@pytest.mark.fault("P10")
def test_geometries_of_a_scene_stand_where_their_nodes_place_them(tmp_path: Path) -> None:
    transform = np.array([[0, 0, 2.0, 5], [0, 2, 0, 0], [-2, 0, 0, 0], [0, 0, 0, 1]])
    path = written(tmp_path / "a.glb", box(name="b"), box(name="a"), transform=transform)
    meshes = read_meshes(path, [])
    assert [mesh.name for mesh in meshes] == ["b", "a"]
    assert extent(meshes[0]) == [[3, -2, -2], [7, 2, 2]]


@pytest.mark.fault("P10", "P13")
def test_a_mirrored_node_keeps_its_outside(tmp_path: Path) -> None:
    path = written(tmp_path / "a.glb", box(), transform=np.diag([-1.0, 1, 1, 1]))
    (mesh,) = read_meshes(path, [])
    points, normals = mesh.corners().mean(axis=1), mesh.area_vectors()
    assert ((points * normals).sum(axis=1) > 0).all()


def test_objects_of_an_obj_file_are_kept_apart(tmp_path: Path) -> None:
    path = tmp_path / "a.obj"
    second = obj_text(box((2, 0, 0), (3, 1, 1), name="cup"), first=9)
    path.write_text("mtllib ../../../etc/passwd\n" + obj_text(box(name="table")) + second)
    found = [(mesh.name, extent(mesh)) for mesh in read_meshes(path, [])]
    assert found == [("table", [[-1, -1, -1], [1, 1, 1]]), ("cup", [[2, 0, 0], [3, 1, 1]])]


@pytest.mark.fault("P13")
def test_a_single_face_is_a_mesh(tmp_path: Path) -> None:
    path = tmp_path / "a.obj"
    path.write_text("v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\n")
    (mesh,) = read_meshes(path, [])
    np.testing.assert_allclose(mesh.area_vectors(), [[0, 0, 0.5]])
    assert not outward(mesh)[1]


# -- what is wrong with meshes ---------------------------------------------------------------------

TEXTS = {
    "empty": ("", "the file is empty"),
    "points": ("v 0 0 0\nv 1 0 0\nv 0 1 0\n", "no faces in a.obj"),
    "faces": ("f 1 2 3\n", ""),
    "beyond": ("v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 9\n", ""),
    "nan": ("v 0 0 0\nv nan 0 0\nv 0 1 0\nf 1 2 3\n", ""),
    "flat": ("v 0 0 0\nv 1 0 0\nv 2 0 0\nf 1 2 3\nf 1 1 2\n", "no area: all 2 faces"),
    "page": ("<!DOCTYPE html><html>Sign in</html>", "a web page, not a mesh"),
    "pointer": ("version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
}


@pytest.mark.fault("P08", "P09", "P11")
@pytest.mark.parametrize("case", TEXTS)
def test_meshes_that_cannot_be_sampled_are_refused(tmp_path: Path, case: str) -> None:
    path = tmp_path / "a.obj"
    text, expected = TEXTS[case]
    path.write_text(text)
    assert expected in problem(path)


@pytest.mark.fault("P09")
def test_faces_beyond_the_vertices_and_broken_vertices_are_counted() -> None:
    mesh = box()
    faces = mesh.faces.copy()
    faces[:2, 1] = 8, -1
    with pytest.raises(DataError, match="2 of 12 faces name vertices beyond its 8"):
        checked(replace(mesh, faces=faces), [])
    vertices = mesh.vertices.copy()
    vertices[3, 1] = np.inf
    with pytest.raises(DataError, match="1 of 8 vertices are NaN or infinite"):
        checked(replace(mesh, vertices=vertices), [])


@pytest.mark.fault("P09")
def test_faces_without_area_are_dropped_and_counted() -> None:
    notes: list[str] = []
    faces = np.concatenate([box().faces, [[0, 0, 1], [2, 2, 2]]])
    assert len(checked(replace(box(), faces=faces), notes).faces) == 12
    assert notes == ["faces without area were dropped: 2 of 14"]


# -- files that lie --------------------------------------------------------------------------------


@pytest.mark.fault("P11")
def test_an_stl_that_promises_four_billion_triangles_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.stl"
    path.write_bytes(bytes(80) + struct.pack("<I", 2**32 - 1) + bytes(500))
    assert "promises 4294967295 triangles, at least 214748364834 bytes, but 584" in problem(path)


@pytest.mark.fault("P11")
@pytest.mark.parametrize("form", ["ascii", "binary_little_endian"])
def test_a_ply_that_promises_three_billion_vertices_is_refused(tmp_path: Path, form: str) -> None:
    head = f"ply\nformat {form} 1.0\nelement vertex 3000000000\nproperty float x\n"
    head += "property float y\nproperty float z\nelement face 1\n"
    head += "property list uchar int vertex_indices\nend_header\n"
    path = tmp_path / "a.ply"
    path.write_bytes(head.encode() + b"0 0 0\n" * 4)
    assert "its header promises 3000000000 of vertex and 1 of face" in problem(path)


@pytest.mark.fault("P11")
@pytest.mark.parametrize("suffix", [".ply", ".stl", ".off", ".glb"])
def test_truncated_files_are_refused_at_every_eighth(tmp_path: Path, suffix: str) -> None:
    path = written(tmp_path / f"a{suffix}", box())
    data = path.read_bytes()
    for eighths in range(8):
        path.write_bytes(data[: len(data) * eighths // 8])
        assert problem(path)


def gltf(path: Path, uri: str) -> Path:
    """A triangle whose buffer is somewhere else."""
    graph = {
        "asset": {"version": "2.0"},
        "buffers": [{"uri": uri, "byteLength": 42}],
        "bufferViews": [
            {"buffer": 0, "byteOffset": 0, "byteLength": 36},
            {"buffer": 0, "byteOffset": 36, "byteLength": 6},
        ],
        "accessors": [
            {"bufferView": 0, "componentType": 5126, "count": 3, "type": "VEC3"},
            {"bufferView": 1, "componentType": 5123, "count": 3, "type": "SCALAR"},
        ],
        "meshes": [{"primitives": [{"attributes": {"POSITION": 0}, "indices": 1}]}],
        "nodes": [{"mesh": 0}],
        "scenes": [{"nodes": [0]}],
        "scene": 0,
    }
    path.write_text(json.dumps(graph))
    return path


@pytest.mark.fault("P12")
def test_a_gltf_reads_only_files_of_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "scene"
    folder.mkdir()
    triangle = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0]], np.float32).tobytes()
    for place in (tmp_path, folder):
        (place / "x.bin").write_bytes(triangle + struct.pack("<3H", 0, 1, 2))
    (mesh,) = read_meshes(gltf(folder / "a.gltf", "x.bin"), [])
    assert len(mesh.faces) == 1
    for uri in ("../x.bin", "%2e%2e/x.bin", "/etc/passwd", "http://localhost/x.bin", "file:x.bin"):
        text = problem(gltf(folder / "a.gltf", uri))
        assert text == f"buffer {uri!r}: only files inside the mesh's folder are read"
    assert problem(gltf(folder / "a.gltf", "y.bin")) == "buffer 'y.bin': no such file"


# -- orientation -----------------------------------------------------------------------------------


@pytest.mark.fault("P13")
def test_a_closed_mesh_that_is_inside_out_is_turned() -> None:
    mesh = joined([box((3, 3, 3), (4, 4, 4)), box((5, 3, 3), (6, 4, 5))], "two")
    inverted = replace(mesh, faces=mesh.faces[:, ::-1])
    assert outward(mesh) == (mesh, True)
    turned, closed = outward(inverted)
    assert closed
    np.testing.assert_allclose(turned.area_vectors(), mesh.area_vectors())


@pytest.mark.fault("P13")
def test_an_open_mesh_and_one_turned_both_ways_are_said_to_be_so() -> None:
    faces = box().faces.copy()
    assert not outward(replace(box(), faces=faces[1:]))[1]
    faces[0] = faces[0][::-1]
    assert not outward(replace(box(), faces=faces))[1]


def test_points_that_coincide_get_the_same_number() -> None:
    points = np.random.default_rng(0).integers(-2, 3, size=(500, 3)).astype(np.float64)
    points[::7] *= -1.0  # some zeros are negative
    expected = np.unique(points, axis=0, return_inverse=True)[1].reshape(-1)
    np.testing.assert_array_equal(places(points), expected)
