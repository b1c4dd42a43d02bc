"""`scenesplat-lora train`: from scenes of Gaussians and a checkpoint to an adapter for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_core.errors import run as guarded
from lora_core.guards import Guards
from lora_core.report import RunLog, copied_to, say
from lora_core.run_folder import read_settings, travelling
from scenesplat_lora.artifacts import (
    PATHS,
    artifacts_of,
    checkpoint_of,
    find_run,
    refuse_existing,
    run_in,
    writable,
    write_whole,
)
from scenesplat_lora.config import Config
from scenesplat_lora.settings.words import for_parser

if TYPE_CHECKING:
    import torch
    from transformers import TrainingArguments

    from lora_core.epoch_run import Artifacts, EpochRun
    from lora_core.trainer import LoraTrainer
    from scenesplat_lora.data import Splits

COLUMNS = (
    "step", "split", "epoch", "loss", "CosineSimilarity", "L2Loss", "AggregatedContrastiveLoss",
    "CrossEntropyLoss", "LovaszLoss", "mIoU", "fg_mIoU", "global_acc", "mean_class_acc", "fg_mAcc",
    "lr", "grad_norm", "seconds",
)  # fmt: skip
SHOWN = ("mIoU", "fg_mIoU", "mean_class_acc", "loss")
# Settings that a resumed run may change; paths may, too: what lies there is compared. The product
# of batch size, accumulated batches and processes must stay.
MAY_CHANGE = frozenset(
    [
        "epoch", "batch_size", "gradient_accumulation_steps", "optimizer.lr", "clip_grad",
        "optimizer.weight_decay", "scheduler.type", "scheduler.warmup_epochs",
        "scheduler.warmup_lr", "scheduler.min_lr", "enable_amp", "amp_dtype", "num_worker",
        "lora_training.eval_epoch", "lora_training.save_epoch", "lora_training.merge_on_end",
        "lora_training.save_lora_only", "log_steps", "overwrite", "device", "tensorboard",
        "trainer", *(field.name for field in fields(Guards)),
    ]
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `scenesplat-lora train` and `tools/train_lora.py`; returns the exit code."""
    return guarded(train, argv)


def train(argv: Sequence[str]) -> int:
    """Run one training from its command line, top to bottom.

    Raises:
        UserError: settings, data or checkpoints that cannot be used; nothing is lost.
    """
    cfg, run = settings(argv)
    place = run or run_in(Path(cfg.save_path))
    ready(cfg, writable(place), *([] if run else [lambda: refuse_existing(cfg)]))
    if cfg.dry_run:
        from scenesplat_lora import dry_run

        return dry_run.run(cfg)

    from lora_core.distributed import together
    from lora_core.training.arguments import choose_device

    device = choose_device(cfg.device)
    with together(device, cfg.trainer.get("ddp_timeout")):
        return fit(cfg, run, device)


def settings(argv: Sequence[str]) -> tuple[Config, EpochRun | None]:
    """Read the command line; a resumed run has its own settings, changed by flags given now."""
    about = {"prog": "scenesplat-lora train", "description": "Train a LoRA of SceneSplat."}
    with for_parser(argv) as words:
        cfg, run = read_settings(Config, words, find_run, **about)
    from scenesplat_lora import model

    return model.with_grid_size(cfg), run


def ready(cfg: Config, *checks: Callable[[], object]) -> None:
    """Refuse what can be known before data, weights and the GPU are touched.

    Args:
        checks: more of them, whose problems are told together with the others.

    Raises:
        ConfigError: libraries, folders, a device, transforms or terms of the loss that cannot work.
        CheckpointError: no such base, or one of another model, as far as its header tells.
    """
    from lora_core import preflight

    preflight.libraries("scenesplat-lora", "train,peft", optional=("peft",))
    from lora_core.training.arguments import check_device
    from scenesplat_lora import data, model, objective, validation

    def fits() -> None:
        model.glance(cfg)
        text = validation.texts(cfg)
        needs = objective.needs_of(model.skeleton(cfg), text)
        preflight.check_all(
            lambda: objective.terms(cfg, needs.language),
            lambda: data.transform(cfg, needs, "train"),
            lambda: data.transform(cfg, needs, "val"),
            lambda: validation.check_texts(text, needs, cfg),
        )

    preflight.check_all(
        *checks,
        lambda: check_device(cfg.device, objective.precision(cfg), cfg.trainer, SHOWN, cfg.dry_run),
        lambda: data.records_of(cfg),
        fits,
    )


def fit(cfg: Config, run: EpochRun | None, device: torch.device) -> int:
    """Load data and weights, train, and write the results; the same in every process."""
    from lora_core.disk import check_space, folder_bytes
    from lora_core.distributed import first_rank_decides
    from lora_core.epoch_run import start
    from lora_core.trainer import LoraTrainer
    from lora_core.training.arguments import choose_precision
    from scenesplat_lora import data, lora, memory, model, objective, validation

    text = validation.texts(cfg)
    needs = objective.needs_of(model.skeleton(cfg), text)
    splits = data.load(cfg, needs, lambda make: first_rank_decides(make, device))
    say(f"{splits}\n")
    number_format = choose_precision(objective.precision(cfg), device)
    net = model.adapted(model.build(cfg), cfg).to(device)
    loss = objective.loss_of(cfg, needs)
    evaluate = validation.evaluation(cfg, splits, needs, text)
    cfg = memory.fitted(net, loss, partial(data.largest_batch, splits), cfg, number_format)
    updates = data.updates_per_epoch(cfg, splits)
    use = memory.disk_use(net, cfg, updates, splits.val is not None)
    check_space(use, cfg.save_path, folder_bytes(run.folder) if run else 0)
    about = f"{splits}\n\n{lora.lora_summary(net)}"
    new = run_in(Path(cfg.save_path))
    run = run or first_rank_decides(lambda: start(new, cfg, about), device)
    first_rank_decides(run.tidy, device)
    run.list_bad_samples(splits.bad, device)

    with copied_to(run.text):
        log = RunLog(run.folder, run.csv, COLUMNS, cfg.tensorboard)
        prints = {"data": data.fingerprint(splits), "base": model.base_of(net).fingerprint}
        artifacts = artifacts_of(run, net, cfg, updates, {"data": prints["data"]})
        trainer = LoraTrainer(
            net,
            arguments(cfg, run, updates, device),
            splits.train,
            partial(data.collate, mix_prob=cfg.mix_prob),
            loss,
            evaluate,
            log=log,
            shown=SHOWN,
            on_best=artifacts.best,
            on_latest=artifacts.latest,
            referenced=artifacts.steps,
            schedule=objective.schedule(cfg, updates),
            count=objective.count_of(cfg, needs),
            guards=cfg,
            settings=travelling(cfg, PATHS),
            fingerprints=prints,
            may_change=MAY_CHANGE,
            resume_with=f"scenesplat-lora train --resume {run.folder}",
            advice=memory.advice(cfg, net),
            callbacks=objective.callbacks(cfg),
        )
        trainer.train(resume_from_checkpoint=checkpoint_of(run, cfg.resume) if cfg.resume else None)
        if trainer.already_done and run.summary.is_file():
            say(f"nothing was changed; results: {run.folder}")
            return 0
        first_rank_decides(lambda: conclude(trainer, artifacts, splits, cfg), device)
        log.close()
    return 0


def arguments(cfg: Config, run: EpochRun, updates: int, device: torch.device) -> TrainingArguments:
    """The configuration as transformers' TrainingArguments.

    Raises:
        ConfigError: see `lora_core.training.arguments`.
    """
    from lora_core.training.arguments import training_arguments
    from scenesplat_lora import objective

    beta1, beta2 = cfg.optimizer.betas
    extra = {"save_steps": updates, "adam_beta1": beta1, "adam_beta2": beta2}
    return training_arguments(
        run.state,
        learning_rate=cfg.optimizer.lr,
        weight_decay=cfg.optimizer.weight_decay,
        steps=updates * cfg.epoch,
        batch_size=cfg.batch_size,
        gradient_accumulation_steps=cfg.gradient_accumulation_steps,
        max_grad_norm=cfg.clip_grad or 0.0,
        log_steps=cfg.log_steps,
        eval_steps=updates * cfg.lora_training.eval_epoch,
        seed=cfg.seed,
        num_workers=cfg.num_worker,
        precision=objective.precision(cfg),
        device=device,
        trainer=extra | cfg.trainer,
    )


def conclude(trainer: LoraTrainer, artifacts: Artifacts, splits: Splits, cfg: Config) -> None:
    """Write the last files, and say where all is. Afterwards the network has the best adapter."""
    from lora_core.validate import samples

    run, step, best = artifacts.run, trainer.state.global_step, trainer.best
    artifacts.final(step, has_best=best is not None)
    if best is None:
        say(f"{'no figure was measured' if splits.val else 'no validation scenes'}: "
            f"{run.best.name} is the last epoch")  # fmt: skip
    chosen = best["step"] if best else step
    artifacts.load_best(chosen)
    if cfg.lora_training.merges and run.whole:
        net: Any = trainer.network
        write_whole(net, cfg, run.whole, chosen // artifacts.updates)
    artifacts.summary(
        steps=step,
        best_step=best and best["step"],
        best=best and best["metrics"],
        bad_samples=len(samples(splits.bad)),
        dropped_updates=trainer.dropped,
    )
    for remark in splits.train.remarks():
        say(f"note: {remark}")
    say(f"\nresults: {run.folder}\n  adapter: {run.best}\n  figures: {run.csv}")
    if cfg.lora_training.merges:
        say(f"  merged model: {run.whole}")
    run.say_left_out(splits.bad)


if __name__ == "__main__":
    raise SystemExit(main())
