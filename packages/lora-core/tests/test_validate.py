"""Every sample is looked at once; what looks at it may crash, hang or be killed."""

from __future__ import annotations

import json
import os
import resource
import signal
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from lora_core import shielded, validate
from lora_core.errors import DataError, UserError, run
from lora_core.shielded import Limits
from lora_core.testing import hostile, limited
from lora_core.training.loading import Watched, retried
from lora_core.validate import REPORT, Bad, stop_or_skip, write_report


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder of the user."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Thirty files of a data set, each with its number."""
    root = tmp_path / "data"
    root.mkdir()
    paths = [root / f"{number:02}.txt" for number in range(30)]
    for number, path in enumerate(paths):
        path.write_text(str(number))
    return paths


def look(path: Path) -> dict[str, int]:
    """The number in a file; a note beside the data set for each look."""
    with (path.parent.parent / "looks").open("a") as file:
        file.write(f"{path.name}\n")
    try:
        return {"number": int(path.read_text())}
    except ValueError:
        raise DataError(f"{path}: no number") from None


def check(
    paths: list[Path], look: Callable[[Path], Any] = look, **settings: Any
) -> list[shielded.Outcome]:
    words = {"kind": "number 1", "root": paths[0].parent, "files": lambda path: [path]}
    return validate.validate(paths, look, **(words | settings))


def looks(paths: list[Path]) -> int:
    """How many files were looked at since the last question."""
    log = paths[0].parent.parent / "looks"
    count = len(log.read_text().splitlines()) if log.exists() else 0
    log.unlink(missing_ok=True)
    return count


def remembered(memory: Path) -> Path:
    (path,) = (memory / "lora-core" / "validated").iterdir()
    return path


# -- the shield ------------------------------------------------------------------------------------


@pytest.mark.fault("D46", "H48")
@pytest.mark.parametrize(
    ("act", "reason"),
    [
        (hostile.crash, "its decoder crashes (SIGSEGV)"),
        (lambda: hostile.crash(signal.SIGABRT), "its decoder crashes (SIGABRT)"),
        (lambda: hostile.crash(signal.SIGBUS), "its decoder crashes (SIGBUS)"),
        (hostile.hang, "takes longer than 0.5 s to be decoded"),
        (hostile.eat_memory, "needs more than 0.25 GB of memory to be decoded"),
        (lambda: os._exit(3), "the process that decoded it ended twice (status 3)"),
        (lambda: hostile.crash(signal.SIGKILL), "killed twice (SIGKILL), most likely because"),
    ],
    ids=["segv", "abort", "bus", "hang", "memory", "exit", "kill"],
)
def test_a_decoder_that_dies_costs_its_own_sample_only(
    act: Callable[[], object], reason: str
) -> None:
    def function(index: int) -> int:
        if index == 5:
            act()
        return index

    began = time.monotonic()
    seconds = 0.5 if act is hostile.hang else 8.0
    found = dict(
        shielded.each(function, 20, name="x{}.jpg".format, limits=Limits(seconds, 2**28), workers=2)
    )
    assert time.monotonic() - began < 10
    blamed = found.pop(5)
    assert blamed.value is None
    assert blamed.problem.startswith("x5.jpg: ")
    assert reason in blamed.problem
    assert found == {index: (index, "") for index in range(20) if index != 5}


@pytest.mark.fault("D43")
def test_inputs_are_looked_at_side_by_side(tmp_path: Path) -> None:
    """Each input waits until two processes are at work: alone, a process would see itself only."""

    def function(index: int) -> int:
        (tmp_path / str(os.getpid())).touch()
        end = time.monotonic() + 10
        while len(found := os.listdir(tmp_path)) < 2 and time.monotonic() < end:
            time.sleep(0.01)
        return len(found)

    assert dict(shielded.each(function, 16, workers=2)) == dict.fromkeys(range(16), (2, ""))


def test_a_worker_that_was_killed_from_outside_is_replaced(tmp_path: Path) -> None:
    """The system kills a process when memory is short: the sample at hand may be innocent."""

    def function(index: int) -> int:
        if index == 5 and not (tmp_path / "killed").exists():
            (tmp_path / "killed").touch()
            hostile.crash(signal.SIGKILL)
        return index

    found = dict(shielded.each(function, 20, workers=2))
    assert found == {index: (index, "") for index in range(20)}
    assert (tmp_path / "killed").exists()


def test_a_fault_of_the_program_is_no_bad_sample() -> None:
    with pytest.raises(RuntimeError, match=r"x0: Traceback(.|\n)*ZeroDivisionError"):
        list(shielded.each(lambda index: 1 // index, 3, name="x{}".format))


@pytest.mark.parametrize(("worth", "processes"), [(8, 1), (1, 3)])
def test_slow_inputs_are_worth_a_worker_each(worth: int, processes: int) -> None:
    def process(_: int) -> int:
        time.sleep(0.1)
        return os.getpid()

    outcomes = [outcome for _, outcome in shielded.each(process, 3, workers=4, worth=worth)]
    assert len({outcome.value for outcome in outcomes}) == processes


def test_where_processes_cannot_be_forked_the_outcomes_are_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def function(index: int) -> int:
        if index == 2:
            raise DataError("x2: odd")
        if index == 3:
            raise MemoryError
        return index

    forked = sorted(shielded.each(function, 5, name="x{}".format))
    monkeypatch.setattr(shielded, "CAN_FORK", False)
    assert sorted(shielded.each(function, 5, name="x{}".format)) == forked
    assert forked[2] == (2, (None, "x2: odd"))


def test_what_decoders_write_to_the_terminal_is_dropped(capfd: pytest.CaptureFixture) -> None:
    def function(index: int) -> None:
        os.write(2, b"libtiff: warning")
        os.write(1, b"\x1b[2J")

    list(shielded.each(function, 3))
    assert capfd.readouterr() == ("", "")


@pytest.mark.fault("R32")
def test_workers_compute_although_openmp_has_run_before_the_fork() -> None:
    """OpenMP's threads do not survive a fork: a child that waits for them hangs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        torch.ones(400, 400) @ torch.ones(400, 400)
        found = dict(
            shielded.each(
                lambda index: float((torch.ones(400, 400) @ torch.ones(400, 400)).sum()),
                4, limits=Limits(20.0), workers=2,
            )
        )  # fmt: skip
    finally:
        torch.set_num_threads(threads)
    assert {outcome.problem for outcome in found.values()} == {""}
    assert found[0].value == 400.0**3


def child(function: Callable[[], object]) -> int:
    """Run `function` in a forked process of its own group; gives its id."""
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        status = 1
        try:
            status = run(lambda argv: function() and 0, [])
        finally:
            os._exit(status)
    return pid


def alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def wait_for(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


@pytest.mark.fault("R38")
def test_ctrl_c_leaves_at_once_and_what_was_looked_at_is_remembered(
    memory: Path, files: list[Path]
) -> None:
    def slow(path: Path) -> dict[str, int]:
        if path == files[20]:
            hostile.hang()
        return look(path)

    def main() -> None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        check(files, slow, workers=1)

    pid = child(main)
    log = files[0].parent.parent / "looks"
    assert wait_for(lambda: log.exists() and len(log.read_text().splitlines()) >= 20)
    time.sleep(0.3)
    began = time.monotonic()
    os.killpg(pid, signal.SIGINT)  # as a terminal does: the workers get it too
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 130
    assert time.monotonic() - began < 6
    assert wait_for(lambda: not alive(pid)), "a worker lives on"
    looks(files)
    assert [outcome.value["number"] for outcome in check(files)] == list(range(30))
    assert 10 <= looks(files) <= 12, "only the rest is looked at"


def test_workers_end_when_their_run_is_killed(memory: Path, files: list[Path]) -> None:
    started = files[0].parent.parent / "started"

    def slow(path: Path) -> None:
        started.touch()
        time.sleep(0.2)

    pid = child(lambda: check(files, slow, workers=3))
    assert wait_for(started.exists)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert wait_for(lambda: not alive(pid)), "a worker lives on"


# -- what is remembered ----------------------------------------------------------------------------


@pytest.mark.fault("D43", "D44")
def test_a_good_sample_is_looked_at_again_only_if_it_changed(
    memory: Path, files: list[Path]
) -> None:
    first = check(files)
    assert looks(files) == 30
    assert check(files) == first
    assert looks(files) == 0
    files[3].write_text("33")  # another length
    status = files[4].stat()
    files[4].write_text("9")  # the same length
    os.utime(files[4], ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    changed = [outcome.value["number"] for outcome in check(files)]
    assert (changed[3], changed[4], changed[5]) == (33, 9, 5)
    assert looks(files) == 2
    status = files[5].stat()
    files[5].write_text("55")  # another length at the same time, as copying tools can leave it
    os.utime(files[5], ns=(status.st_atime_ns, status.st_mtime_ns))
    assert check(files)[5].value["number"] == 55
    assert looks(files) == 1
    for path in files[6:8]:
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    for _ in range(2):  # two files of one length and time are told apart by their paths
        assert [outcome.value["number"] for outcome in check(files)[6:8]] == [6, 7]
    looks(files)
    assert check(files, content=lambda path: "annotated anew") == check(files)
    assert looks(files) == 30
    check(files, kind="number 2")
    assert looks(files) == 30
    assert not list(files[0].parent.glob("*.jsonl")), "nothing is written into the data"


def test_a_bad_sample_is_looked_at_every_time(memory: Path, files: list[Path]) -> None:
    """A disk that was away must not count against a file that never changed."""
    files[7].write_text("seven")
    for expected in (30, 1, 1):
        assert check(files)[7].problem == f"{files[7]}: no number"
        assert looks(files) == expected


@pytest.mark.fault("D45")
@pytest.mark.parametrize("damage", ["cut", "flipped", "garbage", "empty", "folder"])
def test_a_damaged_memory_is_rebuilt_and_said_once(
    memory: Path, files: list[Path], damage: str, capsys: pytest.CaptureFixture
) -> None:
    first = check(files)
    looks(files)
    path = remembered(memory)
    data = path.read_bytes()
    if damage == "folder":
        path.unlink()
        path.mkdir()
    else:
        middle = len(data) // 2
        flipped = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        bad = {"cut": data[:-20], "flipped": flipped, "garbage": b"\xff\0 x\n" * 9, "empty": b""}
        path.write_bytes(bad[damage])
    assert check(files) == first
    assert looks(files) == {"cut": 1, "flipped": 1}.get(damage, 30)
    said = capsys.readouterr().out
    assert said.count(str(path)) == (damage != "empty")
    if damage != "folder":
        assert check(files) == first
        assert looks(files) == 0
        assert capsys.readouterr().out == ""


@pytest.mark.fault("H33")
def test_what_is_remembered_can_be_read_by_its_owner_only(memory: Path, files: list[Path]) -> None:
    mask = os.umask(0)
    try:
        check(files)
    finally:
        os.umask(mask)
    path = remembered(memory)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


@pytest.mark.fault("R39")
def test_runs_at_the_same_time_share_one_memory(memory: Path, files: list[Path]) -> None:
    pids = [child(lambda: check(files, workers=2)) for _ in range(4)]
    for pid in pids:
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    looks(files)
    assert [outcome.value["number"] for outcome in check(files)] == list(range(30))
    assert looks(files) == 0


@pytest.mark.fault("R40")
def test_on_a_full_disk_the_run_goes_on_without_memory(
    memory: Path, files: list[Path], capsys: pytest.CaptureFixture
) -> None:
    def main() -> list[Any]:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        looks_on = [look(path) for path in files]
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))
        outcomes = check(files, lambda path: {"number": int(path.read_text())})
        return [looks_on == [outcome.value for outcome in outcomes]]

    pid = child(lambda: os._exit(0 if main() == [True] else 7))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert [outcome.value["number"] for outcome in check(files)] == list(range(30))


@pytest.mark.fault("R31")
@pytest.mark.parametrize("case", ["no home", "not writable", "inside the data"])
def test_without_a_place_for_a_memory_everything_else_works(
    files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str,
    capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    if case == "not writable":
        (tmp_path / "file").touch()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    elif case == "inside the data":
        monkeypatch.setenv("HOME", str(files[0].parent))
    before = sorted(tmp_path.rglob("*"))
    for _ in range(2):
        assert [outcome.value["number"] for outcome in check(files)] == list(range(30))
        assert looks(files) == 30
    assert sorted(tmp_path.rglob("*")) == before
    said = capsys.readouterr().out
    assert ("the next run looks at the whole data set again" in said) == (case == "not writable")


def test_the_users_cache_folder_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/is/invalid")
    assert validate.cache_folder() == Path("/home/me/.cache/lora-core")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/cache/me")
    assert validate.cache_folder() == Path("/var/cache/me/lora-core")


@pytest.mark.fault("D43")
def test_a_long_pass_shows_how_far_it_is(
    memory: Path, files: list[Path], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]

    def tick() -> float:
        clock[0] += 1.0
        return clock[0]

    monkeypatch.setattr(validate.time, "monotonic", tick)
    answers = ((number, shielded.Outcome(1)) for number in range(30))
    list(validate._told(answers, 30, "pictures"))
    lines = capsys.readouterr().out.splitlines()
    assert 2 <= len(lines) <= 6
    assert all(line.startswith("checked ") and " of 30 pictures, " in line for line in lines)


# -- stopping or leaving out -----------------------------------------------------------------------

BAD = [
    Bad("train", "a.jpg", "/data/a.jpg: the file is empty"),
    Bad("train", "b.jpg", "/data/b.json: object 1: odd\n/data/b.json: object 2: odd"),
    Bad("train", "b.jpg", "/data/b.jpg: no such file"),
    Bad("val", "c\x1b[2J.jpg", "/data/c\x1b[2J.jpg: cut off"),
]


def settle(bad: list[Bad], rule: str, share: float, folder: Path, good: int = 98) -> None:
    counts = {"train": good, "val": 99}
    stop_or_skip(bad, counts, rule, share, Path("/data"), folder / "runs" / REPORT)


def test_bad_samples_stop_the_run_all_at_once(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        settle(BAD, "stop", 0.5, tmp_path)
    lines = str(caught.value).splitlines()
    assert lines[0] == "/data: 5 problems"
    assert lines[1] == "/data/a.jpg: the file is empty"
    assert lines[-1].startswith("mend or remove them, or leave the 3 samples out with --on_bad")
    with pytest.raises(DataError, match="remove it, or leave it out with --on_bad_sample skip"):
        settle(BAD[:1], "stop", 0.5, tmp_path)
    many = [Bad("train", str(k), f"{k}.jpg: the file is empty") for k in range(1000)]
    with pytest.raises(DataError) as caught:
        settle(many, "stop", 0.5, tmp_path)
    lines = str(caught.value).splitlines()
    assert lines[0] == "/data: 1000 problems"
    assert len(lines) == 23
    assert lines[21] == "... and 980 more"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.fault("D47", "D49")
def test_too_many_bad_samples_stop_the_run_with_the_path_of_their_list(tmp_path: Path) -> None:
    settle(BAD, "skip", 0.02, tmp_path)  # 2 of 100 and 1 of 100
    settle([], "stop", 0.0, tmp_path)
    assert not (tmp_path / "runs").exists()
    with pytest.raises(DataError) as caught:
        settle(BAD, "skip", 0.019, tmp_path)
    text, report = str(caught.value), tmp_path / "runs" / REPORT
    assert "train: 2 of 100 samples are bad, more than --max_bad_fraction 0.019 allows" in text
    assert "val:" not in text
    assert str(report) in text
    assert [json.loads(line) for line in report.read_text().splitlines()] == [
        one._asdict() for one in BAD
    ]
    assert "\x1b" not in report.read_text()


def test_a_list_that_cannot_be_written_hides_nothing(tmp_path: Path) -> None:
    (tmp_path / "runs").touch()
    with pytest.raises(DataError) as caught:
        settle(BAD, "skip", 0.0, tmp_path)
    assert "train: 2 of 100 samples are bad" in str(caught.value)
    assert "bad_samples.jsonl: cannot be written: " in str(caught.value)
    with pytest.raises(DataError, match="cannot be written"):
        write_report(tmp_path / "runs" / REPORT, BAD)


# -- while training --------------------------------------------------------------------------------


@pytest.mark.fault("D08")
def test_a_file_that_comes_back_is_read_and_one_that_stays_away_is_named(tmp_path: Path) -> None:
    path, tries = tmp_path / "x.jpg", []

    def read() -> str:
        tries.append(1)
        if len(tries) == 3:
            path.write_text("back")
        if not path.exists():
            raise DataError(f"{path}: Stale file handle")
        return path.read_text()

    assert retried(read, (0.01, 0.01, 0.01)) == "back"
    assert len(tries) == 3
    path.unlink()
    with pytest.raises(DataError) as caught:
        retried(read, (0.01, 0.01))
    first, second = str(caught.value).splitlines()
    assert first == f"{path}: Stale file handle"
    assert "was tried 3 times" in second
    assert "--resume" in second


class Failing(Dataset[int]):
    """Twelve samples; loading the eighth ends as `act` does."""

    def __init__(self, act: Callable[[], object]) -> None:
        self.act = act

    def __len__(self) -> int:
        return 12

    def name_of(self, index: int) -> str:
        return f"img/{index:02}.jpg"

    def __getitem__(self, index: int) -> int:
        if index == 7:
            self.act()
        return index


def loaded(act: Callable[[], object], workers: int = 2) -> Iterator[int]:
    watched = Watched(Failing(act))
    with watched.explaining():
        yield from DataLoader(watched, batch_size=None, num_workers=workers)


class Special(DataError):
    pass


@pytest.mark.fault("D08")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", [DataError, Special, UserError])
def test_a_bad_file_in_a_loader_process_is_one_clear_message(
    workers: int, kind: type[UserError]
) -> None:
    def act() -> None:
        try:
            raise DataError("DataError: of another file")
        except DataError as error:
            raise kind("img/07.jpg: cut off\nDataError: bring it back") from error

    with pytest.raises(kind) as caught:
        list(loaded(act, workers))
    assert type(caught.value) is kind
    assert str(caught.value) == "img/07.jpg: cut off\nDataError: bring it back"


@pytest.mark.fault("D46")
@pytest.mark.parametrize(
    ("number", "cause"),
    [
        (signal.SIGKILL, "memory ran out"),
        (signal.SIGBUS, "/dev/shm is too small"),
        (signal.SIGSEGV, "its decoder crashed"),
    ],
)
def test_a_loader_process_that_dies_is_named_with_its_sample_and_the_cause(
    number: signal.Signals, cause: str, capfd: pytest.CaptureFixture
) -> None:
    with pytest.raises(DataError) as caught:
        list(loaded(lambda: hostile.crash(number)))
    first, second = str(caught.value).splitlines()
    assert first.startswith("loading: worker process ")
    assert f"was killed ({signal.strsignal(number)}) while it loaded sample img/07.jpg" in first
    assert cause in second


def test_a_fault_of_the_program_in_a_loader_process_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError, match=r"Original Traceback"):
        list(loaded(lambda: 1 // 0))
    with pytest.raises(RuntimeError, match="CUDA error"):
        list(loaded(lambda: (_ for _ in ()).throw(RuntimeError("CUDA error")), workers=0))


def test_hostile_files_take_little_room_on_this_disk(tmp_path: Path) -> None:
    assert hostile.huge(tmp_path / "huge").stat().st_blocks < 64
    assert limited.run(lambda: hostile.png_bomb(tmp_path / "x.png").stat().st_size).value < 50_000
