"""The folder of a run, which is the folder of its adapter.

<output_dir>/
    adapter_model.safetensors,      the best adapter so far, or without validation the last one, as
    adapter_config.json             `peft.PeftModel.from_pretrained` reads it
    depth.json                      the depth that it was trained with, if any
    README.md                       its model card, with the licences
    tokenizer_config.json ...       the tokenizer of the base, unchanged
    config.yaml                     all settings, accepted by --config
    train.log, metrics.csv          what was said and measured; TensorBoard's files are beside them
    state/checkpoint-500/ ...       what a resumed run needs, with an adapter of its own each
    training_summary.json           written last
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from isaac_lora.config import PATHS, Config
from lora_core import epoch_run
from lora_core.epoch_run import Artifacts, EpochRun
from lora_core.errors import CheckpointError, ConfigError, UserError, one_line
from lora_core.run_folder import RunFolder, named, travelling
from lora_core.validate import REPORT

if TYPE_CHECKING:
    from isaac_lora.network.isaac import IsaacForConditionalGeneration

FOLDER = "--output_dir"
TENSORS, SETTINGS, CARD, DEPTH = (
    "adapter_model.safetensors", "adapter_config.json", "README.md", "depth.json"
)  # fmt: skip
CHECKPOINT = re.compile(r"checkpoint-\d+")
BEFORE_A_RUN = re.compile(rf"\..*|.*\.(log|out|err)|{REPORT}|events\.out\.tfevents\..*", re.DOTALL)
# What is copied of a tokenizer, as `save_pretrained` of transformers names it.
TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json",
    "special_tokens_map.json", "chat_template.jinja", "chat_template.json",
)  # fmt: skip


@dataclass(frozen=True)
class IsaacRun(EpochRun):
    """A run whose folder holds its one adapter."""

    def epochs(self) -> Iterator[tuple[Path, int]]:
        """None: training states have adapters of their own."""
        return iter(())


def run_in(folder: Path) -> IsaacRun:
    """The run in this folder."""
    return IsaacRun(
        folder,
        best=folder / TENSORS,
        each=folder / "epoch-{epoch}",
        text=folder / "train.log",
        csv=folder / "metrics.csv",
    )


def refuse_existing(cfg: Config) -> None:
    """A new run never mixes with what is there, nor replaces it unasked.

    Raises:
        ConfigError: a model, an adapter of another program, or a run; with what to do about it.
    """
    run = run_in(Path(cfg.output_dir))
    place = run.folder.absolute()
    if (run.folder / "config.json").is_file():
        raise ConfigError(
            f"{FOLDER} {place} is a model folder, and the adapter would replace its README.md and "
            f"tokenizer: choose another {FOLDER}"
        )
    if not cfg.overwrite and not run.config.is_file() and run.best.is_file():
        raise ConfigError(
            f"{FOLDER} {place} holds an adapter that no run of isaac-lora has written there: "
            f"choose another {FOLDER}, or replace it with --overwrite"
        )
    if strange := _of_nobody(run):
        more = f" and {len(strange) - 3} more" if len(strange) > 3 else ""
        raise ConfigError(
            f"{FOLDER} {place} holds {one_line(', '.join(strange[:3]))}{more}, which no run of "
            f"isaac-lora has written there: choose another {FOLDER}"
        )
    epoch_run.refuse_existing(run, cfg, FOLDER)


def _of_nobody(run: IsaacRun) -> list[str]:
    """Files in a folder without a run: a run would replace some, and lie among the others.

    What may be there before a run, such as logs of a job's scheduler, does not count.
    """
    if run.best.is_file() or run.text.is_file() or run.state.is_dir():
        return []
    try:
        run.settings(Config)
    except UserError:  # there are none, or not those of a run
        return sorted(
            path.name
            for path in run.folder.glob("*")
            if not path.is_dir() and not BEFORE_A_RUN.fullmatch(path.name)
        )
    return []


def start(run: IsaacRun, cfg: Config, about: str) -> IsaacRun:
    """Make the folder of a new run; see `epoch_run.start`."""
    if cfg.overwrite:
        for name in (SETTINGS, DEPTH, CARD, *TOKENIZER):
            (run.folder / name).unlink(missing_ok=True)
    epoch_run.start(run, cfg, about)
    return run


# -- continuing ------------------------------------------------------------------------------------


def find_run(resume: str) -> IsaacRun:
    """The run that `--resume_from_checkpoint` names: its folder, or a training checkpoint in it.

    Raises:
        CheckpointError: no such run.
    """
    path = Path(resume)
    if CHECKPOINT.fullmatch(path.name):  # scripts of transformers have them without state/
        folder = path.parent.parent if path.parent.name == "state" else path.parent
    else:
        folder = named(resume)[1]
    if not RunFolder(folder).config.is_file():
        raise CheckpointError(
            f"--resume_from_checkpoint {resume}: no run of isaac-lora train, whose config.yaml "
            f"would be in {folder.absolute()}. To start from an adapter's weights alone: --adapter"
        )
    return run_in(folder)


def checkpoint_of(run: RunFolder, resume: str) -> str | bool:
    """What `--resume_from_checkpoint` continues from: a state's folder, or the last one (True).

    Raises:
        CheckpointError: the state that is meant is gone.
    """
    path = Path(resume)
    if not CHECKPOINT.fullmatch(path.name):
        return True
    state = run.state / path.name
    if state.is_dir():
        return str(state)
    there = ", ".join(sorted(p.name for p in run.state.glob("checkpoint-*"))) or "none"
    raise CheckpointError(f"{state.absolute()} is not there; there is {there}")


# -- results ---------------------------------------------------------------------------------------


def shown(metrics: Mapping[str, float]) -> dict[str, float]:
    """What files say of a validation: without `minus_loss`, which the trainer alone needs."""
    return {name: value for name, value in metrics.items() if name != "minus_loss"}


@dataclass
class IsaacArtifacts(Artifacts):
    """Writes the adapter of a run into its folder."""

    run: IsaacRun

    def best(self, step: int, metrics: Mapping[str, float]) -> None:
        """Save the adapter that the network has now as the one to use."""
        self.save(self.run.folder, self._facts(step, shown(metrics)))

    def adapter(self, folder: Path) -> None:
        """Save the adapter that the network has now into a folder of a training state."""
        self.save(folder, {})

    def tokenizer(self, folder: Path) -> None:
        """Copy the tokenizer's files beside the adapter.

        Args:
            folder: where they lie.

        Raises:
            CheckpointError: they cannot be read or written.
        """
        from lora_core.tensor_file import atomic_write

        for name in TOKENIZER:
            source = folder / name
            if not source.is_file():
                continue
            try:
                content = source.read_bytes()
            except OSError as error:
                raise CheckpointError(f"{source.absolute()}: {error.strerror}") from error
            with atomic_write(self.run.folder / name) as file:
                file.write(content)


def artifacts_of(
    run: IsaacRun,
    net: IsaacForConditionalGeneration,
    cfg: Config,
    updates: int,
    facts: Mapping[str, Any],
) -> IsaacArtifacts:
    """What writes the results of a run.

    Args:
        updates: of one pass over the training conversations. facts: about the run.
    """
    from isaac_lora.adapter_files import save_adapter

    save = partial(save_adapter, net)
    return IsaacArtifacts(
        run, net, lambda path, about: save(path, about), updates, 1, facts, travelling(cfg, PATHS)
    )
