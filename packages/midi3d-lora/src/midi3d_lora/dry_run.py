"""`midi3d-lora train --dry_run`: everything that can be known before the weights are read."""

from __future__ import annotations

import torch
from torch import nn

from lora_core import dry_run
from lora_core.report import say
from midi3d_lora import data, lora, memory, model, objective, scene_encodings
from midi3d_lora.config import Config


def run(cfg: Config) -> int:
    """Check the data, and print what would be trained and what it would take.

    No device is asked for: a dry run may happen where there is no GPU. Of the model only names and
    shapes are read.

    Raises:
        DataError: faults in the data.
        CheckpointError: a base or adapter that cannot be used, as far as its header tells.
    """
    splits = data.load(cfg)
    say(f"{splits}\n")
    net = model.skeleton(cfg)
    columns = dry_run.precisions(objective.precision(cfg), cfg.device)
    dtype = objective.DTYPES[columns[0]]
    nn.Module.to(net, dtype)  # diffusers' own warns, whatever is given
    if cfg.gradient_checkpointing:
        net.enable_gradient_checkpointing()
    model.adapted(net, cfg)
    batch = memory.largest_batch(cfg, splits, net)(cfg.batch_size)
    say(f"\nlargest batch: {memory.describe(batch)}")
    encodings = scene_encodings.encodings_of(cfg, net, torch.device("cpu"), dtype, kept=False)
    updates = data.updates_per_epoch(cfg, splits)
    cached = memory.cache_bytes(cfg, splits, net, dtype.itemsize)
    dry_run.report(
        net,
        objective.loss_of(cfg, encodings, model.scheduler_of(cfg)),
        batch,
        columns[:1],
        memory.disk_use(net, cfg, updates, bool(splits.val), cached),
        cfg.output_dir,
        cfg.device,
        lora.stack(net),
    )
    return 0
