"""`isaac-lora train`: from conversations and a model folder to an adapter that PEFT loads."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from isaac_lora.artifacts import (
    FOLDER,
    artifacts_of,
    checkpoint_of,
    find_run,
    refuse_existing,
    run_in,
    shown,
    start,
)
from isaac_lora.config import PATHS, Config
from isaac_lora.training_flags import TrainingFlags, description
from isaac_lora.training_words import settled
from lora_core.errors import run as guarded
from lora_core.guards import Guards
from lora_core.report import RunLog, copied_to, say
from lora_core.run_folder import read_settings, travelling

if TYPE_CHECKING:
    import torch
    from transformers import TrainingArguments

    from isaac_lora.artifacts import IsaacArtifacts, IsaacRun
    from isaac_lora.data import Splits
    from lora_core.trainer import LoraTrainer

COLUMNS = (
    "step", "split", "epoch", "loss", "exact_match", "anls", "box_iou", "box_f1", "polygon_iou",
    "pointing_accuracy", "point_distance", "damaged_tags", "lr", "grad_norm", "seconds",
)  # fmt: skip
SHOWN = ("loss", "exact_match", "anls", "box_iou", "pointing_accuracy")
# Settings that a resumed run may change; paths may, too: what lies there is compared. The product
# of batch size, accumulated batches and processes must stay.
MAY_CHANGE = frozenset(
    [
        "num_train_epochs", "max_steps", "per_device_train_batch_size",
        "per_device_eval_batch_size", "gradient_accumulation_steps", "learning_rate",
        "lr_scheduler_type", "warmup_steps", "warmup_ratio", "weight_decay", "max_grad_norm",
        "fp16", "bf16", "gradient_checkpointing", "use_cpu", "dataloader_num_workers",
        "cache_vision", "cache_gb", "save_steps", "save_total_limit", "logging_steps",
        "eval_steps", "eval_generate_samples", "eval_max_new_tokens", "report_to", "tensorboard",
        "overwrite",
        *(field.name for field in fields(Guards)),
        *(field.name for field in fields(TrainingFlags)),
    ]
) - {"optim", "optim_args", "dataloader_drop_last"}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `isaac-lora train` and `src/train_lora.py`; returns the process exit code."""
    return guarded(train, argv)


def train(argv: Sequence[str]) -> int:
    """Run one training from its command line, top to bottom.

    Raises:
        UserError: settings, data or checkpoints that cannot be used; nothing is lost.
    """
    cfg, run = settings(argv)
    from lora_core import preflight

    place = run or run_in(Path(cfg.output_dir))

    def output() -> None:
        preflight.writable(place.folder, FOLDER)  # first: into others nobody may look
        if run:
            _state_of(run, cfg)
        else:
            refuse_existing(cfg)

    ready(cfg, output)
    if cfg.dry_run:
        from isaac_lora import dry_run

        return dry_run.run(cfg)

    from lora_core.distributed import together
    from lora_core.training.arguments import choose_device

    device = choose_device(cfg.device)
    with together(device, cfg.ddp_timeout):
        return fit(cfg, run, device)


def settings(argv: Sequence[str]) -> tuple[Config, IsaacRun | None]:
    """Read the command line; a resumed run has its own settings, changed by flags given now."""
    with settled(argv) as words:
        return read_settings(
            Config, words, find_run, prog="isaac-lora train", description=description()
        )


def ready(cfg: Config, *checks: Callable[[], object]) -> None:
    """Refuse what can be known before data, weights and the GPU are touched.

    Args:
        checks: more of them, whose problems are told together with the others.

    Raises:
        ConfigError: libraries, folders, a device, layers or a schedule that cannot work.
        CheckpointError: no such model, or another one, as far as headers tell.
        DataError: no conversation files.
    """
    from lora_core import preflight

    preflight.libraries("isaac-lora", "train,pictures,peft", optional=("peft",))
    from isaac_lora import data_survey, model, objective
    from lora_core.training.arguments import check_device

    def device() -> None:
        objective.check_precision(cfg)
        precision = objective.precision(cfg)
        check_device(cfg.device, precision, cfg.trainer, SHOWN, cfg.dry_run, section="")

    def cache() -> None:
        kept = cfg.use_depth or cfg.cache_vision
        if kept and not os.path.isdir(cfg.cache_place):  # one that is only read is of use, too
            preflight.writable(cfg.cache_place, "--cache_dir")

    preflight.check_all(
        *checks,
        device,
        lambda: objective.schedule(cfg)(0, 100),
        lambda: data_survey.find_files(cfg),
        lambda: model.glance(cfg),
        cache,
    )


def fit(cfg: Config, run: IsaacRun | None, device: torch.device) -> int:
    """Load data and weights, train, and write the results; the same in every process."""
    from isaac_lora import data, frozen_features, memory, model, objective, validation
    from isaac_lora.conversations.tokenizer_files import find_tokenizer
    from isaac_lora.processing import IsaacProcessor
    from lora_core import summary
    from lora_core.disk import check_space, folder_bytes
    from lora_core.distributed import first_rank_decides
    from lora_core.trainer import LoraTrainer
    from lora_core.training.arguments import choose_precision

    base = model.folder_of(cfg)
    processor = IsaacProcessor.from_pretrained(base)
    splits = data.load(cfg, processor, lambda make: first_rank_decides(make, device))
    say(f"{splits}\n")
    rows = data.training_rows(cfg, splits)
    number_format = choose_precision(objective.precision(cfg), device)
    steps = objective.total_updates(cfg, data.updates_per_epoch(cfg, rows))
    empty = model.planned(cfg, objective.DTYPES[number_format])
    cfg = model.as_planned(cfg, empty) if cfg.adapter else cfg
    use = memory.disk_use(empty, cfg, steps, bool(splits.val))
    check_space(use, cfg.output_dir, folder_bytes(run.folder) if run else 0)
    cache = frozen_features.cache_of(cfg)
    pictures = frozen_features.pictures_of([*splits.train, *splits.val], processor.rules)
    depths = model.depths_of(cfg, device, cache)
    frozen_features.fill_depth(depths, pictures, device)
    net = model.build(cfg, objective.DTYPES[number_format], depths)
    net = model.adapted(net, cfg).to(device)
    features = frozen_features.features_of(cfg, net, processor.rules, depths, number_format, cache)
    frozen_features.fill_vision(features, pictures, device)
    loss = objective.loss_of(cfg, features)
    largest = memory.largest_batch(cfg, rows, processor)
    cfg = memory.fitted(net, loss, largest, cfg, number_format)
    updates = data.updates_per_epoch(cfg, rows)
    steps = objective.total_updates(cfg, updates)
    about = f"{splits}\n\n{summary(net)}"
    new = run_in(Path(cfg.output_dir))
    run = run or first_rank_decides(lambda: start(new, cfg, about), device)
    first_rank_decides(run.tidy, device)
    run.list_bad_samples(splits.bad, device)

    with copied_to(run.text):
        log = RunLog(run.folder, run.csv, COLUMNS, cfg.tensorboard)
        prints = {"data": data.fingerprint(splits), "base": model.fingerprint(cfg)}
        if depths is not None:
            prints["depth"] = depths.fingerprint
        artifacts = artifacts_of(run, net, cfg, updates, {"data": prints["data"]})
        measure, draw = validation.evaluation(cfg, splits.val, processor, features, log)
        trainer = LoraTrainer(
            net,
            arguments(cfg, run, steps, device),
            data.TrainSet(rows, processor, cfg.seed, features.vision, features.depth),
            partial(data.collate, processor=processor, packed=cfg.packing),
            loss,
            measure,
            log=log,
            draw=draw,
            shown=SHOWN,
            on_best=artifacts.best,
            save_adapter=artifacts.adapter,
            schedule=objective.schedule(cfg),
            order=data.order_of(cfg, rows),
            count=data.num_label_tokens,
            sharded=list(net.model.layers) if cfg.shard_base else (),
            guards=cfg,
            settings=travelling(cfg, PATHS),
            fingerprints=prints,
            may_change=MAY_CHANGE,
            resume_with=f"isaac-lora train --resume_from_checkpoint {run.folder}",
            advice=memory.advice(cfg, net),
        )
        trainer.train(resume_from_checkpoint=_state_of(run, cfg))
        if trainer.already_done and run.summary.is_file():
            say(f"nothing was changed; results: {run.folder}")
            return 0
        tokenizer = find_tokenizer(base)
        first_rank_decides(lambda: conclude(trainer, artifacts, splits, tokenizer), device)
        log.close()
    return 0


def _state_of(run: IsaacRun, cfg: Config) -> str | bool | None:
    """What the run continues from; None: it is new. Raises CheckpointError: that is gone."""
    return checkpoint_of(run, cfg.resume) if cfg.resume else None


def arguments(cfg: Config, run: IsaacRun, steps: int, device: torch.device) -> TrainingArguments:
    """The configuration as transformers' TrainingArguments.

    Args:
        steps: optimizer updates of the whole run.

    Raises:
        ConfigError: see `lora_core.training.arguments`.
    """
    from isaac_lora import objective
    from lora_core.training.arguments import training_arguments

    ours = ("lr_scheduler_type", "lr_scheduler_kwargs")  # see `objective.schedule`
    handed_on = {name: value for name, value in cfg.trainer.items() if name not in ours}
    return training_arguments(
        run.state,
        learning_rate=cfg.learning_rate,
        weight_decay=cfg.weight_decay,
        steps=steps,
        batch_size=cfg.per_device_train_batch_size,
        gradient_accumulation_steps=cfg.gradient_accumulation_steps,
        max_grad_norm=cfg.max_grad_norm,
        log_steps=cfg.logging_steps,
        eval_steps=cfg.eval_steps or cfg.save_steps,
        seed=cfg.seed,
        num_workers=cfg.dataloader_num_workers,
        precision=objective.precision(cfg),
        device=device,
        trainer={"save_steps": cfg.save_steps} | handed_on,
        section="",
    )


def conclude(
    trainer: LoraTrainer, artifacts: IsaacArtifacts, splits: Splits, tokenizer: Path
) -> None:
    """Write the last files, and say where all is. Afterwards the network has the best adapter.

    Args:
        tokenizer: the folder of the base's.
    """
    from lora_core.validate import samples

    run, step, best = artifacts.run, trainer.state.global_step, trainer.best
    chosen = best["step"] if best else step
    artifacts.load_best(chosen)
    artifacts.best(chosen, best["metrics"] if best else {})
    artifacts.tokenizer(tokenizer)
    artifacts.summary(
        steps=step,
        best_step=best and best["step"],
        best=best and shown(best["metrics"]),
        bad_samples=len(samples(splits.bad)),
        dropped_updates=trainer.dropped,
    )
    which = f"the best step, {chosen}" if best else f"the last step, {chosen}"
    say(f"\nresults: {run.folder}\n  adapter for PEFT: {run.best} ({which})\n  figures: {run.csv}")
    run.say_left_out(splits.bad)


if __name__ == "__main__":
    raise SystemExit(main())
