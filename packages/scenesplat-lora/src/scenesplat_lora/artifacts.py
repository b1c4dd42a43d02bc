"""The folder of a run.

<save_path>/
    model/
        lora_best.pth, lora_epoch_5.pth ...   adapters for load_lora_checkpoint
        model_best.pth            with merge_on_end: the whole model, as the official trainer has it
    adapter/                      the best adapter as PEFT reads it, where it has no prompt MLPs
    config.yaml                   all settings, accepted by --config
    train.log, metrics.csv        what was said and measured
    state/                        what a resumed run needs
    training_summary.json         written last
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
from scenesplat_lora.config import Config

if TYPE_CHECKING:
    from scenesplat_lora.model import Network

_EPOCH = re.compile(r"lora_epoch_(?P<epoch>\d+)\.pth")
# What a run may find changed and still be the one that is asked for again.
NOT_COMPARED = frozenset(["resume", "overwrite", "dry_run", "device", "tensorboard"])
# Where things are on this machine.
PATHS = frozenset(
    [
        "data.train.data_root", "data.val.data_root", "data.text_embeddings", "data.class_names",
        "lora_training.pretrained_path", "save_path", "resume", "adapter",
    ]
)  # fmt: skip


@dataclass(frozen=True)
class Run(RunFolder):
    """Where a run lives: `cfg.save_path`."""

    @classmethod
    def of(cls, cfg: Config) -> Run:
        return cls(Path(cfg.save_path))

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def best(self) -> Path:
        return self.model / "lora_best.pth"

    @property
    def merged(self) -> Path:
        return self.model / "model_best.pth"

    @property
    def csv(self) -> Path:
        return self.folder / "metrics.csv"

    @property
    def text(self) -> Path:
        return self.folder / "train.log"

    def problems(self) -> list[Callable[[], object]]:
        """Checks that its folder can be written."""
        return [partial(preflight.writable, self.folder, "--save_path")]

    def epochs(self) -> Iterator[tuple[Path, int]]:
        """The `lora_epoch_N.pth` files with their N."""
        for path in sorted(self.model.glob("lora_epoch_*.pth")):
            if match := _EPOCH.fullmatch(path.name):
                yield path, int(match["epoch"])

    def tidy(self) -> None:
        """Delete files half written that a killed process has left."""
        from lora_core.tensor_file import remove_partial

        super().tidy()
        if self.model.is_dir():
            remove_partial(self.model)


def refuse_existing(cfg: Config) -> None:
    """A new run never mixes with one that is there, nor replaces it unasked.

    Raises:
        ConfigError: there is one, with what to do about it.
    """
    run = Run.of(cfg)
    if cfg.overwrite or not os.path.exists(run.config):  # Path.exists raises for long names
        return
    place = run.folder.absolute()
    try:
        changed = differences(run.settings(Config), cfg)
    except UserError:  # of another version
        changed = []
    if changed:
        rows = table(["setting", "there", "now"], changed)
        raise ConfigError(
            f"{place} holds a run with other settings: choose another --save_path, or add "
            f"--overwrite\n{rows}"
        )
    state = "a finished" if run.summary.exists() else "an unfinished"
    raise ConfigError(
        f"{place} holds {state} run with these settings: continue it with --resume {run.folder}, "
        "replace it with --overwrite, or choose another --save_path"
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
        run.model.mkdir(parents=True, exist_ok=True)
        run.text.write_text(f"{about}\n", "utf-8", errors="backslashreplace")
        dump(cfg, run.config)
    except OSError as error:
        raise ConfigError(f"{run.folder.absolute()}: {error.strerror}") from error
    return run


def _remove(run: Run) -> None:
    """Delete what runs write, and nothing else; the settings first, which make it a run."""
    epochs = [path for path, _ in run.epochs()]
    events = sorted(run.folder.glob("events.out.tfevents.*"))
    files = (run.config, run.summary, run.best, run.merged, run.folder / REPORT, run.csv, run.text)
    for path in (*files, *epochs, *events):
        path.unlink(missing_ok=True)
    for folder in (run.state, run.adapter):
        if folder.is_dir() and not folder.is_symlink():
            shutil.rmtree(folder)


def find_run(resume: str) -> Run:
    """The run that `--resume` names: its folder, or one of the adapters in its `model`.

    Raises:
        CheckpointError: no such run.
    """
    path, folder = named(resume)
    folder = folder.parent if path.is_file() else folder
    if not RunFolder(folder).config.is_file():
        raise CheckpointError(
            f"--resume {path.absolute()}: no run of scenesplat-lora train, whose config.yaml would "
            f"be in {folder.absolute()}. To start from an adapter's weights alone: --adapter"
        )
    return Run(folder)


def checkpoint_of(run: Run, resume: str) -> str | bool:
    """What `--resume` continues from: the state that a file names, or the last whole one (True).

    Raises:
        CheckpointError: the file names none, or the state is gone.
    """
    path = Path(resume)
    if path.is_dir():
        return True
    from lora_core.tensor_file import read_torch

    content = read_torch(path)
    facts = content.get("metadata") if isinstance(content, dict) else None
    state = facts.get("state") if isinstance(facts, dict) else None
    if not isinstance(state, str) or not re.fullmatch(r"state/checkpoint-\d+", state):
        raise CheckpointError(f"--resume {path.absolute()}: it does not say which state it is of")
    if not (run.folder / state).is_dir():
        raise CheckpointError(
            f"--resume {path.absolute()}: its state {run.folder.absolute() / state} is gone. The "
            f"last one: --resume {run.folder}. Its weights alone: --adapter {resume}"
        )
    return str(run.folder / state)


class Artifacts:
    """Writes the results of a run.

    Args:
        steps_per_epoch: updates of one pass over the training scenes.
        facts: about the run, for its adapter files.
    """

    def __init__(
        self, run: Run, net: Network, cfg: Config, steps_per_epoch: int, facts: Mapping[str, Any]
    ) -> None:
        self.run, self.net, self.cfg = run, net, cfg
        self.steps_per_epoch, self.facts = steps_per_epoch, dict(facts)

    def best(self, step: int, metrics: Mapping[str, float]) -> None:
        """Save the adapter of a new best step, for us and for PEFT."""
        from lora_core import save_adapter
        from scenesplat_lora import lora, model

        facts = self._facts(step, metrics)
        lora.save_lora_checkpoint(self.net, self.run.best, facts)
        if not model.has_prompts(self.net):
            save_adapter(self.net, self.run.adapter, metadata=facts)

    def latest(self, step: int) -> None:
        """Save the adapter as it is at the end of an epoch."""
        from scenesplat_lora import lora

        epoch, rest = divmod(step, self.steps_per_epoch)
        if rest == 0 and epoch % self.cfg.lora_training.save_epoch == 0:
            path = self.run.model / f"lora_epoch_{epoch}.pth"
            lora.save_lora_checkpoint(self.net, path, self._facts(step))

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
        load_tensors(self.net, state["tensors"])

    def merge(self, step: int) -> Path:
        """Write the network, with its adapter in its weights, as the official trainer does.

        Raises:
            ConfigError: prompt MLPs, which have no place in weights.
            CheckpointError: the base is gone, or it cannot be written.
        """
        from lora_core import merged_state_dict
        from scenesplat_lora import model
        from scenesplat_lora.official import read_official, to_official, write_official

        if model.has_prompts(self.net):
            raise ConfigError("prompt MLPs cannot be merged: keep the adapter beside the base")
        base = read_official(self.cfg.lora_training.pretrained_path)
        tensors = to_official(base, merged_state_dict(self.net))
        return write_official(self.run.merged, tensors, step // self.steps_per_epoch)

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
