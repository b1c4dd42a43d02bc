"""`isaac-lora train --dry_run`: everything that can be known before the weights are read."""

from __future__ import annotations

from isaac_lora import data, lora, memory, model, objective
from isaac_lora.config import Config
from isaac_lora.frozen_features import FrozenFeatures
from isaac_lora.processing import IsaacProcessor
from lora_core import dry_run
from lora_core.report import say


def run(cfg: Config) -> int:
    """Check the data, and print what would be trained and what it would take.

    No device is asked for: a dry run may happen where there is no GPU. Of the models only names and
    shapes are read.

    Raises:
        DataError: faults in the data.
        CheckpointError: a base or adapter that cannot be used, as far as its header tells.
    """
    processor = IsaacProcessor.from_pretrained(model.folder_of(cfg))
    splits = data.load(cfg, processor)
    say(f"{splits}\n")
    columns = dry_run.precisions(objective.precision(cfg), cfg.device)
    net = model.skeleton(cfg).to(objective.DTYPES[columns[0]])
    if cfg.gradient_checkpointing:
        model.checkpoint_activations(net)
    model.adapted(net, cfg)
    rows = data.training_rows(cfg, splits)
    batch = memory.largest_batch(cfg, rows, processor)(cfg.per_device_train_batch_size)
    say(f"\nlargest batch: {memory.describe(batch)}")
    # The model runs its tower itself: what computes features looks at their values.
    depths = model.depths_of(cfg)
    features = FrozenFeatures(None, depths, cfg.depth_alpha, net.config.hidden_size)
    steps = objective.total_updates(cfg, data.updates_per_epoch(cfg, rows))
    dry_run.report(
        net,
        objective.loss_of(cfg, features),
        batch,
        columns[:1],
        memory.disk_use(net, cfg, steps, bool(splits.val)),
        cfg.output_dir,
        cfg.device,
        lora.stack(net),
    )
    return 0
