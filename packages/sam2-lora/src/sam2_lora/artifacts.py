"""The folder of a run: its files have the names that the guide promises.

models/severstal_lora/sam2_large_lora_r8_a16_lr1e-3_20261121_0915/
    best_lora_step500_iou0.7312_dice0.8201.torch     the adapter alone, official module names
    best_merged_step500_iou0.7312_dice0.8201.torch   an official checkpoint
    latest_lora_step1500.torch, final_lora_step10000.torch, training_summary.json
    adapter/            the best adapter as PEFT reads it
    config.yaml         all settings, accepted by --config
    state/              what a resumed run needs
    tensorboard/
logs/training_metrics_lora_20261121_0915.csv
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_core.config import dump
from lora_core.errors import CheckpointError, ConfigError, UserError
from lora_core.report import say
from lora_core.run_folder import RunFolder, named, travelling
from lora_core.settings import as_yaml
from sam2_lora.config import Config

if TYPE_CHECKING:
    from transformers import Sam2Model

# Settings that name a place on one machine: nothing that may be copied or published holds them.
PLACES = frozenset(
    {"data_root", "checkpoint", "adapter", "resume", "output_dir", "logs_dir", "cache_dir"}
)

_NAME = re.compile(r"sam2_\w+_lora_r\d+_a[\d.e+-]+_lr[^_]+_(?P<stamp>\d{8}_\d{4}(?:_\d+)?)")
_BEST = re.compile(
    r"best_(?P<kind>lora|merged)_step(?P<step>\d+)_iou(?P<iou>[\d.]+|nan)_dice([\d.]+|nan)\.torch"
)
_LATEST = re.compile(r"latest_lora_step(?P<step>\d+)\.torch")


@dataclass(frozen=True)
class Run(RunFolder):
    """Where a run lives; its stamp `20261121_0915` is also in the name of its CSV."""

    stamp: str

    def csv(self, cfg: Config) -> Path:
        return Path(cfg.logs_dir) / f"training_metrics_lora_{self.stamp}.csv"


def new_run(cfg: Config, size: str) -> Run:
    """Make the folder of a new run, which holds its settings, and its CSV; never some that exist.

    Raises:
        ConfigError: they cannot be made.
    """
    if earlier := unfinished(cfg):
        say(f"an unfinished run has the same settings; to continue it: --resume {earlier}")
    start = f"sam2_{size}_lora_r{cfg.lora_rank}_a{cfg.lora_alpha:g}_lr{plain(cfg.learning_rate)}"
    now = datetime.now().strftime("%Y%m%d_%H%M")
    attempt = 0
    while True:
        attempt += 1
        stamp = now if attempt == 1 else f"{now}_{attempt}"  # two runs within one minute
        run = Run(Path(cfg.output_dir) / f"{start}_{stamp}", stamp)
        try:
            # A run with another rank or output folder has another name, but could have this CSV.
            run.csv(cfg).parent.mkdir(parents=True, exist_ok=True)
            run.csv(cfg).open("x").close()
        except FileExistsError:
            continue
        except OSError as error:
            raise ConfigError(f"--logs_dir {run.csv(cfg).absolute()}: {error.strerror}") from error
        try:
            run.folder.mkdir(parents=True)
        except FileExistsError:
            run.csv(cfg).unlink()
            continue
        except OSError as error:
            run.csv(cfg).unlink()
            raise ConfigError(f"--output_dir {run.folder.absolute()}: {error.strerror}") from error
        dump(cfg, run.config)
        return run


def unfinished(cfg: Config) -> Path | None:
    """The latest run in the output folder with the same settings that stopped before its end."""
    for folder in sorted(Path(cfg.output_dir).glob("sam2_*"), key=_started, reverse=True):
        run = RunFolder(folder)
        saved = any(run.state.glob("checkpoint-*/"))
        if saved and run.config.is_file() and not run.summary.exists():
            try:
                stored = run.settings(Config)
            except UserError:  # of another version
                continue
            if _asked_for(stored) == _asked_for(cfg):
                return folder
    return None


def _started(folder: Path) -> tuple[str, str, int]:
    """Day, time and number in its minute of a run: as text the tenth would precede the second."""
    name = _NAME.fullmatch(folder.name)
    day, time, *number = name["stamp"].split("_") if name else ("", "")
    return day, time, int(number[0]) if number else 1


def _asked_for(cfg: Config) -> str:
    """Settings as text, such that what `--auto_batch` has made of them is the same."""
    if cfg.auto_batch:
        samples = cfg.batch_size * cfg.gradient_accumulation_steps
        cfg = replace(cfg, batch_size=samples, gradient_accumulation_steps=1)
    return as_yaml(cfg)


def find_run(resume: str) -> Run:
    """The run that `--resume` names: its folder, or one of its `latest_lora_step` files.

    Raises:
        CheckpointError: no such run, or an adapter without the state that continuing needs.
    """
    path, folder = named(resume)
    hint = f" To start from its weights alone: --adapter {resume}" if _may_adapt(path) else ""
    stamp = _stamp(folder)
    if stamp is None:
        around = [above for above in path.absolute().parents[:3] if _stamp(above)]
        if around:
            hint = f" It lies in one: --resume {around[0]}{hint and '.'}{hint}"
        raise CheckpointError(f"--resume {path.absolute()}: no run of sam2-lora train.{hint}")
    if path.is_file() and not _LATEST.fullmatch(path.name):
        raise CheckpointError(
            f"--resume {path.absolute()}: a run continues from its last step, so give its folder "
            f"{folder} or its latest_lora_step file.{hint}"
        )
    return Run(folder, stamp)


def _stamp(folder: Path) -> str | None:
    """That of a run's folder; None if it is none."""
    name = _NAME.fullmatch(folder.resolve().name)
    return name["stamp"] if name and (folder / "config.yaml").is_file() else None


def _may_adapt(path: Path) -> bool:
    """Whether `--adapter` could take it, by its name."""
    if path.is_dir():
        return (path / "adapter_config.json").is_file()
    return path.suffix in {".torch", ".pt", ".pth", ".safetensors"} and "_merged_" not in path.name


def checkpoint_of(run: Run, resume: str) -> str | bool:
    """What `--resume` continues from: the state that a file names, or the last whole one (True)."""
    from lora_core import checkpoint

    name = _LATEST.fullmatch(Path(resume).name)
    if name is None or Path(resume).is_dir():
        return True
    return str(checkpoint.folder(run.state, int(name["step"])))


def plain(value: float) -> str:
    """Write a learning rate as people do: 1e-3, 2.5e-4."""
    mantissa, exponent = f"{value:e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


class Artifacts:
    """Writes the results of a run: adapters and merged models, the best few of them kept."""

    def __init__(self, run: Run, model: Sam2Model, cfg: Config, data: str = "") -> None:
        """Write into `run`; `data` is the fingerprint of the pictures and masks."""
        self.run, self.model, self.cfg, self.data = run, model, cfg, data

    def best(self, step: int, metrics: Mapping[str, float]) -> None:
        """Save the adapter and the verified merged model of a new best step."""
        from sam2_lora.export import export
        from sam2_lora.model import save_adapter

        name = f"step{step}_iou{metrics['iou']:.4f}_dice{metrics['dice']:.4f}.torch"
        facts = self._facts(step, metrics)
        save_adapter(self.model, self.run.folder / f"best_lora_{name}", facts)
        export(self.model, self.run.folder / f"best_merged_{name}", overwrite=True)
        save_adapter(self.model, self.run.adapter, facts)
        self._forget_worse()

    def latest(self, step: int) -> None:
        """Save the adapter as it is now, in place of the one before."""
        from sam2_lora.model import save_adapter

        newest = self.run.folder / f"latest_lora_step{step}.torch"
        save_adapter(self.model, newest, self._facts(step))
        for path, _ in self._matching(_LATEST):
            if path != newest:
                path.unlink()

    def steps(self) -> set[int]:
        """Steps of the adapter files, each of which names the state to continue from."""
        patterns = (_BEST, _LATEST)
        return {int(name["step"]) for pattern in patterns for _, name in self._matching(pattern)}

    def final(self, step: int, has_best: bool) -> None:
        """Save the adapter of the last step; without validation it stands for the best, too."""
        from sam2_lora.export import export
        from sam2_lora.model import save_adapter

        save_adapter(
            self.model, self.run.folder / f"final_lora_step{step}.torch", self._facts(step)
        )
        if not has_best:
            export(self.model, self.run.folder / f"final_merged_step{step}.torch", overwrite=True)
            save_adapter(self.model, self.run.adapter, self._facts(step))

    def summary(self, **values: Any) -> None:
        """Write `training_summary.json`: the guide's fields, and what is given here."""
        cfg = self.cfg
        content = {
            "model_size": self.model.sam2_base.variant,
            "tuning_method": "lora",
            "dataset_size": cfg.dataset_size,
            "lora_rank": cfg.lora_rank,
            "lora_alpha": cfg.lora_alpha,
            "lora_dropout": cfg.lora_dropout,
            "learning_rate": cfg.learning_rate,
            "weight_decay": cfg.weight_decay,
            "total_steps": cfg.steps,
            "early_stopping_patience": cfg.patience,
            "timestamp": self.run.stamp,
            "checkpoint_dir": str(self.run.folder),
            "note": "IoU is the mean over objects from one click, at original resolution.",
            **values,
        }
        self.run.write_summary(content)

    def _facts(self, step: int, metrics: Mapping[str, float] | None = None) -> dict[str, Any]:
        """What an adapter file says about its making; `state` leads back to the whole state."""
        from lora_core.adapters.origin import commit

        facts = {
            "step": step,
            "state": f"state/checkpoint-{step}",
            "targets": self.cfg.targets,
            "dataset_size": self.cfg.dataset_size,
            "batch_size": self.cfg.batch_size,
            "learning_rate": self.cfg.learning_rate,
            "weight_decay": self.cfg.weight_decay,
            "seed": self.cfg.seed,
            "data": self.data,
            "commit": commit(),
            "settings": travelling(self.cfg, PLACES),
        }
        if metrics is not None:
            facts |= {"iou": metrics["iou"], "dice": metrics["dice"]}
        return facts

    def _forget_worse(self) -> None:
        """Keep the `keep_best` pairs with the highest IoU; of equals the earlier ones."""
        ranks = {
            int(name["step"]): (float(name["iou"]), -int(name["step"]))
            for _, name in self._matching(_BEST)
        }
        kept = sorted(ranks, key=ranks.__getitem__, reverse=True)[: self.cfg.keep_best]
        for path, name in self._matching(_BEST):
            if int(name["step"]) not in kept:
                path.unlink()
                path.with_suffix(".json").unlink(missing_ok=True)  # config of a custom size

    def _matching(self, pattern: re.Pattern[str]) -> Iterator[tuple[Path, re.Match[str]]]:
        for path in sorted(self.run.folder.iterdir()):
            if match := pattern.fullmatch(path.name):
                yield path, match
