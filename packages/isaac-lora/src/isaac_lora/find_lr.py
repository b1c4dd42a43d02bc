"""`isaac-lora find-lr`: a learning rate for your conversations, from a hundred updates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from isaac_lora.config import Config
from isaac_lora.training_words import settled
from lora_core.config import parse
from lora_core.ramp import Ramp
from lora_core.report import say

if TYPE_CHECKING:
    from isaac_lora.examples import Example, Row


@dataclass(kw_only=True)
class Options(Ramp, Config):
    """Settings of `isaac-lora find-lr`: those of a training, and the ramp's."""

    train_command = "isaac-lora train"


def settings(argv: Sequence[str]) -> Options:
    """Read the command line, in the words of `train`."""
    about = "Raise the learning rate over a short training, and suggest one."
    with settled(argv, Options) as words:
        return parse(Options, words, prog="isaac-lora find-lr", description=about)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `isaac-lora find-lr` with these words; returns the exit code.

    Raises:
        UserError: settings, data or checkpoints that cannot be used, or no rate that works.
    """
    cfg = settings(argv or [])
    from isaac_lora import data, frozen_features, memory, model, objective, train
    from isaac_lora.processing import IsaacProcessor
    from lora_core import find_lr, preflight
    from lora_core.training.arguments import choose_device, choose_precision

    # Not after a hundred updates.
    train.ready(cfg, partial(preflight.writable, cfg.ramp_dir, "--ramp_dir"))
    device = choose_device(cfg.device)
    processor = IsaacProcessor.from_pretrained(model.folder_of(cfg))
    # Nothing is validated here; what --val_fraction keeps for it is not trained on either.
    splits = data.load(replace(cfg, val_data_path=None), processor)
    notes = tuple(note for note in splits.notes if note != data.NO_VALIDATION)
    say(f"{replace(splits, val=[], notes=notes)}\n")
    precision = choose_precision(objective.precision(cfg), device)  # wakes a GPU: after the data
    rows, cache = data.training_rows(cfg, splits), frozen_features.cache_of(cfg)
    pictures = frozen_features.pictures_of(_seen(cfg, rows), processor.rules)
    depths = model.depths_of(cfg, device, cache)
    frozen_features.fill_depth(depths, pictures, device)
    net = model.build(cfg, objective.DTYPES[precision], depths)
    net = model.adapted(net, cfg).to(device)
    features = frozen_features.features_of(cfg, net, processor.rules, depths, precision, cache)
    frozen_features.fill_vision(features, pictures, device)
    find_lr.suggest(
        net,
        objective.loss_of(cfg, features),
        data.TrainSet(rows, processor, cfg.seed, features.vision, features.depth),
        partial(data.collate, processor=processor, packed=cfg.packing),
        find_lr.Updates(
            batch_size=cfg.per_device_train_batch_size,
            accumulation=cfg.gradient_accumulation_steps,
            weight_decay=cfg.weight_decay,
            max_grad_norm=cfg.max_grad_norm,
            seed=cfg.seed,
            precision=precision,
            num_workers=cfg.dataloader_num_workers,
        ),
        cfg,
        flag="--learning_rate",
        advice=memory.advice(cfg, net),
    )
    return 0


def _seen(cfg: Options, rows: Sequence[Row]) -> list[Example]:
    """The conversations that the ramp trains on, in its order."""
    from lora_core.training.schedule import EpochSampler

    count = cfg.ramp_steps * cfg.gradient_accumulation_steps * cfg.per_device_train_batch_size
    order = list(EpochSampler(len(rows), cfg.seed))[:count]
    return [example for index in order for example in rows[index].examples]
