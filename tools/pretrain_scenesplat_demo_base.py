"""Pretrain the tiny base that scenesplat-lora carries, from random weights on generated rooms.

    python tools/pretrain_scenesplat_demo_base.py --output runs/scenesplat_demo_base

A run is a function of its seed. One that was stopped goes on where its last checkpoint was when
the same command is given again. The end is a file in half precision that describes its network,
and its figures on rooms that training has not shown.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from scenesplat_lora import demo
from scenesplat_lora.demo_base import rooms
from scenesplat_lora.language.zero_shot import label, probabilities
from scenesplat_lora.losses import Term, distillation_loss
from scenesplat_lora.metrics import Confusion, class_scores, final_scores
from scenesplat_lora.network.description import Description
from scenesplat_lora.network.models import LangPretrainer
from scenesplat_lora.network.official import load_official, write_official
from scenesplat_lora.network.ptv3_config import CURVES, PTv3Config
from scenesplat_lora.scenes.collate import collate
from scenesplat_lora.scenes.scene import Scene
from scenesplat_lora.schedule import OneCycle, set_one_cycle
from scenesplat_lora.transforms.pipeline import (
    LANGUAGE_KEYS,
    compose,
    validation_transforms,
)

SEED = 50260  # of initial weights, rooms and augmentation of training
CHOICE_SEED = 6  # of the rooms that are scored while it trains
PEAK = 2e-3  # learning rate
SAVE_EVERY = 60  # seconds between checkpoints
TERMS = (
    Term("CosineSimilarity"),
    Term("L2Loss"),
    Term("AggregatedContrastiveLoss", loss_weight=0.02),
)
# Four stages as the released language model, so that presets mean the same.
CONFIG = PTv3Config(
    in_channels=11, order=CURVES, stride=(2, 2, 2),
    enc_depths=(2, 2, 2, 2), enc_channels=(32, 48, 64, 96), enc_num_head=(2, 3, 4, 6),
    enc_patch_size=(256,) * 4,
    dec_depths=(1, 1, 1), dec_channels=(rooms.WIDTH, 48, 64), dec_num_head=(2, 3, 4),
    dec_patch_size=(256,) * 3,
    drop_path=0.0,
)  # fmt: skip


def augmentation() -> list[dict[str, Any]]:
    """Rooms at any angle half of the time, mirrored, stretched a little: as official training."""
    tail = validation_transforms(LANGUAGE_KEYS, rooms.GRID_SIZE)
    moves = [
        {"type": "RandomRotate", "angle": [-1, 1], "axis": "z", "center": [0, 0, 0], "p": 0.5},
        {"type": "RandomScale", "scale": [0.95, 1.05]},
        {"type": "RandomFlip", "p": 0.5},
    ]
    return [tail[0], *moves, *tail[1:]]


# -- figures ---------------------------------------------------------------------------------------


@torch.no_grad()
def score(model: nn.Module, some: Iterable[Scene]) -> tuple[dict[str, float], dict[str, float]]:
    """Zero-shot figures over the voxels of rooms, and the IoU of each class."""
    steps = compose(validation_transforms(LANGUAGE_KEYS, rooms.GRID_SIZE))
    table, texts = Confusion(rooms.CLASSES), demo.texts()
    model.eval()
    for number, room in enumerate(some):
        batch = collate([steps(room, np.random.default_rng(number))])
        found = label(probabilities(model(batch), texts), texts.classes)
        table.add(batch["segment"].numpy(), found.numpy())
    scores = final_scores(table)
    classes = {name: round(one["IoU"], 3) for name, one in class_scores(table).items()}
    return {name: round(scores[name], 4) for name in ("mIoU", "mAcc", "allAcc")}, classes


def chosen(count: int) -> Iterable[Scene]:
    """Rooms for the figures while it trains."""
    return (rooms.room((CHOICE_SEED, i, 0)) for i in range(count))


# -- the run ---------------------------------------------------------------------------------------


class Run:
    """The weights, the step, and the checkpoint that holds both."""

    def __init__(self, output: Path, steps: int, batch: int) -> None:
        self.output, self.steps, self.batch = output, steps, batch
        torch.manual_seed(SEED)
        self.model = LangPretrainer(CONFIG)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=PEAK, weight_decay=0.02)
        self.transform = compose(augmentation())
        self.step, self.spent = 0, 0.0  # seconds of training
        if self.file.exists():
            self.restore()

    @property
    def file(self) -> Path:
        return self.output / "checkpoint.pt"

    def save(self) -> None:
        """Write the checkpoint aside first: a crash never leaves half of one."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "steps": self.steps,
            "spent": self.spent,
        }
        aside = self.file.with_suffix(".new")
        torch.save(state, aside)
        os.replace(aside, self.file)

    def restore(self) -> None:
        state = torch.load(self.file, weights_only=True)
        if state["steps"] != self.steps:
            raise SystemExit(f"{self.file} is of a run of --steps {state['steps']}")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.spent = state["step"], state["spent"]
        print(f"going on at step {self.step}", flush=True)

    def train(self, log_every: int) -> None:
        """All steps that are left."""
        schedule = OneCycle(self.steps)
        began = saved = time.monotonic()
        before = self.spent
        losses: list[Tensor] = []
        while self.step < self.steps:
            set_one_cycle(self.optimizer, schedule, self.step, [PEAK])
            losses.append(self.update())
            self.step += 1
            self.spent = before + time.monotonic() - began
            if self.step % log_every == 0 or self.step == self.steps:
                figures, classes = score(self.model, chosen(10))
                mean = torch.stack(losses).mean().item()
                print(self.step, f"{self.spent:.0f} s, loss {mean:.3f}", figures, flush=True)
                print("   ", classes, flush=True)
                losses.clear()
            if time.monotonic() - saved > SAVE_EVERY or self.step == self.steps:
                self.save()
                saved = time.monotonic()

    def update(self) -> Tensor:
        """One step on new rooms; its loss."""
        torch.manual_seed(SEED + 1 + self.step)  # of the curves' order and the halves of classes
        rng = np.random.default_rng((SEED, self.step))
        seeds = [(SEED, self.step, i) for i in range(self.batch)]
        batch = collate([self.transform(rooms.room(seed), rng) for seed in seeds])
        self.model.train()
        feat = self.model(batch)
        target, valid, segment = (
            batch[name] for name in ("lang_feat", "valid_feat_mask", "segment")
        )
        loss, _ = distillation_loss(feat, target.float(), valid, segment, TERMS)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return loss.detach()


def finish(run: Run, count: int) -> None:
    """Write the base in half precision and measure the file, not the model in memory."""
    path = run.output / "scenesplat_demo.safetensors"
    state = run.model.state_dict()
    halves = {name: t.half() if t.is_floating_point() else t for name, t in state.items()}
    write_official(path, halves, description=Description(CONFIG, rooms.GRID_SIZE))
    model = load_official(path)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{parameters} parameters, {path.stat().st_size} bytes, {run.spent:.0f} s")
    for name, style in (("held out", rooms.DAY), ("other domain", rooms.NIGHT)):
        print(name, *score(model, rooms.held_out(count, style)), flush=True)


def main() -> None:
    """Train what is left, then write and measure the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="checkpoints and result")
    parser.add_argument("--steps", type=int, default=3000, help="updates of the whole run")
    parser.add_argument("--batch", type=int, default=1, help="rooms per update")
    parser.add_argument("--log_every", type=int, default=250, help="steps")
    parser.add_argument("--measured", type=int, default=50, help="rooms of the final figures")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.output.mkdir(parents=True, exist_ok=True)
    run = Run(args.output, args.steps, args.batch)
    run.train(args.log_every)
    finish(run, args.measured)


if __name__ == "__main__":
    main()
