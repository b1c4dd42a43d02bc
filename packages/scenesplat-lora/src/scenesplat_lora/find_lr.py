"""`scenesplat-lora find-lr`: a learning rate for your scenes, from a hundred updates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from lora_core.config import parse
from lora_core.ramp import Ramp
from lora_core.report import say
from scenesplat_lora.config import Config
from scenesplat_lora.settings.words import for_parser


@dataclass
class Options(Ramp, Config):
    """Settings of `scenesplat-lora find-lr`: those of a training, and the ramp's."""

    train_command = "scenesplat-lora train"


def settings(argv: Sequence[str]) -> Options:
    """Read the command line, in the words of `train` and of the guide's script."""
    about = "Raise the learning rate over a short training, and suggest one."
    with for_parser(argv) as words:
        cfg = parse(Options, words, prog="scenesplat-lora find-lr", description=about)
    from scenesplat_lora import model

    found = model.with_grid_size(cfg)
    assert isinstance(found, Options)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run `scenesplat-lora find-lr` with these words; returns the exit code.

    Raises:
        UserError: settings, data or checkpoints that cannot be used, or no rate that works.
    """
    cfg = settings(argv or [])
    from lora_core import find_lr, preflight
    from lora_core.training.arguments import choose_device, choose_precision
    from scenesplat_lora import data, memory, model, objective, train, validation

    # Not after a hundred updates.
    train.ready(cfg, partial(preflight.writable, cfg.ramp_dir, "--ramp_dir"))
    device = choose_device(cfg.device)
    needs = objective.needs_of(model.skeleton(cfg), validation.texts(cfg))
    splits = data.load(cfg, needs)
    say(f"{splits}\n")
    precision = choose_precision(objective.precision(cfg), device)  # wakes a GPU: after the data
    net = model.adapted(model.build(cfg), cfg).to(device)
    find_lr.suggest(
        net,
        objective.loss_of(cfg, needs),
        splits.train,
        partial(data.collate, mix_prob=cfg.mix_prob),
        find_lr.Updates(
            batch_size=cfg.batch_size,
            accumulation=cfg.gradient_accumulation_steps,
            weight_decay=cfg.optimizer.weight_decay,
            max_grad_norm=cfg.clip_grad or float("inf"),
            seed=cfg.seed,
            precision=precision,
            num_workers=cfg.num_worker,
        ),
        cfg,
        flag="--optimizer.lr",
        advice=memory.advice(cfg, net),
    )
    return 0
