"""Pretrain the tiny base that sam3-lora carries, from random weights on generated scenes.

    python tools/pretrain_sam3_demo_base.py --output runs/sam3_demo_base [--device cuda]

A curriculum of stages: the image encoder and the phrases first (what is where, for every cell and
every phrase at once), then object queries with boxes, scores and presence, then masks, then the
official loss. Each stage is a function of the seed and of the weights before it. A run that was
stopped goes on where its last checkpoint was when the same command is given again. The end is a
file in half precision with its config and vocabulary beside it, and its figures on scenes that no
stage has shown.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from sam3_base.batches import Scenes, make_batch, phrases_of
from sam3_base.new_network import config_dict, new_model
from sam3_base.probes import Probes
from sam3_base.scoring import score, validation
from torch import Tensor, nn
from torch.utils.data import DataLoader

from sam3_lora import names, network, official
from sam3_lora.demo_base import scenes
from sam3_lora.losses import LossSettings, loss
from sam3_lora.matching import MatchSettings
from sam3_lora.tokenizer import Tokenizer, learn_merges, vocabulary, write_vocabulary

if TYPE_CHECKING:
    from transformers import Sam3Model

SEED = 30260  # of initial weights, scenes and phrases of training
BOXES_ONLY = "visual"  # SAM 3's phrase where only boxes are given: a token, but untrained
SAVE_EVERY = 180  # seconds between checkpoints


@dataclass(frozen=True)
class Stage:
    """One leg of the curriculum: fresh AdamW, a warm-up, then a cosine from `lr` to `lr_end`.

    Attributes:
        images, phrases: scenes per step, and phrases asked for in each; no phrases: only what is
            said of cells is trained, for all phrases at once.
        style: of the scenes; None: half easy, half full ones.
        settings: of the loss of the object queries.
        cells: weight of the loss of cells.
    """

    name: str
    steps: int
    lr: float
    lr_end: float
    images: int
    phrases: int
    style: scenes.Style | None
    settings: LossSettings = field(default_factory=LossSettings)
    cells: float = 1.0


# One to many takes the best four queries of an object however bad they are.
EARLY = LossSettings(
    masks=False, ce=5.0, presence=10.0, o2m_weight=1.0, scale_by_batch=False, pad_queries=1,
    matching=MatchSettings(o2m_threshold=0.0),
)  # fmt: skip
MASKS = replace(EARLY, masks=True, mask=50.0, dice=5.0, semantic=10.0, semantic_dice=5.0)
STAGES = (
    Stage("see", 4000, 2e-3, 4e-4, 32, 0, None, EARLY),
    Stage("find", 6000, 1e-3, 1e-4, 16, 6, scenes.FULL, EARLY, 4.0),
    Stage("draw", 2000, 4e-4, 5e-5, 8, 5, scenes.FULL, MASKS, 1.0),
    Stage("official", 500, 5e-5, 5e-6, 8, 5, scenes.FULL, LossSettings(), 0.0),
)
WARMUP = 100  # steps of each stage


# -- steps -------------------------------------------------------------------------------------


def step_loss(
    model: Sam3Model, probes: Probes, batch: dict[str, Any], stage: Stage
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of one step and its parts."""
    masks = stage.settings.masks and stage.phrases > 0
    features = network.encode_images(model, batch["pixel_values"], masks=masks)
    text = network.encode_text(model, batch["input_ids"], batch["attention_mask"])
    valid = batch["attention_mask"][..., None].float()
    total, parts = text.new_zeros(()), {}
    if stage.cells:
        mean = (text * valid).sum(1) / valid.sum(1)
        value, figures = probes.cells(features.map, mean, batch)
        total, parts = total + stage.cells * value, {"cells": value, **figures}
    if stage.phrases:
        with KeptMemory(model) as kept:
            out = network.detect(model, features, text, batch, masks=masks, one_to_many=True)
        value, found = loss(out, batch["targets"], stage.settings)
        total, parts = total + value, {**parts, **found}
        if stage.cells:
            parts["memory"] = probes.memory(kept[0], batch)
            total = total + 10 * stage.cells * parts["memory"]
    return total, parts


class KeptMemory:
    """Context in which a forward pass leaves what the decoder reads of the image in a list."""

    def __init__(self, model: Sam3Model) -> None:
        self.reader = model.detr_decoder.layers[0].vision_cross_attn.v_proj

    def __enter__(self) -> list[Tensor]:
        kept: list[Tensor] = []
        self.hook = self.reader.register_forward_pre_hook(lambda _, args: kept.append(args[0]))
        return kept

    def __exit__(self, *_: object) -> None:
        self.hook.remove()


# -- the run -----------------------------------------------------------------------------------


class Run:
    """The weights, the place in the curriculum, and the checkpoint that holds both."""

    def __init__(self, output: Path, device: torch.device, workers: int) -> None:
        self.output, self.device, self.workers = output, device, workers
        self.merges = learn_merges([*scenes.PHRASES, BOXES_ONLY])
        tokens = vocabulary(self.merges)
        self.phrases = phrases_of(Tokenizer(tokens, self.merges), device)
        self.config = config_dict(len(tokens))
        self.model = new_model(self.config, SEED).to(device)
        self.probes = Probes(self.config["detr_decoder_config"]["hidden_size"]).to(device)
        self.stage, self.step = 0, 0
        self.optimizer = self.fresh_optimizer()
        self.spent = 0.0  # seconds of training
        if self.file.exists():
            self.restore()

    @property
    def file(self) -> Path:
        return self.output / "checkpoint.pt"

    def fresh_optimizer(self) -> torch.optim.AdamW:
        weights = [*self.model.parameters(), *self.probes.parameters()]
        return torch.optim.AdamW(weights, weight_decay=0.01, betas=(0.9, 0.98), foreach=True)

    def save(self) -> None:
        """Write the checkpoint aside first: a crash never leaves half of one."""
        state = {
            "model": self.model.state_dict(),
            "probes": self.probes.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "stage": self.stage,
            "step": self.step,
            "spent": self.spent,
        }
        aside = self.file.with_suffix(".new")
        torch.save(state, aside)
        os.replace(aside, self.file)

    def restore(self) -> None:
        state = torch.load(self.file, map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.probes.load_state_dict(state["probes"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.stage, self.step, self.spent = state["stage"], state["step"], state["spent"]
        print(f"going on with stage {self.stage} of {len(STAGES)} at step {self.step}", flush=True)

    def train(self, log_every: int = 250) -> None:
        """All stages that are left."""
        while self.stage < len(STAGES):
            self.train_stage(STAGES[self.stage], log_every)
            self.stage, self.step = self.stage + 1, 0
            self.optimizer = self.fresh_optimizer()
            self.save()

    def train_stage(self, stage: Stage, log_every: int) -> None:
        began = saved = time.monotonic()
        before, recent = self.spent, Recent()
        weights = self.optimizer.param_groups[0]["params"]
        for items in self.loader(stage):
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(stage, self.step)
            self.model.train()
            batch = make_batch(items, self.phrases, self.device)
            value, parts = step_loss(self.model, self.probes, batch, stage)
            self.optimizer.zero_grad()
            value.backward()
            parts["norm"] = nn.utils.clip_grad_norm_(weights, 1.0)
            self.optimizer.step()
            recent.add({"loss": value.detach(), **parts})
            self.step += 1
            self.spent = before + time.monotonic() - began
            if self.step % log_every == 0 or self.step == stage.steps:
                self.report(stage, recent)
            if time.monotonic() - saved > SAVE_EVERY:
                self.save()
                saved = time.monotonic()

    def loader(self, stage: Stage) -> DataLoader:
        """Batches from the run's step on."""
        count, seed = stage.steps * stage.images, SEED + 1 + STAGES.index(stage)
        data = Scenes(stage.style, stage.phrases, count, seed)
        left = range(self.step * stage.images, len(data))
        return DataLoader(data, stage.images, sampler=left, num_workers=self.workers)

    def report(self, stage: Stage, recent: Recent) -> None:
        figures = {}
        if stage.phrases:
            masks = stage.settings.masks
            figures = score(self.model, self.phrases, validation(40), self.device, masks=masks)
        print(stage.name, self.step, f"{self.spent:.0f} s", recent.means(), figures, flush=True)


class Recent:
    """Means of what was logged since the last report."""

    def __init__(self) -> None:
        self.values: dict[str, list[Tensor]] = {}

    def add(self, parts: dict[str, Tensor]) -> None:
        for name, value in parts.items():
            self.values.setdefault(name, []).append(value.detach())

    def means(self) -> dict[str, float]:
        found = {name: torch.stack(values).mean().item() for name, values in self.values.items()}
        self.values.clear()
        return {name: round(value, 3) for name, value in found.items()}


def learning_rate(stage: Stage, step: int) -> float:
    """Warm-up times cosine."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / stage.steps))
    return (stage.lr_end + (stage.lr - stage.lr_end) * cosine) * min(1, (step + 1) / WARMUP)


def finish(run: Run) -> None:
    """Write the base in half precision and measure the file, not the model in memory."""
    path = run.output / "sam3_demo.safetensors"
    tensors = names.to_official(run.model.state_dict())
    halves = {f"detector.{name}": t.half().cpu().contiguous() for name, t in tensors.items()}
    save_file(halves, path)
    path.chmod(0o644)  # which save_file keeps from others
    path.with_suffix(".json").write_text(json.dumps(run.config, indent=2) + "\n")
    write_vocabulary(run.output / "vocabulary.txt", run.merges)
    run.model.load_state_dict(official.read_state(path))
    count = sum(parameter.numel() for parameter in run.model.parameters())
    print(f"{count} parameters, {path.stat().st_size} bytes")
    for name, style in (("held out", scenes.FULL), ("other domain", scenes.SHIFTED)):
        pictures = scenes.held_out(200, style)
        print(name, score(run.model, run.phrases, pictures, run.device, masks=True), flush=True)


def main() -> None:
    """Train what is left, then write and measure the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="checkpoints and result")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--workers", type=int, default=0, help="processes that paint scenes")
    parser.add_argument("--log_every", type=int, default=500, help="steps")
    args = parser.parse_args()
    if args.device == "cpu":
        torch.set_num_threads(1)
    args.output.mkdir(parents=True, exist_ok=True)
    run = Run(args.output, torch.device(args.device), args.workers)
    run.train(args.log_every)
    finish(run)


if __name__ == "__main__":
    main()
