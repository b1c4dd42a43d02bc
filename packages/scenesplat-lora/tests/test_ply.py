"""3D Gaussian splatting files to scenes and back, in every form that PLY has."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import raw_folders
from made_scenes import made_scene

from lora_core.errors import DataError
from scenesplat_lora.scenes.files import read_scene, write_scene
from scenesplat_lora.scenes.ply import (
    read_gaussians,
    read_triangles,
    read_vertices,
    write_gaussians,
    write_points,
    write_vertices,
)

RAW = {
    "x": [1.5, -2.0], "y": [0.0, 3.0], "z": [0.25, -1.0], "nx": [0, 0], "opacity": [0.0, 2.0],
    "f_dc_0": [0.0, 9.0], "f_dc_1": [1.0, -9.0], "f_dc_2": [-1.0, 0.5],
    "scale_0": [-3.0, 0.0], "scale_1": [-2.0, 0.0], "scale_2": [-1.0, -4.0],
    "rot_0": [2.0, -1.0], "rot_1": [0.0, 1.0], "rot_2": [0.0, 0.0], "rot_3": [0.0, 0.0],
}  # fmt: skip


def raw(**changes: list[float]) -> dict[str, np.ndarray]:
    return {name: np.array(v, dtype=np.float32) for name, v in (RAW | changes).items()}


def ascii_file(path: Path, columns: dict[str, np.ndarray], before: str = "") -> Path:
    header = ["ply", "format ascii 1.0", "comment made by hand"]
    header += ["element camera 2", "property float fov"] if before else []
    header += [f"element vertex {len(columns['x'])}"]
    header += [f"property float {name}" for name in columns]
    header += ["element face 1", "property list uchar int vertex_indices", "end_header"]
    rows = [" ".join(map(str, row)) for row in zip(*columns.values(), strict=True)]
    path.write_text("\n".join([*header, *([before] if before else []), *rows, "3 0 1 0", ""]))
    return path


def big_endian_file(path: Path, columns: dict[str, np.ndarray]) -> Path:
    header = ["ply", "format binary_big_endian 1.0", "element extra 3", "property short a"]
    header += [f"element vertex {len(columns['x'])}"]
    header += [f"property float {name}" for name in columns] + ["end_header", ""]
    table = np.stack(list(columns.values()), axis=1).astype(">f4")
    path.write_bytes("\n".join(header).encode() + b"\0" * 6 + table.tobytes())
    return path


def test_gaussians_get_the_documented_values(tmp_path: Path) -> None:
    write_vertices(tmp_path / "room.ply", raw())
    scene = read_gaussians(tmp_path / "room.ply")
    assert scene["name"] == "room"
    np.testing.assert_array_equal(scene["coord"], [[1.5, 0, 0.25], [-2, 3, -1]])
    np.testing.assert_allclose(scene["opacity"][:, 0], [0.5, 1 / (1 + np.exp(-2))], rtol=1e-6)
    np.testing.assert_allclose(scene["scale"][0], np.exp([-3, -2, -1]), rtol=1e-6)
    half = 1 / np.sqrt(2)
    np.testing.assert_allclose(scene["quat"], [[1, 0, 0, 0], [half, -half, 0, 0]], atol=1e-6)
    # 127.5, 199.4, 55.6 and 255 (cut), 0 (cut), 163.5: truncated
    np.testing.assert_array_equal(scene["color"], [[127, 199, 55], [255, 0, 163]])


@pytest.mark.fault("P28")
def test_all_forms_of_the_file_give_one_scene(tmp_path: Path) -> None:
    write_vertices(tmp_path / "a.ply", raw())
    expected = read_gaussians(tmp_path / "a.ply")
    shuffled = dict(sorted(raw().items(), reverse=True)) | {"extra": np.zeros(2, np.float32)}
    files = [
        ascii_file(tmp_path / "b.ply", raw()),
        ascii_file(tmp_path / "c.ply", shuffled, before="1.0\n2.0"),
        big_endian_file(tmp_path / "d.ply", shuffled),
    ]
    for file in files:
        found = read_gaussians(file)
        for name in ("coord", "color", "opacity", "scale", "quat"):
            np.testing.assert_array_equal(found[name], expected[name], err_msg=f"{file} {name}")


def test_a_quaternion_with_w_0_is_not_zeroed(tmp_path: Path) -> None:
    write_vertices(tmp_path / "a.ply", raw(rot_0=[0, 0], rot_1=[3, -1]))
    np.testing.assert_allclose(read_gaussians(tmp_path / "a.ply")["quat"][:, 1], [1, -1])


def test_a_scene_survives_ply_and_folder(tmp_path: Path) -> None:
    scene = made_scene(300)
    write_gaussians(tmp_path / "a.ply", scene)
    write_scene(tmp_path / "a", read_gaussians(tmp_path / "a.ply"))
    found = read_scene(tmp_path / "a")
    for name in ("coord", "color", "opacity", "scale", "quat"):
        np.testing.assert_allclose(found[name], scene[name], rtol=2e-5, atol=1e-6)


def test_coloured_points_are_written_as_viewers_read_them(tmp_path: Path) -> None:
    write_points(tmp_path / "a.ply", np.eye(3), np.array([[0, 127.6, 300]] * 3))
    rows = read_vertices(tmp_path / "a.ply")
    assert rows.dtype.names == ("x", "y", "z", "red", "green", "blue")
    assert rows["red"].dtype == np.uint8
    assert (rows["red"][0], rows["green"][0], rows["blue"][0]) == (0, 128, 255)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.fault("P20", "P21")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"opacity": [0, np.nan]}, "opacity: 1 of 2 Gaussians hold NaN"),
        ({"scale_1": [0, 99.0]}, r"exp\(99\) is no length"),
        ({"rot_0": [0, 1]}, "rot: 1 of 2 Gaussians have no rotation"),
    ],
)
def test_values_that_are_no_gaussians_are_refused(
    tmp_path: Path, changes: dict[str, list[float]], message: str
) -> None:
    write_vertices(tmp_path / "a.ply", raw(**changes))
    with pytest.raises(DataError, match=f"a.ply: .*{message}"):
        read_gaussians(tmp_path / "a.ply")


@pytest.mark.fault("P28")
@pytest.mark.parametrize(
    ("kept", "message"),
    [
        (("x", "y", "z"), "opacity, f_dc_0.* a mesh or point cloud, no 3D Gaussians"),
        ([n for n in RAW if n != "scale_2"], "2 scales per Gaussian"),
        ([n for n in RAW if n != "rot_3"], "no properties rot_3"),
    ],
)
def test_files_of_something_else_are_told_apart(tmp_path: Path, kept: object, message: str) -> None:
    write_vertices(tmp_path / "a.ply", {n: v for n, v in raw().items() if n in kept})  # type: ignore
    with pytest.raises(DataError, match=message):
        read_gaussians(tmp_path / "a.ply")


def test_a_compressed_splat_says_what_to_do(tmp_path: Path) -> None:
    columns = {n: np.zeros(2, np.uint32) for n in ("packed_position", "packed_color")}
    write_vertices(tmp_path / "a.ply", columns)
    with pytest.raises(DataError, match="compressed splat file: save it again"):
        read_gaussians(tmp_path / "a.ply")


@pytest.mark.fault("P28")
def test_damaged_files_are_refused_before_memory_is_taken(tmp_path: Path) -> None:
    write_vertices(tmp_path / "a.ply", raw())
    data = (tmp_path / "a.ply").read_bytes()
    damages = {
        "cut": (data[:-1], "promises 2 vertices, 120 bytes, but 119"),
        "grown": (data + b"x", "but 121 follow"),
        "billions": (data.replace(b"vertex 2", b"vertex 4000000000"), "promises 4000000000"),
        "absurd": (data.replace(b"vertex 2", b"vertex " + b"9" * 400), "not understood"),
        "endless": (data[:40], "header has no end"),
        "html": (b"<html>\n", "does not begin with 'ply'"),
        "nothing": (b"", "does not begin with 'ply'|no end"),
        "type": (data.replace(b"property float y", b"property quad y"), "'property quad y' is not"),
        "twice": (data.replace(b"property float y", b"property float x"), "more than once"),
        "list": (data.replace(b"property float y", b"property list int int y"), "has a list"),
        "lost": (data.replace(b"element vertex", b"element vertexes"), "no element 'vertex'"),
    }
    for damage, (changed, message) in damages.items():
        path = tmp_path / f"{damage}.ply"
        path.write_bytes(changed)
        with pytest.raises(DataError, match=f"{damage}.ply: .*({message})"):
            read_gaussians(path)


@pytest.mark.fault("P28")
def test_damaged_text_is_refused(tmp_path: Path) -> None:
    path = ascii_file(tmp_path / "a.ply", raw())
    text = path.read_text()
    for old, new in (("vertex 2", "vertex 9"), ("1.5 0.0", "1.5"), ("1.5 0.0", "1.5 x")):
        path.write_text(text.replace(old, new))
        with pytest.raises(DataError, match=r"a\.ply"):
            read_gaussians(path)


# -- meshes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["<", ">"])
def test_vertices_and_triangles_of_a_mesh_are_read(tmp_path: Path, order: str) -> None:
    faces = raw_folders.triangles()
    number = np.arange(len(faces), dtype="i4")
    path = raw_folders.write_mesh(
        tmp_path / "a.ply", raw_folders.floor(), faces, order, category_id=number
    )
    rows = read_vertices(path)
    assert np.array_equal(rows["x"], raw_folders.floor()[:, 0])
    found = read_triangles(path)
    assert np.array_equal(found["vertex_indices"], faces)
    assert np.array_equal(found["category_id"], number)


def test_triangles_are_read_from_text(tmp_path: Path) -> None:
    path = ascii_file(tmp_path / "a.ply", raw())
    assert read_triangles(path)["vertex_indices"].tolist() == [[0, 1, 0]]


def test_meshes_of_other_faces_and_cut_ones_are_refused(tmp_path: Path) -> None:
    floor, faces = raw_folders.floor(), raw_folders.triangles()
    quads = np.concatenate([faces, faces[:, :1]], axis=1)
    path = raw_folders.write_mesh(tmp_path / "a.ply", floor, quads)
    with pytest.raises(DataError, match=r"a\.ply: .*not all of them triangles"):
        read_triangles(path)
    data = raw_folders.write_mesh(path, floor, faces).read_bytes()
    at = data.rindex(b"end_header\n") + len(b"end_header\n") + len(floor) * 16
    for changed, message in (
        (data[:-1], "promises 242 faces, 3146 bytes, but 3145 follow"),
        (data.replace(b"face 242", b"face 4000000000"), "promises 4000000000 faces"),
        (data[:at] + b"\4" + data[at + 1 :], "faces that are no triangles"),
        (data.replace(b"list uchar int", b"list uchar bad"), "'property list uchar bad"),
    ):
        path.write_bytes(changed)
        with pytest.raises(DataError, match=message):
            read_triangles(path)
