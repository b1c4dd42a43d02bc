"""`scenesplat-lora train --dry_run`: everything that can be known before the weights are read."""

from __future__ import annotations

from lora_core import dry_run
from lora_core.report import say
from scenesplat_lora import data, lora, memory, model, objective, validation
from scenesplat_lora.config import Config


def run(cfg: Config) -> int:
    """Check the data, and print what would be trained and what it would take.

    No device is asked for: a dry run may happen where there is no GPU. Of the checkpoint only names
    and shapes are read. The neighbours and patches of the largest batch are found as in a run.

    Raises:
        DataError: faults in the data.
        CheckpointError: a base or adapter that cannot be used, as far as its header tells.
    """
    net = model.skeleton(cfg)
    needs = objective.needs_of(net, validation.texts(cfg))
    splits = data.load(cfg, needs)
    say(f"{splits}\n")
    model.adapted(net, cfg)
    batch = data.largest_batch(splits, cfg.batch_size)
    say(f"\nlargest batch, in this epoch: {memory.describe(batch)}")
    dry_run.report(
        net,
        objective.loss_of(cfg, needs),
        batch,
        precisions(cfg),
        memory.disk_use(net, cfg, data.updates_per_epoch(cfg, splits), splits.val is not None),
        cfg.save_path,
        cfg.device,
        lora.stack(net),
    )
    return 0


def precisions(cfg: Config) -> list[str]:
    """The precisions that a run may train in, found without asking a GPU."""
    if not cfg.enable_amp or cfg.device == "cpu":
        return ["fp32"]
    mixed = {"float16": "fp16", "bfloat16": "bf16", "auto": "bf16"}[cfg.amp_dtype]
    return [mixed] if cfg.device == "cuda" else [mixed, "fp32"]
