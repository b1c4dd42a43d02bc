"""`sam3-lora train --dry_run`: everything that can be known before the weights are read."""

from __future__ import annotations

from lora_core import dry_run
from lora_core.report import say
from sam3_lora import data, memory, model, objective, placement
from sam3_lora.config import Config
from sam3_lora.network import drop_text_encoder, trains_text
from sam3_lora.scoring import EncodedPhrases


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
    network = objective.adapted(model.skeleton(cfg), cfg)
    words = objective.vocabulary(network, splits, cfg)
    phrases = None
    if not trains_text(network):  # which a run drops then
        phrases = EncodedPhrases.without_values(network, objective.texts_of(splits))
        drop_text_encoder(network)
    dry_run.report(
        network,
        objective.loss_of(cfg, phrases),
        memory.largest_batch(splits.train, words, cfg.training.batch_size),
        precisions(cfg),
        memory.disk_use(network, cfg, data.updates_per_epoch(cfg, splits), splits.val is not None),
        cfg.checkpoint.save_dir,
        cfg.device,
        placement.stack(network),
    )
    return 0


def precisions(cfg: Config) -> list[str]:
    """The precisions that a run may train in, found without asking a GPU."""
    if not cfg.training.use_amp or cfg.device == "cpu":
        return ["fp32"]
    mixed = {"bfloat16": "bf16", "float16": "fp16"}[cfg.training.amp_dtype]
    return [mixed] if cfg.device == "cuda" else [mixed, "fp32"]
