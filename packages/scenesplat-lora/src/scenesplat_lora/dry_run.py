"""`scenesplat-lora train --dry_run`: what can be known before the weights are read."""

from __future__ import annotations

import torch

from lora_core.disk import disk_table
from lora_core.memory import ADAM_MOMENTS, adapter_bytes, size
from lora_core.report import say
from scenesplat_lora import data, memory, model, objective, validation
from scenesplat_lora.config import Config


def run(cfg: Config) -> int:
    """Check the data, and print what would be trained and what is known of what it takes.

    Which voxels are neighbours depends on the scenes, so the memory of a step is not estimated: a
    run on a GPU tries its largest batch before it begins.

    Raises:
        DataError: faults in the data.
        CheckpointError: a base that cannot be used, as far as its header tells.
    """
    net, text = model.skeleton(cfg), validation.texts(cfg)
    needs = objective.needs_of(net, text)
    splits = data.load(cfg, needs)
    say(f"{splits}\n")
    net.to_empty(device="cpu")  # no values: only layers and sizes are looked at
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    model.adapted(net, cfg)
    trained = adapter_bytes(net)
    whole = sum(p.numel() * p.element_size() for p in net.parameters())
    largest = memory.describe(data.largest_batch(splits, cfg.batch_size))
    moments = size((1 + ADAM_MOMENTS) * trained)
    say(
        f"\nmemory of the network {size(whole)}, of gradients and AdamW's moments {moments}; "
        "activations come on top"
    )
    say(f"largest batch, in this epoch: {largest}")
    files = memory.disk_use(net, cfg, data.updates_per_epoch(cfg, splits), splits.val is not None)
    say(f"\n{disk_table(files, cfg.save_path)}")
    say("\ndry run: settings and data are fine. No weights were read, no results written")
    return 0
