"""`prepare`: folders of meshes become scenes that training reads, in one frame, with pictures."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import trimesh
from mesh_folders import SMALL, halves, write_obj, write_picture, write_rooms
from mesh_shapes import box
from PIL import Image

from lora_core.config import parse
from lora_core.errors import ConfigError, DataError
from lora_core.pictures.files import read_image
from midi3d_lora import prepare
from midi3d_lora.prepare_folders import Options
from midi3d_lora.scenes.scene_folders import SceneSettings, list_scenes, read_scene, scene_facts

SETTINGS = SceneSettings(image_size=32, num_points=100)


def prepared(root: Path, *words: str) -> Path:
    prepare.main(
        ["--input_dir", str(root / "raw"), "--output_dir", str(root / "out"), *SMALL, *words]
    )
    return root / "out"


def problem(root: Path, *words: str) -> str:
    with pytest.raises(DataError) as caught:
        prepared(root, *words)
    return str(caught.value)


def surface(scene: Path) -> np.ndarray:
    return np.load(scene / "surface.npy", allow_pickle=False)


def extent(points: np.ndarray) -> np.ndarray:
    """[3] lengths of the box around points [..., 6]."""
    return np.ptp(points[..., :3].reshape(-1, 3), axis=0)


# -- rendered --------------------------------------------------------------------------------------


def test_training_reads_what_was_prepared(tmp_path: Path) -> None:
    write_rooms(tmp_path / "raw", 2)
    out = prepared(tmp_path)
    scenes = list_scenes(out)
    assert [scene.name for scene in scenes] == ["scene_0000", "scene_0001"]
    for folder in scenes:
        assert scene_facts(folder, SETTINGS)["labels"] == [[1], [2]]
        scene = read_scene(folder, SETTINGS, np.random.default_rng(0))
        assert len(scene) == 2
        held = surface(folder)
        assert held.shape == (2, 100, 6)
        assert held.dtype == np.float32
        # The points of the left box belong to the left instance of the picture.
        columns = [np.nonzero(scene.pictures.mask(i))[1].mean() for i in range(2)]
        means = [one.points[:, 0].mean() for one in scene.surfaces]
        assert columns[0] < columns[1]
        assert means[0] < means[1]
    camera = json.loads((scenes[0] / "camera.json").read_text())
    assert (camera["width"], camera["fov"]) == (32, 40.0)
    np.testing.assert_array_equal(
        read_image(scenes[0] / "rgb.png"), read_image(scenes[0] / "scene_rgb.png")
    )


def test_the_scene_and_not_each_object_is_normalised(tmp_path: Path) -> None:
    write_obj(tmp_path / "raw" / "a" / "1.obj", box((0, 0, 0), (100, 50, 50)))
    write_obj(tmp_path / "raw" / "a" / "2.obj", box((100, 0, 0), (200, 100, 50)))
    out = prepared(tmp_path)
    record = json.loads((out / "a" / "scene.json").read_text())
    assert record["frame"] == {"centre": [100.0, 50.0, 25.0], "scale": pytest.approx(0.95 / 100)}
    first, second = surface(out / "a")
    np.testing.assert_allclose(extent(first), [0.95, 0.475, 0.475], atol=0.05)
    np.testing.assert_allclose(extent(second), [0.95, 0.95, 0.475], atol=0.05)
    assert [one["name"] for one in record["instances"]] == ["1", "2"]


@pytest.mark.fault("P10")
def test_a_single_scene_file_gives_its_geometries_where_it_places_them(tmp_path: Path) -> None:
    scene = trimesh.Scene()
    for number, name in enumerate(("left", "right")):
        one = trimesh.Trimesh(box().vertices, box().faces, process=False)
        scene.add_geometry(
            one,
            geom_name=name,
            transform=trimesh.transformations.translation_matrix([4 * number, 0, 0]),
        )
    (tmp_path / "raw").mkdir()
    scene.export(tmp_path / "raw" / "room.glb")
    out = prepared(tmp_path)
    points = surface(out / "room")
    assert points[0, :, 0].max() < points[1, :, 0].min()
    whole = tmp_path / "whole"
    whole.mkdir()
    (tmp_path / "raw").rename(whole / "raw")
    assert surface(prepared(whole, "--instances", "scene") / "room").shape == (100, 6)


def test_z_up_is_for_formats_that_do_not_say_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tall = box((0, 0, 0), (1, 1, 4))
    write_obj(tmp_path / "raw" / "a" / "1.obj", tall)
    (tmp_path / "raw" / "b").mkdir()
    trimesh.Trimesh(tall.vertices, tall.faces).export(tmp_path / "raw" / "b" / "1.glb")
    out = prepared(tmp_path, "--up", "z")
    assert "up axis: z in .obj, y in .glb" in capsys.readouterr().out
    assert extent(surface(out / "a")).argmax() == 1
    assert extent(surface(out / "b")).argmax() == 2
    (tmp_path / "raw" / "b" / "1.glb").rename(tmp_path / "raw" / "a" / "2.glb")
    assert "a: holds glTF, where y is up" in problem(tmp_path, "--up", "z", "--overwrite")


def test_yaw_turns_scenes_around_the_up_axis(tmp_path: Path) -> None:
    write_obj(tmp_path / "raw" / "a" / "1.obj", box((0, 0, 0), (4, 1, 1)))
    assert extent(surface(prepared(tmp_path) / "a")).argmax() == 0
    assert extent(surface(prepared(tmp_path, "--yaw", "90", "--overwrite") / "a")).argmax() == 2


def test_instances_that_cannot_be_seen_are_left_out_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_obj(tmp_path / "raw" / "a" / "front.obj", box((0, 0, 0), (2, 2, 1)))
    write_obj(tmp_path / "raw" / "a" / "behind.obj", box((0.8, 0.8, -1), (1.2, 1.2, -0.5)))
    out = prepared(tmp_path)
    assert "instances left out that cannot be seen: a (behind)" in capsys.readouterr().out
    assert surface(out / "a").shape == (100, 6)
    assert scene_facts(out / "a", SETTINGS)["labels"] == [[2]]


@pytest.mark.fault("P07")
def test_without_normalising_scenes_must_be_in_the_frame(tmp_path: Path) -> None:
    write_obj(tmp_path / "raw" / "a" / "1.obj", box((-0.5, -0.5, -0.5), (0.5, 0.5, 1)))
    out = prepared(tmp_path, "--normalize", "false")
    assert json.loads((out / "a" / "scene.json").read_text())["frame"] is None
    np.testing.assert_allclose(extent(surface(out / "a")), [1, 1, 1.5], atol=0.1)
    write_obj(tmp_path / "raw" / "a" / "1.obj", box((0, 0, 0), (800, 1, 1)))
    text = problem(tmp_path, "--normalize", "false", "--overwrite")
    assert "a: outside of [-1, 1]: x 0..800, y 0..1, z 0..1; prepare with --normalize" in text


# -- given pictures --------------------------------------------------------------------------------


def given(root: Path, seg: np.ndarray | None, size: tuple[int, int] = (64, 64)) -> Path:
    folder = write_rooms(root / "raw", 1) / "scene_0000"
    picture = np.zeros((*size, 3))
    picture[:, : size[1] // 2, 0] = 255
    write_picture(folder / "image.jpg", picture)
    if seg is not None:
        write_picture(folder / "mask.png", seg)
    return folder


def test_given_pictures_are_taken_and_labels_counted_from_1(tmp_path: Path) -> None:
    given(tmp_path, halves(64, 64, 90, 200))
    out = prepared(tmp_path) / "scene_0000"
    assert not (out / "camera.json").exists()
    with Image.open(out / "seg.png") as seg:
        np.testing.assert_array_equal(np.asarray(seg), halves(32, 32))
    assert read_image(out / "rgb.png")[5, 5].argmax() == 0
    assert scene_facts(out, SETTINGS)["labels"] == [[1], [2]]
    assert (
        read_image(prepared(tmp_path, "--render", "--overwrite") / "scene_0000" / "rgb.png")[0]
        == 255
    ).all()


def test_the_whole_scene_may_be_another_picture(tmp_path: Path) -> None:
    folder = given(tmp_path, halves(64, 64))
    write_picture(folder / "scene_rgb.png", np.full((128, 128, 3), 77))
    out = prepared(tmp_path) / "scene_0000"
    assert (read_image(out / "scene_rgb.png") == 77).all()


@pytest.mark.fault("D40")
def test_pictures_that_are_not_square_are_padded_with_white(tmp_path: Path) -> None:
    given(tmp_path, halves(32, 64), size=(32, 64))
    out = prepared(tmp_path) / "scene_0000"
    assert (read_image(out / "rgb.png")[20:] == 255).all()
    with Image.open(out / "seg.png") as seg:
        assert not np.asarray(seg)[16:].any()


@pytest.mark.fault("D40", "D39", "D42")
@pytest.mark.parametrize(
    ("seg", "size", "message"),
    [
        (None, (64, 64), "has image.jpg but misses seg.png, the map of instances; --full_mask"),
        (halves(64, 64, 1, 1), (64, 64), "2 instances in the meshes (a, b), but 1 in seg.png (1)"),
        (halves(64, 32), (64, 64), "seg.png has 32 x 64 pixels, the picture 64 x 64"),
    ],
)
def test_pictures_that_do_not_fit_the_meshes_are_refused(
    tmp_path: Path, seg: np.ndarray | None, size: tuple[int, int], message: str
) -> None:
    given(tmp_path, seg, size)
    text = problem(tmp_path)
    assert text.startswith(f"{tmp_path}/raw/scene_0000: {message}")
    assert len(text.splitlines()) == 1


@pytest.mark.fault("D41")
def test_a_map_saved_as_jpeg_is_refused(tmp_path: Path) -> None:
    folder = given(tmp_path, None)
    write_picture(folder / "mask.jpg", halves(64, 64, 90, 200))
    text = problem(tmp_path)
    assert text.startswith(f"{folder}/mask.jpg: ")
    assert "PNG" in text


def test_a_map_without_a_picture_is_refused(tmp_path: Path) -> None:
    (given(tmp_path, halves(64, 64)) / "image.jpg").unlink()
    assert "has mask.png but misses rgb.png; --render draws the pictures" in problem(tmp_path)


def test_a_picture_may_be_one_instance_if_asked_for(tmp_path: Path) -> None:
    given(tmp_path, None)
    out = prepared(tmp_path, "--full_mask", "--instances", "scene") / "scene_0000"
    with Image.open(out / "seg.png") as seg:
        assert (np.asarray(seg) == 1).all()
    assert surface(out).shape == (100, 6)


def test_all_labels_may_be_one_instance_if_asked_for(tmp_path: Path) -> None:
    given(tmp_path, halves(64, 64))
    out = prepared(tmp_path, "--instances", "scene") / "scene_0000"
    assert scene_facts(out, SETTINGS)["labels"] == [[1]]


def test_a_folder_called_mask_is_no_mask(tmp_path: Path) -> None:
    write_rooms(tmp_path / "raw", 1)
    (tmp_path / "raw" / "scene_0000").rename(tmp_path / "raw" / "masked_render")
    assert (prepared(tmp_path) / "masked_render" / "camera.json").exists()


# -- folders and flags -----------------------------------------------------------------------------


def test_folders_that_hold_no_scene_are_passed_over(tmp_path: Path) -> None:
    write_rooms(tmp_path / "raw", 1)
    (tmp_path / "raw" / ".git").mkdir()
    (tmp_path / "raw" / "notes").mkdir()
    (tmp_path / "raw" / "readme.txt").write_text("hello")
    write_obj(tmp_path / "raw" / "chair.obj", box())
    (tmp_path / "raw" / "chair.blend").write_text("the file that it was exported from")
    assert [one.name for one in list_scenes(prepared(tmp_path))] == ["chair", "scene_0000"]


def test_input_without_scenes_is_said_with_what_was_expected(tmp_path: Path) -> None:
    assert "raw: No such file or directory" in problem(tmp_path)
    (tmp_path / "raw").mkdir()
    assert "no scenes, expected folders with .glb, .gltf, .obj" in problem(tmp_path)
    write_obj(tmp_path / "raw" / "a.obj", box())
    write_picture(tmp_path / "raw" / "rgb.png", np.zeros((8, 8, 3)))
    assert f"looks like one scene itself: give its parent, {tmp_path}" in problem(tmp_path)


def test_two_sources_of_one_name_are_refused(tmp_path: Path) -> None:
    for suffix in (".obj", "/x.obj"):
        write_obj(tmp_path / "raw" / f"chair{suffix}", box())
    assert "would both make the scene chair: rename one" in problem(tmp_path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["objavers"], "did you mean 'objaverse'"),
        (["--input_dir", "a"], "--output_dir is missing"),
        (["--num_samples", "3"], "--num_samples is 3: it must be at least 64"),
        (["--num_shards", "2", "--shard_id", "2"], "it must be 0 to 1"),
        (["--yaw", "north"], "--yaw: expected a number"),
        (["--up", "x"], "--up"),
        (["--image_size", "100000"], "at most 8192"),
    ],
)
def test_settings_that_cannot_work_are_refused(words: list[str], message: str) -> None:
    more = (
        [] if words[0] in ("objavers", "--input_dir") else ["--input_dir", "a", "--output_dir", "b"]
    )
    with pytest.raises(ConfigError, match=message):
        prepare.main([*words, *more])


def test_the_command_of_the_guide_is_understood() -> None:
    guide = "--input_dir data/raw_meshes --output_dir data/training_data --num_samples 20480"
    options = parse(Options, guide.split(), prog="prepare_data.py")
    assert (options.input_dir, options.output_dir) == ("data/raw_meshes", "data/training_data")
    assert (options.num_samples, options.image_size, options.normalize) == (20480, 512, True)


def test_the_script_of_the_guide_prepares_scenes(tmp_path: Path) -> None:
    write_rooms(tmp_path / "raw", 1)
    words = ["--input_dir", "raw", "--output_dir", "out", "--normalize", "--num_samples", "100"]
    script = Path(__file__).parent.parent / "prepare_data.py"
    done = subprocess.run(
        [sys.executable, str(script), *words], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert surface(tmp_path / "out" / "scene_0000").shape == (2, 100, 6)
    assert read_image(tmp_path / "out" / "scene_0000" / "rgb.png").shape == (512, 512, 3)
