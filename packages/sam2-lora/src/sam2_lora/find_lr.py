"""`sam2-lora find-lr`: a learning rate for your data, from a hundred updates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lora_core.config import parse
from lora_core.preflight import writable
from lora_core.ramp import Ramp
from lora_core.report import say
from sam2_lora.config import Config


@dataclass
class Options(Ramp, Config):
    """Settings of `sam2-lora find-lr`: those of a training, and the ramp's."""

    train_command = "sam2-lora train"


def main(argv: Sequence[str] | None = None) -> int:
    """Run `sam2-lora find-lr` with these words; returns the exit code.

    Raises:
        UserError: settings, data or checkpoints that cannot be used, or no rate that works.
    """
    cfg = parse(
        Options,
        argv or [],
        prog="sam2-lora find-lr",
        description="Raise the learning rate over a short training, and suggest one.",
    )
    from lora_core import find_lr
    from lora_core.training.arguments import choose_device, choose_precision
    from sam2_lora import data, frozen, memory, model, placement
    from sam2_lora.train import ready, warm_start

    writable(cfg.ramp_dir, "--ramp_dir")  # not after a hundred updates
    ready(cfg, None)
    device = choose_device(cfg.device)
    splits = data.load(cfg)
    say(f"{splits}\n")
    precision = choose_precision(cfg.precision, device)  # wakes a GPU, so after the data
    network = model.build(cfg)
    if cfg.adapter:
        warm_start(network, cfg)
    else:
        say(placement.adapt(network, cfg))
    network.to(device)
    images = frozen.frozen_images(network, cfg, precision)
    splits.use(images)
    find_lr.suggest(
        network,
        frozen.loss_of(cfg, images),
        splits.train,
        data.collate,
        find_lr.Updates(
            batch_size=cfg.batch_size,
            accumulation=cfg.gradient_accumulation_steps,
            weight_decay=cfg.weight_decay,
            max_grad_norm=cfg.max_grad_norm,
            seed=cfg.seed,
            precision=precision,
            num_workers=cfg.num_workers,
        ),
        cfg,
        flag="--learning_rate",
        advice=memory.advice(cfg, network),
    )
    return 0
