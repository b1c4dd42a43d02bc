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

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_core import epoch_run, preflight
from lora_core.epoch_run import Artifacts, EpochRun
from lora_core.errors import CheckpointError
from lora_core.run_folder import RunFolder, named, travelling
from sam3_lora.config import Config

if TYPE_CHECKING:
    from transformers import Sam3Model

FOLDER, LOGS = "--checkpoint.save_dir", "--logging.log_dir"
# Where things are on this machine.
PATHS = frozenset(
    [
        "dataset.train_img_folder", "dataset.train_ann_file", "dataset.val_img_folder",
        "dataset.val_ann_file", "paths.sam3_checkpoint", "paths.bpe_path", "checkpoint.save_dir",
        "logging.log_dir", "resume", "adapter", "cache_dir",
    ]
)  # fmt: skip


def run_of(cfg: Config) -> EpochRun:
    """Where the run of a configuration lives."""
    return run_in(Path(cfg.checkpoint.save_dir), Path(cfg.logging.log_dir))


def run_in(folder: Path, logs: Path) -> EpochRun:
    """The run in these folders."""
    return EpochRun(
        folder,
        best=folder / "best.pt",
        each=folder / "epoch_{epoch}.pt",
        text=logs / "training.log",
        csv=logs / "metrics.csv",
    )


def writable(run: EpochRun) -> list[Callable[[], object]]:
    """Checks that the folders of a run can be written."""
    return [
        partial(preflight.writable, run.folder, FOLDER),
        partial(preflight.writable, run.csv.parent, LOGS),
    ]


def refuse_existing(cfg: Config) -> None:
    """A new run never mixes with one that is there; see `epoch_run.refuse_existing`."""
    run = run_of(cfg)
    epoch_run.refuse_existing(run, cfg, FOLDER, run.best, LOGS)


def find_run(resume: str) -> EpochRun:
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
    logs = RunFolder(folder).settings(Config).logging.log_dir
    return run_in(folder, Path(logs))  # it may have been moved


def checkpoint_of(run: EpochRun, resume: str) -> str | bool:
    """What `--resume` continues from; see `epoch_run.checkpoint_of`."""
    from lora_core.adapters.read import read_adapter

    return epoch_run.checkpoint_of(run, resume, lambda path: read_adapter(path).metadata)


def artifacts_of(
    run: EpochRun, net: Sam3Model, cfg: Config, updates: int, facts: Mapping[str, Any]
) -> Artifacts:
    """What writes the results of a run.

    Args:
        updates: of one pass over the training pictures. facts: about the run.
    """
    from sam3_lora.model import save_adapter

    save = partial(save_adapter, net)
    every, settings = cfg.checkpoint.save_freq, travelling(cfg, PATHS)
    return Artifacts(run, net, save, updates, every, facts, settings)
