"""What is wrong with meshes and scenes is told by name, all of it together; the rest goes on."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import trimesh
from mesh_folders import SMALL, halves, write_obj, write_picture, write_rooms
from mesh_shapes import box, obj_text

from lora_core.errors import DataError
from lora_core.testing import console, limited, safe_source
from midi3d_lora import prepare
from midi3d_lora.__main__ import main
from midi3d_lora.scenes.scene_folders import SceneSettings, list_scenes, look_at

SETTINGS = SceneSettings(image_size=32, num_points=100)
TRIANGLE = "v 0 0 0\nv 1 0 0\nv 0 1 0\n"


def text(name: str, content: str | bytes) -> Callable[[Path], object]:
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(data)


def many_parts(folder: Path) -> None:
    for number in range(33):
        write_obj(folder / f"{number:02}.obj", box((number, 0, 0), (number + 0.5, 1, 1)))


def huge_graph(folder: Path) -> None:
    (folder / "a.gltf").write_text('{"asset": {')
    os.truncate(folder / "a.gltf", 2**30)  # takes no place on the disk


def ply(vertices: int) -> bytes:
    head = f"ply\nformat binary_little_endian 1.0\nelement vertex {vertices}\nproperty float x\n"
    head += "property float y\nproperty float z\nelement face 1\n"
    return f"{head}property list uchar int vertex_indices\nend_header\n".encode() + bytes(48)


def gltf(uri: str) -> bytes:
    return json.dumps({"asset": {"version": "2.0"}, "buffers": [{"uri": uri}]}).encode()


# Case -> what makes the folder of a scene, and what is said about it.
FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "P08 empty": (text("a.obj", ""), "a.obj: the file is empty"),
    "P08 points": (text("a.obj", TRIANGLE), "a.obj: no faces in a.obj"),
    "P08 faces": (text("a.obj", "f 1 2 3\n"), "a.obj: "),
    "P09 beyond": (text("a.obj", TRIANGLE + "f 1 2 9\n"), "a.obj: "),
    "P09 nan": (text("a.obj", "v nan 0 0\n" + TRIANGLE + "f 1 2 3\n"), "a.obj: "),
    "P09 lines": (text("a.obj", TRIANGLE + "f 1 1 2\n"), "no area: all 1 faces are lines"),
    "P11 cut": (text("a.glb", b"glTF" + struct.pack("<2I", 2, 900)), "a.glb: no binary glTF"),
    "P11 page": (text("a.glb", "<!DOCTYPE html><html>"), "a.glb: a web page, not a mesh"),
    "P11 stl": (
        text("a.stl", bytes(80) + struct.pack("<I", 2**32 - 1)),
        "a.stl: its header promises 4294967295 triangles",
    ),
    "P11 ply": (text("a.ply", ply(3 * 10**9)), "a.ply: its header promises 3000000000 of vertex"),
    "P12 parent": (text("a.gltf", gltf("../../x.bin")), "only files inside the mesh's folder"),
    "P12 http": (text("a.gltf", gltf("http://localhost/x.bin")), "only files inside the mesh's"),
    "H24 gigabyte": (huge_graph, "a.gltf: 1074 MB of JSON are more than is read"),
    "H24 collada": (text("a.dae", "<?xml version='1.0'?>"), "convert a.dae"),
    "P35 many": (many_parts, "33 instances, expected at most 32"),
}


def prepared(root: Path, *words: str) -> Path:
    words = ("--input_dir", str(root / "raw"), "--output_dir", str(root / "out"), *SMALL, *words)
    prepare.main(list(words))
    return root / "out"


@pytest.mark.fault("P08", "P09", "P11", "P12", "P35", "P44", "H24")
def test_every_fault_is_told_in_a_line_and_the_good_scenes_are_made(tmp_path: Path) -> None:
    raw = write_rooms(tmp_path / "raw", 2)
    for case, (make, _) in FAULTS.items():
        (raw / case).mkdir()
        make(raw / case)
    with pytest.raises(DataError) as caught:
        prepared(tmp_path)
    lines = str(caught.value).splitlines()
    assert len(lines) == len(FAULTS)
    for line, (case, (_, message)) in zip(lines, sorted(FAULTS.items()), strict=True):
        assert line.startswith(f"{raw / case}")
        assert message in line
    assert [one.name for one in list_scenes(tmp_path / "out")] == ["scene_0000", "scene_0001"]
    info = json.loads((tmp_path / "out" / "dataset_info.json").read_text())
    assert info["counts"] == {"scenes": 2, "instances": 4, "failures": len(FAULTS)}
    assert set(info["failures"]) == set(FAULTS)


@pytest.mark.fault("P11", "H24")
@pytest.mark.parametrize("case", [case for case in FAULTS if case[:3] in ("P11", "H24")])
def test_promises_cost_neither_memory_nor_time(tmp_path: Path, case: str) -> None:
    from midi3d_lora.prepare_folders import Options
    from midi3d_lora.sources.folder_scenes import build, find_sources

    (tmp_path / "raw" / "a").mkdir(parents=True)
    FAULTS[case][0](tmp_path / "raw" / "a")
    options = Options(input_dir="raw", output_dir="out", num_samples=100, image_size=32)
    (source,) = find_sources(tmp_path / "raw")
    outcome = limited.run(lambda: len(build(source, options).labels), memory=2**28)
    assert FAULTS[case][1] in outcome.problem


@pytest.mark.fault("P13", "P09")
def test_what_may_make_results_worse_is_said_once_with_its_scenes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        (tmp_path / "raw" / name).mkdir(parents=True)
        (tmp_path / "raw" / name / "leaf.obj").write_text(TRIANGLE + "f 1 2 3\nf 1 1 2\n")
    prepared(tmp_path)
    said = capsys.readouterr().out
    assert said.count("not closed") == 1
    assert "the file has them: a (leaf), b (leaf)" in said
    assert "faces without area were dropped: a (1 of 2), b (1 of 2)" in said


@pytest.mark.fault("P13")
def test_flipped_faces_of_a_closed_mesh_are_turned_outward(tmp_path: Path) -> None:
    path = write_obj(tmp_path / "raw" / "a" / "1.obj", box())
    lines = [line.split() for line in path.read_text().splitlines()]
    flipped = [[one[0], *one[:0:-1]] if one[0] == "f" else one for one in lines]
    path.write_text("\n".join(map(" ".join, flipped)) + "\n")
    values = np.load(prepared(tmp_path) / "a" / "surface.npy", allow_pickle=False)
    assert ((values[:, :3] * values[:, 3:]).sum(axis=1) > 0).all()


@pytest.mark.fault("P13")
def test_a_mesh_of_many_faces_is_sampled_in_a_second(tmp_path: Path) -> None:
    sphere = trimesh.creation.icosphere(subdivisions=6)  # 81,920 faces
    (tmp_path / "raw").mkdir()
    sphere.export(tmp_path / "raw" / "ball.stl")
    values = np.load(prepared(tmp_path) / "ball" / "surface.npy", allow_pickle=False)
    np.testing.assert_allclose(np.linalg.norm(values[:, :3], axis=1), 0.95, atol=1e-3)


@pytest.mark.fault("H25", "H32")
def test_names_are_never_read_as_anything_else(tmp_path: Path) -> None:
    name = "$(touch x); rm -rf ~ `id` & 'a' \x1b[2J\nerror: forged"
    write_obj(tmp_path / "raw" / name / "$(touch x).obj", box())
    out = prepared(tmp_path)
    assert [one.name for one in list_scenes(out)] == [name]
    (tmp_path / "raw" / name / "$(touch x).obj").write_text(TRIANGLE)
    with pytest.raises(DataError) as caught:
        prepared(tmp_path, "--overwrite")
    assert len(str(caught.value).splitlines()) == 1
    assert "\x1b" not in str(caught.value)
    assert not (tmp_path / "x").exists()
    assert not Path("x").exists()


@pytest.mark.fault("H24")
def test_materials_and_textures_of_an_obj_are_not_opened(tmp_path: Path) -> None:
    folder = tmp_path / "raw" / "a"
    folder.mkdir(parents=True)
    os.mkfifo(folder / "pipe.mtl")  # would block for ever
    (folder / "1.obj").write_text("mtllib pipe.mtl\nusemtl x\n" + obj_text(box()))
    assert len(list_scenes(prepared(tmp_path))) == 1


@pytest.mark.fault("D39", "D40", "D41", "D42")
def test_prepared_scenes_that_were_changed_are_told_before_training(tmp_path: Path) -> None:
    write_rooms(tmp_path / "raw", 5)
    out = prepared(tmp_path)
    (out / "scene_0000" / "seg.png").unlink()
    write_picture(out / "scene_0001" / "seg.png", np.zeros((32, 32)))
    write_picture(out / "scene_0002" / "seg.png", halves(32, 32, 1, 1))
    write_picture(out / "scene_0003" / "scene_rgb.png", np.zeros((32, 16, 3)))
    problems = [one.problem for one in look_at(list_scenes(out), SETTINGS, out)]
    assert "misses seg.png" in problems[0]
    assert "no instance: all pixels are background" in problems[1]
    assert "2 slices, but seg.png has the labels 1" in problems[2]
    assert "of other proportions" in problems[3]
    assert problems[4] == ""


# -- the command -----------------------------------------------------------------------------------


def test_a_fault_is_a_message_and_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rooms(tmp_path / "raw", 1)
    (tmp_path / "raw" / "bad.obj").write_text(TRIANGLE)
    words = ["--input_dir", str(tmp_path / "raw"), "--output_dir", str(tmp_path / "out")]
    assert main(["prepare", *words, *SMALL]) == 2
    said = capsys.readouterr()
    assert said.err == f"error: {tmp_path}/raw/bad.obj: no faces in bad.obj\n"
    assert "1 scenes prepared, 0 were there, 1 failed; 1 in all" in said.out
    assert "Traceback" not in said.err + said.out


@pytest.mark.fault("C24")
def test_an_output_that_cannot_be_is_refused_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    words = ["--input_dir", str(tmp_path), "--output_dir", str(tmp_path / "file" / "out")]
    assert main(["prepare", *words]) == 2
    assert "is not a folder: choose another one" in capsys.readouterr().err


def test_help_and_the_steps_need_no_torch() -> None:
    for words in (["prepare", "--help"], ["prepare", "3d-front", "--help"]):
        console.check_light("midi3d-lora", words)


@pytest.mark.fault("H25", "H26", "H04")
def test_no_source_of_the_package_runs_what_is_not_its_own() -> None:
    import midi3d_lora

    assert safe_source.unsafe_calls(Path(midi3d_lora.__file__).parent) == []
