"""Two processes in one folder: the second is told who is there; the dead hold nothing."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lora_core import checkpoint, run_lock
from lora_core.errors import ConfigError, run
from lora_core.run_lock import LOCK, lock


def child(work):
    """A forked process that does `work` and waits for its end; gives its number when it is done."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(reader)
            work(lambda: (os.write(writer, b"x"), os.close(writer), time.sleep(60)))
        finally:
            os._exit(0)
    os.close(writer)
    assert os.read(reader, 1) == b"x"
    os.close(reader)
    return pid


def end(pid):
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def holder(folder):
    def work(wait):
        with lock(folder):
            wait()

    return child(work)


@pytest.fixture(params=["system's lock", "process numbers"])
def _locks(request, monkeypatch):
    """With the locks of the system, and as on a file system that has none."""
    if request.param == "process numbers":
        monkeypatch.setattr(run_lock, "fcntl", None)


@pytest.mark.fault("K06")
@pytest.mark.usefixtures("_locks")
def test_a_folder_in_use_is_refused_with_process_host_and_file(tmp_path, capsys):
    def start(argv):
        with lock(tmp_path):
            raise AssertionError("two processes in one folder")

    pid = holder(tmp_path)
    try:
        assert run(start, []) == 2
    finally:
        end(pid)
    text = capsys.readouterr().err
    assert str(tmp_path / LOCK) in text
    assert f"process {pid} on {socket.gethostname()}" in text
    assert "choose another folder" in text
    assert "Traceback" not in text


@pytest.mark.fault("K06")
@pytest.mark.usefixtures("_locks")
def test_what_a_killed_process_left_is_named_and_taken_over(tmp_path, capsys):
    pid = holder(tmp_path)
    end(pid)
    assert (tmp_path / LOCK).is_file()
    with lock(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    out = capsys.readouterr().out
    assert f"process {pid} on {socket.gethostname()}, which has ended: taken over" in out
    assert list(tmp_path.iterdir()) == []
    with lock(tmp_path):
        pass
    assert capsys.readouterr().out == ""


@pytest.mark.fault("K06")
def test_the_system_knows_better_than_process_numbers(tmp_path):
    """In a container every run has number 1, and its host gets a new name at every start."""
    for who in ({"pid": os.getpid(), "host": socket.gethostname()}, {"pid": 1, "host": "old-name"}):
        (tmp_path / LOCK).write_text(json.dumps(who))
        with lock(tmp_path):
            pass


@pytest.mark.fault("K06")
def test_without_a_lock_of_the_system_another_host_counts_as_alive(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "fcntl", None)
    (tmp_path / LOCK).write_text(json.dumps({"pid": 1, "host": "other"}))
    with (
        pytest.raises(ConfigError, match=r"process 1 on other.*If it has ended, delete "),
        lock(tmp_path),
    ):
        pass
    assert (tmp_path / LOCK).is_file()


@pytest.mark.fault("K06")
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 5000, b'{"pid": "x"}'])
def test_an_unreadable_lock_file_is_no_obstacle(tmp_path, content):
    (tmp_path / LOCK).write_bytes(content)
    with lock(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.fault("K06")
def test_one_process_does_not_lock_a_folder_twice(tmp_path):
    with lock(tmp_path):
        with pytest.raises(ConfigError, match=f"process {os.getpid()} on"), lock(tmp_path):
            pass
        with lock(tmp_path / "another"):
            pass
        assert (tmp_path / LOCK).is_file()
    with lock(tmp_path):
        pass


@pytest.mark.fault("K06")
def test_a_worker_that_outlives_its_run_does_not_hold_the_lock(tmp_path):
    """Workers of a data loader notice the death of their parent only after seconds."""

    def with_worker(wait):
        with lock(tmp_path):
            worker = os.fork()
            if worker == 0:
                time.sleep(60)
                os._exit(0)
            (tmp_path / "worker").write_text(str(worker))
            wait()

    pid = child(with_worker)
    worker = int((tmp_path / "worker").read_text())
    try:
        with pytest.raises(ConfigError, match=f"process {pid}"), lock(tmp_path):
            pass
        end(pid)
        os.kill(worker, 0)  # lives on
        with lock(tmp_path):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)


@pytest.mark.fault("K06")
def test_a_fork_that_leaves_the_block_takes_no_lock_away(tmp_path):
    with lock(tmp_path):
        pid = os.fork()
        if pid == 0:
            try:
                with lock(tmp_path / "own"):
                    raise SystemExit
            finally:
                os._exit(0)
        os.waitpid(pid, 0)
        assert (tmp_path / LOCK).is_file()

    class Leave(Exception):
        pass

    pid = 0
    try:
        with lock(tmp_path):
            pid = os.fork()
            if pid == 0:
                raise Leave
            os.waitpid(pid, 0)
            assert (tmp_path / LOCK).is_file()
    except Leave:
        os._exit(0)


@pytest.mark.fault("K06")
def test_many_starts_at_once_have_one_winner(tmp_path):
    """Six processes try again and again; whoever is inside must be alone."""
    script = f"""
import os, pathlib, random, sys, time
from lora_core.errors import ConfigError
from lora_core.run_lock import lock
folder, won = pathlib.Path({str(tmp_path)!r}), 0
end = time.time() + 1
sys.stdout = open(os.devnull, "w")
while time.time() < end:
    try:
        with lock(folder):
            (folder / "inside").touch(exist_ok=False)
            time.sleep(random.random() / 1000)
            (folder / "inside").unlink()
            won += 1
    except ConfigError:
        time.sleep(0.0005)
sys.stderr.write(f"{{won}}\\n")
"""
    starter = (
        "import os, sys\n"
        "from lora_core import run_lock\n"
        "children = []\n"
        "for _ in range(6):\n"
        "    if (pid := os.fork()) == 0:\n"
        "        try:\n"
        f"            exec({script!r})\n"
        "        except BaseException:\n"
        "            import traceback; traceback.print_exc(); os._exit(1)\n"
        "        os._exit(0)\n"
        "    children.append(pid)\n"
        "sys.exit(max(os.waitpid(pid, 0)[1] for pid in children) != 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", starter], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sum(map(int, done.stderr.split())) > 10
    assert not (tmp_path / LOCK).exists()


@pytest.mark.fault("K06", "K07")
def test_a_folder_that_cannot_be_locked_is_named(tmp_path):
    (tmp_path / "file").touch()
    message = r"cannot lock .*file/\.lock: .*can be written"
    with pytest.raises(ConfigError, match=message), lock(tmp_path / "file"):
        pass
    (tmp_path / LOCK).symlink_to("/etc/passwd")
    with pytest.raises(ConfigError, match="cannot lock"), lock(tmp_path):
        pass
    assert Path("/etc/passwd").stat().st_size > 0


def test_a_lock_and_checkpoints_live_in_one_folder(tmp_path):
    with lock(tmp_path):
        checkpoint.save(tmp_path, 1, {}, lambda folder: None)
        assert checkpoint.latest(tmp_path).name == "checkpoint-1"
