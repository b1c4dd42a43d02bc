"""`sam2-lora train --dry_run`: everything that can be known before the weights are read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_core import dry_run
from lora_core.report import say
from sam2_lora import data, losses, memory, model, placement
from sam2_lora.config import Config

if TYPE_CHECKING:
    from transformers import Sam2Model


def run(cfg: Config) -> int:
    """Check the data, and print what would be trained and what it would take.

    No device is asked for: a dry run may happen where there is no GPU. Of the checkpoint only names
    and shapes are read.

    Raises:
        DataError: faults in the data.
        CheckpointError: a base or adapter that cannot be used, as far as its header tells.
    """
    splits = data.load(cfg)
    say(f"{splits}\n")
    network = adapted(cfg)
    dry_run.report(
        network,
        lambda net, batch: losses.loss(net, batch, cfg),
        memory.largest_batch(splits.train, cfg.batch_size),
        dry_run.precisions(cfg.precision, cfg.device),
        memory.disk_use(network, cfg),
        cfg.output_dir,
        cfg.device,
        placement.stack(network),
    )
    return 0


def adapted(cfg: Config) -> Sam2Model:
    """The network with its adapters on the meta device, and what is adapted, printed."""
    network = model.skeleton(cfg)
    if cfg.adapter:
        from lora_core import summary

        model.load_adapter(network, cfg.adapter)
        say(summary(network))
    else:
        say(placement.adapt(network, cfg))
    return network
