"""Files that lie, hang, vanish or lead elsewhere: named, never followed, never a crash."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faulty_scenes as faulty
import numpy as np
import pytest
import tiny_scenes
from made_scenes import made_scene

from lora_core.errors import DataError
from lora_core.npy_file import read_array
from lora_core.testing import corrupt, limited
from lora_core.testing.no_device import no_device
from lora_core.training import loading
from scenesplat_lora import prepare, survey
from scenesplat_lora.scenes.files import list_scenes, read_scene, write_scene

ROWS = faulty.ROWS


@pytest.fixture(autouse=True)
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test begins without what another has looked at."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_scenes.write_base(tmp_path_factory.mktemp("base") / "base.pth")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return faulty.write_data(tmp_path / "data")


def room(data: Path) -> Path:
    return data / "train" / "room_0"


def stopped(base: Path, data: Path, **given: Any) -> str:
    with no_device(), pytest.raises(DataError) as caught:
        faulty.loaded(base, data, data.parent / "run", **given)
    return str(caught.value)


# -- damaged ---------------------------------------------------------------------------------------


@pytest.mark.fault("D02", "D07")
@pytest.mark.parametrize("name", ["coord", "lang_feat"])
def test_damaged_arrays_are_named_and_all_of_them(base: Path, data: Path, name: str) -> None:
    damages = [damage for damage in corrupt.DAMAGE if damage != "zeros"]
    for number, damage in enumerate(damages):
        shutil.copytree(room(data), data / "train" / f"hall_{number}")
        corrupt.DAMAGE[damage](data / "train" / f"hall_{number}" / f"{name}.npy")
    lines = stopped(base, data).splitlines()
    assert lines[0] == f"{data}: {len(damages)} problems"
    for number, damage in enumerate(damages):
        (line,) = (line for line in lines if f"hall_{number}: {name}.npy: " in line)
        hints = {"web_page": "a web page", "lfs_pointer": "Git LFS pointer"}
        assert hints.get(damage, "") in line


def npy(shape: str, form: str = "'<f4'", body: bytes = bytes(ROWS * 12), version: int = 1) -> bytes:
    """A .npy file with a header as it is given."""
    header = f"{{'descr': {form}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    length = struct.pack("<H" if version == 1 else "<I", len(header))
    return b"\x93NUMPY" + bytes([version, 0]) + length + header + body


LIES = {
    "billions of rows": npy("(4000000000000, 3)"),
    "overflow of 64 bits": npy("(4294967296, 4294967296)"),
    "negative lengths": npy(f"(-{ROWS}, -3)"),
    "a truth value": npy("(True, 3)", body=bytes(12)),
    "a hundred axes": npy(f"({'1, ' * 100})", body=bytes(4)),
    "an expression": npy("(60 ** 1, 3)"),
    "code": npy("(60, 3)", form="__import__('os').system('touch sprung')"),
    "objects": npy("(60, 3)", form="'|O'"),
    "text": npy("(60, 3)", form="'<U0'", body=b""),
    "records": npy("(60,)", form="[('x', '<f4', (3,))]"),
    "complex numbers": npy("(60, 3)", form="'<c8'", body=bytes(ROWS * 24)),
    "no such type": npy("(60, 3)", form="'<f3'"),
    "a later version": npy("(60, 3)", version=9),
    "nested": b"\x93NUMPY\x01\x00" + struct.pack("<H", 8000) + b"(" * 4000 + b")" * 4000,
    "a header of 4 GB": b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + bytes(100),
    "an archive": b"PK\x03\x04" + bytes(100),
}


@pytest.mark.fault("H06", "H41", "H04")
@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies_costs_neither_memory_nor_trust(tmp_path: Path, lie: str) -> None:
    path = tmp_path / "coord.npy"
    path.write_bytes(LIES[lie])
    outcome = limited.run(lambda: str(read_array(path)), memory=2**28)
    assert outcome.problem.startswith(f"{path}: ")
    assert "memory" not in outcome.problem
    assert len(outcome.problem.splitlines()) == 1
    assert not Path("sprung").exists()


@pytest.mark.fault("H06")
def test_lengths_are_compared_before_a_file_is_read(base: Path, data: Path) -> None:
    rows = 2 * 10**9  # 24 GB that take no place on the disk
    path = room(data) / "coord.npy"
    path.write_bytes(npy(f"({rows}, 3)", body=b""))
    os.truncate(path, path.stat().st_size + rows * 12)
    assert f"coord [{rows}, 3], color [{ROWS}, 3]" in stopped(base, data)


def test_memory_and_time_for_a_scene_grow_with_its_files(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    small = survey.limits([tmp_path / "a"])
    with (tmp_path / "a" / "lang_feat.npy").open("wb") as file:
        file.truncate(30 * 10**9)  # is mapped, which a limit of addresses counts
    large = survey.limits([tmp_path / "a"])
    assert large.memory - small.memory == 30 * 10**9
    assert large.seconds > 1000 + small.seconds


# -- no regular files, and links -------------------------------------------------------------------


def pipe(path: Path) -> None:
    os.mkfifo(path)


KINDS: dict[str, Callable[[Path], None]] = {
    "pipe": pipe,
    "folder": lambda path: path.mkdir(),
    "device": lambda path: path.symlink_to("/dev/zero"),
    "loop": lambda path: path.symlink_to(path.name),
    "nowhere": lambda path: path.symlink_to("gone.npy"),
    "no array": lambda path: path.symlink_to("/etc/passwd"),
}


@pytest.mark.fault("D07")
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_file_of_numbers_is_not_read(base: Path, data: Path, kind: str) -> None:
    faulty.change(room(data), coord=None)
    KINDS[kind](room(data) / "coord.npy")
    lines = stopped(base, data).splitlines()
    assert lines[0] == f"{data}: 1 problem"
    assert "coord.npy" in lines[1]
    assert "root:" not in lines[1].replace("b'root:x'", "")


@pytest.mark.fault("H15")
@pytest.mark.parametrize("split", ["..", "train/../../data/train", "/etc", ""])
def test_a_split_stays_inside_the_data_root(
    capsys: Any, base: Path, data: Path, split: str
) -> None:
    given = {"data__train__split": f"['{split}']"}
    message = faulty.refused(capsys, base, data, data.parent / "run", **given)
    assert f"split {split!r}: it must be a folder inside {data}" in message
    with pytest.raises(DataError, match="inside"):
        prepare.main(["chunk", "--data_root", str(data), "--split", split or "../data"])


def test_a_split_that_is_named_twice_is_refused(data: Path) -> None:
    with pytest.raises(DataError, match="'train' is named 2 times"):
        list_scenes(data, ["train", "val", "train"])


@pytest.mark.fault("H32")
@pytest.mark.parametrize("name", ["a\nerror: all is well", "a\x1b[31mred", "Büro ☃ ‮عرب", "[a-z]*"])
def test_names_of_scenes_cannot_forge_lines_of_a_message(
    capsys: Any, base: Path, data: Path, name: str
) -> None:
    room(data).rename(data / "train" / name)
    splits = faulty.loaded(base, data, data.parent / "run")
    assert len(splits.train) == 2
    assert splits.facts["train", f"train/{name}"]["rows"] == ROWS
    faulty.change(data / "train" / name, quat=lambda array: array * 2)
    text = str(faulty.loaded(base, data, data.parent / "run"))  # what was remembered is not used
    assert "to length 1" in text
    assert "\x1b" not in text
    assert not re.search("^error", text, re.MULTILINE)
    faulty.change(data / "train" / name, quat=np.zeros((ROWS, 4)))
    message = faulty.refused(capsys, base, data, data.parent / "run")
    assert len(message.splitlines()) == 3
    assert "\x1b" not in message


# -- files that change -----------------------------------------------------------------------------


def vanish(path: Path) -> None:
    path.unlink()


def shrink(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.fault("D08")
@pytest.mark.parametrize("fault", [vanish, shrink])
@pytest.mark.parametrize("name", ["coord", "lang_feat"])
def test_an_array_that_was_good_and_is_gone_is_tried_again_and_named(
    base: Path, data: Path, fault: Callable[[Path], None], name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(loading, "PAUSES", (0.0, 0.0))
    splits = faulty.loaded(base, data, data.parent / "run")
    path = room(data) / f"{name}.npy"
    before = path.read_bytes()
    fault(path)
    with pytest.raises(DataError, match=rf"{name}\.npy[^$]*was good when the run began"):
        splits.train[0]
    reads = iter([None, lambda: path.write_bytes(before)])
    monkeypatch.setattr(loading.time, "sleep", lambda pause: (next(reads) or (lambda: 0))())
    assert splits.train[0]["name"] == "train/room_0"  # it came back with the third attempt


@pytest.mark.fault("D43")
def test_scenes_that_were_good_are_not_read_again_and_changed_ones_are(
    base: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def look(folder: Path, *given: Any) -> dict[str, Any]:
        with (data.parent / "seen.txt").open("a") as file:  # of any process
            file.write(f"{folder.parent.name}/{folder.name}\n")
        return facts(folder, *given)

    facts = survey.scene_facts
    monkeypatch.setattr(survey, "scene_facts", look)
    for changed in (None, room(data) / "scale.npy", room(data) / "coord.npy"):
        if changed:
            np.save(changed, np.load(changed) * np.float32(0.9))
        splits = faulty.loaded(base, data, data.parent / "run")
        assert splits.facts["train", "train/room_0"]["rows"] == ROWS
        seen.append((data.parent / "seen.txt").read_text())
        (data.parent / "seen.txt").write_text("")
    assert sorted(seen[0].split()) == ["train/room_0", "train/room_1", "val/room_0"]
    assert seen[1:] == ["train/room_0\n", "train/room_0\n"]


@pytest.mark.fault("D47", "D49")
def test_bad_scenes_are_left_out_and_listed_up_to_a_share(
    capsys: Any, base: Path, data: Path
) -> None:
    run = data.parent / "run"
    faulty.change(room(data), coord=np.full((ROWS, 3), np.nan))
    status = faulty.train(base, data, run, on_bad_sample="skip", max_bad_fraction=0.2)
    message = capsys.readouterr().err
    assert status == 2
    assert "train: 1 of 2 samples are bad, more than --max_bad_fraction 0.2 allows" in message
    (row,) = map(json.loads, (run / "bad_samples.jsonl").read_text().splitlines())
    assert (row["split"], row["sample"]) == ("train", "train/room_0")
    assert "60 of 60 rows hold NaN" in row["reason"]
    shutil.rmtree(run)
    assert faulty.train(base, data, run, on_bad_sample="skip", max_bad_fraction=0.6) == 0
    said = capsys.readouterr().out
    assert "train/room_0" in said
    assert "1" in json.dumps(json.loads((run / "training_summary.json").read_text())["bad_samples"])


# -- preparing -------------------------------------------------------------------------------------


@pytest.mark.fault("P29")
def test_chunks_hold_what_the_whole_scene_holds_and_features_stay_on_disk(tmp_path: Path) -> None:
    rows, width = 8000, 768
    scene = made_scene(rows, side=11.9, width=width)
    write_scene(tmp_path / "train" / "hall", scene)
    features = rows * width * 2
    flags = ["chunk", "--data_root", str(tmp_path), "--split", "train", "--grid_size", "0.05"]
    flags += ["--chunk_minimum_size", "1", "--chunk_range", "[3, 3]"]
    prepare.main([*flags, "--max_chunk_num", "1"])  # what is imported counts once
    shutil.rmtree(tmp_path / "train_grid5.0cm_chunk3x3_stride3x3")
    tracemalloc.start()
    prepare.main(flags)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 0.8 * features  # with all arrays of Gaussians, and those of one chunk
    prepare.main([*flags[:-1], "[99, 99]"])
    (whole,) = list_scenes(tmp_path, "train_grid5.0cm_chunk99x99_stride3x3")
    expected = read_scene(whole, wanted=("lang_feat", "normal"))
    place = {row.tobytes(): number for number, row in enumerate(expected["coord"])}
    seen = np.zeros(len(expected["coord"]), bool)
    folders = list_scenes(tmp_path, "train_grid5.0cm_chunk3x3_stride3x3")
    assert len(folders) == 16
    for folder in folders:
        chunk = read_scene(folder, wanted=("lang_feat", "normal"))
        index = np.array([place[row.tobytes()] for row in chunk["coord"]])
        seen[index] = True
        for name in ("color", "opacity", "scale", "quat", "normal", "segment", "instance",
                     "lang_feat", "valid_feat_mask"):  # fmt: skip
            np.testing.assert_array_equal(chunk[name], expected[name][index], err_msg=name)
    assert seen.all()


@pytest.mark.fault("P23")
def test_chunks_of_a_map_are_moved_together_and_that_is_said(tmp_path: Path) -> None:
    scene = made_scene(500, side=12.0)
    write_scene(tmp_path / "train" / "hall", scene)
    coord = scene["coord"].astype(np.float64) + np.array([691_000.0, 5_335_000.0, 516.0])
    faulty.change(tmp_path / "train" / "hall", coord=coord)
    flags = ["--data_root", str(tmp_path), "--split", "train", "--chunk_minimum_size", "1"]
    with pytest.warns(UserWarning, match="hall: coordinates far from the origin"):
        prepare.main(["chunk", *flags, "--grid_size", "0"])
    folders = list_scenes(tmp_path, "train_chunk6x6_stride3x3")
    assert len(folders) == 9
    held = np.concatenate([read_scene(folder)["coord"] for folder in folders])
    assert np.abs(held).max() < 7
    assert len(np.unique(held, axis=0)) == 500


@pytest.mark.fault("P29")
@pytest.mark.parametrize(
    ("far", "words"),
    [(0.0, ["--chunk_stride", "[1e-7, 1e-7]"]), (1e30, [])],
    ids=["tiny stride", "an outlier"],
)
def test_chunks_that_would_never_end_are_refused(
    tmp_path: Path, far: float, words: list[str]
) -> None:
    scene = made_scene(100, side=12.0)
    scene["coord"][0, :2] += np.float32(far)
    write_scene(tmp_path / "train" / "hall", scene)
    flags = ["--data_root", str(tmp_path), "--split", "train", "--chunk_minimum_size", "1"]
    with pytest.raises(DataError, match=r"hall: .* windows every .* take a larger stride"):
        prepare.main(["chunk", *flags, "--grid_size", "0", *words])


@pytest.mark.parametrize("content", ["[]", "3", "null", '{"settings": 1}'])
def test_a_record_of_someone_else_is_made_anew_only_when_told(tmp_path: Path, content: str) -> None:
    write_scene(tmp_path / "train" / "hall", made_scene(500, side=3.0))
    flags = ["--data_root", str(tmp_path), "--split", "train", "--chunk_minimum_size", "1"]
    prepare.main(["chunk", *flags])
    (record,) = (tmp_path / "train_grid1.0cm_chunk6x6_stride3x3" / ".records").rglob("*.json")
    record.write_text(content)
    with pytest.raises(DataError, match=r"hall: prepared with other settings.*--overwrite"):
        prepare.main(["chunk", *flags])
    prepare.main(["chunk", *flags, "--overwrite"])
    assert "made" in json.loads(record.read_text())
