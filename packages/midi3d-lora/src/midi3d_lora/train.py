"""`midi3d-lora train`: from scenes and a model directory to an adapter for one's own domain."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from lora_core.errors import run as guarded
from lora_core.guards import Guards
from lora_core.report import RunLog, copied_to, say
from lora_core.run_folder import read_settings, travelling
from midi3d_lora.artifacts import (
    artifacts_of,
    checkpoint_of,
    find_run,
    refuse_existing,
    run_in,
    start,
    writable,
)
from midi3d_lora.config import PATHS, Config
from midi3d_lora.config_sections import without_sections

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import TrainingArguments

    from lora_core.trainer import LoraTrainer
    from midi3d_lora.artifacts import SceneArtifacts, SceneRun
    from midi3d_lora.data import Splits

COLUMNS = (
    "step", "split", "epoch", "loss", "loss_at_0.1", "loss_at_0.3", "loss_at_0.5", "loss_at_0.7",
    "loss_at_0.9", "chamfer", "f_score", "lr", "grad_norm", "seconds",
)  # fmt: skip
SHOWN = ("loss", "chamfer", "f_score")
# Settings that a resumed run may change; paths may, too: what lies there is compared. The product
# of batch size, accumulated batches and processes must stay.
MAY_CHANGE = frozenset(
    [
        "name", "num_epochs", "batch_size", "gradient_accumulation_steps", "learning_rate",
        "weight_decay", "lr_scheduler", "lr_warmup_steps", "max_grad_norm",
        "gradient_checkpointing", "mixed_precision", "num_workers", "cache", "cache_gb",
        "save_every_n_epochs", "checkpointing_steps", "eval_every_n_epochs", "log_steps",
        "preview_scenes", "preview_every_n_epochs", "preview_steps", "preview_depth",
        "overwrite", "device", "tensorboard", "trainer",
        *(field.name for field in fields(Guards)),
    ]
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `midi3d-lora train` and `train_lora.py`; returns the process exit code."""
    return guarded(train, argv)


def train(argv: Sequence[str]) -> int:
    """Run one training from its command line, top to bottom.

    Raises:
        UserError: settings, data or checkpoints that cannot be used; nothing is lost.
    """
    cfg, run = settings(argv)
    place = run or run_in(Path(cfg.output_dir))
    ready(cfg, writable(place), *([] if run else [lambda: refuse_existing(cfg)]))
    if cfg.dry_run:
        from midi3d_lora import dry_run

        return dry_run.run(cfg)

    from lora_core.distributed import together
    from lora_core.training.arguments import choose_device

    device = choose_device(cfg.device)
    with together(device, cfg.trainer.get("ddp_timeout")):
        return fit(cfg, run, device)


def settings(argv: Sequence[str]) -> tuple[Config, SceneRun | None]:
    """Read the command line; a resumed run has its own settings, changed by flags given now."""
    about = {"prog": "midi3d-lora train", "description": "Train a LoRA of MIDI-3D."}
    with without_sections(argv) as words:
        return read_settings(Config, words, find_run, **about)


def ready(cfg: Config, *checks: Callable[[], object]) -> None:
    """Refuse what can be known before data, weights and the GPU are touched.

    Args:
        checks: more of them, whose problems are told together with the others.

    Raises:
        ConfigError: libraries, folders, a device, layers or blocks that cannot work.
        CheckpointError: no such model, or another one, as far as headers tell.
        DataError: no scenes.
    """
    from lora_core import preflight

    preflight.libraries("midi3d-lora", "train,peft", optional=("peft",))
    from lora_core.training.arguments import check_device
    from midi3d_lora import data, model, objective

    preflight.check_all(
        *checks,
        lambda: check_device(cfg.device, objective.precision(cfg), cfg.trainer, SHOWN, cfg.dry_run),
        lambda: data.folders_of(cfg),
        lambda: model.glance(cfg),
    )


def fit(cfg: Config, run: SceneRun | None, device: torch.device) -> int:
    """Load data and weights, train, and write the results; the same in every process."""
    from lora_core import summary
    from lora_core.disk import check_space, folder_bytes
    from lora_core.distributed import first_rank_decides
    from lora_core.trainer import LoraTrainer
    from lora_core.training.arguments import choose_precision
    from midi3d_lora import data, memory, model, objective, scene_encodings
    from midi3d_lora.previews import Previews

    splits = data.load(cfg, lambda make: first_rank_decides(make, device))
    say(f"{splits}\n")
    number_format = choose_precision(objective.precision(cfg), device)
    empty, dtype = model.skeleton(cfg), objective.DTYPES[number_format]
    memory.check_cache(cfg, splits, empty, dtype.itemsize)
    encodings = scene_encodings.encodings_of(cfg, empty, device, dtype)
    scene_encodings.fill(encodings, splits, device)
    net = model.adapted(model.build(cfg, dtype), cfg).to(device)
    scheduler = model.scheduler_of(cfg)
    loss = objective.loss_of(cfg, encodings, scheduler)
    cfg = memory.fitted(net, loss, memory.largest_batch(cfg, splits, net), cfg, number_format)
    updates = data.updates_per_epoch(cfg, splits)
    use = memory.disk_use(net, cfg, updates, bool(splits.val))
    check_space(use, cfg.output_dir, folder_bytes(run.folder) if run else 0)
    about = f"{splits}\n\n{summary(net)}"
    new = run_in(Path(cfg.output_dir))
    run = run or first_rank_decides(lambda: start(new, cfg, about), device)
    first_rank_decides(run.tidy, device)
    run.list_bad_samples(splits.bad, device)

    with copied_to(run.text):
        log = RunLog(run.folder, run.csv, COLUMNS, cfg.tensorboard)
        prints = {"data": data.fingerprint(splits), "base": model.fingerprint(cfg)}
        facts = {"name": cfg.name, "data": prints["data"]}
        artifacts = artifacts_of(run, net, cfg, updates, facts)
        previews = Previews(cfg, splits.val[: cfg.preview_scenes], encodings, log)

        def extra(network: nn.Module) -> dict[str, float]:
            due = trainer.state.global_step % (updates * cfg.preview_every_n_epochs) == 0
            return previews.measure(network) if due and previews.scenes else {}

        trainer = LoraTrainer(
            net,
            arguments(cfg, run, updates, device),
            data.TrainSet(splits.train, encodings, cfg, net.config.in_channels),
            data.collate,
            loss,
            objective.evaluation(cfg, splits.val, encodings, scheduler, extra),
            log=log,
            draw=previews.draw,
            shown=SHOWN,
            on_best=artifacts.best,
            on_latest=artifacts.latest,
            referenced=artifacts.steps,
            schedule=objective.schedule(cfg),
            count=data.rows_of,
            sharded=net.blocks if cfg.shard_base else (),
            guards=cfg,
            settings=travelling(cfg, PATHS),
            fingerprints=prints,
            may_change=MAY_CHANGE,
            resume_with=f"midi3d-lora train --resume_from_checkpoint {run.folder}",
            advice=memory.advice(cfg, net),
            callbacks=[objective.SaveEpochs(updates * cfg.save_every_n_epochs)],
        )
        trainer.train(resume_from_checkpoint=checkpoint_of(run, cfg.resume) if cfg.resume else None)
        if trainer.already_done and run.summary.is_file():
            say(f"nothing was changed; results: {run.folder}")
            return 0
        first_rank_decides(lambda: conclude(trainer, artifacts, splits), device)
        log.close()
    return 0


def arguments(cfg: Config, run: SceneRun, updates: int, device: torch.device) -> TrainingArguments:
    """The configuration as transformers' TrainingArguments.

    Raises:
        ConfigError: see `lora_core.training.arguments`.
    """
    from lora_core.training.arguments import training_arguments
    from midi3d_lora import objective

    return training_arguments(
        run.state,
        learning_rate=cfg.learning_rate,
        weight_decay=cfg.weight_decay,
        steps=updates * cfg.num_epochs,
        batch_size=cfg.batch_size,
        gradient_accumulation_steps=cfg.gradient_accumulation_steps,
        max_grad_norm=cfg.max_grad_norm,
        log_steps=cfg.log_steps,
        eval_steps=updates * cfg.eval_every_n_epochs,
        seed=cfg.seed,
        num_workers=cfg.num_workers,
        precision=objective.precision(cfg),
        device=device,
        trainer={"save_steps": cfg.checkpointing_steps} | cfg.trainer,
    )


def conclude(trainer: LoraTrainer, artifacts: SceneArtifacts, splits: Splits) -> None:
    """Write the last files, and say where all is. Afterwards the network has the best adapter."""
    from lora_core.validate import samples

    run, step, best = artifacts.run, trainer.state.global_step, trainer.best
    artifacts.final(step, has_best=best is not None)
    chosen = best["step"] if best else step
    artifacts.load_best(chosen)
    artifacts.write_final(chosen, best and best["metrics"])
    artifacts.summary(
        steps=step,
        best_step=best and best["step"],
        best=best and best["metrics"],
        bad_samples=len(samples(splits.bad)),
        dropped_updates=trainer.dropped,
    )
    which = f"the best step, {chosen}" if best else f"the last step, {chosen}"
    say(f"\nresults: {run.folder}\n  adapter: {run.final} ({which})\n  figures: {run.csv}")
    run.say_left_out(splits.bad)


if __name__ == "__main__":
    raise SystemExit(main())
