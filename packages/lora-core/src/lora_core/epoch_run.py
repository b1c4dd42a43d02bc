"""Runs in a folder that their settings name, with adapters of the best step and of epochs.

    run = Run.of(cfg)                               # a package's `EpochRun`
    refuse_existing(run, cfg, "--save_path")        # before anything is read
    start(run, cfg, "what was said so far")
    artifacts = Artifacts(run, network, save, ...)  # for the events of `LoraTrainer`

Every adapter file says of which training state it is, so that a run continues from each of them.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_core.config import dump
from lora_core.errors import CheckpointError, ConfigError, UserError
from lora_core.report import table
from lora_core.run_folder import RunFolder, by_flag
from lora_core.validate import REPORT

if TYPE_CHECKING:
    from torch import nn

# What a run may find changed and still be the one that is asked for again.
NOT_COMPARED = frozenset(["resume", "overwrite", "dry_run", "device", "tensorboard"])


@dataclass(frozen=True)
class EpochRun(RunFolder):
    """Where a run and its files are.

    Attributes:
        best: the adapter of the best step.
        each: that of an epoch, whose number takes the place of {epoch} in the name.
        text: what was said. csv: the figures; TensorBoard's files are beside it.
        whole: a merged model, if the run writes one.
    """

    best: Path
    each: Path
    text: Path
    csv: Path
    whole: Path | None = None

    def of_epoch(self, epoch: int) -> Path:
        """The adapter file of an epoch."""
        return self.each.with_name(self.each.name.format(epoch=epoch))

    def epochs(self) -> Iterator[tuple[Path, int]]:
        """The adapter files of epochs that are there, with their numbers."""
        start, end = map(re.escape, self.each.name.split("{epoch}"))
        for path in sorted(self.each.parent.glob("*")):
            if match := re.fullmatch(rf"{start}(\d+){end}", path.name):
                yield path, int(match[1])

    def adapters(self) -> list[Path]:
        """The files and folders with adapters that are there."""
        found = [path for path in (self.best, self.adapter) if os.path.exists(path)]
        if os.path.isdir(self.each.parent):  # its name may be too long for one
            found += [path for path, _ in self.epochs()]
        return found

    def tidy(self) -> None:
        """Delete files half written that a killed process has left."""
        from lora_core.tensor_file import remove_partial

        super().tidy()
        if self.best.parent.is_dir():
            remove_partial(self.best.parent)


# -- a new run -------------------------------------------------------------------------------------


def refuse_existing(
    run: EpochRun, cfg: Any, setting: str, resume: Path | None = None, logs: str = ""
) -> None:
    """A new run never mixes with one that is there, nor replaces it unasked.

    Args:
        setting: that names the folder, such as "--save_path".
        resume: what is given to `--resume` if it is there, in place of the folder.
        logs: the setting that names the folder of the figures, where it is another one.

    Raises:
        ConfigError: there is one, with what to do about it.
    """
    if cfg.overwrite:
        return
    if not os.path.exists(run.config):  # Path.exists raises for long names
        if logs and os.path.exists(run.csv):
            raise ConfigError(
                f"{run.csv.parent.absolute()} holds the figures of another run: choose another "
                f"{logs}, or replace them with --overwrite"
            )
        if adapters := [str(path.relative_to(run.folder)) for path in run.adapters()]:
            raise ConfigError(
                f"{run.folder.absolute()} holds {adapters[0]} and no {run.config.name}: no run has "
                f"written it there, or its settings are gone. Choose another {setting}, or replace "
                "it with --overwrite"
            )
        return
    place = run.folder.absolute()
    try:
        changed = differences(run.settings(type(cfg)), cfg)
    except UserError:  # of another version
        changed = []
    if changed:
        rows = table(["setting", "there", "now"], changed)
        both = f"{setting} (and {logs})" if logs else setting
        raise ConfigError(
            f"{place} holds a run with other settings: choose another {both}, or add --overwrite\n"
            f"{rows}"
        )
    state = "a finished" if run.summary.exists() else "an unfinished"
    known = resume if resume and resume.exists() else run.folder
    raise ConfigError(
        f"{place} holds {state} run with these settings: continue it with --resume {known}, "
        f"replace it with --overwrite, or choose another {setting}"
    )


def differences(there: Any, now: Any) -> list[tuple[str, str, str]]:
    """(setting, there, now) of all settings that make another run."""
    old = dict(by_flag(there))
    return [
        (name, str(old[name]), str(value))
        for name, value in by_flag(now)
        if name not in NOT_COMPARED and old[name] != value
    ]


def start(run: EpochRun, cfg: Any, about: str) -> EpochRun:
    """Make the folders of a new run, with its settings in them; with `overwrite` empty ones.

    Args:
        about: what was said before: the log begins with it.

    Raises:
        ConfigError: they cannot be made.
    """
    try:
        if cfg.overwrite:
            remove(run)
        for path in (run.config, run.best, run.each, run.text, run.csv):
            path.parent.mkdir(parents=True, exist_ok=True)
        run.text.write_text(f"{about}\n", "utf-8", errors="backslashreplace")
        dump(cfg, run.config)
    except OSError as error:
        raise ConfigError(f"{run.folder.absolute()}: {error.strerror}") from error
    return run


def remove(run: EpochRun) -> None:
    """Delete what runs write, and nothing else; the settings first, which make it a run."""
    epochs = [path for path, _ in run.epochs()]
    events = sorted(run.csv.parent.glob("events.out.tfevents.*"))
    whole = [run.whole] if run.whole else []
    files = (run.config, run.summary, run.best, run.folder / REPORT, run.csv, run.text)
    for path in (*files, *whole, *epochs, *events):
        path.unlink(missing_ok=True)
    for folder in (run.state, run.adapter):
        if folder.is_dir() and not folder.is_symlink():
            shutil.rmtree(folder)


# -- continuing ------------------------------------------------------------------------------------


def checkpoint_of(
    run: RunFolder, resume: str, facts: Callable[[Path], Mapping[str, Any]]
) -> str | bool:
    """What `--resume` continues from: the state that a file names, or the last whole one (True).

    Args:
        facts: an adapter file -> what it says about its making.

    Raises:
        CheckpointError: the file names none, or the state is gone.
    """
    path = Path(resume)
    if path.is_dir():
        return True
    state = facts(path).get("state")
    if not isinstance(state, str) or not re.fullmatch(r"state/checkpoint-\d+", state):
        raise CheckpointError(
            f"--resume {path.absolute()}: it does not say which state it belongs to. To start from "
            f"its weights alone: --adapter {resume}"
        )
    if not (run.folder / state).is_dir():
        raise CheckpointError(
            f"--resume {path.absolute()}: its state {run.folder.absolute() / state} is gone. The "
            f"last one: --resume {run.folder}. Its weights alone: --adapter {resume}"
        )
    return str(run.folder / state)


# -- results ---------------------------------------------------------------------------------------


@dataclass
class Artifacts:
    """Writes the results of a run.

    Attributes:
        network: the adapted one.
        save: (path, facts) -> None; writes its adapter into a file, or for PEFT into a folder.
        updates: of one epoch. every: epochs from one adapter file to the next.
        facts: about the run, for its summary and its adapter files.
        settings: the run's, for its adapter files.
    """

    run: EpochRun
    network: nn.Module
    save: Callable[[Path, dict[str, Any]], object]
    updates: int
    every: int
    facts: Mapping[str, Any]
    settings: Mapping[str, Any]

    def best(self, step: int, metrics: Mapping[str, float]) -> None:
        """Save the adapter of a new best step, as a file and for PEFT."""
        facts = self._facts(step, metrics)
        self.save(self.run.best, facts)
        self.save(self.run.adapter, facts)

    def latest(self, step: int) -> None:
        """Save the adapter as it is at the end of an epoch."""
        epoch, rest = divmod(step, self.updates)
        if rest == 0 and epoch % self.every == 0:
            self.save(self.run.of_epoch(epoch), self._facts(step))

    def steps(self) -> set[int]:
        """Steps of the adapter files, each of which names the state to continue from."""
        return {epoch * self.updates for _, epoch in self.run.epochs()}

    def final(self, step: int, has_best: bool) -> None:
        """Without validation the last step stands for the best, too."""
        if not has_best:
            self.best(step, {})

    def load_best(self, step: int) -> None:
        """Give the network the adapter of a step whose training checkpoint is there.

        Raises:
            CheckpointError: it is damaged.
        """
        from lora_core import checkpoint
        from lora_core.checkpoint.state import load_tensors

        state = checkpoint.load(checkpoint.folder(self.run.state, step))
        load_tensors(self.network, state["tensors"])

    def summary(self, **values: Any) -> None:
        """Write `training_summary.json`."""
        self.run.write_summary({**self.facts, **values})

    def _facts(self, step: int, metrics: Mapping[str, float] | None = None) -> dict[str, Any]:
        """What an adapter file says about its making; `state` leads back to the whole state."""
        return {
            **self.facts,
            "step": step,
            "epoch": step / self.updates,
            "state": f"state/checkpoint-{step}",
            "metrics": dict(metrics or {}),
            "settings": dict(self.settings),
        }
