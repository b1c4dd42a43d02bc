"""A resumed run is the run: bits, rows, best; and what may differ, is refused, or is survived."""

import errno
import os
import shutil
from collections import defaultdict
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest
import torch
from tiny_training import (
    COLUMNS,
    FromOneOn,
    Points,
    assert_same_bits,
    evaluate,
    loss,
    network,
    rows,
    train,
    trainer,
)

from lora_core import checkpoint, errors
from lora_core.errors import CheckpointError, UserError
from lora_core.guards import Guards
from lora_core.report import RunLog
from lora_core.testing import processes
from lora_core.testing.refusals import files_limited_to, no_space_left
from lora_core.training import resume_check
from lora_core.training.schedule import EpochSampler, lr_factor

EVERY = {"trainer": {"save_steps": 1}}


@pytest.fixture(scope="module")
def every(tmp_path_factory):
    """An uninterrupted run of 23 updates, 7 to an epoch, with a checkpoint after each.

    An epoch is 13 batches in windows of two: its last window has one batch, of two samples.
    """
    folder = tmp_path_factory.mktemp("every")
    return folder, train(folder, **EVERY)


def resumed(every, folder, step, **settings):
    """Go on in `folder` from a copy of the run as it was after `step`."""
    first, _ = every
    folder.mkdir(exist_ok=True)
    shutil.copytree(first / f"checkpoint-{step}", folder / f"checkpoint-{step}")
    shutil.copy(first / "log.csv", folder)
    return train(folder, resume=True, **EVERY | settings)


def assert_same_run(every, folder, made):
    first_folder, first = every
    assert_same_bits(first.network, made.network)
    assert rows(folder) == rows(first_folder)
    assert (made.best, made.without_gain) == (first.best, first.without_gain)


# -- exact -----------------------------------------------------------------------------------------


@pytest.mark.fault("K08", "K09", "K11", "K55", "R16")
@pytest.mark.parametrize(
    ("step", "workers"),
    [
        *[(1, 0), (3, 1), (5, 0), (6, 0), (7, 0), (9, 4), (13, 0), (14, 1), (20, 4), (22, 0)],
        *[pytest.param(n, 0, marks=pytest.mark.slow) for n in (2, 4, 8, 10, 11, 12)],
        *[pytest.param(n, 1, marks=pytest.mark.slow) for n in (15, 16, 17, 18, 19, 21)],
    ],
)
def test_resuming_from_any_step_with_any_workers_is_bit_equal(every, tmp_path, step, workers):
    made = resumed(every, tmp_path, step, num_workers=workers)
    assert_same_run(every, tmp_path, made)


@pytest.mark.fault("K08", "K55")
def test_a_checkpoint_stands_for_a_whole_number_of_updates(every):
    """Saved inside an accumulation window it would lack the gradients so far."""
    folder, made = every
    state = checkpoint.load(folder / "checkpoint-9")
    moments = next(iter(state["optimizer"].values()))
    assert int(moments["step"]) == state["step"] == 9
    assert not [name for name in state["tensors"] if "grad" in name]
    assert made.state.global_step == 23


@pytest.mark.fault("K09")
def test_samples_come_in_the_same_order_and_each_once_an_epoch(every, tmp_path):
    def seen_by(folder, step=None):
        seen = []

        def noted(model, batch):
            if model.training:
                seen.extend(batch["ids"])
            return loss(model, batch)

        if step:
            resumed(every, folder, step, loss=noted)
        else:
            train(folder, loss=noted)
        return seen

    whole = seen_by(tmp_path / "a")
    per_epoch = defaultdict(list)
    for epoch, index in whole:
        per_epoch[epoch].append(index)
    for epoch in range(3):
        assert sorted(per_epoch[epoch]) == list(range(50))
    assert per_epoch[0] != per_epoch[1] != per_epoch[2], "each epoch has an order of its own"
    for step, samples in ((3, 24), (7, 50), (16, 116)):
        assert seen_by(tmp_path / str(step), step) == whole[samples:]


@pytest.mark.fault("K08", "K09", "K12")
@pytest.mark.parametrize("parts", [(4, 2), (8, 1)])
def test_an_order_of_the_caller_is_followed_and_taken_up_inside_an_epoch(tmp_path, parts):
    seen = []

    def noted(model, batch):
        if model.training:
            seen.extend(batch["ids"])
        return loss(model, batch)

    def run(folder, resume=None, batch=4, accumulation=2):
        seen.clear()
        return train(
            folder, resume, loss=noted, order=FromOneOn(50, 3), batch_size=batch,
            gradient_accumulation_steps=accumulation, **EVERY,
        )  # fmt: skip

    first = run(tmp_path / "first")
    whole = list(seen)
    assert [index for _, index in whole[:50]] == [(21 + i) % 50 for i in range(50)]
    assert [index for _, index in whole[50:100]] == [(28 + i) % 50 for i in range(50)]
    (tmp_path / "again").mkdir()
    for name in ("checkpoint-10", "log.csv"):
        copy = shutil.copytree if name == "checkpoint-10" else shutil.copy
        copy(tmp_path / "first" / name, tmp_path / "again" / name)
    again = run(tmp_path / "again", True, *parts)
    assert seen == whole[74:], "step 10 is three updates after an epoch of seven"
    if parts == (4, 2):
        assert_same_bits(first.network, again.network)
        assert rows(tmp_path / "again") == rows(tmp_path / "first")


@pytest.mark.fault("K04", "K08")
def test_a_run_continued_from_an_earlier_step_leaves_the_later_checkpoints_aside(every, tmp_path):
    """Killed before its next save, it would else go on from a step that its log does not know."""
    first, _ = every
    shutil.copytree(first, tmp_path / "run")
    folder = tmp_path / "run"
    made = trainer(folder, **EVERY)

    class Killed(Exception):
        pass

    def kill(*_, **__):
        raise Killed

    made.compute_loss = kill
    with pytest.raises(Killed):
        made.train(resume_from_checkpoint=str(folder / "checkpoint-10"))
    assert checkpoint.latest(folder) == folder / "checkpoint-10"
    assert len(list(folder.glob("checkpoint-*.kept-1"))) == 13
    again = train(folder, resume=True, **EVERY)
    assert_same_run(every, folder, again)


@pytest.mark.fault("K10")
def test_resuming_three_times_inside_one_epoch_is_bit_equal(every, tmp_path):
    class Killed(Exception):
        pass

    def dies(step):
        def after(done):
            if done >= step:
                raise Killed

        return after

    for step in (2, 3, 5):
        made = trainer(tmp_path, on_latest=dies(step), **EVERY)
        with pytest.raises(Killed):
            made.train(step > 2)
    assert_same_run(every, tmp_path, train(tmp_path, resume=True, **EVERY))


@pytest.mark.fault("K17", "R36")
@pytest.mark.parametrize("step", [5, 14, 20])
def test_counters_of_early_stopping_and_the_best_go_on(tmp_path, step):
    values = {0: 0.0, 5: 0.5, 10: 0.4, 15: 0.6, 20: 0.6, 25: 0.59}

    def run(folder, **settings):
        made = trainer(
            folder, measure=lambda model: {"score": values[made.state.global_step]},
            patience=2, steps=40, **EVERY,
        )  # fmt: skip
        made.train(**settings)
        return made

    first = run(tmp_path)
    assert first.state.global_step == 25
    assert first.best["step"] == 15
    log = rows(tmp_path)
    again = run(tmp_path, resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    assert again.state.global_step == 25
    assert (again.best, again.without_gain) == (first.best, first.without_gain)
    assert rows(tmp_path) == log


@pytest.mark.fault("K17")
def test_everything_that_changes_in_training_is_restored(every, tmp_path):
    folder, _ = every
    state = checkpoint.load(folder / "checkpoint-12")
    assert state["schedule"] == 12
    (rank,) = state["ranks"]
    assert set(rank["random"]) >= {"python", "numpy", "torch"}
    made = trainer(tmp_path, **EVERY)
    made._resumed = state
    made._load_from_checkpoint(str(folder / "checkpoint-12"))
    for name, value in checkpoint.tensors(made.network).items():
        assert torch.equal(value, state["tensors"][name])
    assert (made.best, made.without_gain) == (state["best"], state["without_gain"])
    assert made.seconds >= state["seconds"] > 0


@pytest.mark.fault("K49", "K08")
def test_tensorboard_and_csv_have_every_step_once_after_resumes(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def log(folder):
        return RunLog(Path(folder) / "tensorboard", folder / "log.csv", COLUMNS, tensorboard=True)

    def scalars(folder):
        events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
        events.Reload()
        return {
            tag: [(e.step, e.value) for e in events.Scalars(tag)]
            for tag in events.Tags()["scalars"]
            if not tag.endswith("seconds")
        }

    def dies(model, batch):
        if made.state.global_step == 13:
            raise KeyError("as if killed")
        return loss(model, batch)

    settings = {"log_steps": 2, "trainer": {"save_steps": 5}}
    train(tmp_path / "a", log=False, **settings | {"own": {"log": log(tmp_path / "a")}})
    made = trainer(
        tmp_path / "b", log=False, loss=dies, **settings | {"own": {"log": log(tmp_path / "b")}}
    )
    with pytest.raises(KeyError):
        made.train()
    assert rows(tmp_path / "b")[-1]["step"] == "12"  # after the checkpoint of step 10
    for step in (5, 10):
        resume = str(tmp_path / "b" / f"checkpoint-{step}")
        own = {"own": {"log": log(tmp_path / "b")}}
        train(tmp_path / "b", log=False, resume=resume, **settings | own)
    assert rows(tmp_path / "b") == rows(tmp_path / "a")
    whole = scalars(tmp_path / "a")
    assert whole["train/loss"]
    assert scalars(tmp_path / "b") == whole


@pytest.mark.fault("K49", "K15")
def test_rows_after_the_checkpoint_are_those_of_the_resumed_run(every, tmp_path):
    """The run had logged further than it had saved, and goes on with another learning rate."""
    shutil.copytree(every[0] / "checkpoint-10", tmp_path / "checkpoint-10")
    shutil.copy(every[0] / "log.csv", tmp_path)  # up to step 23
    train(tmp_path, resume=True, learning_rate=1e-3, **EVERY)
    before, after = rows(every[0], "train"), rows(tmp_path, "train")
    assert [row["step"] for row in after] == [row["step"] for row in before]
    for old, new in zip(before, after, strict=True):
        if int(old["step"]) <= 10:
            assert new == old
        else:
            assert float(new["lr"]) == pytest.approx(float(old["lr"]) / 10)
            assert new["loss"] != old["loss"]


@pytest.mark.fault("K49")
def test_a_row_that_a_crash_has_cut_off_is_written_anew(every, tmp_path):
    resumed(every, tmp_path, 11)
    whole = rows(tmp_path)
    text = (tmp_path / "log.csv").read_text()
    (tmp_path / "log.csv").write_text(text[:-20])
    shutil.copytree(every[0] / "checkpoint-22", tmp_path / "again" / "checkpoint-22")
    shutil.copy(tmp_path / "log.csv", tmp_path / "again")
    made = train(tmp_path / "again", resume=True, **EVERY)
    assert made.state.global_step == 23
    assert rows(tmp_path / "again") == whole


# -- nothing left, more to do ----------------------------------------------------------------------


@pytest.mark.fault("K13")
def test_a_finished_run_is_already_done_and_nothing_changes(every, tmp_path, capsys):
    folder, _ = every
    for name in ("checkpoint-23", "checkpoint-20"):
        shutil.copytree(folder / name, tmp_path / name)
    shutil.copy(folder / "log.csv", tmp_path)
    before = {
        path: (path.read_bytes(), path.stat().st_mtime_ns)
        for path in tmp_path.rglob("*")
        if path.is_file()
    }
    made = trainer(tmp_path, **EVERY)
    assert errors.run(lambda argv: made.train(True) and None, []) == 0
    assert made.already_done
    assert "already finished" in capsys.readouterr().out
    after = {
        path: (path.read_bytes(), path.stat().st_mtime_ns)
        for path in tmp_path.rglob("*")
        if path.is_file()
    }
    assert after == before
    assert_same_run(every, tmp_path, made)


@pytest.mark.fault("K14")
@pytest.mark.parametrize("at", [12, 23])
def test_more_steps_rebuild_the_schedule_which_is_said_once(every, tmp_path, at, capsys):
    """A restored cosine would keep its length, or rise again after its end."""
    resumed(every, tmp_path, at, steps=40, log_steps=1)
    rates = {int(row["step"]): float(row["lr"]) for row in rows(tmp_path, "train")}
    for step in range(at + 1, 41):
        assert rates[step] == pytest.approx(1e-2 * lr_factor(step - 1, 3, 40))
    assert rates[40] == min(rates.values())
    out = capsys.readouterr().out
    assert out.count("the run now ends at step 40 instead of 23") == 1


@pytest.mark.fault("K14")
def test_fewer_steps_than_done_are_a_finished_run(every, tmp_path, capsys):
    assert resumed(every, tmp_path, 12, steps=8).already_done
    assert "already finished" in capsys.readouterr().out


@pytest.mark.fault("K15")
def test_other_intervals_of_logging_and_saving_hold_after_a_resume(every, tmp_path):
    """Trainer would go on with those in the checkpoint."""
    made = resumed(every, tmp_path, 12, log_steps=3, trainer=EVERY["trainer"] | {"save_steps": 4})
    assert_same_bits(every[1].network, made.network)
    steps = [int(row["step"]) for row in rows(tmp_path, "train")]
    assert steps == [4, 8, 12, 15, 18, 21, 23]
    assert {16, 20, 23} <= set(checkpoint.steps(tmp_path))
    assert 17 not in checkpoint.steps(tmp_path)


# -- settings --------------------------------------------------------------------------------------

SETTINGS = {"rank": 8, "alpha": 16.0, "targets": "all", "lr": 1e-3, "workers": 0, "list": [1, 2]}
SAFE = ("lr", "workers")


def described(settings=SETTINGS, base="a" * 32, data="d" * 32):
    return {
        "settings": settings,
        "fingerprints": {"base": base, "data": data},
        "may_change": SAFE,
    }


@pytest.fixture(scope="module")
def stated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stated")
    train(folder, steps=4, trainer={"save_steps": 2}, **described())
    return folder


@pytest.mark.fault("K15")
@pytest.mark.parametrize(
    ("now", "row"),
    [
        (described({**SETTINGS, "rank": 4}), ("rank", "8", "4")),
        (described({**SETTINGS, "alpha": 32.0}), ("alpha", "16", "32")),
        (described({**SETTINGS, "targets": "encoder"}), ("targets", "all", "encoder")),
        (described(base="b" * 32), ("base weights", "aaaaaaaaaaaa", "bbbbbbbbbbbb")),
        (described(data="e" * 32), ("training data", "dddddddddddd", "eeeeeeeeeeee")),
    ],
)
def test_a_change_that_makes_another_run_is_a_table_of_then_and_now(
    stated, tmp_path, now, row, capsys
):
    shutil.copytree(stated, tmp_path / "run")
    made = trainer(tmp_path / "run", steps=9, **now)
    before = {name: value.clone() for name, value in made.network.state_dict().items()}
    log = (tmp_path / "run" / "log.csv").read_bytes()

    def command(argv):
        made.train(True)

    assert errors.run(command, []) == 2
    text = capsys.readouterr().err
    assert "the run cannot be continued, these have changed" in text
    lines = [line.split() for line in text.splitlines()]
    assert ["setting", "then", "now"] in lines
    assert " ".join(row).split() in lines
    assert "Traceback" not in text
    assert (tmp_path / "run" / "log.csv").read_bytes() == log
    now_state = made.network.state_dict()
    assert not [name for name in before if not torch.equal(before[name], now_state[name])]


@pytest.mark.fault("K15")
def test_all_changes_are_in_one_table(stated, tmp_path):
    shutil.copytree(stated, tmp_path / "run")
    now = described({**SETTINGS, "rank": 4, "alpha": 1.0, "lr": 5.0}, base="b" * 32)
    with pytest.raises(CheckpointError) as caught:
        train(tmp_path / "run", resume=True, steps=9, **now)
    text = str(caught.value)
    assert all(word in text for word in ("rank", "alpha", "base weights"))
    assert "lr" not in text.split()


@pytest.mark.fault("K15")
def test_safe_changes_are_allowed_and_listed_once(stated, tmp_path, capsys):
    shutil.copytree(stated, tmp_path / "run")
    now = described({**SETTINGS, "lr": 0.5, "workers": 2, "list": (1, 2), "new": 1})
    train(tmp_path / "run", resume=True, steps=6, **now)
    out = capsys.readouterr().out
    assert out.count("changed for the rest of the run: lr 0.001 -> 0.5, workers 0 -> 2") == 1


@pytest.mark.fault("K12")
@pytest.mark.parametrize(
    ("batch_size", "accumulation", "advice"),
    [
        (4, 1, "batch size 4 and 2 accumulated batches"),
        (8, 2, "batch size 8 and 1 accumulated batches"),
        (3, 2, "batch size 2 and 4 accumulated batches"),
    ],
)
def test_another_number_of_samples_per_update_is_refused_with_numbers_that_fit(
    every, tmp_path, batch_size, accumulation, advice
):
    with pytest.raises(CheckpointError) as caught:
        resumed(
            every, tmp_path, 12, batch_size=batch_size, gradient_accumulation_steps=accumulation
        )
    text = str(caught.value)
    assert "8 samples per update (1 process x batch 4 x 2 accumulated)" in text
    assert f"now it would be 1 process x batch {batch_size} x {accumulation} accumulated" in text
    assert advice in text


@pytest.mark.fault("K12")
def test_advice_for_a_number_of_processes_that_does_not_divide():
    then = {"processes": 1, "batch_size": 4, "accumulation": 2}
    now = {"processes": 3, "batch_size": 4, "accumulation": 2}
    with pytest.raises(CheckpointError, match="processes that divides 8: 1, 2, 4, 8"):
        resume_check.check_world(then, now)
    now = {"processes": 2, "batch_size": 4, "accumulation": 2}
    with pytest.raises(CheckpointError, match="batch size 4 and 1 accumulated"):
        resume_check.check_world(then, now)


@pytest.mark.fault("K12")
def test_the_same_samples_in_another_split_keep_their_order_and_the_losses(every, tmp_path, capsys):
    folder, _ = every
    made = resumed(every, tmp_path, 12, batch_size=8, gradient_accumulation_steps=1)
    out = capsys.readouterr().out
    assert out.count("the same samples per update in the same order") == 1
    for one, other in zip(rows(folder, "train"), rows(tmp_path, "train"), strict=True):
        assert one["step"] == other["step"]
    assert made.state.global_step == 23


@pytest.mark.fault("K56")
def test_other_versions_and_another_place_are_a_warning(every, tmp_path, monkeypatch, capsys):
    now = {**resume_check.versions(), "torch": "9.9"}
    monkeypatch.setattr(resume_check, "versions", lambda: now)
    made = resumed(every, tmp_path / "elsewhere with spaces", 12)
    assert_same_run(every, tmp_path / "elsewhere with spaces", made)
    out = capsys.readouterr().out
    assert out.count("warning: written with other versions, so not bit-equal: torch ") == 1
    assert " -> 9.9" in out


# -- what is damaged -------------------------------------------------------------------------------


@pytest.mark.fault("K04")
def test_a_damaged_last_checkpoint_is_said_and_the_one_before_is_taken(every, tmp_path, capsys):
    folder, _ = every
    for step in (11, 12):
        shutil.copytree(folder / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    shutil.copy(folder / "log.csv", tmp_path)
    broken = tmp_path / "checkpoint-12" / "state.safetensors"
    broken.write_bytes(broken.read_bytes()[:500])
    assert_same_run(every, tmp_path, train(tmp_path, resume=True, **EVERY))
    out = capsys.readouterr().out
    assert out.count("checkpoint-12 is damaged") == 1
    assert "continuing at step 11" in out


# -- what must not disturb -------------------------------------------------------------------------


@pytest.mark.fault("R10", "R12")
def test_an_evaluation_that_changes_modes_and_generators_is_not_felt(every, tmp_path):
    def rude(model):
        metrics = evaluate(model)
        model.train()
        for _ in range(3):
            torch.rand(5), torch.manual_seed(1)
        return metrics

    made = train(tmp_path, measure=rude)
    assert_same_bits(every[1].network, made.network)


@pytest.mark.fault("R12")
def test_frozen_statistics_of_the_base_stay_as_they_were(tmp_path):
    model = network()
    before = {name: value.clone() for name, value in model.named_buffers()}
    train(tmp_path, model=model, steps=4)
    after = dict(model.named_buffers())
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert "1.running_mean" in before


@pytest.mark.fault("R17", "R16")
def test_two_runs_with_one_seed_are_equal_and_the_order_needs_no_state(every, tmp_path):
    torch.rand(7)
    assert_same_run(every, tmp_path, train(tmp_path))
    sampler = EpochSampler(50, 3)
    sampler.set_epoch(2)
    assert list(sampler) == list(sampler)


@pytest.mark.fault("R17")
def test_kernels_are_deterministic_on_request_and_after_a_resume(every, tmp_path):
    """In a process of its own, as torch and its environment stay so."""

    def target(rank):
        seen = set()

        def noted(model, batch):
            seen.add(torch.are_deterministic_algorithms_enabled())
            return loss(model, batch)

        flag = {"trainer": {"full_determinism": True, "save_steps": 1}}
        made = resumed(every, tmp_path, 20, loss=noted, **flag)
        assert seen == {True}
        assert_same_run(every, tmp_path, made)

    (ended,) = processes.run(target, world=1)
    assert ended.status == 0, ended.output


# -- what accompanies a training -------------------------------------------------------------------


class Flaky:
    """Raises in these calls, counted from 1."""

    def __init__(self, bad, answer=lambda *args: None, error=None):
        self.bad, self.answer, self.calls = set(bad), answer, 0
        self.error = error or RuntimeError("the plug is out")

    def __call__(self, *args, **kwargs):
        self.calls += 1
        if self.calls in self.bad:
            raise self.error
        return self.answer(*args, **kwargs)


@pytest.mark.fault("R35")
@pytest.mark.parametrize(
    ("what", "phase"), [("log", "writing the log"), ("draw", "drawing pictures")]
)
def test_a_failing_log_or_picture_is_a_warning(every, tmp_path, what, phase, capsys):
    flaky = Flaky({2, 3, 5})
    if what == "log":
        log = RunLog(tmp_path / "tensorboard", tmp_path / "log.csv", COLUMNS, tensorboard=False)
        flaky.answer, log.write = log.write, flaky
        made = train(tmp_path, log=False, own={"log": log})
    else:
        made = train(tmp_path, draw=flaky)
    assert_same_bits(every[1].network, made.network)
    out = capsys.readouterr().out
    assert out.count(f"warning: {phase} at step ") == 3
    assert "RuntimeError: the plug is out" in out


@pytest.mark.fault("R35")
@pytest.mark.parametrize("what", ["log", "draw", "measure"])
def test_three_failures_in_a_row_end_the_run(tmp_path, what, capsys):
    flaky = Flaky({2, 3, 4}, evaluate)
    if what == "log":
        log = RunLog(tmp_path / "tensorboard", tmp_path / "log.csv", COLUMNS, tensorboard=False)
        log.write = flaky
        made = trainer(tmp_path, log=False, own={"log": log})
    else:
        made = trainer(tmp_path, **{what: flaky})
    assert errors.run(lambda argv: made.train() and None, []) == 2
    text = capsys.readouterr().err
    assert "failed 3 times in a row" in text
    assert "the plug is out" in text
    assert "Traceback" not in text


@pytest.mark.fault("R35")
def test_a_failing_evaluation_is_a_warning_and_counts_for_nothing(every, tmp_path, capsys):
    flaky = Flaky({3, 5}, evaluate, ZeroDivisionError("no object"))
    made = train(tmp_path, measure=flaky)
    assert_same_bits(every[1].network, made.network)
    assert [row["step"] for row in rows(tmp_path, "val")] == ["0", "5", "15", "23"]
    out = capsys.readouterr().out
    assert "the validation at step 10 failed (1 in a row, 3 end the run)" in out
    assert "ZeroDivisionError: no object" in out


@pytest.mark.fault("R35", "R14")
def test_an_evaluation_that_fails_before_training_stops_at_once_and_names_the_phase(tmp_path):
    with pytest.raises(ZeroDivisionError) as caught:
        train(tmp_path, measure=Flaky({1}, evaluate, ZeroDivisionError("no object")))
    assert caught.value.__notes__ == ["in the validation at step 0"]


@pytest.mark.fault("R14")
@pytest.mark.parametrize("phase", ["validation", "saving"])
def test_memory_that_runs_out_outside_of_a_step_names_the_phase(tmp_path, phase, capsys):
    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    if phase == "validation":
        settings = {"measure": Flaky({3}, evaluate, full)}
    else:
        settings = {"save_adapter": Flaky({2}, Path.mkdir, full)}
    made = trainer(tmp_path, **settings)
    assert errors.run(lambda argv: made.train() and None, []) == 2
    text = capsys.readouterr().err
    assert f"out of memory in {phase} at step 10" in text
    assert "Traceback" not in text


# -- saving that fails -----------------------------------------------------------------------------


@contextmanager
def filled(folder):
    """Nothing more fits on the disk."""
    with suppress(OSError), open(folder / "filler", "wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    yield
    (folder / "filler").unlink()


@pytest.fixture(params=["flush", "disk"])
def disk(request, tmp_path):
    """A folder, and what fills its disk: as the flush of a file has it, or a small one for good."""
    if request.param == "flush":
        return tmp_path, no_space_left
    folder = request.getfixturevalue("small_disk")
    return folder, partial(filled, folder)


@pytest.mark.fault("R35", "K49")
def test_a_log_without_room_is_survived_without_a_gap(every, tmp_path, capsys):
    """The limit lets a part of the row through, as a disk that becomes full in the middle of it."""
    limit = ExitStack()

    def fills(step):
        if step == 5:
            room = (tmp_path / "log.csv").stat().st_size + 10
            limit.enter_context(files_limited_to(room))

    def frees(model, batch):
        if made.state.global_step == 9:
            limit.close()
        return loss(model, batch)

    made = trainer(tmp_path, on_latest=fills, loss=frees)
    with limit:
        made.train()
    assert_same_bits(every[1].network, made.network)
    assert rows(tmp_path) == rows(every[0])  # what could not be written came with the next row
    out = capsys.readouterr().out
    assert "writing the log at step 8 failed" in out
    assert "File too large" in out


@pytest.mark.fault("K02")
def test_a_full_disk_is_a_warning_and_the_next_save_tries_again(every, disk, capsys):
    folder, filled = disk
    full, seen = ExitStack(), []

    def fills(step):
        if step == 5:
            full.enter_context(filled())

    def frees(model, batch):
        if made.state.global_step == 12 and not seen:
            seen.append(checkpoint.steps(folder))
            full.close()
        return loss(model, batch)

    made = trainer(folder, log=False, on_latest=fills, loss=frees)
    with full:
        made.train()
    assert seen == [[5]]  # that of step 10 could not be written
    assert_same_bits(every[1].network, made.network)
    assert checkpoint.latest(folder).name == "checkpoint-23"
    assert 15 in checkpoint.steps(folder)
    assert not list(folder.glob(".checkpoint*"))
    out = capsys.readouterr().out
    assert out.count("warning: saving at step 10 failed") == 1
    assert "No space left on device" in out
    assert "MB free" in out
    assert "checkpoint of step 5 is as it was; the training goes on" in out


@pytest.mark.fault("K02")
def test_a_disk_that_is_still_full_at_the_end_is_an_error(disk, capsys):
    folder, filled = disk
    with ExitStack() as full:
        made = trainer(
            folder, log=False, resume_with="go on",
            on_latest=lambda step: full.enter_context(filled()),
        )  # fmt: skip
        assert errors.run(lambda argv: made.train() and None, []) == 2
    text = capsys.readouterr().err
    assert "error: saving at step 23 failed" in text
    assert "No space left on device" in text
    assert "The checkpoint of step 5 is as it was; make room" in text
    assert "continue with: go on" in text
    assert "Traceback" not in text
    assert checkpoint.latest(folder).name == "checkpoint-5"


@pytest.mark.fault("K02", "K18")
@pytest.mark.parametrize("hook", ["on_best", "on_latest", "save_adapter"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_best_whose_files_do_not_fit_is_not_the_best(tmp_path, hook, number, capsys):
    """The next evaluation is compared with the best that there are files of."""
    scores = {0: 0.0, 5: 0.5, 10: 0.9, 15: 0.6, 20: 0.4, 23: 0.1}
    full = OSError(number, os.strerror(number))
    flaky = Flaky({2}, Path.mkdir if hook == "save_adapter" else lambda *args: None, full)
    made = trainer(
        tmp_path, measure=lambda model: {"score": scores[made.state.global_step]}, **{hook: flaky}
    )
    made.train()
    assert "warning: saving at step 10 failed" in capsys.readouterr().out
    assert made.best["step"] == 15
    assert checkpoint.folder(tmp_path, 15).is_dir()


@pytest.mark.fault("K07")
@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_a_lost_permission_stops_at_the_first_save(tmp_path, number, capsys):
    lost = OSError(number, os.strerror(number), "somewhere")
    made = trainer(tmp_path, save_adapter=Flaky({1}, Path.mkdir, lost))
    assert errors.run(lambda argv: made.train() and None, []) == 2
    text = capsys.readouterr().err
    assert "error: saving at step 5 failed" in text
    assert os.strerror(number) in text
    assert "There is none yet; make room or restore the access" in text
    assert "Traceback" not in text
    assert made.state.global_step == 5


@pytest.mark.fault("K07")
def test_a_run_folder_that_is_gone_is_noticed_at_the_next_save(tmp_path, capsys):
    run = tmp_path / "run"

    def vanishes(step):
        if step == 5:
            shutil.rmtree(run)
            run.write_text("a file in its place")

    made = trainer(run, log=False, on_latest=vanishes)
    assert errors.run(lambda argv: made.train() and None, []) == 2
    text = capsys.readouterr().err
    assert "error: saving at step 10 failed" in text
    assert "Traceback" not in text


@pytest.mark.fault("K02")
def test_a_full_disk_on_the_first_process_is_survived_by_both(tmp_path):
    def rank(number):
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        made = trainer(
            tmp_path, log=False, save_adapter=Flaky({2}, Path.mkdir, full), model=network(),
        )  # fmt: skip
        made.train()
        return 0

    ended = processes.run(rank, limit=40)
    assert [each.status for each in ended] == [0, 0]
    assert "warning: saving at step 10 failed" in ended[0].output
    assert checkpoint.latest(tmp_path).name == "checkpoint-23"


@pytest.mark.fault("K01")
@pytest.mark.parametrize("place", ["old", "new"])
def test_a_named_checkpoint_is_found_whose_saving_was_killed_between_its_renames(
    every, tmp_path, place
):
    space = tmp_path / ".checkpoint-20.999.0123abcd.tmp"
    shutil.copytree(every[0] / "checkpoint-20", space / place)
    (space / ".lora-core").touch()
    shutil.copy(every[0] / "log.csv", tmp_path)
    made = train(tmp_path, resume=str(tmp_path / "checkpoint-20"), **EVERY)
    assert_same_run(every, tmp_path, made)
    assert not space.exists()


@pytest.mark.fault("K06")
def test_two_processes_do_not_write_one_run(tmp_path):
    with checkpoint.lock(tmp_path), pytest.raises(UserError, match="is being written by process"):
        train(tmp_path)


@pytest.mark.fault("K19")
@pytest.mark.parametrize("keep", [1, 2])
def test_guards_say_how_many_checkpoints_stay(tmp_path, keep):
    train(
        tmp_path, guards=Guards(keep_last=keep), measure=None, steps=8, data=Points(24),
        trainer={"save_steps": 2},
    )  # fmt: skip
    assert checkpoint.steps(tmp_path) == [2, 4, 6, 8][-keep:]
