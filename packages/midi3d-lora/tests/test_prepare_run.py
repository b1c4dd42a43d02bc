"""`prepare` loses nothing: shards, kills, crashes, two runs at once, other settings."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mesh_folders import SMALL, tree, write_rooms

from lora_core import errors
from lora_core.errors import DataError
from lora_core.testing import hostile
from lora_core.testing.kill_points import kill_points
from midi3d_lora import prepare
from midi3d_lora.prepare_folders import Options
from midi3d_lora.prepare_run import Source, Work, make, run_all
from midi3d_lora.scenes.prepared_scene import PreparedScene
from midi3d_lora.sources.folder_scenes import build, find_sources


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rooms(tmp_path_factory.mktemp("raw"), 6)


@pytest.fixture(scope="module")
def whole(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one undisturbed run makes of it."""
    output = tmp_path_factory.mktemp("whole") / "out"
    prepared(raw, output)
    return tree(output)


def prepared(raw: Path, output: Path, *words: str) -> None:
    prepare.main(["--input_dir", str(raw), "--output_dir", str(output), *SMALL, *words])


def in_child(action: Callable[[], Any]) -> int:
    child = os.fork()
    if not child:
        status = 1
        try:
            action()
            status = 0
        finally:
            os._exit(status)
    return child


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.fault("P15", "P14")
def test_four_shards_in_any_order_equal_one_run(
    raw: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    for shard in (2, 0, 3, 1):
        prepared(raw, tmp_path, "--num_shards", "4", "--shard_id", str(shard))
    assert tree(tmp_path) == whole
    info = json.loads(whole["dataset_info.json"])
    assert info["counts"] == {"scenes": 6, "instances": 12, "failures": 0}
    assert info["settings"][0]["num_samples"] == 100


@pytest.mark.fault("P14")
def test_a_shard_that_is_killed_and_run_again_changes_nothing(
    raw: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    words = ("--num_shards", "2", "--num_workers", "1")
    child = in_child(lambda: prepared(raw, tmp_path, *words, "--shard_id", "0"))
    wait_for(tmp_path / "scene_0000")
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    # What a process leaves that dies in the middle of a scene, or at its end.
    for name, kind in (("scene_0003", "partial"), ("scene_0000", "old")):
        (tmp_path / f".{name}.{kind}").mkdir()
        (tmp_path / f".{name}.lock").write_text('{"pid": 1, "host": "elsewhere"}')
    for shard in ("1", "0"):
        prepared(raw, tmp_path, *words, "--shard_id", shard)
    assert tree(tmp_path) == whole


@pytest.mark.fault("P14")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_stopped_leaves_whole_scenes_alone_and_can_be_taken_up(
    raw: Path, whole: dict[str, bytes], tmp_path: Path, number: signal.Signals
) -> None:
    words = ["--input_dir", str(raw), "--output_dir", str(tmp_path), *SMALL, "--num_workers", "1"]
    child = os.fork()
    if not child:
        os._exit(errors.run(prepare.main, words))
    wait_for(tmp_path / "scene_0000")
    os.kill(child, number)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 128 + number)
    for path, content in tree(tmp_path).items():
        assert path.startswith("dataset_") or content == whole[path]
        assert not path.startswith(".scene")
    prepared(raw, tmp_path)
    assert tree(tmp_path) == whole


@pytest.mark.fault("P14")
def test_two_runs_at_once_share_the_work(
    raw: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    child = in_child(lambda: prepared(raw, tmp_path, "--num_workers", "1"))
    prepared(raw, tmp_path, "--num_workers", "1")
    assert os.waitpid(child, 0)[1] == 0
    assert tree(tmp_path) == whole


@pytest.mark.fault("P44")
@pytest.mark.parametrize("workers", ["1", "64"])
def test_the_number_of_workers_changes_nothing(
    raw: Path, whole: dict[str, bytes], tmp_path: Path, workers: str
) -> None:
    prepared(raw, tmp_path, "--num_workers", workers)
    assert tree(tmp_path) == whole


@pytest.mark.fault("P44")
def test_a_mesh_that_crashes_a_worker_costs_only_its_scene(
    raw: Path, whole: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    options = Options(input_dir="raw", output_dir="out", num_samples=100, image_size=32)
    settings = options.made_with("meshes", "up", "instances", "render", "full_mask")

    def risky(source: Source) -> PreparedScene:
        if source.name == "scene_0002" and not output.with_name("healed").exists():
            hostile.crash()
        return build(source, options)

    work = Work(output, risky, settings, options.reading())
    with pytest.raises(DataError, match=r"raw.*/scene_0002: its decoder crashes \(SIGSEGV\)$"):
        run_all(work, find_sources(raw), workers=2)
    assert "5 scenes prepared, 0 were there, 1 failed; 5 in all" in capsys.readouterr().out
    info = json.loads((output / "dataset_info.json").read_text())
    assert info["counts"]["failures"] == 1
    assert "its decoder crashes" in info["failures"]["scene_0002"]
    assert not [path for path in output.iterdir() if path.name.startswith(".scene")]
    output.with_name("healed").touch()
    run_all(work, find_sources(raw), workers=2)
    assert tree(output) == whole


@pytest.mark.fault("P14")
def test_what_is_there_is_not_made_again_and_other_settings_need_a_word(
    raw: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    prepared(raw, tmp_path)
    before = (tmp_path / "scene_0000").stat().st_mtime_ns
    prepared(raw, tmp_path)
    assert (tmp_path / "scene_0000").stat().st_mtime_ns == before
    with pytest.raises(DataError, match=r"(?s)scene_0000: was prepared with other .*scene_0005"):
        prepared(raw, tmp_path, "--seed", "7")
    assert tree(tmp_path) == whole
    prepared(raw, tmp_path, "--seed", "7", "--overwrite")
    assert tree(tmp_path) != whole
    prepared(raw, tmp_path, "--overwrite")
    assert tree(tmp_path) == whole


@pytest.mark.fault("P14")
def test_a_scene_whose_files_are_damaged_is_made_again(
    raw: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    prepared(raw, tmp_path)
    (tmp_path / "scene_0001" / "surface.npy").write_bytes(b"")
    (tmp_path / "scene_0002" / "rgb.png").unlink()
    prepared(raw, tmp_path)
    assert tree(tmp_path) == whole


@pytest.mark.fault("P14")
def test_folders_that_were_not_made_here_are_never_replaced(raw: Path, tmp_path: Path) -> None:
    mine = tmp_path / "scene_0003" / "rgb.png"
    mine.parent.mkdir()
    mine.write_bytes(b"precious")
    with pytest.raises(DataError, match="scene_0003: is there already and was not made here"):
        prepared(raw, tmp_path, "--overwrite")
    assert mine.read_bytes() == b"precious"


def test_a_changed_source_is_noticed(tmp_path: Path) -> None:
    raw = write_rooms(tmp_path / "raw", 2)
    prepared(raw, tmp_path / "out")
    (raw / "scene_0001" / "c.obj").write_text((raw / "scene_0001" / "a.obj").read_text())
    with pytest.raises(DataError, match="scene_0001: was prepared with other settings or from"):
        prepared(raw, tmp_path / "out")


def test_a_scene_that_fails_leaves_the_earlier_one(tmp_path: Path) -> None:
    raw = write_rooms(tmp_path / "raw", 2)
    prepared(raw, tmp_path / "out")
    before = tree(tmp_path / "out" / "scene_0001")
    (raw / "scene_0001" / "a.obj").write_text("v 0 0 0\n")
    with pytest.raises(DataError, match=r"no faces in a.obj"):
        prepared(raw, tmp_path / "out", "--overwrite")
    assert tree(tmp_path / "out" / "scene_0001") == before


@pytest.mark.fault("P14")
@pytest.mark.parametrize("there", [False, True], ids=["new", "over an older one"])
def test_a_kill_at_any_file_operation_leaves_a_whole_scene_or_the_one_of_before(
    raw: Path, whole: dict[str, bytes], tmp_path: Path, there: bool
) -> None:
    source = find_sources(raw)[1]
    options = Options(input_dir="raw", output_dir="out", num_samples=100, image_size=32)
    settings = options.made_with("meshes", "up", "instances", "render", "full_mask")
    work = Work(tmp_path / "out", lambda one: build(one, options), settings, options.reading())
    expected = {k.partition("/")[2]: v for k, v in whole.items() if k.startswith(source.name)}

    older = {"scene.json": b"{}"}
    scene = work.output / source.name

    def afresh() -> None:
        shutil.rmtree(work.output, ignore_errors=True)
        work.output.mkdir()
        if there:
            scene.mkdir()
            (scene / "scene.json").write_bytes(older["scene.json"])

    def look(_: int) -> None:
        if scene.exists():
            assert tree(scene) in (expected, older)
        elif there:
            assert tree(work.output / f".{source.name}.old") == older
        make(work, source)
        assert tree(work.output) == {f"{source.name}/{k}": v for k, v in expected.items()}

    assert kill_points(lambda: make(work, source), look, afresh) > 15
