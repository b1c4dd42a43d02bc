"""Checkpoint folders: found by what they are, refused when damaged, deleted only when ours."""

import json
import os
import pickle
import shutil
import stat
from pathlib import Path

import pytest
import torch

from lora_core import checkpoint
from lora_core.checkpoint import manifest_file as checkpoint_manifest
from lora_core.errors import CheckpointError, ConfigError, run
from lora_core.tensor_file import atomic_write, remove_partial

RECORD = {
    "config": {"learning_rate": 1e-4, "betas": (0.9, 0.999), "name": None},
    "fingerprints": {"base": "abc", "data": "def"},
    "world": {"processes": 2, "batch_size": 4, "accumulation": 8},
}


def fill(folder):
    (folder / "adapter").mkdir()
    (folder / "adapter" / "weights.bin").write_bytes(bytes(range(256)) * 8)
    (folder / "trainer_state.json").write_text("{}")


def save(run, step, value=None):
    state = {"tensors": {"w": torch.full((20, 5), float(value or step))}, "value": value}
    return checkpoint.save(run, step, state, fill, RECORD)


def rewrite(path, **changes):
    """Change a manifest and sign it again, as another program or an attacker could."""
    content = json.loads((path / "manifest.json").read_text())
    content |= changes
    content.pop("sha256")
    content["sha256"] = checkpoint_manifest._digest(content)
    (path / "manifest.json").write_text(json.dumps(content))


@pytest.fixture
def one(tmp_path):
    return save(tmp_path / "run", 7)


# -- what is written -------------------------------------------------------------------------------


def test_a_manifest_lists_every_file_and_what_made_it(one):
    found = checkpoint.manifest(one)
    assert (found["format"], found["step"]) == (2, 7)
    assert {name: found[name] for name in RECORD} == RECORD
    assert found["versions"].keys() >= {"python", "lora-core", "torch", "transformers"}
    on_disk = {p.relative_to(one).as_posix() for p in one.rglob("*") if p.is_file()}
    assert {*found["files"], "manifest.json"} == on_disk
    assert found["files"]["adapter/weights.bin"]["size"] == 2048


@pytest.mark.fault("K51")
def test_a_copy_elsewhere_is_as_good(tmp_path, one):
    place = tmp_path / "other disk" / "mit Umläuten und spaces"
    shutil.copytree(one.parent, place)
    shutil.rmtree(one.parent)
    path = checkpoint.latest(place)
    assert checkpoint.load(path)["tensors"]["w"].unique().tolist() == [7]
    for file in path.rglob("*"):
        assert not file.is_file() or str(tmp_path).encode() not in file.read_bytes()


@pytest.mark.fault("H33")
def test_a_save_works_in_a_private_folder_and_its_result_has_the_usual_permissions(tmp_path):
    seen = []

    def look(folder):
        fill(folder)
        seen.append((folder, stat.S_IMODE(folder.parent.stat().st_mode)))

    path = checkpoint.save(tmp_path, 1, {}, look)
    other = checkpoint.save(tmp_path, 2, {}, look)
    (first, mode), (second, _) = seen
    assert mode == 0o700
    assert first.parent.parent == tmp_path  # beside the target: a rename, never a copy
    assert first.parent.name.split(".")[3] != second.parent.name.split(".")[3]  # not to be guessed
    (tmp_path / "usual").mkdir()
    assert path.stat().st_mode == other.stat().st_mode == (tmp_path / "usual").stat().st_mode
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-2", "usual"]


@pytest.mark.fault("H33")
def test_a_file_is_private_until_it_is_whole(tmp_path):
    names = set()
    for _ in range(2):
        with atomic_write(tmp_path / "x") as file:
            (part,) = tmp_path.glob(".*")
            assert stat.S_IMODE(part.stat().st_mode) == 0o600
            names.add(part.name)
            file.write(b"x")
    assert len(names) == 2
    (tmp_path / "usual").touch()
    assert (tmp_path / "x").stat().st_mode == (tmp_path / "usual").stat().st_mode


# -- damage ----------------------------------------------------------------------------------------


def flip(file, where):
    data = bytearray(file.read_bytes())
    data[int(where * (len(data) - 1))] ^= 0x10
    file.write_bytes(data)


DAMAGE = {
    "emptied": lambda file: file.write_bytes(b""),
    "missing": lambda file: file.unlink(),
    "a folder": lambda file: (file.unlink(), file.mkdir()),
    "a link": lambda file: (file.rename(file.parent.parent / "x"), file.symlink_to("../x")),
    "another of the same size": lambda file: file.write_bytes(b"\0" * file.stat().st_size),
    **{
        f"cut at {i}/8": lambda file, i=i: os.truncate(file, file.stat().st_size * i // 8)
        for i in range(8)
    },
    **{f"flipped at {w}": lambda file, w=w: flip(file, w) for w in (0.0, 0.3, 0.9, 1.0)},
}
FILES = ["state.safetensors", "state.json", "adapter/weights.bin", "manifest.json"]


@pytest.mark.fault("K03", "K04", "K05")
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_left_out_and_one_before_it_is_taken(
    tmp_path, one, name, damage, capsys
):
    last = save(one.parent, 9)
    DAMAGE[damage](last / name)
    assert checkpoint.latest(one.parent) == one
    out = capsys.readouterr().out
    assert out.count("left out: ") == 1
    assert str(last) in out
    assert name in out
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(last)
    assert str(last) in str(caught.value)
    assert name in str(caught.value)
    assert checkpoint.load(one)["value"] is None


@pytest.mark.fault("K05")
def test_every_flipped_byte_of_a_manifest_is_noticed(one):
    file = one / "manifest.json"
    data = file.read_bytes()
    for i in range(0, len(data) - 1, 7):
        for bit in (1, 0x20):
            file.write_bytes(data[:i] + bytes([data[i] ^ bit]) + data[i + 1 :])
            with pytest.raises(CheckpointError):
                checkpoint.manifest(one)
    file.write_bytes(data)
    assert checkpoint.manifest(one)["step"] == 7


@pytest.mark.fault("K04")
def test_a_damaged_checkpoint_that_was_named_stops_with_a_message(tmp_path, one, capsys):
    flip(one / "state.safetensors", 0.5)
    (one / "adapter" / "weights.bin").unlink()
    assert run(lambda argv: checkpoint.load(one), []) == 2
    text = capsys.readouterr().err
    assert f"{one} is damaged" in text
    assert "adapter/weights.bin is missing" in text  # all problems at once
    assert "state.safetensors is not what was saved" in text
    assert "takes its last whole checkpoint" in text
    assert "Traceback" not in text
    assert len(text.splitlines()) <= 3


def test_a_run_without_any_whole_checkpoint_says_so(tmp_path, one):
    os.truncate(one / "state.json", 3)
    with pytest.raises(CheckpointError, match="none of its 1 training checkpoints is whole"):
        checkpoint.latest(one.parent)
    with pytest.raises(CheckpointError, match="holds no training checkpoint"):
        checkpoint.latest(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=r"no training checkpoint: .*nothing does not exist"):
        checkpoint.load(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    for read in (checkpoint.load, checkpoint.manifest):
        with pytest.raises(CheckpointError, match=r"empty has no manifest\.json"):
            read(tmp_path / "empty")


@pytest.mark.fault("K03")
def test_foreign_files_are_named_and_hinder_nothing(one, capsys):
    (one / "notes.txt").write_text("mine")
    (one / "adapter" / "more").symlink_to("/")
    (one / "\x1b[2J").touch()
    assert checkpoint.load(one)["step"] == 7
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "holds files that are not of it" in out
    assert "adapter/more" in out
    assert "notes.txt" in out


def test_a_folder_is_read_once_unless_it_changes(one, monkeypatch):
    checkpoint_manifest._whole.clear()
    read = []
    whole = checkpoint_manifest._problem
    monkeypatch.setattr(
        checkpoint_manifest, "_problem", lambda *args: (read.append(args), whole(*args))[1]
    )
    checkpoint.load(checkpoint.latest(one.parent))
    assert len(read) == len(checkpoint.manifest(one)["files"])
    status = (one / "state.json").stat()
    flip(one / "state.json", 0.5)
    os.utime(one / "state.json", ns=(status.st_atime_ns, status.st_mtime_ns))  # as if unchanged
    with pytest.raises(CheckpointError, match="sha256"):
        checkpoint.load(one)


# -- formats ---------------------------------------------------------------------------------------


@pytest.mark.fault("K57")
def test_a_later_format_is_refused_with_both_numbers(one, capsys):
    rewrite(one, format=3)
    for call in (checkpoint.load, checkpoint.manifest, lambda path: checkpoint.latest(path.parent)):
        assert run(lambda argv, call=call: call(one), []) == 2
        text = capsys.readouterr().err
        assert f"{one} was written by format 3, this program reads up to 2" in text
        assert "update lora-core" in text


def old_format(folder, **changes):
    folder.mkdir(parents=True)
    state = {"format": 1, "step": 5, "tensors": {"w": torch.ones(2)}, "best": None}
    torch.save(state | changes, folder / "state.pt")
    (folder / "trainer_state.json").write_text("{}")
    return folder


@pytest.mark.fault("K58")
def test_the_first_format_is_read_and_never_changed(tmp_path):
    old = old_format(tmp_path / "checkpoint-5")
    before = {path.name: path.read_bytes() for path in old.iterdir()}
    assert checkpoint.latest(tmp_path) == old
    state = checkpoint.load(old)
    assert (state["step"], state["tensors"]["w"].tolist()) == (5, [1, 1])
    assert checkpoint.manifest(old) == {
        **{key: {} for key in ("versions", "config", "fingerprints", "world", "files")},
        "format": 1,
        "step": 5,
    }
    save(tmp_path, 6)
    save(tmp_path, 7)
    checkpoint.prune(tmp_path, 1, ())
    assert checkpoint.steps(tmp_path) == [5, 7]
    assert {path.name: path.read_bytes() for path in old.iterdir()} == before
    save(tmp_path, 5)  # the new one takes the name, the old one stays
    assert {p.name: p.read_bytes() for p in (tmp_path / "checkpoint-5.kept-1").iterdir()} == before
    assert checkpoint.load(tmp_path / "checkpoint-5")["value"] is None


class Canary:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.fault("K45")
def test_a_checkpoint_with_a_program_inside_runs_nothing(tmp_path):
    canary = tmp_path / "canary"
    old = old_format(tmp_path / "checkpoint-5", best=Canary(canary))
    with pytest.raises(CheckpointError, match="could run a program") as caught:
        checkpoint.load(old)
    assert str(old) in str(caught.value)
    (old / "state.pt").write_bytes(pickle.dumps(Canary(canary)))
    with pytest.raises(CheckpointError):
        checkpoint.load(old)
    assert not canary.exists()
    pickle.loads((old / "state.pt").read_bytes())  # so the canary does sing
    assert canary.exists()


@pytest.mark.fault("K46")
@pytest.mark.parametrize("odd", ["numpy scalar", "path", "namespace", "config"])
def test_a_checkpoint_with_odd_objects_names_their_class(tmp_path, odd):
    import argparse

    import numpy as np

    value, name = {
        "numpy scalar": (np.float64(1), "numpy"),
        "path": (Path("x"), "pathlib"),
        "namespace": (argparse.Namespace(a=1), "argparse.Namespace"),
        "config": (Canary(tmp_path), "Canary"),
    }[odd]
    if odd == "config":
        Canary.__reduce__, kept = object.__reduce__, Canary.__reduce__
    try:
        old = old_format(tmp_path / "checkpoint-5", best=value)
    finally:
        if odd == "config":
            Canary.__reduce__ = kept
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(old)
    assert name in str(caught.value)
    assert str(old / "state.pt") in str(caught.value)


@pytest.mark.parametrize(
    "content", [{"a": 1}, [1], {"format": 1}, {"format": True, "step": 1}, {"format": "1"}]
)
def test_a_state_file_that_is_not_ours_is_refused(tmp_path, content):
    (tmp_path / "checkpoint-5").mkdir()
    torch.save(content, tmp_path / "checkpoint-5" / "state.pt")
    with pytest.raises(CheckpointError, match="is no training checkpoint of lora-core"):
        checkpoint.load(tmp_path / "checkpoint-5")


# -- finding ---------------------------------------------------------------------------------------


@pytest.mark.fault("K21")
def test_steps_are_compared_as_numbers(tmp_path):
    for step in (999, 1000, 9, 500):
        save(tmp_path / str(step), step)
        shutil.move(tmp_path / str(step) / f"checkpoint-{step}", tmp_path)
    assert checkpoint.steps(tmp_path) == [9, 500, 999, 1000]
    assert checkpoint.latest(tmp_path).name == "checkpoint-1000"
    checkpoint.prune(tmp_path, 1, ())
    assert checkpoint.steps(tmp_path) == [1000]


@pytest.mark.fault("K22")
def test_the_latest_is_told_by_the_manifest_not_by_time_or_name(tmp_path):
    for step in (5, 10, 15):
        save(tmp_path, step)
    for step, day in ((5, 3), (10, 2), (15, 1)):  # as a copy can leave them
        for path in (
            checkpoint.folder(tmp_path, step),
            *checkpoint.folder(tmp_path, step).iterdir(),
        ):
            os.utime(path, (86400 * day, 86400 * day))
    assert checkpoint.latest(tmp_path).name == "checkpoint-15"
    (tmp_path / "checkpoint-5").rename(tmp_path / "checkpoint-99")
    assert checkpoint.steps(tmp_path) == [5, 10, 15]
    assert checkpoint.latest(tmp_path).name == "checkpoint-15"


@pytest.mark.fault("H46")
@pytest.mark.parametrize(
    "name",
    [
        "checkpoint-9999; rm -rf ~",
        "checkpoint-9999\n",
        "checkpoint-٩٩",
        "checkpoint--9",
        "checkpoint-+9",
        "checkpoint-099",
        "checkpoint-9e3",
        "checkpoint-",
        "checkpoint-99.kept-1",
        "Checkpoint-99",
        "xcheckpoint-99",
        "checkpoint-" + "9" * 40,
    ],
)
def test_only_folders_named_exactly_as_ours_are_looked_at(one, name):
    shutil.copytree(one, one.parent / name)
    rewrite(one.parent / name, step=9999)
    (one.parent / "checkpoint-50").write_text("a file")
    assert checkpoint.steps(one.parent) == [7]
    assert checkpoint.latest(one.parent) == one
    save(one.parent, 8)
    checkpoint.prune(one.parent, 1, ())
    checkpoint.clean(one.parent)
    assert (one.parent / name / "manifest.json").is_file()


@pytest.mark.fault("H44")
@pytest.mark.parametrize(
    "name",
    [
        "../../etc/passwd",
        "/etc/passwd",
        "adapter/../../x",
        "./state.json",
        "adapter//x",
        "C:\\x",
        "\\\\server\\share",
        "a\0b",
        "",
    ],
)
def test_a_manifest_with_a_file_outside_of_the_checkpoint_is_refused(tmp_path, one, name):
    files = checkpoint.manifest(one)["files"]
    rewrite(one, files={**files, name: files["state.json"]})
    for read in (checkpoint.load, checkpoint.manifest, lambda path: checkpoint.latest(path.parent)):
        with pytest.raises(CheckpointError, match="outside of the checkpoint") as caught:
            read(one)
        assert str(one) in str(caught.value)


@pytest.mark.fault("H44")
def test_a_link_out_of_a_checkpoint_is_not_followed(tmp_path, one):
    shutil.copytree(one / "adapter", tmp_path / "same content")
    shutil.rmtree(one / "adapter")
    (one / "adapter").symlink_to(tmp_path / "same content")
    with pytest.raises(CheckpointError, match=r"adapter/weights\.bin is a link"):
        checkpoint.load(one)


@pytest.mark.parametrize(
    "changes",
    [
        {"step": -1},
        {"step": "7"},
        {"step": True},
        {"files": []},
        {"files": {"state.json": 3}},
        {"files": {"state.json": {"size": "1", "sha256": "0" * 64}}},
        {"files": {"state.json": {"size": 1, "sha256": "0"}}},
        {"files": {}},
        {"format": "2"},
        {"format": None},
        {"config": {"$": ["tensor", "x"]}},
        {"config": {"$": ["object", "os.system"]}},
    ],
    ids=str,
)
def test_a_manifest_that_makes_no_sense_is_refused(one, changes):
    rewrite(one, **changes)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(one)
    assert str(one) in str(caught.value)


@pytest.mark.fault("H38", "H02")
def test_a_checkpoint_is_data_only(one):
    files = [path for path in one.rglob("*") if path.is_file()]
    for path in files:
        content = path.read_bytes()
        if path.suffix == ".json":
            json.loads(content, parse_constant=pytest.fail)
        elif path.suffix == ".safetensors":
            assert content[8:9] == b"{"
        else:
            assert path.name == "weights.bin"  # what this test's `fill` wrote
    assert {path.suffix for path in files} == {".json", ".safetensors", ".bin"}


@pytest.mark.fault("H38")
@pytest.mark.parametrize(
    "values", ['{"$": ["tensor", "no such"]}', '{"$": [1]}', "[]", "{", "[" * 10_000, "NaN"]
)
def test_a_state_that_makes_no_sense_is_refused(one, values):
    """Also with right hashes, as an attacker could write it: it is data, and nothing runs."""
    (one / "state.json").write_text(values)
    rewrite(one, files=_described(one))
    with pytest.raises(CheckpointError, match="does not hold a state"):
        checkpoint.load(one)


def _described(path):
    names = checkpoint.manifest(path)["files"]
    return {name: checkpoint_manifest._describe(path / name) for name in names}


# -- retention -------------------------------------------------------------------------------------


@pytest.mark.fault("K18", "K19")
def test_the_last_ones_the_best_and_the_referenced_stay(tmp_path):
    for step in range(1, 9):
        save(tmp_path, step)
    checkpoint.prune(tmp_path, 2, {3, 5, 77})
    assert checkpoint.steps(tmp_path) == [3, 5, 7, 8]
    checkpoint.prune(tmp_path, 99, ())
    assert checkpoint.steps(tmp_path) == [3, 5, 7, 8]
    checkpoint.prune(tmp_path, 1, {3})
    assert checkpoint.steps(tmp_path) == [3, 8]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-3", "checkpoint-8"]


@pytest.mark.fault("K19")
@pytest.mark.parametrize("keep", [0, -1])
def test_keeping_no_checkpoint_is_refused(one, keep):
    with pytest.raises(ConfigError, match=f"{keep} checkpoints to keep: it must be at least 1"):
        checkpoint.prune(one.parent, keep, ())
    assert checkpoint.steps(one.parent) == [7]


@pytest.mark.fault("K19")
def test_a_damaged_checkpoint_does_not_count_among_the_last(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    flip(tmp_path / "checkpoint-3" / "state.json", 0.5)
    checkpoint.prune(tmp_path, 1, ())
    assert checkpoint.steps(tmp_path) == [2, 3]
    assert checkpoint.latest(tmp_path).name == "checkpoint-2"


@pytest.mark.fault("H43")
def test_nothing_is_deleted_that_is_not_ours(tmp_path, capsys):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("x")
    folder = tmp_path / "run"
    for step in (1, 2, 3, 4, 9):
        save(folder, step)
    shutil.rmtree(folder / "checkpoint-2")
    (folder / "checkpoint-2").symlink_to(outside)  # a link under our name
    (folder / "checkpoint-3" / "notes.txt").write_text("x")  # somebody's file in our folder
    shutil.copytree(folder / "checkpoint-4", folder / "checkpoint-6")  # a copy, another name
    (folder / "checkpoint-5").mkdir()
    (folder / "checkpoint-5" / "model.bin").write_text("x")  # another program's
    (folder / "checkpoint-4" / "adapter" / "link").symlink_to(outside)
    fake = folder / ".checkpoint-7.1.0123abcd.tmp"  # named as a left-over of ours
    gone = folder / ".checkpoint-7.1.0123abcd.gone"
    linked = folder / ".checkpoint-8.1.0123abcd.tmp"
    for path in (fake, gone):
        path.mkdir()
        (path / "data").write_text("x")
    (outside / ".lora-core").touch()  # even with the mark of ours
    linked.symlink_to(outside)
    before = {*tmp_path.rglob("*")} - {*(folder / "checkpoint-1").rglob("*")}
    checkpoint.prune(folder, 1, ())
    checkpoint.clean(folder)
    assert {*tmp_path.rglob("*")} == before - {folder / "checkpoint-1"}


@pytest.mark.fault("H43")
def test_a_link_inside_of_a_left_over_is_removed_and_not_followed(tmp_path):
    outside, left = tmp_path / "outside", tmp_path / "run" / ".checkpoint-7.1.0123abcd.tmp"
    for path in (outside, left, left / "new"):
        path.mkdir(parents=True)
    (outside / "precious").write_text("x")
    (left / ".lora-core").touch()
    (left / "new" / "adapter").symlink_to(outside)
    (left / "old").symlink_to(outside)
    checkpoint.clean(tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []
    assert (outside / "precious").read_text() == "x"


@pytest.mark.fault("H43")
@pytest.mark.parametrize("kind", ["folder", "link", "file", "later format"])
def test_what_lies_in_the_way_of_a_save_is_renamed_not_deleted(tmp_path, kind, capsys):
    way, precious = tmp_path / "checkpoint-7", tmp_path / "precious"
    precious.mkdir()
    (precious / "x").write_text("x")
    if kind == "folder":
        shutil.copytree(precious, way)
    elif kind == "link":
        way.symlink_to(precious)
    elif kind == "file":
        way.write_text("x")
    else:
        save(tmp_path, 7)
        rewrite(way, format=3)
    before = way.lstat()
    save(tmp_path, 7, value=1)
    assert checkpoint.load(way)["value"] == 1
    assert os.path.samestat((tmp_path / "checkpoint-7.kept-1").lstat(), before)
    assert (precious / "x").read_text() == "x"
    assert "now checkpoint-7.kept-1" in capsys.readouterr().out


def test_a_run_that_goes_on_from_an_earlier_step_sets_later_ones_aside(tmp_path, capsys):
    for step in (5, 10, 15):
        save(tmp_path, step)
    save(tmp_path, 7, value=1)
    checkpoint.prune(tmp_path, 1, ())
    assert checkpoint.latest(tmp_path).name == "checkpoint-7"
    assert checkpoint.load(tmp_path / "checkpoint-15.kept-1")["step"] == 15
    assert "another course" in capsys.readouterr().out


# -- what is left behind ---------------------------------------------------------------------------


@pytest.mark.fault("K01")
def test_what_a_live_process_works_on_is_left_alone(tmp_path):
    def work(folder):
        fill(folder)
        child = os.fork()
        if child == 0:  # another process cleans up meanwhile
            checkpoint.clean(tmp_path)
            remove_partial(tmp_path)
            os._exit(0)
        os.waitpid(child, 0)
        assert (folder / "trainer_state.json").is_file()

    checkpoint.save(tmp_path, 1, {}, work)
    with atomic_write(tmp_path / "x") as file:
        file.write(b"x")
        (tmp_path / "y").mkdir()
        work(tmp_path / "y")
    assert (tmp_path / "x").read_bytes() == b"x"
    assert checkpoint.steps(tmp_path) == [1]


@pytest.mark.fault("K01")
def test_left_over_files_go_at_the_next_start_and_files_like_them_stay(tmp_path):
    ours, near = tmp_path / ".best.pt.0123abcd.tmp", tmp_path / ".best.pt.0123.tmp"
    linked = tmp_path / ".link.0123abcd.tmp"
    ours.touch(), near.touch(), linked.symlink_to(near)
    checkpoint.clean(tmp_path)
    assert {*tmp_path.iterdir()} == {near, linked}
