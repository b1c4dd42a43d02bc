"""`sam3-lora train`: from COCO annotations and a checkpoint to an adapter for one's own phrases."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial
from typing import TYPE_CHECKING

from lora_core.errors import run as guarded
from lora_core.guards import Guards
from lora_core.report import RunLog, copied_to, say
from lora_core.run_folder import read_settings, travelling
from sam3_lora import objective
from sam3_lora.artifacts import (
    PATHS,
    artifacts_of,
    checkpoint_of,
    find_run,
    refuse_existing,
    run_of,
    writable,
)
from sam3_lora.config import Config

if TYPE_CHECKING:
    import torch
    from transformers import TrainingArguments

    from lora_core.epoch_run import Artifacts, EpochRun
    from lora_core.trainer import LoraTrainer
    from sam3_lora.data import Splits
    from sam3_lora.scoring import EncodedPhrases
    from sam3_lora.validation import Phrases

COLUMNS = (
    "step", "split", "epoch", "loss", "loss_bbox", "loss_giou", "loss_ce", "presence_loss",
    "loss_mask", "loss_dice", "loss_semantic_seg", "loss_semantic_dice", "loss_aux", "loss_o2m",
    "presence_accuracy", "bbox_mAP", "bbox_mAP50", "segm_mAP", "segm_mAP50", "cgF1", "cgF1_50",
    "pmF1", "IL_F1", "IL_FPR", "lr", "grad_norm", "seconds",
)  # fmt: skip
SHOWN = ("segm_mAP", "bbox_mAP", "cgF1", "pmF1", "loss")
# Settings that a resumed run may change; paths may, too: what lies there is compared. The product
# of batch size, accumulated batches and processes must stay.
MAY_CHANGE = frozenset(
    [
        "training.max_epochs", "training.batch_size", "training.gradient_accumulation_steps",
        "training.learning_rate", "training.weight_decay", "training.scheduler",
        "training.warmup_steps", "training.timescale", "training.cooldown_steps",
        "training.max_grad_norm", "training.gradient_checkpointing", "training.use_amp",
        "training.amp_dtype", "training.val_epoch_freq", "checkpoint.save_freq",
        "logging.log_steps", "dataset.num_workers", "dataset.follow_links", "overwrite", "device",
        "cache_dir", "cache_gb", "tensorboard", "trainer",
        *(field.name for field in fields(Guards)),
    ]
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `sam3-lora train` and of `train.py`; returns the process exit code."""
    return guarded(train, argv)


def train(argv: Sequence[str]) -> int:
    """Run one training from its command line, top to bottom.

    Raises:
        UserError: settings, data or checkpoints that cannot be used; nothing is lost.
    """
    cfg, run = settings(argv)
    ready(cfg, *writable(run or run_of(cfg)), *([] if run else [lambda: refuse_existing(cfg)]))
    if cfg.dry_run:
        from sam3_lora import dry_run

        return dry_run.run(cfg)

    from lora_core.distributed import together
    from lora_core.training.arguments import choose_device

    device = choose_device(cfg.device)
    with together(device, cfg.trainer.get("ddp_timeout")):
        return fit(cfg, run, device)


def settings(argv: Sequence[str]) -> tuple[Config, EpochRun | None]:
    """Read the command line; a resumed run has its own settings, changed by flags given now."""
    about = {"prog": "sam3-lora train", "description": "Train a LoRA of SAM 3 on your phrases."}
    return read_settings(Config, argv, find_run, **about)


def ready(cfg: Config, *checks: Callable[[], object]) -> None:
    """Refuse what can be known before data, weights and the GPU are touched.

    Args:
        checks: more of them, whose problems are told together with the others.

    Raises:
        ConfigError: libraries, folders, a device or settings of the trainer that cannot work.
        CheckpointError: no such base, or one of another model, as far as its header tells.
    """
    from lora_core import preflight

    preflight.libraries("sam3-lora", "train,pictures,peft", optional=("peft",))
    from lora_core.training.arguments import check_device
    from sam3_lora import model

    if cfg.cache_dir:
        checks = (*checks, partial(preflight.writable, cfg.cache_dir, "--cache_dir"))
    layers = [] if cfg.adapter else [lambda net: model.adapt(net, cfg)]  # whether they exist
    preflight.check_all(
        *checks,
        lambda: check_device(cfg.device, objective.precision(cfg), cfg.trainer, SHOWN, cfg.dry_run),
        lambda: model.glance(cfg, *layers),
    )


def fit(cfg: Config, run: EpochRun | None, device: torch.device) -> int:
    """Load data and weights, train, and write the results; the same in every process."""
    from lora_core import summary
    from lora_core.disk import check_space, folder_bytes
    from lora_core.distributed import first_rank_decides
    from lora_core.epoch_run import start
    from lora_core.trainer import LoraTrainer
    from sam3_lora import data, frozen, memory, model, network, validation
    from sam3_lora.normalisers import counted
    from sam3_lora.predictor import Predictor
    from sam3_lora.scoring import EncodedPhrases

    splits = data.load(cfg, lambda make: first_rank_decides(make, device))
    say(f"{splits}\n")
    number_format = objective.usable_precision(cfg, device)
    net = objective.adapted(model.build(cfg), cfg).to(device)
    words = objective.vocabulary(net, splits, cfg)
    cache = frozen.cache_of(cfg)
    fixed = objective.encoded(net, words, splits, cache)
    images = frozen.frozen_images(net, cfg, number_format, cache)
    loss = objective.loss_of(cfg, fixed, images)

    def phrases() -> EncodedPhrases:
        return fixed or EncodedPhrases(net, words, objective.texts_of(splits))

    evaluate = validation.evaluation(cfg, splits, phrases)
    splits.use(images)
    largest = partial(memory.largest_batch, splits.train, words)
    cfg = memory.fitted(net, loss, largest, cfg, number_format)
    updates = data.updates_per_epoch(cfg, splits)
    use = memory.disk_use(net, cfg, updates, splits.val is not None)
    check_space(use, cfg.checkpoint.save_dir, folder_bytes(run.folder) if run else 0)
    about = f"{splits}\n\n{summary(net)}"
    run = run or first_rank_decides(lambda: start(run_of(cfg), cfg, about), device)
    first_rank_decides(run.tidy, device)
    run.list_bad_samples(splits.bad, device)

    predictor = Predictor(net, words, number_format, fixed)
    with copied_to(run.text):
        log = RunLog(run.csv.parent, run.csv, COLUMNS, cfg.tensorboard)
        prints = {"data": data.fingerprint(splits), "base": str(net.sam3_base.fingerprint)}
        facts = {"phrases": list(splits.phrases), "data": prints["data"]}
        artifacts = artifacts_of(run, net, cfg, updates, facts)
        trainer = LoraTrainer(
            net,
            arguments(cfg, run, updates, device),
            splits.train,
            partial(data.collate, tokenizer=words),
            loss,
            evaluate,
            log=log,
            shown=SHOWN,
            on_best=artifacts.best,
            on_latest=artifacts.latest,
            draw=lambda step: validation.show(predictor, splits, log, step),
            save_adapter=lambda path: model.save_adapter(net, path),
            referenced=artifacts.steps,
            schedule=schedule(cfg),
            count=partial(counted, masks=cfg.training.enable_segmentation),
            sharded=network.divisible(net) if cfg.shard_base else (),
            guards=cfg,
            settings=travelling(cfg, PATHS),
            fingerprints=prints,
            may_change=MAY_CHANGE,
            resume_with=f"sam3-lora train --resume {run.folder}",
            advice=memory.advice(cfg, net),
        )
        trainer.train(resume_from_checkpoint=checkpoint_of(run, cfg.resume) if cfg.resume else None)
        if trainer.already_done and run.summary.is_file():
            say(f"nothing was changed; results: {run.folder}")
            return 0
        first_rank_decides(lambda: conclude(trainer, artifacts, splits, phrases), device)
        log.close()
    return 0


def schedule(cfg: Config) -> Callable[[int, int], float] | None:
    """(update, updates) -> share of the peak learning rate; None: the trainer's cosine."""
    from sam3_lora.schedule import inverse_sqrt_factor

    training = cfg.training
    if training.scheduler == "cosine":
        return None

    def factor(update: int, updates: int) -> float:
        warmup = min(training.warmup_steps, updates // 10)
        if training.scheduler == "constant":
            return min(1.0, (update + 1) / (warmup + 1))
        cooldown = min(training.cooldown_steps, updates // 10)
        return inverse_sqrt_factor(update, updates, warmup, training.timescale, cooldown)

    return factor


def arguments(cfg: Config, run: EpochRun, updates: int, device: torch.device) -> TrainingArguments:
    """The configuration as transformers' TrainingArguments.

    Raises:
        ConfigError: see `lora_core.training.arguments`.
    """
    from lora_core.training.arguments import training_arguments

    training, total = cfg.training, updates * cfg.training.max_epochs
    saves = {"save_steps": updates * cfg.checkpoint.save_freq}
    return training_arguments(
        run.state,
        learning_rate=training.learning_rate,
        weight_decay=training.weight_decay,
        steps=total,
        batch_size=training.batch_size,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        warmup_steps=min(training.warmup_steps, total // 10),
        max_grad_norm=training.max_grad_norm,
        log_steps=cfg.logging.log_steps,
        eval_steps=updates * training.val_epoch_freq,
        seed=cfg.seed,
        num_workers=cfg.dataset.num_workers,
        precision=objective.precision(cfg),
        device=device,
        trainer=saves | cfg.trainer,
    )


def conclude(trainer: LoraTrainer, artifacts: Artifacts, splits: Splits, phrases: Phrases) -> None:
    """Write the last files, look what the best adapter does to absent concepts, say where all is.

    Afterwards the network has the best adapter.
    """
    import torch

    from lora_core.training.checks import untouched
    from lora_core.training.out_of_memory import explained
    from lora_core.validate import samples
    from sam3_lora import validation

    run, step, best = artifacts.run, trainer.state.global_step, trainer.best
    artifacts.final(step, has_best=best is not None)
    if best is None:
        why = "no figure was measured" if splits.val else "no validation data"
        say(f"{why}: best.pt is the last epoch")
    net = trainer.network
    with (
        torch.no_grad(),
        untouched(net),
        trainer.accelerator.autocast(),
        explained(net, lambda: "the test at the end", trainer.advice),
    ):
        artifacts.load_best(best["step"] if best else step)
        rates = validation.absent_concepts(net, splits, phrases)
    artifacts.summary(
        steps=step,
        best_step=best and best["step"],
        best=best and best["metrics"],
        absent_concepts_found=rates,
        bad_samples=len(samples(splits.bad)),
        dropped_updates=trainer.dropped,
    )
    say(f"\nresults: {run.folder}\n  adapter for PEFT: {run.adapter}\n  figures: {run.csv}")
    run.say_left_out(splits.bad)


if __name__ == "__main__":
    raise SystemExit(main())
