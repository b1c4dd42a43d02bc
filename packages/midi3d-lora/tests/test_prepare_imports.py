"""`prepare 3d-front` and `prepare objaverse`: the published folders become scenes."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trimesh
from mesh_folders import SMALL, halves, tree, write_obj, write_picture
from mesh_shapes import box
from pickled_arrays import Hostile, pickled
from PIL import Image

from lora_core.errors import DataError
from midi3d_lora import prepare
from midi3d_lora.meshes.mesh_loading import Mesh
from midi3d_lora.scenes.scene_folders import SceneSettings, list_scenes, read_scene, scene_facts
from midi3d_lora.sources.prepare_meshes import sample_mesh

SETTINGS = SceneSettings(image_size=32, num_points=100)
ROOMS = ["house1/Bedroom-1", "house1/Hallway-2", "house2/Bedroom-1"]
OBJECTS = ["Bed_1", "Lamp_2", "Chair_3"]
PLACES = ((-0.9, 0, 0), (0, 0.5, 0.5), (0.5, 0, 0))


def solid(number: int) -> Mesh:
    low = np.array(PLACES[number])
    return box(tuple(low), tuple(low + 0.4))


def processed(root: Path) -> Path:
    """3D-FRONT as processed for MIDI-3D: surfaces, pictures with maps, lists."""
    for room in ROOMS:
        for number, name in enumerate(OBJECTS):
            path = root / "3D-FRONT-SURFACE" / room / f"{name}.npy"
            path.parent.mkdir(parents=True, exist_ok=True)
            values = sample_mesh(solid(number), 300, np.random.default_rng(number))
            held = {"surface_points": values[:, :3], "surface_normals": values[:, 3:]}
            np.save(path, np.array(held), allow_pickle=True)
        folder = root / "3D-FRONT-RENDER" / room
        for view in ("0000", "0007"):
            write_picture(folder / f"render_{view}.webp", np.full((64, 64, 3), 100))
            write_picture(folder / f"semantic_{view}.png", halves(64, 64, 1, 3))
    (root / "midi_room_ids.json").write_text(json.dumps(ROOMS))
    (root / "midi_furniture_ids.json").write_text(json.dumps([OBJECTS] * len(ROOMS)))
    return root


def prepared(step: str, root: Path, *words: str) -> Path:
    output = root.with_name("out")
    prepare.main([step, "--source", str(root), "--output_dir", str(output), *SMALL, *words])
    return output


def problem(step: str, root: Path, *words: str) -> str:
    with pytest.raises(DataError) as caught:
        prepared(step, root, *words)
    return str(caught.value)


# -- 3D-FRONT, processed ---------------------------------------------------------------------------


def test_published_surfaces_and_pictures_become_scenes(tmp_path: Path) -> None:
    out = prepared("3d-front", processed(tmp_path / "front"), "--views", "0000", "0007")
    names = [room.replace("/", "_") for room in ROOMS]
    assert [one.name for one in list_scenes(out)] == [
        f"{n}_{v}" for n in names for v in ("0000", "0007")
    ]
    folder = out / "house1_Bedroom-1_0007"
    assert scene_facts(folder, SETTINGS)["labels"] == [[1], [2]]
    record = json.loads((folder / "scene.json").read_text())
    assert [one["name"] for one in record["instances"]] == ["Bed_1", "Chair_3"]
    scene = read_scene(folder, SETTINGS, np.random.default_rng(0))
    # As published: nothing is moved, and points lie on the solids, normals outward.
    for surface, number in zip(scene.surfaces, (0, 2), strict=True):
        inside = surface.points - np.array(PLACES[number])
        assert inside.min() > -1e-6
        assert inside.max() < 0.4 + 1e-6
        assert ((inside - 0.2) * surface.normals).sum(axis=1).min() == pytest.approx(0.2, abs=1e-5)


def test_rooms_may_be_listed_and_the_test_set_is_the_end_of_the_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from midi3d_lora.sources import front_rooms

    monkeypatch.setattr(front_rooms, "TEST_ROOMS", 1)
    root = processed(tmp_path / "front")
    assert [p.name for p in list_scenes(prepared("3d-front", root, "--subset", "test"))] == [
        "house2_Bedroom-1_0000"
    ]
    (tmp_path / "rooms.txt").write_text("house1/Hallway-2\n")
    out = prepared("3d-front", root, "--rooms", str(tmp_path / "rooms.txt"))
    assert (out / "house1_Hallway-2_0000").is_dir()
    (tmp_path / "rooms.txt").write_text("house1/Halway-2\n")
    text = problem("3d-front", root, "--rooms", str(tmp_path / "rooms.txt"))
    assert text == "--rooms: no room house1/Halway-2; did you mean 'house1/Hallway-2'?"


@pytest.mark.fault("P05")
def test_a_surface_that_runs_a_program_is_refused_and_costs_one_room(tmp_path: Path) -> None:
    root = processed(tmp_path / "front")
    path = root / "3D-FRONT-SURFACE" / ROOMS[1] / "Bed_1.npy"
    pickled(path, {"surface_points": Hostile(tmp_path / "sprung")})
    assert f"{path}: a pickle that is damaged, or holds more" in problem("3d-front", root)
    assert not (tmp_path / "sprung").exists()
    assert len(list_scenes(tmp_path / "out")) == 2


@pytest.mark.fault("D42")
def test_a_map_with_more_objects_than_the_list_is_refused(tmp_path: Path) -> None:
    root = processed(tmp_path / "front")
    write_picture(root / "3D-FRONT-RENDER" / ROOMS[0] / "semantic_0000.png", halves(64, 64, 1, 4))
    assert "holds 1, 4, expected 1 to 3, one for each object" in problem("3d-front", root)


def test_without_the_list_of_objects_maps_have_no_meaning(tmp_path: Path) -> None:
    root = processed(tmp_path / "front")
    (root / "midi_furniture_ids.json").unlink()
    assert "misses midi_furniture_ids.json, by whose order" in problem("3d-front", root)
    (root / "midi_furniture_ids.json").write_text("[]")
    assert "expected one list for each of 3 rooms" in problem("3d-front", root)


def test_a_surface_without_normals_is_refused_by_name(tmp_path: Path) -> None:
    root = processed(tmp_path / "front")
    path = root / "3D-FRONT-SURFACE" / ROOMS[0] / "Chair_3.npy"
    np.save(path, np.array({"surface_points": np.ones((9, 3))}), allow_pickle=True)
    assert f"{path}: holds surface_points [9, 3], expected" in problem("3d-front", root)


def test_published_meshes_are_sampled_and_rendered(tmp_path: Path) -> None:
    root = tmp_path / "front"
    for number, name in enumerate(OBJECTS):
        path = root / "3D-FRONT-SCENE" / ROOMS[0] / f"{name}.glb"
        path.parent.mkdir(parents=True, exist_ok=True)
        trimesh.Trimesh(solid(number).vertices, solid(number).faces).export(path)
    (root / "midi_room_ids.json").write_text(json.dumps(ROOMS))
    out = prepared("3d-front", root)
    (folder,) = list_scenes(out)
    assert scene_facts(folder, SETTINGS)["labels"] == [[1], [2], [3]]


# -- 3D-FRONT, as distributed ----------------------------------------------------------------------


def raw(root: Path, **changes: Any) -> Path:
    """A house whose room has the same bar twice, once turned a quarter, and a piece unknown."""
    write_obj(root / "3D-FUTURE-model" / "bar" / "raw_model.obj", box((0, 0, 0), (2, 1, 1)))
    quarter = float(np.sqrt(0.5))
    children = [
        {"ref": "1/model", "pos": [0, 0, 0], "rot": [0, 0, 0, 1], "scale": [1, 1, 1]},
        {"ref": "1/model", "pos": [4, 0, 0], "rot": [0, quarter, 0, quarter], "scale": [1, 2, 1]},
        {"ref": "2/model", "pos": [0, 0, 0], "rot": [0, 0, 0, 1], "scale": [1, 1, 1]},
        {"ref": "wall", "pos": [0, 0, 0], "rot": [0, 0, 0, 1], "scale": [1, 1, 1]},
    ]
    children[1] |= changes
    house = {
        "uid": "house1",
        "furniture": [{"uid": "1/model", "jid": "bar"}, {"uid": "2/model", "jid": "gone"}],
        "mesh": [{"uid": "wall"}],
        "scene": {
            "room": [
                {"instanceid": "LivingRoom-7", "type": "LivingRoom", "children": children},
                {"instanceid": "Empty-1", "type": "None", "children": []},
            ]
        },
    }
    (root / "3D-FRONT").mkdir(exist_ok=True)
    (root / "3D-FRONT" / "house1.json").write_text(json.dumps(house))
    return root


def test_furniture_stands_where_its_house_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = prepared("3d-front", raw(tmp_path / "front"))
    assert "whose model is missing: house1_LivingRoom-7 (gone)" in capsys.readouterr().out
    (folder,) = list_scenes(out)
    assert folder.name == "house1_LivingRoom-7"
    record = json.loads((folder / "scene.json").read_text())
    scale, centre = record["frame"]["scale"], np.array(record["frame"]["centre"])
    straight, turned = np.load(folder / "surface.npy", allow_pickle=False)[..., :3] / scale + centre
    np.testing.assert_allclose(straight.min(axis=0), [0, 0, 0], atol=0.15)
    np.testing.assert_allclose(straight.max(axis=0), [2, 1, 1], atol=0.15)
    # x goes to -z: [0, 2] x [0, 1] x [0, 1] becomes [0, 1] x [0, 2] x [-2, 0], 4 to the right.
    np.testing.assert_allclose(turned.min(axis=0), [4, 0, -2], atol=0.15)
    np.testing.assert_allclose(turned.max(axis=0), [5, 2, 0], atol=0.15)


@pytest.mark.parametrize(
    "changes", [{"rot": [0, 0, 0, 0]}, {"pos": [0, 0]}, {"scale": ["a", 1, 1]}, {"rot": None}]
)
def test_a_house_with_a_piece_that_has_no_place_is_refused(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    text = problem("3d-front", raw(tmp_path / "front", **changes))
    assert "house1.json: no house of 3D-FRONT: " in text


def test_a_model_outside_of_its_folder_is_refused(tmp_path: Path) -> None:
    root = raw(tmp_path / "front")
    path = root / "3D-FRONT" / "house1.json"
    path.write_text(path.read_text().replace('"bar"', '"../secret"'))
    assert "'../secret' is no name of a model or room" in problem("3d-front", root)


def test_a_folder_of_something_else_is_said_to_be_none(tmp_path: Path) -> None:
    (tmp_path / "front").mkdir()
    assert "expected 3D-FRONT-SURFACE with 3D-FRONT-RENDER" in problem(
        "3d-front", tmp_path / "front"
    )


# -- Objaverse -------------------------------------------------------------------------------------


def objaverse(root: Path) -> Path:
    for number, uid in enumerate(("8476c4170df24cf5bbe6967222d1a42d", "f" * 32, "a" * 32)):
        scene = trimesh.Scene()
        for place in (0, 3):
            one = box((place, 0, 0), (place + 1 + number, 1, 1))
            scene.add_geometry(trimesh.Trimesh(one.vertices, one.faces))
        path = root / "hf-objaverse-v1" / "glbs" / f"000-00{number}" / f"{uid}.glb"
        path.parent.mkdir(parents=True)
        scene.export(path)
    content = {"chair": ["f" * 32, "0" * 32], "sofa": ["a" * 32]}
    path = root / "hf-objaverse-v1" / "lvis-annotations.json.gz"
    path.write_bytes(gzip.compress(json.dumps(content).encode()))
    return root


def test_objects_become_scenes_of_one_instance(tmp_path: Path) -> None:
    out = prepared("objaverse", objaverse(tmp_path / "objaverse"))
    assert [one.name for one in list_scenes(out)] == [
        "8476c4170df24cf5bbe6967222d1a42d",
        "a" * 32,
        "f" * 32,
    ]
    folder = out / ("f" * 32)
    assert np.load(folder / "surface.npy", allow_pickle=False).shape == (100, 6)
    with Image.open(folder / "seg.png") as seg:
        assert set(np.unique(np.asarray(seg))) == {0, 1}


def test_objects_may_be_chosen_by_category_and_list(tmp_path: Path) -> None:
    root = objaverse(tmp_path / "objaverse")
    out = prepared("objaverse", root, "--categories", "chair")
    assert [one.name for one in list_scenes(out)] == ["f" * 32]
    assert "no category 'chairr'; did you mean 'chair'?" in problem(
        "objaverse", root, "--categories", "chairr"
    )
    (tmp_path / "uids.txt").write_text("a" * 32 + "\n" + "b" * 32)
    text = problem("objaverse", root, "--uids", str(tmp_path / "uids.txt"))
    assert text == f"--uids: 1 objects have no .glb file: {'b' * 32}"


@pytest.mark.fault("P11", "P44")
def test_a_damaged_object_costs_only_its_scene(tmp_path: Path) -> None:
    root = objaverse(tmp_path / "objaverse")
    path = next(root.rglob(f"{'a' * 32}.glb"))
    path.write_bytes(path.read_bytes()[:-40])
    assert problem("objaverse", root).startswith(f"{path}: its header promises a file")
    assert len(list_scenes(tmp_path / "out")) == 2
    assert list(tree(tmp_path / "out" / ".failed")) == [f"{'a' * 32}.json"]


def test_damaged_annotations_are_refused(tmp_path: Path) -> None:
    root = objaverse(tmp_path / "objaverse")
    path = next(root.rglob("*.json.gz"))
    for data in (path.read_bytes()[:-9], b"<html>", gzip.compress(b"[1]")):
        path.write_bytes(data)
        assert f"{path}: " in problem("objaverse", root, "--categories", "chair")
