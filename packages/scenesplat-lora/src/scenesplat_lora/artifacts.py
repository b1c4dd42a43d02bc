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

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_core import epoch_run, preflight
from lora_core.epoch_run import Artifacts, EpochRun
from lora_core.errors import CheckpointError
from lora_core.run_folder import RunFolder, named, travelling
from scenesplat_lora.config import Config

if TYPE_CHECKING:
    from scenesplat_lora.model import Network

FOLDER = "--save_path"
# Where things are on this machine.
PATHS = frozenset(
    [
        "data.train.data_root", "data.val.data_root", "data.text_embeddings", "data.class_names",
        "lora_training.pretrained_path", "save_path", "resume", "adapter",
    ]
)  # fmt: skip


def run_in(folder: Path) -> EpochRun:
    """The run in this folder."""
    model = folder / "model"
    return EpochRun(
        folder,
        best=model / "lora_best.pth",
        each=model / "lora_epoch_{epoch}.pth",
        text=folder / "train.log",
        csv=folder / "metrics.csv",
        whole=model / "model_best.pth",
    )


def writable(run: EpochRun) -> Callable[[], object]:
    """A check that the folder of a run can be written."""
    return partial(preflight.writable, run.folder, FOLDER)


def refuse_existing(cfg: Config) -> None:
    """A new run never mixes with one that is there; see `epoch_run.refuse_existing`."""
    epoch_run.refuse_existing(run_in(Path(cfg.save_path)), cfg, FOLDER)


def find_run(resume: str) -> EpochRun:
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
    return run_in(folder)


def checkpoint_of(run: EpochRun, resume: str) -> str | bool:
    """What `--resume` continues from; see `epoch_run.checkpoint_of`."""
    return epoch_run.checkpoint_of(run, resume, _facts_in)


def _facts_in(path: Path) -> Mapping[str, Any]:
    from lora_core.tensor_file import read_torch

    content = read_torch(path)
    facts = content.get("metadata") if isinstance(content, dict) else None
    return facts if isinstance(facts, dict) else {}


def artifacts_of(
    run: EpochRun, net: Network, cfg: Config, updates: int, facts: Mapping[str, Any]
) -> Artifacts:
    """What writes the results of a run.

    Args:
        updates: of one pass over the training scenes. facts: about the run.
    """
    names = getattr(net, "class_names", None)
    facts = {**facts, "classes": list(names)} if names else facts
    every, settings = cfg.lora_training.save_epoch, travelling(cfg, PATHS)
    return Artifacts(run, net, partial(save, net), updates, every, facts, settings)


def save(net: Network, path: Path, facts: Mapping[str, Any]) -> None:
    """Write the adapter as `load_lora_checkpoint` takes it; into a folder: as PEFT does, if it can.

    PEFT knows no prompt MLPs.
    """
    from lora_core import save_adapter
    from scenesplat_lora import lora, model

    if path.suffix == ".pth":
        lora.save_lora_checkpoint(net, path, facts)
    elif not model.has_prompts(net):
        save_adapter(net, path, metadata=facts)


def write_whole(net: Network, cfg: Config, path: Path, epoch: int) -> None:
    """Write the network, with its adapter in its weights, as the official trainer does.

    Raises:
        ConfigError: prompt MLPs, which have no place in weights.
        CheckpointError: the base has gone or changed, or the file cannot be written.
        NumericError: the file gives other outputs than the network.
    """
    from lora_core.merged_file import refuse_changed
    from scenesplat_lora import model
    from scenesplat_lora.export import export
    from scenesplat_lora.network.official import read_official

    then, now = model.base_of(net), model.base_of(model.build(cfg))
    refuse_changed(then.path, now.fingerprint, then.fingerprint)
    base, voxels = read_official(then.path), cfg.data.voxels
    export(net, base, path, grid_size=voxels, epoch=epoch, overwrite=True)
