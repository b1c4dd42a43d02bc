"""Pretrain the tiny base that midi3d-lora carries, from random weights on generated scenes.

    python tools/pretrain_midi3d_demo_base.py --output runs/midi3d_demo_base

Two stages: the autoencoder on the objects of both styles, then the transformer together with the
7-channel picture encoder on scenes of furniture. A run is a function of its seed. One that was
stopped goes on where its last checkpoint was when the same command is given again. The end is a
model directory in the released layout, and its figures on scenes that training has not shown.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from pathlib import Path
from typing import Any

import torch
from midi3d_base.figures import draw, table_of
from midi3d_base.flow import Flow
from midi3d_base.networks import MULTI_INSTANCE_BLOCKS, new_networks, write_base
from midi3d_base.shapes import Shapes
from torch import Tensor, nn

from midi3d_lora.pipeline import MIDIPipeline

SEED = 60260  # of initial weights, and of everything that training shows
SAVE_EVERY = 30  # CPU seconds between checkpoints
WARMUP = 100  # steps of each stage


class Run:
    """The weights, the place in the stages, and the checkpoint that holds both."""

    def __init__(self, output: Path, steps: tuple[int, int], scenes: int) -> None:
        self.output, self.steps = output, steps
        self.networks = new_networks(SEED)
        self.stages = (
            Shapes(self.networks, SEED + 1),
            Flow(self.networks, SEED + 2, scenes, output / "scenes.safetensors"),
        )
        self.stage, self.step, self.spent = 0, 0, 0.0  # CPU seconds
        self.optimizer = self.fresh_optimizer()
        if self.file.exists():
            self.restore()

    @property
    def file(self) -> Path:
        return self.output / "checkpoint.pt"

    def fresh_optimizer(self) -> torch.optim.AdamW:
        weights = self.stages[min(self.stage, 1)].parameters()
        return torch.optim.AdamW(weights, weight_decay=0.01, betas=(0.9, 0.99))

    def save(self) -> None:
        """Write the checkpoint aside first: a crash never leaves half of one."""
        state: dict[str, Any] = {
            "networks": self.networks.state(),
            "optimizer": self.optimizer.state_dict(),
            "stage": self.stage,
            "step": self.step,
            "steps": list(self.steps),
            "spent": self.spent,
        }
        aside = self.file.with_suffix(".new")
        torch.save(state, aside)
        os.replace(aside, self.file)

    def restore(self) -> None:
        state = torch.load(self.file, weights_only=True)
        self.stage, self.step, self.spent = state["stage"], state["step"], state["spent"]
        # Stages that are over may have had any length.
        if state["steps"][self.stage :] != list(self.steps[self.stage :]):
            raise SystemExit(f"{self.file} is of a run of --steps {state['steps']}")
        self.networks.restore(state["networks"])
        self.optimizer = self.fresh_optimizer()
        self.optimizer.load_state_dict(state["optimizer"])
        print(f"going on with stage {self.stage} at step {self.step}", flush=True)

    def train(self, log_every: int) -> None:
        """All steps that are left."""
        while self.stage < len(self.stages):
            self.train_stage(log_every)
            self.stages[self.stage].finish()
            self.stage, self.step = self.stage + 1, 0
            self.optimizer = self.fresh_optimizer()
            self.save()

    def train_stage(self, log_every: int) -> None:
        stage, steps = self.stages[self.stage], self.steps[self.stage]
        began = saved = time.process_time()
        before, recent = self.spent, Recent()
        stage.begin()
        while self.step < steps:
            for group in self.optimizer.param_groups:
                group["lr"] = stage.peak * share_of_peak(self.step, steps)
            recent.add(self.update())
            self.step += 1
            self.spent = before + time.process_time() - began
            if self.step % log_every == 0 or self.step == steps:
                figures = stage.figures()
                name = type(stage).__name__
                print(name, self.step, f"{self.spent:.0f} s", recent.means(), figures, flush=True)
            if time.process_time() - saved > SAVE_EVERY:
                self.save()
                saved = time.process_time()

    def update(self) -> dict[str, Tensor]:
        """One step; its loss and the parts of it."""
        stage = self.stages[self.stage]
        torch.manual_seed(SEED + self.step)
        loss, parts = stage.loss(self.step)
        self.optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(stage.parameters(), 1.0)
        self.optimizer.step()
        return {"loss": loss, "norm": norm, **parts}


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
        return {name: round(value, 4) for name, value in found.items()}


def share_of_peak(step: int, steps: int) -> float:
    """Of the learning rate: warm-up times cosine, down to a hundredth."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
    return (0.01 + 0.99 * cosine) * min(1, (step + 1) / WARMUP)


def finish(run: Run, count: int) -> MIDIPipeline:
    """Write the model directory and measure it as users read it, not the model in memory."""
    folder = write_base(run.networks, run.output / "model")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder}: {size} bytes, {run.spent:.0f} CPU seconds of training", flush=True)
    pipe = MIDIPipeline.from_pretrained(folder, multi_instance_blocks=MULTI_INSTANCE_BLOCKS)
    pipe.set_progress_bar_config(disable=True)
    if count:
        for name, scores in table_of(pipe, count).items():
            print(name, scores, flush=True)
        draw(pipe, run.output / "generated.png", min(count, 6))
    return pipe


def main() -> None:
    """Train what is left, then write and measure the model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="checkpoints and result")
    parser.add_argument("--steps", type=int, nargs=2, default=(10000, 12000), help="of the stages")
    parser.add_argument("--scenes", type=int, default=6000, help="that the flow is trained on")
    parser.add_argument("--measured", type=int, default=20, help="scenes of each style at the end")
    parser.add_argument("--log_every", type=int, default=250, help="steps")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.output.mkdir(parents=True, exist_ok=True)
    run = Run(args.output, tuple(args.steps), args.scenes)
    run.train(args.log_every)
    finish(run, args.measured)


if __name__ == "__main__":
    main()
