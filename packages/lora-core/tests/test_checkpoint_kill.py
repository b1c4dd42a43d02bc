"""SIGKILL at every file operation of a save, full disks, lost permissions: nothing is ever lost."""

import errno
import os
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path

import pytest
import torch
from tiny_training import assert_same_bits, rows, train, trainer
from torch import nn

from lora_core import checkpoint
from lora_core.adapters.file import read_adapter, save_adapter
from lora_core.checkpoint.state import pack
from lora_core.config import LoraConfig
from lora_core.errors import CheckpointError
from lora_core.guards import Guards
from lora_core.injection import inject
from lora_core.tensor_file import atomic_write, remove_partial
from lora_core.testing.kill_points import kill_points, operations
from lora_core.testing.refusals import as_nobody, files_limited_to

torch.set_num_threads(1)  # of which the forks have none


def model(value):
    made = nn.Sequential(nn.Linear(4, 4))
    inject(made, LoraConfig(["0"], r=2))
    with torch.no_grad():
        made[0].lora_B.default.weight.fill_(value)
    return made


MODELS = {value: model(value) for value in (1, 2)}


def fill_with(value):
    def fill(folder):
        (folder / "adapter").mkdir()
        with atomic_write(folder / "adapter" / "weights") as file:
            file.write(bytes([value]) * 100)
        (folder / "adapter" / "more").mkdir()
        (folder / "adapter" / "more" / "plain").write_text("x")  # nobody has flushed its folder
        (folder / "trainer_state.json").write_text("{}")

    return fill


def state(value):
    generator = torch.Generator().manual_seed(value)
    weights = {f"w{i}": torch.randn(30, 5, generator=generator) for i in range(3)}
    return {"tensors": weights, "value": value, "ranks": [{"window": {"loss": [0.1 * value, 2]}}]}


def save(run, step, value):
    return checkpoint.save(run, step, state(value), fill_with(value))


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def assert_is(path, value):
    """The checkpoint holds exactly `state(value)`, and the file that belongs to it."""
    found = checkpoint.load(path)
    del found["format"], found["step"]
    (values, tensors), (wanted, wanted_tensors) = pack(found), pack(state(value))
    assert values == wanted
    assert tensors.keys() == wanted_tensors.keys()
    assert all(torch.equal(tensors[name], wanted_tensors[name]) for name in tensors)
    assert (path / "adapter" / "weights").read_bytes() == bytes([value]) * 100


@pytest.fixture
def fast(tmp_path):
    """A folder in memory, if there is such a thing: thousands of flushes cost no time there."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


# -- checkpoints -----------------------------------------------------------------------------------


@pytest.mark.fault("K01", "K19")
@pytest.mark.parametrize(
    "what", ["the first", "the next, with pruning", "one of the same step", "an earlier step"]
)
def test_a_save_that_is_killed_anywhere_leaves_the_old_or_the_new_checkpoint(fast, what):
    run, template = fast / "run", fast / "template"
    template.mkdir()
    if what != "the first":
        save(template, 1, 1)
    if what == "one of the same step":
        save(template, 2, 2)
    if what == "an earlier step":
        save(template, 5, 2)

    def prepare():
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(template, run)

    def action():
        save(run, 2, 3)
        checkpoint.prune(run, 1, ())

    allowed = {
        "the first": {2: (3,)},
        "the next, with pruning": {1: (1,), 2: (3,)},
        "one of the same step": {2: (2, 3)},
        "an earlier step": {5: (2,), 2: (3,)},
    }[what]
    seen = set()

    def check(n):
        checkpoint.clean(run)
        if what == "the first" and not checkpoint.steps(run):
            found = None
        else:
            path = checkpoint.latest(run)
            found = checkpoint.load(path)["value"]
            assert found in allowed[int(path.name.removeprefix("checkpoint-"))], n
            assert_is(path, found)
        seen.add(found)
        left = {f"checkpoint-{name}" for name in (1, 2, 5, "5.kept-1")}
        assert set(names(run)) <= left, n
        if n % 10 == 0:  # and the run goes on
            again = save(run, 9, 1)
            assert checkpoint.latest(run) == again

    assert kill_points(action, check, prepare) > 30
    assert 3 in seen
    assert seen & {None, 1, 2}


@pytest.mark.fault("K01")
def test_cleaning_up_can_be_killed_anywhere_too(fast):
    """A replacement that died between its two renames is the hardest case: `clean` must end it."""
    run, template = fast / "run", fast / "template"
    save(fast / "a", 2, 2), save(fast / "b", 2, 3)
    space = template / ".checkpoint-2.999.0123abcd.tmp"
    space.mkdir(parents=True)
    (space / ".lora-core").touch()
    (fast / "a" / "checkpoint-2").rename(space / "old")
    (fast / "b" / "checkpoint-2").rename(space / "new")
    save(template, 1, 1)
    (template / "checkpoint-1").rename(template / ".checkpoint-1.999.0123abcd.gone")
    (template / ".checkpoint-3.999.0123abcd.tmp").mkdir()
    (template / ".best.pt.0123abcd.tmp").touch()

    def prepare():
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(template, run)

    def check(n):
        checkpoint.clean(run)
        assert [p.name for p in run.iterdir()] == ["checkpoint-2"]
        assert_is(run / "checkpoint-2", 3)

    assert kill_points(lambda: checkpoint.clean(run), check, prepare) > 15


@pytest.mark.fault("K01")
def test_an_interrupted_replacement_without_a_whole_new_one_gets_the_old_one_back(tmp_path):
    save(tmp_path, 2, 2)
    space = tmp_path / ".checkpoint-2.999.0123abcd.tmp"
    space.mkdir()
    (space / ".lora-core").touch()
    (tmp_path / "checkpoint-2").rename(space / "old")
    shutil.copytree(space / "old", space / "new")
    (space / "new" / "state.json").write_bytes(b"")
    assert_is(checkpoint.latest(tmp_path), 2)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-2"]


@pytest.mark.fault("K03")
def test_everything_is_flushed_before_it_gets_its_name(tmp_path):
    """What a power cut can undo: unflushed data, and names in unflushed folders."""
    save(tmp_path, 1, 1)
    done = operations(lambda: (save(tmp_path, 2, 2), checkpoint.prune(tmp_path, 1, ())))
    kinds = [kind for kind, _ in done]
    new = next(path for kind, path in done if kind == "rename" and path.endswith("/new"))
    named = done.index(("rename", new))
    written = {path for kind, path in done[:named] if kind == "write" and path.startswith(new)}
    assert {Path(path).name for path in written} >= {"state.json", "manifest.json"}
    for path in written:
        renamed = Path(path).with_name("weights")  # written as a sibling first
        names = {path, str(renamed)} if ".tmp" in Path(path).name else {path}
        last_write = max(i for i, entry in enumerate(done) if entry == ("write", path))
        assert any(("fsync", name) in done[last_write:named] for name in names), path
    last = max(i for i in range(named) if kinds[i] == "write")
    assert done[last][1] == f"{new}/manifest.json"
    assert all(
        ("fsync", path) in done[:named] for path in (new, f"{new}/adapter", f"{new}/adapter/more")
    )
    flushed = done.index(("fsync", str(tmp_path)), named)
    gone = done.index(("rename", str(tmp_path / "checkpoint-1")))
    assert named < flushed < gone  # the new one is safe before an old one goes


# -- a whole training ------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.fault("K01", "K08")
def test_a_training_killed_anywhere_in_a_save_resumes_to_the_same_bits(fast):
    """The save of step 10 of a real run, with its log, adapter, best and pruning."""
    settings = {"steps": 12, "save_adapter": None, "guards": Guards(keep_last=1)}
    whole = train(fast / "whole", **settings)
    run, again, kept = fast / "run", fast / "again", fast / "kept"
    made = trainer(run, **settings)
    plain_save, points, randoms = made._save_checkpoint, [], {}

    def prepare():
        checkpoint.set_random_state(randoms)  # `check` trains in this process, too
        for path in run.iterdir():
            if path.name != ".lock":  # this process trains there
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        shutil.copytree(kept, run, dirs_exist_ok=True)

    def check(n):
        shutil.rmtree(again, ignore_errors=True)
        shutil.copytree(run, again, ignore=shutil.ignore_patterns(".lock"))
        resumed = train(again, resume=True, **settings)
        assert_same_bits(whole.network, resumed.network)
        assert rows(fast / "whole") == rows(again)
        assert names(again) == names(fast / "whole")
        for path in (fast / "whole").glob("checkpoint-*/adapter/adapter_model.safetensors"):
            other = again / path.relative_to(fast / "whole")
            one, two = read_adapter(path.parent).tensors, read_adapter(other.parent).tensors
            assert all(torch.equal(one[name], two[name]) for name in one)

    class Done(Exception):
        pass

    def save_and_die(network, trial=None):
        if made.state.global_step < 10:
            return plain_save(network, trial)
        shutil.copytree(run, kept, ignore=shutil.ignore_patterns(".lock"))
        randoms.update(checkpoint.random_state())
        points.append(kill_points(lambda: plain_save(network, trial), check, prepare))
        raise Done

    made._save_checkpoint = save_and_die
    with pytest.raises(Done):
        made.train()
    assert points[0] > 40


# -- single files ----------------------------------------------------------------------------------


@pytest.mark.fault("K01", "K54")
def test_a_file_that_is_replaced_is_the_old_or_the_new_one_at_every_moment(fast):
    path, old, new = fast / "x.bin", b"old" * 100, b"new" * 90_000

    def action():
        with atomic_write(path) as file:
            for start in range(0, len(new), 50_000):  # several writes
                file.write(new[start : start + 50_000])

    def check(n):
        assert path.read_bytes() in (old, new)
        remove_partial(fast)
        assert [p.name for p in fast.iterdir()] == ["x.bin"]

    assert kill_points(action, check, lambda: path.write_bytes(old)) > 8


@pytest.mark.fault("K01", "K54")
@pytest.mark.parametrize("name", ["adapter", "adapter.pt"])
def test_an_adapter_that_is_replaced_is_the_old_or_the_new_one_at_every_moment(fast, name):
    path, template = fast / name, fast / "template" / name
    save_adapter(MODELS[1], template)

    def prepare():
        if path.is_dir():
            shutil.rmtree(path)
        copy = shutil.copytree if template.is_dir() else shutil.copy
        copy(template, path)

    def check(n):
        tensors = read_adapter(path).tensors
        assert tensors["0.lora_B.weight"].unique().tolist() in ([1], [2])

    assert kill_points(lambda: save_adapter(MODELS[2], path), check, prepare) > 5


@pytest.mark.fault("K54")
def test_a_reader_sees_the_old_or_the_new_file_and_never_a_mix(tmp_path):
    path, contents = tmp_path / "x", [bytes([i]) * 200_000 for i in (1, 2)]
    path.write_bytes(contents[0])
    seen, done = set(), threading.Event()

    def read():
        while not done.is_set():
            seen.add(path.read_bytes())

    thread = threading.Thread(target=read)
    thread.start()
    try:
        for i in range(60):
            with atomic_write(path) as file:
                file.write(contents[i % 2])
    finally:
        done.set()
        thread.join()
    assert seen <= set(contents)


# -- disks -----------------------------------------------------------------------------------------


PARTS = ["tensors", "fill", "adapter", "no file at all"]


def assert_refused(run, part, number):
    """Saving step 2, of which this part is too large, fails and changes nothing."""
    large, fill = state(2), fill_with(2)
    if part == "tensors":
        large["tensors"]["more"] = torch.zeros(1_000_000)
    if part == "fill":
        fill = lambda folder: (folder / "x").write_bytes(bytes(4_000_000))  # noqa: E731
    if part == "adapter":
        big = nn.Sequential(nn.Linear(1000, 1000))
        inject(big, LoraConfig(["0"], r=500))
        fill = lambda folder: save_adapter(big, folder / "adapter")  # noqa: E731
    before = names(run)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.save(run, 2, large, fill)
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == number
    assert f"cannot save {run / 'checkpoint-2'}: {os.strerror(number)}" in str(caught.value)
    assert names(run) == before
    assert_is(checkpoint.latest(run), 1)


@pytest.mark.fault("K02")
@pytest.mark.parametrize("part", PARTS)
def test_a_full_disk_keeps_the_checkpoint_before_and_leaves_nothing_behind(small_disk, part):
    save(small_disk, 1, 1)
    if part == "no file at all":
        (small_disk / "full").write_bytes(bytes(shutil.disk_usage(small_disk).free))
    assert_refused(small_disk, part, errno.ENOSPC)
    (small_disk / "full").unlink(missing_ok=True)
    assert_is(save(small_disk, 2, 2), 2)  # with room again it goes on


@pytest.mark.fault("K02")
@pytest.mark.parametrize("part", PARTS)
def test_a_write_that_the_system_refuses_keeps_the_checkpoint_before(tmp_path, part):
    """As a quota does it; needs no right to mount."""
    save(tmp_path, 1, 1)
    with files_limited_to(0 if part == "no file at all" else 2_000_000):
        assert_refused(tmp_path, part, errno.EFBIG)
    assert_is(save(tmp_path, 2, 2), 2)


@pytest.mark.fault("K02")
def test_on_a_full_disk_old_checkpoints_can_be_deleted(small_disk):
    for step in (1, 2):
        save(small_disk, step, step)
    (small_disk / "full").write_bytes(bytes(shutil.disk_usage(small_disk).free))
    checkpoint.prune(small_disk, 1, ())
    assert names(small_disk) == ["checkpoint-2", "full"]


@pytest.mark.fault("K02")
def test_deleting_old_checkpoints_needs_no_byte(tmp_path):
    for step in (1, 2):
        save(tmp_path, step, step)
    with files_limited_to(0):
        checkpoint.prune(tmp_path, 1, ())
    assert names(tmp_path) == ["checkpoint-2"]


@pytest.mark.fault("K07")
def test_a_disk_that_became_read_only_is_said_and_can_still_be_resumed_from(small_disk, capsys):
    save(small_disk, 1, 1)
    save(small_disk, 2, 2)
    remount = ["mount", "-o", "remount,ro", str(small_disk)]
    subprocess.run(remount, check=True)
    with pytest.raises(CheckpointError, match=r"checkpoint-3: Read-only file system") as caught:
        save(small_disk, 3, 3)
    assert caught.value.__cause__.errno == errno.EROFS
    checkpoint.prune(small_disk, 1, ())  # no reason to stop
    assert "cannot delete old checkpoints" in capsys.readouterr().out
    assert_is(checkpoint.latest(small_disk), 2)


@pytest.mark.fault("K07")
def test_a_lost_permission_is_said_at_the_first_save_and_can_still_be_resumed_from(open_folder):
    run = open_folder / "run"
    save(run, 1, 1)
    save(run, 2, 2)
    run.chmod(0o555)

    def work():
        with pytest.raises(CheckpointError, match="checkpoint-3: Permission denied") as caught:
            save(run, 3, 3)
        assert caught.value.__cause__.errno == errno.EACCES
        checkpoint.prune(run, 1, ())  # no reason to stop
        assert_is(checkpoint.latest(run), 2)
        return 0

    status, output = as_nobody(work)
    assert status == 0, output
    run.chmod(0o755)
    assert names(run) == ["checkpoint-1", "checkpoint-2"]


@pytest.mark.fault("K02")
def test_an_error_of_ours_or_ctrl_c_while_saving_leaves_nothing_behind(tmp_path):
    save(tmp_path, 1, 1)
    for error in (ZeroDivisionError, KeyboardInterrupt, CheckpointError):

        def fails(folder, error=error):
            (folder / "x").write_text("x")
            raise error

        with pytest.raises(error):
            checkpoint.save(tmp_path, 1, state(2), fails)
        assert names(tmp_path) == ["checkpoint-1"]
        assert_is(checkpoint.latest(tmp_path), 1)


# -- the runner itself -----------------------------------------------------------------------------


def test_the_runner_finds_a_save_that_is_not_safe(tmp_path):
    path = tmp_path / "x"

    def check(n):
        assert path.read_text() in ("old", "new")

    with pytest.raises(AssertionError, match="assert 'n' in"):  # half of it, that is
        kill_points(lambda: path.write_text("new"), check, lambda: path.write_text("old"))


def test_the_runner_sees_every_kind_of_operation(tmp_path):
    def action():
        (tmp_path / "d").mkdir()
        with open(tmp_path / "d" / "text", "w") as text:
            text.write("ü")
        with open(tmp_path / "d" / "bytes", "wb", buffering=0) as raw:
            raw.write(b"1")
            os.fsync(raw)
        handle = os.open(tmp_path / "d" / "low", os.O_CREAT | os.O_WRONLY)
        os.write(handle, b"1")
        os.ftruncate(handle, 0)
        os.close(handle)
        os.replace(tmp_path / "d" / "low", tmp_path / "d" / "high")
        os.chmod(tmp_path / "d" / "high", 0o600)
        shutil.rmtree(tmp_path / "d")
        (tmp_path / "nothing").exists()

    kinds = [kind for kind, _ in operations(action)]
    assert [kind for kind in kinds if kind not in ("open", "remove")] == (
        ["mkdir", "write", "write", "fsync", "write", "truncate", "rename", "chmod", "rmdir"]
    )
    assert kinds.count("remove") == 3
    assert kinds.count("open") >= 3
    points = kill_points(action, lambda n: shutil.rmtree(tmp_path / "d", ignore_errors=True))
    assert points == len(kinds)


def test_the_runner_tells_what_went_wrong_in_the_action(tmp_path):
    def action():
        (tmp_path / "x").touch()
        raise KeyError("lost")

    with pytest.raises(AssertionError, match="KeyError: 'lost'"):
        kill_points(action, lambda n: None, lambda: (tmp_path / "x").unlink(missing_ok=True))
    with pytest.raises(AssertionError, match="does nothing"):
        kill_points(lambda: None, lambda n: None)
