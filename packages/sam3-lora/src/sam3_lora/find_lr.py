"""`sam3-lora find-lr`: a learning rate for your data, from a hundred updates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from lora_core.config import parse
from lora_core.ramp import Ramp
from lora_core.report import say
from sam3_lora.config import Config


@dataclass
class Options(Ramp, Config):
    """Settings of `sam3-lora find-lr`: those of a training, and the ramp's."""

    train_command = "sam3-lora train"


def main(argv: Sequence[str] | None = None) -> int:
    """Run `sam3-lora find-lr` with these words; returns the exit code.

    Raises:
        UserError: settings, data or checkpoints that cannot be used, or no rate that works.
    """
    cfg = parse(
        Options,
        argv or [],
        prog="sam3-lora find-lr",
        description="Raise the learning rate over a short training, and suggest one.",
    )
    from lora_core import find_lr, preflight
    from lora_core.training.arguments import choose_device
    from sam3_lora import data, frozen, memory, model, objective, train

    # Not after a hundred updates.
    train.ready(cfg, partial(preflight.writable, cfg.ramp_dir, "--ramp_dir"))
    device = choose_device(cfg.device)
    splits = data.load(cfg)
    say(f"{splits}\n")
    precision = objective.usable_precision(cfg, device)  # wakes a GPU, so after the data
    network = objective.adapted(model.build(cfg), cfg).to(device)
    words = objective.vocabulary(network, splits, cfg)
    cache = frozen.cache_of(cfg)
    phrases = objective.encoded(network, words, splits, cache)
    images = frozen.frozen_images(network, cfg, precision, cache)
    splits.use(images)
    find_lr.suggest(
        network,
        objective.loss_of(cfg, phrases, images),
        splits.train,
        partial(data.collate, tokenizer=words),
        find_lr.Updates(
            batch_size=cfg.training.batch_size,
            accumulation=cfg.training.gradient_accumulation_steps,
            weight_decay=cfg.training.weight_decay,
            max_grad_norm=cfg.training.max_grad_norm,
            seed=cfg.seed,
            precision=precision,
            num_workers=cfg.dataset.num_workers,
        ),
        cfg,
        flag="--training.learning_rate",
        advice=memory.advice(cfg, network),
    )
    return 0
