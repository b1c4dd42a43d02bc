"""The folder of a run.

<output_dir>/
    lora-final/lora_weights.pth     written at the end: the best adapter, or without validation the
                                    last one
    lora-best/lora_weights.pth      the best one so far
    lora-epoch-10/lora_weights.pth ...
    adapter/                        the best one as PEFT reads it
    config.yaml, training_args.json all settings; the first is accepted by --config
    train.log, metrics.csv          what was said and measured; TensorBoard's files are beside them
    state/checkpoint-500/ ...       what a resumed run needs
    training_summary.json           written last
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_core import epoch_run, preflight
from lora_core.epoch_run import Artifacts, EpochRun
from lora_core.errors import CheckpointError
from lora_core.run_folder import RunFolder, named, travelling
from midi3d_lora.config import PATHS, Config

if TYPE_CHECKING:
    from midi3d_lora.transformer.dit import TripoSGDiTModel

FOLDER = "--output_dir"
WEIGHTS = "lora_weights.pth"
FINAL = "lora-final"


@dataclass(frozen=True)
class SceneRun(EpochRun):
    """A run whose adapters have folders of their own; `each` names that folder."""

    @property
    def final(self) -> Path:
        """The adapter that is written at the end."""
        return self.folder / FINAL / WEIGHTS

    @property
    def arguments(self) -> Path:
        """All settings as JSON, under the guide's name."""
        return self.folder / "training_args.json"

    def of_epoch(self, epoch: int) -> Path:
        """The adapter file of an epoch."""
        return super().of_epoch(epoch) / WEIGHTS

    def epochs(self) -> Iterator[tuple[Path, int]]:
        """The adapter files of epochs that are there, with their numbers."""
        for folder, epoch in super().epochs():
            if (folder / WEIGHTS).is_file():
                yield folder / WEIGHTS, epoch

    def adapters(self) -> list[Path]:
        """The files and folders with adapters that are there."""
        final = [self.final] if os.path.exists(self.final) else []
        return [*super().adapters(), *final]

    def tidy(self) -> None:
        """Delete files half written that a killed process has left."""
        from lora_core.tensor_file import remove_partial

        super().tidy()
        for folder in (self.final.parent, *self.folder.glob("lora-epoch-*")):
            if folder.is_dir():
                remove_partial(folder)


def run_in(folder: Path) -> SceneRun:
    """The run in this folder."""
    return SceneRun(
        folder,
        best=folder / "lora-best" / WEIGHTS,
        each=folder / "lora-epoch-{epoch}",
        text=folder / "train.log",
        csv=folder / "metrics.csv",
    )


def writable(run: EpochRun) -> Callable[[], object]:
    """A check that the folder of a run can be written."""
    return partial(preflight.writable, run.folder, FOLDER)


def refuse_existing(cfg: Config) -> None:
    """A new run never mixes with one that is there; see `epoch_run.refuse_existing`."""
    epoch_run.refuse_existing(run_in(Path(cfg.output_dir)), cfg, FOLDER)


def start(run: SceneRun, cfg: Config, about: str) -> SceneRun:
    """Make the folder of a new run; see `epoch_run.start`."""
    from lora_core.run_folder import by_flag
    from lora_core.settings import plain
    from lora_core.tensor_file import write_json

    if cfg.overwrite:
        for path in (run.final, run.arguments):
            path.unlink(missing_ok=True)
    epoch_run.start(run, cfg, about)
    write_json(run.arguments, plain(dict(by_flag(cfg))))
    return run


# -- continuing ------------------------------------------------------------------------------------


def find_run(resume: str) -> SceneRun:
    """The run that `--resume_from_checkpoint` names: its folder, a training checkpoint in it, or an
    adapter file of it.

    Raises:
        CheckpointError: no such run.
    """
    folder = _run_folder(resume)
    if not RunFolder(folder).config.is_file():
        raise CheckpointError(
            f"--resume_from_checkpoint {resume}: no run of midi3d-lora train, whose config.yaml "
            f"would be in {folder.absolute()}. To start from an adapter's weights alone: --adapter"
        )
    return run_in(folder)


def _run_folder(resume: str) -> Path:
    path = Path(resume)
    if re.fullmatch(r"checkpoint-\d+", path.name):  # the guide has them without state/
        return path.parent.parent if path.parent.name == "state" else path.parent
    path, folder = named(resume)
    inside = folder.name == FINAL or re.fullmatch(r"lora-(best|epoch-\d+)", folder.name)
    return folder.parent if inside else folder


def checkpoint_of(run: SceneRun, resume: str) -> str | bool:
    """What `--resume_from_checkpoint` continues from: a state's folder, or the last one (True).

    Raises:
        CheckpointError: the state that is meant is gone.
    """
    path = Path(resume)
    if re.fullmatch(r"checkpoint-\d+", path.name):
        state = run.state / path.name
        if state.is_dir():
            return str(state)
        there = ", ".join(sorted(p.name for p in run.state.glob("checkpoint-*"))) or "none"
        raise CheckpointError(f"{state.absolute()} is not there; there is {there}")
    if path.is_dir() and path.resolve() != run.folder.resolve():
        path = path / WEIGHTS  # of lora-best and its like
    return epoch_run.checkpoint_of(run, str(path), _facts_in)


def _facts_in(path: Path) -> Mapping[str, Any]:
    from midi3d_lora.adapter_files import read_adapter

    return read_adapter(path).file.metadata


# -- results ---------------------------------------------------------------------------------------


@dataclass
class SceneArtifacts(Artifacts):
    """Writes the results of a run, and `lora-final` at its end."""

    run: SceneRun

    def write_final(self, step: int, metrics: Mapping[str, float] | None) -> None:
        """Save the adapter that the network has now as the one to use."""
        self.save(self.run.final, self._facts(step, metrics))


def artifacts_of(
    run: SceneRun, net: TripoSGDiTModel, cfg: Config, updates: int, facts: Mapping[str, Any]
) -> SceneArtifacts:
    """What writes the results of a run.

    Args:
        updates: of one pass over the training scenes. facts: about the run.
    """
    from midi3d_lora.adapter_files import save_adapter

    every, settings = cfg.save_every_n_epochs, travelling(cfg, PATHS)
    return SceneArtifacts(run, net, partial(save_adapter, net), updates, every, facts, settings)
