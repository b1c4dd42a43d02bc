"""Runs in a folder that their settings name: never mixed, replaced only when asked, continued."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from torch import nn

from lora_core.config import option
from lora_core.epoch_run import (
    Artifacts,
    EpochRun,
    checkpoint_of,
    differences,
    refuse_existing,
    start,
)
from lora_core.errors import CheckpointError, ConfigError


@dataclass
class Lora:
    rank: int = option(8, "Rank.")


@dataclass
class Config:
    lora: Lora = field(default_factory=Lora)
    device: str = option("auto", "Device.")
    overwrite: bool = option(False, "Replace.")


def run_in(folder: Path, logs: Path | None = None) -> EpochRun:
    logs = logs or folder / "logs"
    return EpochRun(
        folder,
        best=folder / "model" / "best.pt",
        each=folder / "model" / "epoch_{epoch}.pt",
        text=logs / "train.log",
        csv=logs / "metrics.csv",
        whole=folder / "model" / "whole.pt",
    )


@pytest.fixture
def run(tmp_path):
    return start(run_in(tmp_path / "run"), Config(lora=Lora(4)), "before")


def files(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_a_new_run_has_its_settings_and_what_was_said(run):
    assert files(run.folder) == ["config.yaml", "logs/train.log"]
    assert run.settings(Config) == Config(lora=Lora(4))
    assert run.text.read_text() == "before\n"
    assert run.best.parent.is_dir()


def test_files_of_epochs_are_those_with_a_number(run):
    for name in ("epoch_2.pt", "epoch_10.pt", "epoch_x.pt", "my_epoch_3.pt", "epoch_4.pt.old"):
        (run.best.parent / name).touch()
    assert {path.name: number for path, number in run.epochs()} == {
        "epoch_2.pt": 2,
        "epoch_10.pt": 10,
    }
    assert run.of_epoch(7) == run.best.parent / "epoch_7.pt"
    assert not list(run_in(run.folder / "none").epochs())


# -- a run that is there ---------------------------------------------------------------------------


def test_a_run_that_is_there_is_told_with_what_to_do(run):
    refuse_existing(run_in(run.folder.parent / "new"), Config(), "--out")
    with pytest.raises(ConfigError, match=r"an unfinished run with these settings") as error:
        refuse_existing(run, Config(lora=Lora(4), device="cpu"), "--out", run.best)
    assert f"continue it with --resume {run.folder}, replace it with --overwrite" in str(
        error.value
    )
    run.best.touch()
    run.summary.touch()
    with pytest.raises(ConfigError, match=f"a finished run.*--resume {run.best}"):
        refuse_existing(run, Config(lora=Lora(4)), "--out", run.best)
    with pytest.raises(
        ConfigError, match=r"(?s)choose another --out \(and --logs\).*lora.rank +4 +8"
    ):
        refuse_existing(run, Config(), "--out", logs="--logs")
    refuse_existing(run, Config(overwrite=True), "--out")


@pytest.mark.parametrize("name", ["best", "adapter", "epoch"])
def test_an_adapter_that_no_run_has_written_is_not_replaced_unasked(run, name):
    there = run.of_epoch(3) if name == "epoch" else getattr(run, name)
    there.parent.mkdir(parents=True, exist_ok=True)
    there.write_text("mine")
    run.config.unlink()
    with pytest.raises(ConfigError, match=f"holds .*{there.name} and no {run.config.name}"):
        refuse_existing(run, Config(), "--out")
    refuse_existing(run, Config(overwrite=True), "--out")
    there.unlink()
    refuse_existing(run, Config(), "--out")  # a log, as a run leaves it that was killed early


def test_figures_of_another_run_are_not_mixed_with(tmp_path):
    logs = tmp_path / "logs"
    logs.mkdir()
    (logs / "metrics.csv").touch()
    run = run_in(tmp_path / "run", logs)
    with pytest.raises(ConfigError, match=f"{logs} holds the figures of another run"):
        refuse_existing(run, Config(), "--out", logs="--logs")
    refuse_existing(run, Config(overwrite=True), "--out", logs="--logs")


def test_a_name_that_no_folder_can_have_is_left_to_the_check_of_folders():
    refuse_existing(run_in(Path("x" * 300)), Config(), "--out")


def test_settings_of_another_version_are_no_settings_of_this_run(run):
    run.config.write_text("colour: red\n")
    with pytest.raises(ConfigError, match="an unfinished run"):
        refuse_existing(run, Config(), "--out")


def test_only_settings_that_make_another_run_differ():
    now = Config(lora=Lora(2), device="cpu", overwrite=True)
    assert differences(Config(), now) == [("lora.rank", "8", "2")]


def test_overwriting_deletes_what_runs_write_and_nothing_else(run, tmp_path):
    mine, data = run.best.parent / "mine.pt", tmp_path / "data"
    data.mkdir()
    (data / "kept").touch()
    written = [run.best, run.of_epoch(1), run.summary, run.csv, run.whole]
    for path in [*written, mine, run.csv.parent / "events.out.tfevents.1"]:
        path.touch()
    run.state.mkdir()
    (run.state / "x").touch()
    run.adapter.symlink_to(data)
    start(run, Config(overwrite=True), "anew")
    assert files(run.folder) == ["config.yaml", "logs/train.log", "model/mine.pt"]
    assert (data / "kept").exists()


def test_a_folder_that_cannot_be_made_is_one_message(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=f"{tmp_path}/file/run: "):
        start(run_in(tmp_path / "file" / "run"), Config(), "")


# -- continuing ------------------------------------------------------------------------------------


def test_a_file_continues_from_its_own_state(run):
    facts = {"state": "state/checkpoint-3"}
    run.best.touch()
    assert checkpoint_of(run, str(run.folder), dict) is True
    with pytest.raises(CheckpointError, match=r"checkpoint-3 is gone.*--adapter"):
        checkpoint_of(run, str(run.best), lambda path: facts)
    (run.state / "checkpoint-3").mkdir(parents=True)
    assert checkpoint_of(run, str(run.best), lambda path: facts) == str(run.state / "checkpoint-3")
    for state in (None, "/etc", "state/../../x", "state/checkpoint-3/.."):
        with pytest.raises(CheckpointError, match="does not say which state it belongs to"):
            checkpoint_of(run, str(run.best), lambda path, state=state: {"state": state})


# -- results ---------------------------------------------------------------------------------------


def test_every_adapter_says_of_which_step_and_state_it_is(run):
    saved = {}

    def save(path, facts):
        saved[path] = facts
        path.parent.mkdir(exist_ok=True)
        path.touch()

    artifacts = Artifacts(run, nn.Linear(1, 1), save, 5, 2, {"data": "d"}, {"lora.rank": 4})
    for step in range(1, 21):
        artifacts.latest(step)
    assert [path.name for path in saved] == ["epoch_2.pt", "epoch_4.pt"]
    assert artifacts.steps() == {10, 20}
    assert saved[run.of_epoch(2)] == {
        "data": "d",
        "step": 10,
        "epoch": 2.0,
        "state": "state/checkpoint-10",
        "metrics": {},
        "settings": {"lora.rank": 4},
    }
    artifacts.best(7, {"mIoU": 0.5})
    assert saved[run.best] == saved[run.adapter]
    assert (saved[run.best]["step"], saved[run.best]["metrics"]) == (7, {"mIoU": 0.5})
    artifacts.final(20, has_best=True)
    assert saved[run.best]["step"] == 7
    artifacts.final(20, has_best=False)
    assert saved[run.best]["step"] == 20
    artifacts.summary(steps=20)
    assert json.loads(run.summary.read_text()) == {"data": "d", "steps": 20}
