"""`midi3d-lora find-lr`: a learning rate for your scenes, from a hundred updates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from lora_core.config import parse
from lora_core.ramp import Ramp
from lora_core.report import say
from midi3d_lora.config import Config
from midi3d_lora.config_sections import without_sections


@dataclass
class Options(Ramp, Config):
    """Settings of `midi3d-lora find-lr`: those of a training, and the ramp's."""

    train_command = "midi3d-lora train"


def settings(argv: Sequence[str]) -> Options:
    """Read the command line; sections of a file are opened, as for `train`."""
    about = "Raise the learning rate over a short training, and suggest one."
    with without_sections(argv, Options) as words:
        return parse(Options, words, prog="midi3d-lora find-lr", description=about)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `midi3d-lora find-lr` with these words; returns the exit code.

    Raises:
        UserError: settings, data or checkpoints that cannot be used, or no rate that works.
    """
    cfg = settings(argv or [])
    from lora_core import find_lr, preflight
    from lora_core.training.arguments import choose_device, choose_precision
    from midi3d_lora import data, memory, model, objective, scene_encodings, train

    # Not after a hundred updates.
    train.ready(cfg, partial(preflight.writable, cfg.ramp_dir, "--ramp_dir"))
    device = choose_device(cfg.device)
    splits = data.load(cfg)
    say(f"{splits}\n")
    precision = choose_precision(objective.precision(cfg), device)  # wakes a GPU: after the data
    empty, dtype = model.skeleton(cfg), objective.DTYPES[precision]
    memory.check_cache(cfg, splits, empty, dtype.itemsize)
    encodings = scene_encodings.encodings_of(cfg, empty, device, dtype)
    encodings.fill(splits.train, draws=1)  # the ramp stays in the first epoch
    net = model.adapted(model.build(cfg, dtype), cfg).to(device)
    find_lr.suggest(
        net,
        objective.loss_of(cfg, encodings, model.scheduler_of(cfg)),
        data.TrainSet(splits.train, encodings, cfg, net.config.in_channels),
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
        advice=memory.advice(cfg, net),
    )
    return 0
