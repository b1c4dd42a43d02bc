"""`sam2-lora train`: from a data folder and a checkpoint to an adapter and a merged checkpoint."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_core.config import parse
from lora_core.errors import ConfigError
from lora_core.errors import run as guarded
from lora_core.report import RunLog, say, table
from sam2_lora.artifacts import Artifacts, Run, find_run, new_run
from sam2_lora.config import Config

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import Sam2Model

    from lora_core.trainer import LoraTrainer
    from sam2_lora.data import EvalSet, Splits
    from sam2_lora.records import Record

COLUMNS = (
    "step", "split", "epoch", "loss", "loss_mask", "loss_dice", "loss_iou", "loss_class",
    "iou", "dice", "box_iou", "click3_iou", "click5_iou", "empty_images",
    "false_positive_images", "lr", "grad_norm", "seconds",
)  # fmt: skip
SHOWN = ("iou", "dice", "box_iou", "click3_iou")
PICTURES = 4  # overlays per validation in TensorBoard


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `sam2-lora train` and of the scripts; returns the process exit code."""
    return guarded(train, argv)


def train(argv: Sequence[str]) -> int:
    """Run one training from its command line, top to bottom.

    Raises:
        UserError: settings, data or checkpoints that cannot be used; nothing is lost.
    """
    cfg, run = settings(argv)

    from lora_core.trainer import (
        LoraTrainer,
        choose_device,
        choose_precision,
        first_rank_decides,
        training_arguments,
    )
    from sam2_lora import data, losses, metrics, model, placement

    device = choose_device(cfg.device)
    choose_precision(cfg.precision, device)  # raises before anything slow
    splits = data.load(cfg)
    say(f"{splits}\n")
    network = model.build(cfg)
    if cfg.adapter:
        cfg = warm_start(network, cfg)
    else:
        say(placement.adapt(network, cfg))
    network.to(device)
    size = network.sam2_base.variant.rpartition("_hiera_")[2]
    run = run or first_rank_decides(lambda: new_run(cfg, size), device)
    if cfg.cache_dir:
        splits.train.features = cached_features(network, cfg)

    log = RunLog(run.folder, run.csv(cfg), COLUMNS, cfg.tensorboard)
    artifacts = Artifacts(run, network, cfg)

    def keep_latest(step: int) -> None:
        artifacts.latest(step)
        show(network, splits.val, log, step)

    trainer = LoraTrainer(
        network,
        training_arguments(
            run.state,
            learning_rate=cfg.learning_rate,
            weight_decay=cfg.weight_decay,
            steps=cfg.steps,
            batch_size=cfg.batch_size,
            gradient_accumulation_steps=cfg.gradient_accumulation_steps,
            warmup_steps=cfg.warmup_steps,
            max_grad_norm=cfg.max_grad_norm,
            log_steps=cfg.log_steps,
            eval_steps=cfg.eval_steps,
            seed=cfg.seed,
            num_workers=0 if cfg.cache_dir else cfg.num_workers,
            precision=cfg.precision,
            device=device,
            trainer=cfg.trainer,
        ),
        splits.train,
        data.collate,
        lambda net, batch: losses.loss(net, batch, cfg),
        (lambda net: metrics.evaluate(net, splits.val, cfg)) if splits.val else None,
        log=log,
        patience=cfg.patience if splits.val else None,
        min_delta=cfg.min_delta,
        shown=SHOWN,
        on_best=artifacts.best,
        on_latest=keep_latest,
        save_adapter=lambda path: model.save_adapter(network, path),
        referenced=artifacts.steps,
    )
    trainer.train(resume_from_checkpoint=bool(cfg.resume) or None)
    first_rank_decides(lambda: conclude(trainer, artifacts, splits, cfg), device)
    log.close()
    return 0


def settings(argv: Sequence[str]) -> tuple[Config, Run | None]:
    """Read the command line; a resumed run has its own settings, changed by flags given now."""
    about = {"prog": "sam2-lora train", "description": "Train a LoRA of SAM 2 on your own masks."}
    cfg = parse(Config, argv, **about)
    if not cfg.resume:
        return cfg, None
    run = find_run(cfg.resume)
    return parse(Config, ["--config", str(run.config), *argv], **about), run


def warm_start(network: Sam2Model, cfg: Config) -> Config:
    """Put the adapter `cfg.adapter` on the network, and take rank and alpha from it.

    Raises:
        CheckpointError: see `model.load_adapter`.
        ConfigError: it adapts the encoder, whose output is to be cached.
    """
    from lora_core import summary
    from sam2_lora.model import load_adapter

    load_adapter(network, str(cfg.adapter))
    say(f"starting from {cfg.adapter}; its rank, alpha and layers are used")
    say(report := summary(network))
    if cfg.cache_dir and any(row.path.startswith("vision_encoder.") for row in report.rows):
        raise ConfigError(f"--cache_dir needs an unchanged encoder, but {cfg.adapter} adapts it")
    first = report.rows[0]
    return replace(cfg, lora_rank=first.r, lora_alpha=first.alpha)


def cached_features(network: Sam2Model, cfg: Config) -> Callable[[Record], dict[str, Tensor]]:
    """Image embeddings that the frozen encoder makes once per picture, kept in `cfg.cache_dir`."""
    import torch

    from lora_core.cache import FeatureCache, fingerprint
    from sam2_lora.image import preprocess, read_image
    from sam2_lora.metrics import autocast, evaluating
    from sam2_lora.model import encode

    cache = FeatureCache(str(cfg.cache_dir), int(cfg.cache_gb * 1e9))
    device = next(network.parameters()).device

    def compute(record: Record) -> dict[str, Tensor]:
        pixels = preprocess(read_image(record.image), cfg.size)[None].to(device)
        with evaluating(network), autocast(device, cfg.precision), torch.no_grad():
            features = encode(network, pixels)
        return {name: tensor[0].cpu() for name, tensor in features._asdict().items()}

    def features(record: Record) -> dict[str, Tensor]:
        key = {
            "base": network.sam2_base.fingerprint,
            "picture": fingerprint(record.image),
            "preprocessing": f"{cfg.size} {cfg.precision} {device.type}",
        }
        return cache.get(key, lambda: compute(record))

    return features


def show(network: Sam2Model, val: EvalSet | None, log: RunLog, step: int) -> None:
    """Overlays of some validation pictures for TensorBoard: base, LoRA, truth."""
    if val is None or not log.shows_pictures:
        return
    from sam2_lora.evaluate import compare
    from sam2_lora.predictor import Predictor

    predictor = Predictor(network, val.cfg.precision)
    for record in islice((record for record in val if record.objects), PICTURES):
        log.picture(record.key, compare(predictor, record, ("base", "LoRA")), step)


def conclude(trainer: LoraTrainer, artifacts: Artifacts, splits: Splits, cfg: Config) -> None:
    """Write the last files, score the best adapter on the test split, and say where all is."""
    run, step, best = artifacts.run, trainer.state.global_step, trainer.best
    artifacts.final(step, has_best=best is not None)
    test = score_test(trainer, splits.test, cfg) if splits.test else {}
    stopped = step < cfg.steps
    artifacts.summary(
        actual_steps=step,
        best_val_iou=best and best["value"],
        best_step=best and best["step"],
        final_train_iou=_last_train_iou(run.csv(cfg)),
        early_stopping_triggered=stopped,
        test=test,
    )
    say(f"\nresults: {run.folder}\n  adapter for PEFT: {run.folder / 'adapter'}")
    for path in sorted(run.folder.glob("*.torch")):
        say(f"  {path.name}")
    say(f"  figures: {run.csv(cfg)}")


def score_test(trainer: LoraTrainer, test: EvalSet, cfg: Config) -> dict[str, dict[str, float]]:
    """Figures of the base and of the best adapter on the test split."""
    from lora_core import adapters_off, checkpoint
    from sam2_lora.metrics import evaluate

    network: Any = trainer.network
    if trainer.best:
        folder = checkpoint.folder(trainer.args.output_dir, trainer.best["step"])
        checkpoint.load_tensors(network, checkpoint.load(folder)["tensors"])
    with adapters_off(network):
        base = evaluate(network, test, cfg)
    figures = {"base": base, "lora": evaluate(network, test, cfg)}
    say("\ntest split")
    rows = [[name, *(values[key] for key in SHOWN)] for name, values in figures.items()]
    say(table(["model", *SHOWN], rows))
    return figures


def _last_train_iou(path: Path) -> float | None:
    with path.open(newline="", encoding="utf-8") as file:
        values = [row["iou"] for row in csv.DictReader(file) if row["split"] == "train"]
    return float(values[-1]) if values and values[-1] else None


if __name__ == "__main__":
    raise SystemExit(main())
