"""Real signals in every phase of a training: it saves, ends with the right status, resumes exactly.

One way to look at it: whatever a signal interrupts, the run and its resumption together leave the
bits, the rows and the best of a run that nothing happened to.
"""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from tiny_training import (
    Points,
    assert_same_bits,
    collate,
    evaluate,
    loss,
    network,
    rows,
    train,
    trainer,
)

from lora_core import checkpoint, errors
from lora_core.guards import Guards
from lora_core.training.signals import Interrupted, Signals, Stopped, stops_command

SIGNALS = ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"]
STATUS = {"SIGTERM": 143, "SIGINT": 130, "SIGHUP": 143, "SIGUSR1": 143}


@pytest.fixture(autouse=True)
def handlers_as_in_a_terminal():
    """Under nohup SIGHUP is ignored, and so it would be here."""
    usual = dict.fromkeys(SIGNALS, signal.SIG_DFL) | {"SIGINT": signal.default_int_handler}
    before = {name: signal.signal(getattr(signal, name), usual[name]) for name in SIGNALS}
    yield
    for name, handler in before.items():
        signal.signal(getattr(signal, name), handler)


def send(name="SIGTERM"):
    os.kill(os.getpid(), getattr(signal, name))


class Once:
    """Calls `what` the n-th time that it is called itself."""

    def __init__(self, n, what=send):
        self.left, self.what = n, what

    def __call__(self, *args):
        self.left -= 1
        if self.left == 0:
            self.what()


class Backward(torch.autograd.Function):
    """Passes gradients on, and calls something on the way."""

    @staticmethod
    def forward(ctx, x, call):
        ctx.call = call
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        ctx.call()
        return g, None


def in_phase(phase, call):
    """Settings of a training in which `call` is called in this phase again and again."""

    def forward(model, batch):
        if model.training:
            call()
        return loss(model, batch)

    def backward(model, batch):
        value, parts = loss(model, batch)
        return (Backward.apply(value, call) if model.training else value), parts

    def validation(model):
        call()
        return evaluate(model)

    class Loading(Points):
        def __getitem__(self, i):
            call()
            return super().__getitem__(i)

    return {
        "forward": {"loss": forward},
        "backward": {"loss": backward},
        "loading": {"data": Loading()},
        "saving": {"save_adapter": lambda path: (call(), path.mkdir())},
        "after saving": {"on_latest": call},
        "validation": {"measure": validation},
        "drawing": {"draw": call},
    }[phase]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, train(folder)


def assert_like(whole, folder, made):
    """The same bits, rows, and best as in the uninterrupted run."""
    first_folder, first = whole
    assert_same_bits(first.network, made.network)
    assert rows(folder) == rows(first_folder)
    assert made.best == first.best
    assert made.without_gain == first.without_gain


def stop(folder, **settings):
    """Run a training as a command until a signal ends it; gives its exit status."""
    return errors.run(lambda argv: train(folder, **settings) and None, [])


@pytest.mark.fault("K23", "K26")
@pytest.mark.parametrize(
    ("phase", "n", "name"),
    [
        ("forward", 5, "SIGTERM"),
        ("forward", 5, "SIGINT"),
        ("forward", 5, "SIGHUP"),
        ("forward", 5, "SIGUSR1"),
        ("backward", 9, "SIGTERM"),
        ("loading", 30, "SIGTERM"),
        ("saving", 2, "SIGTERM"),
        ("after saving", 1, "SIGHUP"),
        ("validation", 3, "SIGTERM"),
        ("validation", 3, "SIGINT"),
        ("drawing", 2, "SIGTERM"),
    ],
)
def test_a_signal_in_any_phase_saves_and_the_resumed_run_is_exact(
    tmp_path, whole, capfd, phase, n, name
):
    before = [signal.getsignal(getattr(signal, each)) for each in SIGNALS]
    assert stop(tmp_path, **in_phase(phase, Once(n, lambda: send(name)))) == STATUS[name]
    assert [signal.getsignal(getattr(signal, each)) for each in SIGNALS] == before
    text = capfd.readouterr().err
    assert f"stopped by {name} after step" in text
    assert f"saved in {checkpoint.latest(tmp_path)}" in text
    assert "Traceback" not in text
    assert_like(whole, tmp_path, train(tmp_path, resume=True))


@pytest.mark.fault("K23")
def test_a_signal_in_the_last_step_of_an_epoch_resumes_exactly(tmp_path, whole):
    """7 updates make an epoch: its 13th micro-batch is the last one."""
    with pytest.raises(Stopped, match="after step 7 of 23"):
        train(tmp_path, **in_phase("forward", Once(13)))
    assert_like(whole, tmp_path, train(tmp_path, resume=True))


@pytest.mark.fault("K23", "K08")
def test_a_run_that_is_stopped_again_and_again_is_exact(tmp_path, whole):
    resume = None
    for phase, n in [
        ("forward", 3), ("validation", 1), ("loading", 20), ("validation", 2),
    ]:  # fmt: skip
        with pytest.raises(Stopped):
            train(tmp_path, resume=resume, **in_phase(phase, Once(n)))
        resume = True
    assert_like(whole, tmp_path, train(tmp_path, resume=True))


@pytest.mark.fault("K23")
def test_a_long_validation_is_broken_off_within_the_grace_time(tmp_path, whole):
    def hangs():
        threading.Timer(0.1, send).start()
        time.sleep(30)

    began = time.monotonic()
    with pytest.raises(Stopped):
        train(tmp_path, **in_phase("validation", Once(2, hangs)))
    assert time.monotonic() - began < 10
    assert checkpoint.latest(tmp_path).name == "checkpoint-5"
    assert_like(whole, tmp_path, train(tmp_path, resume=True))


@pytest.mark.fault("K23")
def test_a_signal_before_the_first_step_ends_the_baseline_and_can_be_resumed(tmp_path, whole):
    with pytest.raises(Stopped, match="after step 0 of 23"):
        train(tmp_path, **in_phase("validation", Once(1)))
    assert rows(tmp_path) == []
    assert_like(whole, tmp_path, train(tmp_path, resume=True))


@pytest.mark.fault("K23", "K13")
def test_a_signal_in_the_last_validation_leaves_only_that_to_do(tmp_path, whole):
    with pytest.raises(Stopped, match="after step 23 of 23"):
        train(tmp_path, **in_phase("validation", Once(6)))
    steps = []

    def counted(model, batch):
        steps.append(1)
        return loss(model, batch)

    assert_like(whole, tmp_path, train(tmp_path, resume=True, loss=counted))
    assert steps == []
    log = rows(tmp_path)
    again = train(tmp_path, resume=True)  # now nothing at all is left
    assert_like(whole, tmp_path, again)
    assert rows(tmp_path) == log


@pytest.mark.fault("K23")
def test_a_validation_made_up_for_can_stop_the_training_early(tmp_path):
    settings = {"patience": 2, "min_delta": 1e9}
    first = train(tmp_path / "a", **settings)
    assert first.state.global_step == 15
    with pytest.raises(Stopped):
        train(tmp_path / "b", **in_phase("validation", Once(4)), **settings)
    again = train(tmp_path / "b", resume=True, **settings)
    assert again.state.global_step == 15
    assert_like((tmp_path / "a", first), tmp_path / "b", again)


@pytest.mark.fault("K23")
def test_a_signal_after_the_last_step_is_not_lost(tmp_path, whole):
    """Else the command would go on with its last files until it is killed."""
    with pytest.raises(Stopped, match="after step 23 of 23"):
        train(tmp_path, **in_phase("after saving", Once(5)))
    assert_like(whole, tmp_path, train(tmp_path, resume=True))
    made = trainer(tmp_path)  # one with nothing left to do
    original = made._finished
    made._finished = lambda: (send(), original())[1]
    with pytest.raises(Stopped, match="after step 23 of 23"):
        made.train(True)


@pytest.mark.fault("K24")
def test_a_second_ctrl_c_leaves_at_once_and_damages_nothing(tmp_path, whole, capfd):
    def impatient():
        send("SIGINT")
        send("SIGINT")
        pytest.fail("still here")

    settings = in_phase("backward", Once(25, impatient))
    assert stop(tmp_path, **settings) == 130
    text = capfd.readouterr().err
    assert "SIGINT: finishing this step and saving; Ctrl-C again leaves at once" in text
    assert "stopped at once; complete checkpoints are as they were" in text
    assert "Traceback" not in text
    assert checkpoint.latest(tmp_path).name == "checkpoint-10"
    assert_like(whole, tmp_path, train(tmp_path, resume=True))


@pytest.mark.fault("K24")
def test_a_second_and_a_third_ctrl_c_inside_a_save_leave_the_checkpoint_before(tmp_path, whole):
    def impatient():
        send("SIGINT")
        try:
            send("SIGINT")
        finally:
            send("SIGINT")

    assert stop(tmp_path, **in_phase("saving", Once(2, impatient))) == 130
    assert [path.name for path in tmp_path.glob(".checkpoint*")] == []
    assert checkpoint.latest(tmp_path).name == "checkpoint-5"
    assert_like(whole, tmp_path, train(tmp_path, resume=True))


@pytest.mark.fault("K23", "K24")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_other_signals_after_the_first_change_nothing(tmp_path, whole, name):
    others = [each for each in SIGNALS if each != "SIGINT"]
    with pytest.raises(Stopped) as caught:
        train(tmp_path, **in_phase("forward", Once(5, lambda: [send(name), *map(send, others)])))
    assert caught.value.status == STATUS[name]
    assert_like(whole, tmp_path, train(tmp_path, resume=True))


@pytest.mark.fault("K23")
def test_a_signal_from_another_thread_is_taken(tmp_path, whole):
    def slow(model, batch):
        time.sleep(0.01)
        return loss(model, batch)

    threading.Timer(0.15, send).start()
    with pytest.raises(Stopped):
        train(tmp_path, loss=slow)
    assert_like(whole, tmp_path, train(tmp_path, resume=True))


def is_gone(group):
    """Whether all processes of a group have ended, within five seconds."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


class Slow(Points):
    """Takes a while, so that a signal finds the workers inside of it."""

    def __getitem__(self, i):
        time.sleep(0.02)
        return super().__getitem__(i)


@pytest.mark.fault("K23", "K24", "R34")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_to_the_whole_process_group_spares_the_workers(tmp_path, whole, name):
    """As a terminal, `timeout` and `scancel` do it; in a process of its own, which has a group."""
    ready, child = os.pipe(), os.fork()
    if child == 0:
        os.setpgid(0, 0)
        os.dup2(os.open(tmp_path / "out", os.O_CREAT | os.O_WRONLY), 1)
        os.dup2(1, 2)
        step = Once(6, lambda: os.write(ready[1], b"x"))

        def tells(model, batch):
            step()
            return loss(model, batch)

        def main(argv):
            train(tmp_path / "run", data=Slow(), loss=tells, num_workers=2)

        os._exit(errors.run(main, []))
    assert os.read(ready[0], 1) == b"x"
    os.killpg(child, getattr(signal, name))
    _, status = os.waitpid(child, 0)
    text = (tmp_path / "out").read_text()
    assert os.waitstatus_to_exitcode(status) == STATUS[name], text
    assert "Traceback" not in text
    assert "DataLoader" not in text
    assert is_gone(child)
    assert_like(whole, tmp_path / "run", train(tmp_path / "run", resume=True))


@pytest.mark.fault("K26")
def test_what_is_ignored_at_the_start_stays_ignored(tmp_path, whole):
    """nohup sets SIGHUP so; a shell in the background SIGINT."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        call = Once(5, lambda: send("SIGHUP"))
        made = train(tmp_path, **in_phase("forward", call))
    finally:
        signal.signal(signal.SIGHUP, before)
    assert call.left < 0
    assert_like(whole, tmp_path, made)


def test_training_in_another_thread_leaves_signals_alone(tmp_path, whole):
    before = signal.getsignal(signal.SIGTERM)
    made = []
    thread = threading.Thread(target=lambda: made.append(train(tmp_path)))
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGTERM) is before
    assert_like(whole, tmp_path, made[0])


def test_handlers_are_restored_when_training_fails(tmp_path):
    before = [signal.getsignal(getattr(signal, name)) for name in SIGNALS]

    def broken(model, batch):
        raise KeyError("a fault of ours")

    with pytest.raises(KeyError):
        train(tmp_path, loss=broken)
    assert [signal.getsignal(getattr(signal, name)) for name in SIGNALS] == before


# -- commands --------------------------------------------------------------------------------------


@pytest.mark.fault("K23", "K26")
@pytest.mark.parametrize("name", SIGNALS)
def test_a_command_that_is_not_training_ends_at_once_and_cleans_up(name, capsys):
    cleaned = []

    def main(argv):
        try:
            send(name)
            time.sleep(5)
        finally:
            cleaned.append(True)

    assert errors.run(main, []) == STATUS[name]
    assert cleaned
    text = capsys.readouterr().err
    assert "stopped by" in text
    assert "Traceback" not in text


@pytest.mark.fault("K23")
def test_a_child_that_inherits_the_handler_dies_as_if_there_were_none():
    with stops_command(), Signals() as signals:
        child = os.fork()
        if child == 0:
            send()
            time.sleep(5)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == -signal.SIGTERM
        assert signals.received == 0


def test_a_signal_that_came_before_interrupts_at_the_entrance():
    with Signals() as signals:
        send()
        with pytest.raises(Interrupted), signals.interruptible():
            pytest.fail("not to be begun")
        assert signals.received == signal.SIGTERM


@pytest.mark.fault("K23")
def test_a_script_without_our_command_line_ends_with_the_status(tmp_path):
    """`Stopped` is a SystemExit: a plain Python script needs to do nothing for it."""
    script = (
        "import os, signal\n"
        "from lora_core.training.signals import stops_command\n"
        "with stops_command():\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (143, "")


@pytest.mark.fault("K23")
def test_the_message_says_how_to_resume(tmp_path):
    with pytest.raises(Stopped) as caught:
        train(tmp_path, resume_with="run --resume here", **in_phase("forward", Once(5)))
    folder = Path(tmp_path) / "checkpoint-3"
    assert str(caught.value) == (
        f"stopped by SIGTERM after step 3 of 23; saved in {folder}; "
        "continue with: run --resume here"
    )


@pytest.mark.fault("K48")
def test_saves_that_take_longer_than_their_interval_wait_for_each_other(tmp_path):
    times = []

    def slow(step):
        times.append((step, time.monotonic()))
        time.sleep(0.05)

    made = trainer(
        tmp_path, model=network(), on_latest=slow, steps=5, measure=None,
        trainer={"save_steps": 1}, guards=Guards(keep_last=2),
    )  # fmt: skip
    made.train()
    assert [step for step, _ in times] == [1, 2, 3, 4, 5]
    assert all(b - a >= 0.05 for (_, a), (_, b) in pairwise(times))
    assert checkpoint.steps(tmp_path) == [4, 5]


def test_the_collate_function_may_be_interrupted_too(tmp_path, whole):
    call = Once(9)

    def noisy(samples):
        call()
        return collate(samples)

    made = trainer(tmp_path)
    made.data_collator = noisy
    with pytest.raises(Stopped):
        made.train()
    shutil.copytree(tmp_path, tmp_path / "copy")
    assert_like(whole, tmp_path, train(tmp_path, resume=True))
