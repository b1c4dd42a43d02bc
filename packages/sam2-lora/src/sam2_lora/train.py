"""`sam2-lora train`: from a data folder and a checkpoint to an adapter and a merged checkpoint."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import fields, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from lora_core.config import parse
from lora_core.errors import run as guarded
from lora_core.guards import Guards
from lora_core.report import RunLog, say, table
from lora_core.run_folder import read_settings, refuse_both, travelling
from sam2_lora.artifacts import (
    PLACES,
    Artifacts,
    Run,
    checkpoint_of,
    find_run,
    new_run,
    unfinished,
)
from sam2_lora.config import Config

if TYPE_CHECKING:
    import torch
    from transformers import Sam2Model, TrainingArguments

    from lora_core.trainer import LoraTrainer
    from sam2_lora.data import EvalSet, Splits

COLUMNS = (
    "step", "split", "epoch", "loss", "loss_mask", "loss_dice", "loss_iou", "loss_class",
    "iou", "dice", "box_iou", "click3_iou", "click5_iou", "empty_images",
    "false_positive_images", "lr", "grad_norm", "seconds",
)  # fmt: skip
SHOWN = ("iou", "dice", "box_iou", "click3_iou")
PICTURES = 4  # overlays per validation in TensorBoard
# Settings that a resumed run may change. Paths may: what lies there is compared. The product of
# batch size, accumulated batches and processes must stay.
MAY_CHANGE = frozenset(
    [
        "learning_rate", "weight_decay", "warmup_steps", "max_grad_norm", "steps",
        "batch_size", "gradient_accumulation_steps", "gradient_checkpointing", "precision",
        "checkpoint", "adapter", "data_root", "data_format", "follow_links",
        "output_dir", "logs_dir", "cache_dir", "cache_gb", "tensorboard", "trainer",
        "num_workers", "device", "log_steps", "eval_steps", "patience", "min_delta", "keep_best",
        *(field.name for field in fields(Guards)),
    ]
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `sam2-lora train` and of the scripts; returns the process exit code."""
    return guarded(train, argv)


def train(argv: Sequence[str]) -> int:
    """Run one training from its command line, top to bottom.

    Raises:
        UserError: settings, data or checkpoints that cannot be used; nothing is lost.
    """
    cfg, run = settings(argv)
    ready(cfg, run)
    if cfg.dry_run:
        from sam2_lora import dry_run

        return dry_run.run(cfg)

    from lora_core.distributed import together
    from lora_core.training.arguments import choose_device

    device = choose_device(cfg.device)
    with together(device, cfg.trainer.get("ddp_timeout")):
        return fit(cfg, run, device)


def fit(cfg: Config, run: Run | None, device: torch.device) -> int:
    """Load data and weights, train, and write the results; the same in every process."""
    from lora_core.disk import check_space, folder_bytes
    from lora_core.distributed import first_rank_decides
    from lora_core.trainer import LoraTrainer, choose_precision
    from sam2_lora import data, frozen, losses, memory, metrics, model, placement

    splits = data.load(cfg, lambda make: first_rank_decides(make, device))
    say(f"{splits}\n")
    precision = choose_precision(cfg.precision, device)  # wakes a GPU, so after the data
    network = model.build(cfg)
    if cfg.adapter:
        cfg = warm_start(network, cfg)
    else:
        say(placement.adapt(network, cfg))
    network.to(device)
    images = frozen.frozen_images(network, cfg, precision)
    cfg = memory.fitted(network, splits.train, cfg)
    splits.use(images)
    written = folder_bytes(run.folder) if run else 0
    check_space(memory.disk_use(network, cfg), cfg.output_dir, written)
    size = network.sam2_base.variant.rpartition("_hiera_")[2]
    run = run or first_rank_decides(lambda: new_run(cfg, size), device)
    first_rank_decides(run.tidy, device)
    run.list_bad_samples(splits.bad, device)

    log = RunLog(run.folder / "tensorboard", run.csv(cfg), COLUMNS, cfg.tensorboard)
    prints = fingerprints(network, splits)
    artifacts = Artifacts(run, network, cfg, prints["data"])
    trainer = LoraTrainer(
        network,
        arguments(cfg, run.state, device),
        splits.train,
        data.collate,
        frozen.loss_of(cfg, images),
        (lambda net: metrics.evaluate(net, splits.val, cfg, images)) if splits.val else None,
        log=log,
        patience=cfg.patience if splits.val else None,
        min_delta=cfg.min_delta,
        shown=SHOWN,
        on_best=artifacts.best,
        on_latest=artifacts.latest,
        draw=lambda step: show(network, splits.val, log, step),
        save_adapter=lambda path: model.save_adapter(network, path),
        referenced=artifacts.steps,
        count=losses.object_count,
        sharded=network.vision_encoder.backbone.blocks if cfg.shard_base else (),
        guards=cfg,
        settings=travelling(cfg, PLACES),
        fingerprints=prints,
        may_change=MAY_CHANGE,
        resume_with=f"sam2-lora train --resume {run.folder}",
        advice=memory.advice(cfg, network),
    )
    trainer.train(resume_from_checkpoint=checkpoint_of(run, cfg.resume) if cfg.resume else None)
    if trainer.already_done and run.summary.is_file():
        say(f"nothing was changed; results: {run.folder}")
        return 0
    first_rank_decides(lambda: conclude(trainer, artifacts, splits, cfg), device)
    log.close()
    return 0


def fingerprints(network: Sam2Model, splits: Splits) -> dict[str, str]:
    """What tells another base or other data from those that a run began with."""
    from sam2_lora.data import fingerprint

    base = network.sam2_base.fingerprint
    return {"data": fingerprint(splits)} | ({"base": base} if base else {})


def arguments(cfg: Config, folder: str | Path, device: torch.device) -> TrainingArguments:
    """The configuration as transformers' TrainingArguments.

    Raises:
        ConfigError: see `lora_core.training.arguments`.
    """
    from lora_core.training.arguments import training_arguments

    return training_arguments(
        folder,
        learning_rate=cfg.learning_rate,
        weight_decay=cfg.weight_decay,
        steps=cfg.steps,
        batch_size=cfg.batch_size,
        gradient_accumulation_steps=cfg.gradient_accumulation_steps,
        warmup_steps=min(cfg.warmup_steps, cfg.steps // 10),
        max_grad_norm=cfg.max_grad_norm,
        log_steps=cfg.log_steps,
        eval_steps=cfg.eval_steps,
        seed=cfg.seed,
        num_workers=cfg.num_workers,
        precision=cfg.precision,
        device=device,
        trainer=cfg.trainer,
    )


def settings(argv: Sequence[str]) -> tuple[Config, Run | None]:
    """Read the command line; a resumed run has its own settings, changed by flags given now."""
    about = {"prog": "sam2-lora train", "description": "Train a LoRA of SAM 2 on your own masks."}
    cfg = parse(Config, argv, **about)
    if cfg.resume == "latest":
        refuse_both(cfg)
        found = unfinished(replace(cfg, resume=None))
        if found is None:
            say(f"no unfinished run with these settings in {cfg.output_dir}: a new one begins")
            return replace(cfg, resume=None), None
        argv = ["--resume", str(found)]  # the other flags are in its settings
    return read_settings(Config, argv, find_run, **about)


def ready(cfg: Config, run: Run | None) -> None:
    """Refuse what can be known before data, weights and the GPU are touched.

    Raises:
        ConfigError: libraries, folders, a device or settings of the trainer that cannot work.
        CheckpointError: no such base, or one of another model, as far as its header tells.
    """
    from lora_core import preflight

    preflight.libraries("sam2-lora", "train,pictures,peft", optional=("peft",))
    from lora_core.training.arguments import check_device
    from sam2_lora import model

    folders = {"--output_dir": run.folder if run else cfg.output_dir, "--logs_dir": cfg.logs_dir}
    if cfg.cache_dir:
        folders["--cache_dir"] = cfg.cache_dir
    preflight.check_all(
        *(partial(preflight.writable, path, setting) for setting, path in folders.items()),
        lambda: check_device(cfg.device, cfg.precision, cfg.trainer, SHOWN, cfg.dry_run),
        partial(model.glance, cfg),
    )


def warm_start(network: Sam2Model, cfg: Config) -> Config:
    """Put the adapter `cfg.adapter` on the network, and take rank and alpha from it.

    Raises:
        CheckpointError: see `model.load_adapter`.
    """
    from lora_core import summary
    from sam2_lora.model import load_adapter

    load_adapter(network, str(cfg.adapter), cfg.allow_partial)
    say(f"starting from {cfg.adapter}; its rank, alpha and layers are used")
    say(report := summary(network))
    first = report.rows[0]
    return replace(cfg, lora_rank=first.r, lora_alpha=first.alpha)


def show(network: Sam2Model, val: EvalSet | None, log: RunLog, step: int) -> None:
    """Overlays of some validation pictures for TensorBoard: base, LoRA, truth."""
    if val is None or not log.shows_pictures or step == 0:  # when LoRA is the base
        return
    from sam2_lora.evaluate import compare
    from sam2_lora.predictor import Predictor

    predictor = Predictor(network, val.cfg.precision)
    for record in islice((record for record in val if record.objects), PICTURES):
        log.picture(record.key, compare(predictor, record, ("base", "LoRA")), step)


def conclude(trainer: LoraTrainer, artifacts: Artifacts, splits: Splits, cfg: Config) -> None:
    """Write the last files, score the best adapter on the test split, and say where all is."""
    from lora_core.training.out_of_memory import explained
    from lora_core.validate import samples

    run, step, best = artifacts.run, trainer.state.global_step, trainer.best
    artifacts.final(step, has_best=best is not None)
    with explained(trainer.network, lambda: "the test at the end", trainer.advice):
        test = score_test(artifacts, splits.test) if splits.test else {}
    stopped = step < cfg.steps
    artifacts.summary(
        actual_steps=step,
        best_val_iou=best and best["value"],
        best_step=best and best["step"],
        final_train_iou=_last_train_iou(run.csv(cfg)),
        early_stopping_triggered=stopped,
        bad_samples=len(samples(splits.bad)),
        dropped_updates=trainer.dropped,
        test=test,
    )
    say(f"\nresults: {run.folder}\n  adapter for PEFT: {run.folder / 'adapter'}")
    for path in sorted(run.folder.glob("*.torch")):
        say(f"  {path.name}")
    say(f"  figures: {run.csv(cfg)}")
    run.say_left_out(splits.bad)


def score_test(artifacts: Artifacts, test: EvalSet) -> dict[str, dict[str, float]]:
    """Figures of the base and of the best adapter on the test split.

    The adapter is read from its folder, as its users will, so that the figures are those of the
    file and not of the network in memory.
    """
    from lora_core import adapters_off
    from sam2_lora.evaluate import worse
    from sam2_lora.metrics import evaluate
    from sam2_lora.model import image_size, load

    live, cfg = artifacts.model, artifacts.cfg
    network = load(live.sam2_base.path, image_size(live), artifacts.run.folder / "adapter")
    network.to(next(live.parameters()).device)
    with adapters_off(network):
        base = evaluate(network, test, cfg, test.frozen)
    figures = {"base": base, "lora": evaluate(network, test, cfg, test.frozen)}
    say("\ntest split")
    rows = [[name, *(values[key] for key in SHOWN)] for name, values in figures.items()]
    say(table(["model", *SHOWN], rows))
    if text := worse(figures):
        say(text)
    return figures


def _last_train_iou(path: Path) -> float | None:
    with path.open(newline="", encoding="utf-8") as file:
        values = [row["iou"] for row in csv.DictReader(file) if row["split"] == "train"]
    return float(values[-1]) if values and values[-1] else None


if __name__ == "__main__":
    raise SystemExit(main())
