"""The folders of a run: its files have the names that the guide promises.

experiments/
    checkpoints/
        best.pt, epoch_1.pt ...   adapters, each one file {format, config, metadata, tensors}
        adapter/                  the best adapter as PEFT reads it
        config.yaml               all settings, accepted by --config
        state/                    what a resumed run needs
        training_summary.json     written last
    logs/
        training.log, metrics.csv, events.out.tfevents...
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_core import preflight
from lora_core.config import dump
from lora_core.errors import CheckpointError, ConfigError, UserError
from lora_core.report import table
from lora_core.run_folder import RunFolder, by_flag, named, travelling
from lora_core.validate import REPORT
from sam3_lora.config import Config

if TYPE_CHECKING:
    from transformers import Sam3Model

_EPOCH = re.compile(r"epoch_(?P<epoch>\d+)\.pt")
# What a run may find changed and still be the one that is asked for again.
NOT_COMPARED = frozenset(["resume", "overwrite", "dry_run", "device", "tensorboard"])
# Where things are on this machine.
PATHS = frozenset(
    [
        "dataset.train_img_folder", "dataset.train_ann_file", "dataset.val_img_folder",
        "dataset.val_ann_file", "paths.sam3_checkpoint", "paths.bpe_path", "checkpoint.save_dir",
        "logging.log_dir", "resume", "adapter",
    ]
)  # fmt: skip


@dataclass(frozen=True)
class Run(RunFolder):
    """Where a run lives: `cfg.checkpoint.save_dir` and `cfg.logging.log_dir`."""

    logs: Path

    @classmethod
    def of(cls, cfg: Config) -> Run:
        return cls(Path(cfg.checkpoint.save_dir), Path(cfg.logging.log_dir))

    @property
    def best(self) -> Path:
        return self.folder / "best.pt"

    @property
    def csv(self) -> Path:
        return self.logs / "metrics.csv"

    @property
    def text(self) -> Path:
        return self.logs / "training.log"

    def problems(self) -> list[Callable[[], object]]:
        """Checks that its folders can be written."""
        return [
            partial(preflight.writable, self.folder, "--checkpoint.save_dir"),
            partial(preflight.writable, self.logs, "--logging.log_dir"),
        ]

    def epochs(self) -> Iterator[tuple[Path, int]]:
        """The `epoch_N.pt` files with their N."""
        for path in sorted(self.folder.glob("epoch_*.pt")):
            if match := _EPOCH.fullmatch(path.name):
                yield path, int(match["epoch"])


def refuse_existing(cfg: Config) -> None:
    """A new run never mixes with one that is there, nor replaces it unasked.

    Raises:
        ConfigError: there is one, with what to do about it.
    """
    run = Run.of(cfg)
    if cfg.overwrite:
        return
    if not os.path.exists(run.config):  # Path.exists raises for long names
        if os.path.exists(run.csv):
            raise ConfigError(
                f"{run.logs.absolute()} holds the figures of another run: choose another "
                "--logging.log_dir, or replace them with --overwrite"
            )
        return
    place = run.folder.absolute()
    resume = "--resume " + str(run.best if run.best.exists() else run.folder)
    try:
        changed = differences(run.settings(Config), cfg)
    except UserError:  # of another version
        changed = []
    if changed:
        rows = table(["setting", "there", "now"], changed)
        raise ConfigError(
            f"{place} holds a run with other settings: choose another --checkpoint.save_dir (and "
            f"--logging.log_dir), or add --overwrite\n{rows}"
        )
    state = "a finished" if run.summary.exists() else "an unfinished"
    raise ConfigError(
        f"{place} holds {state} run with these settings: continue it with {resume}, replace it "
        "with --overwrite, or choose another --checkpoint.save_dir"
    )


def differences(there: Config, now: Config) -> list[tuple[str, str, str]]:
    """(setting, there, now) of all settings that make another run."""
    old = dict(by_flag(there))
    return [
        (name, str(old[name]), str(value))
        for name, value in by_flag(now)
        if name not in NOT_COMPARED and old[name] != value
    ]


def new_run(cfg: Config, about: str) -> Run:
    """Make the folders of a new run, with its settings in them; with `overwrite` empty ones.

    Args:
        about: what was said before: the log begins with it.

    Raises:
        ConfigError: they cannot be made.
    """
    run = Run.of(cfg)
    try:
        if cfg.overwrite:
            _remove(run)
        run.folder.mkdir(parents=True, exist_ok=True)
        run.logs.mkdir(parents=True, exist_ok=True)
        run.text.write_text(f"{about}\n", "utf-8", errors="backslashreplace")
        dump(cfg, run.config)
    except OSError as error:
        raise ConfigError(f"{run.folder.absolute()}: {error.strerror}") from error
    return run


def _remove(run: Run) -> None:
    """Delete what runs write, and nothing else; the settings first, which make it a run."""
    epochs = [path for path, _ in run.epochs()]
    events = sorted(run.logs.glob("events.out.tfevents.*"))
    files = (run.config, run.summary, run.best, run.folder / REPORT, run.csv, run.text)
    for path in (*files, *epochs, *events):
        path.unlink(missing_ok=True)
    for folder in (run.state, run.adapter):
        if folder.is_dir() and not folder.is_symlink():
            shutil.rmtree(folder)


def find_run(resume: str) -> Run:
    """The run that `--resume` names: its folder, its best.pt, or one of its epoch_N.pt files.

    Raises:
        CheckpointError: no such run, or an adapter without the state that continuing needs.
    """
    path, folder = named(resume)
    hint = f" To start from its weights alone: --adapter {resume}" if path.suffix == ".pt" else ""
    if not RunFolder(folder).config.is_file():
        raise CheckpointError(
            f"--resume {path.absolute()}: no run of sam3-lora train, whose config.yaml "
            f"would be there.{hint}"
        )
    return Run(folder, Path(RunFolder(folder).settings(Config).logging.log_dir))


def checkpoint_of(run: Run, resume: str) -> str | bool:
    """What `--resume` continues from: the state that a file names, or the last whole one (True).

    Raises:
        CheckpointError: the file names none, or the state is gone.
    """
    path = Path(resume)
    if path.is_dir():
        return True
    from lora_core.adapters.read import read_adapter

    state = read_adapter(path).metadata.get("state")
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


class Artifacts:
    """Writes the results of a run.

    Args:
        steps_per_epoch: updates of one pass over the training pictures.
        facts: about the run, for its adapter files.
    """

    def __init__(
        self,
        run: Run,
        model: Sam3Model,
        cfg: Config,
        steps_per_epoch: int,
        facts: Mapping[str, Any],
    ) -> None:
        self.run, self.model, self.cfg = run, model, cfg
        self.steps_per_epoch, self.facts = steps_per_epoch, dict(facts)

    def best(self, step: int, metrics: Mapping[str, float]) -> None:
        """Save the adapter of a new best step as best.pt and for PEFT."""
        from sam3_lora.model import save_adapter

        facts = self._facts(step, metrics)
        save_adapter(self.model, self.run.best, facts)
        save_adapter(self.model, self.run.adapter, facts)

    def latest(self, step: int) -> None:
        """Save the adapter as it is at the end of an epoch."""
        from sam3_lora.model import save_adapter

        epoch, rest = divmod(step, self.steps_per_epoch)
        if rest == 0 and epoch % self.cfg.checkpoint.save_freq == 0:
            save_adapter(self.model, self.run.folder / f"epoch_{epoch}.pt", self._facts(step))

    def steps(self) -> set[int]:
        """Steps of the adapter files, each of which names the state to continue from."""
        return {epoch * self.steps_per_epoch for _, epoch in self.run.epochs()}

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
        load_tensors(self.model, state["tensors"])

    def summary(self, **values: Any) -> None:
        """Write `training_summary.json`."""
        self.run.write_summary({**self.facts, **values})

    def _facts(self, step: int, metrics: Mapping[str, float] | None = None) -> dict[str, Any]:
        """What an adapter file says about its making; `state` leads back to the whole state."""
        return {
            **self.facts,
            "step": step,
            "epoch": step / self.steps_per_epoch,
            "state": f"state/checkpoint-{step}",
            "metrics": dict(metrics or {}),
            "settings": travelling(self.cfg, PATHS),
        }
