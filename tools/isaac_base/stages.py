"""Training in stages that can be stopped, and go on where their last checkpoint was."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

SAVE_EVERY = 30  # CPU seconds between checkpoints
WARMUP = 100  # steps of each stage


class Stage(Protocol):
    """What is trained, with what, and how it is measured.

    Attributes:
        peak: learning rate. cosine: steps until it is lowest; 0: those of the stage.
    """

    peak: float
    cosine: int

    def begin(self) -> None: ...
    def parameters(self) -> list[nn.Parameter]: ...
    def loss(self, step: int) -> tuple[Tensor, dict[str, Tensor]]: ...
    def figures(self) -> Mapping[str, Any]: ...


class Stages:
    """The weights, the place in the stages, and the checkpoint that holds both.

    Attributes:
        spent: CPU seconds of training so far.
    """

    def __init__(
        self,
        file: Path,
        networks: Mapping[str, nn.Module],
        stages: Sequence[tuple[Stage, int]],
        seed: int,
    ) -> None:
        """`stages` with their steps; `file` is the checkpoint."""
        self.file, self.networks, self.stages, self.seed = file, networks, stages, seed
        self.stage, self.step, self.spent = 0, 0, 0.0
        self.optimizer = self._fresh()
        if file.exists():
            self._restore()

    def train(self, log_every: int) -> None:
        """All steps that are left."""
        while self.stage < len(self.stages):
            self._train_stage(log_every)
            self.stage, self.step = self.stage + 1, 0
            self.optimizer = self._fresh()
            self._save()

    def _train_stage(self, log_every: int) -> None:
        stage, steps = self.stages[self.stage]
        began = saved = time.process_time()
        before, losses = self.spent, list[Tensor]()
        stage.begin()
        while self.step < steps:
            for group in self.optimizer.param_groups:
                group["lr"] = stage.peak * share_of_peak(self.step, stage.cosine or steps)
            losses.append(self._update(stage))
            self.step += 1
            self.spent = before + time.process_time() - began
            if self.step % log_every == 0 or self.step == steps:
                mean = torch.stack(losses).mean().item()
                name = f"{type(stage).__name__} {self.step}"
                print(f"{name} {self.spent:.0f} s: {mean:.4f}", stage.figures(), flush=True)
                losses.clear()
            if time.process_time() - saved > SAVE_EVERY:
                self._save()
                saved = time.process_time()

    def _update(self, stage: Stage) -> Tensor:
        """One step; its loss."""
        torch.manual_seed(self.seed + self.step)
        loss, _ = stage.loss(self.step)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(stage.parameters(), 1.0)
        self.optimizer.step()
        return loss.detach()

    # -- checkpoint --------------------------------------------------------------------------------

    def _fresh(self) -> torch.optim.AdamW:
        stage, _ = self.stages[min(self.stage, len(self.stages) - 1)]
        return torch.optim.AdamW(stage.parameters(), weight_decay=0.01, betas=(0.9, 0.99))

    def _save(self) -> None:
        """Write the checkpoint aside first: a crash never leaves half of one."""
        state: dict[str, Any] = {
            "networks": {name: module.state_dict() for name, module in self.networks.items()},
            "optimizer": self.optimizer.state_dict(),
            "place": [self.stage, self.step],
            "steps": [steps for _, steps in self.stages],
            "spent": self.spent,
        }
        aside = self.file.with_suffix(".new")
        torch.save(state, aside)
        os.replace(aside, self.file)

    def _restore(self) -> None:
        state = torch.load(self.file, weights_only=True)
        self.stage, self.step = state["place"]
        self.spent = state["spent"]
        planned = [steps for _, steps in self.stages]
        # Of stages that are over, or have not begun, the length does not matter.
        if state["steps"][self.stage : self.stage + 1] != planned[self.stage : self.stage + 1]:
            raise SystemExit(f"{self.file} is of a run of --steps {state['steps']}")
        for name, module in self.networks.items():
            module.load_state_dict(state["networks"][name])
        self.optimizer = self._fresh()
        self.optimizer.load_state_dict(state["optimizer"])
        print(f"going on with stage {self.stage} at step {self.step}", flush=True)


def share_of_peak(step: int, steps: int) -> float:
    """Of the learning rate: warm-up times cosine, down to a hundredth."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
    return (0.01 + 0.99 * cosine) * min(1, (step + 1) / WARMUP)
