"""How good the written folders are, on scenes that no training has used."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from isaac_base.answers import STYLES, accuracy
from isaac_base.distances import ordered, truth
from isaac_base.networks import DEPTH_SIZE
from isaac_base.pool import held_out
from isaac_base.rows import Rows
from isaac_lora import official
from isaac_lora.demo_scenes import RIBS
from isaac_lora.depth.estimator import read_depth_estimator
from isaac_lora.processing import IsaacProcessor


def answers(folder: Path, count: int) -> dict[str, dict[str, float]]:
    """Share of right answers by style and kind of question.

    Args:
        folder: of Isaac. count: scenes of each style.
    """
    model, processor = official.load_model(folder), IsaacProcessor.from_pretrained(folder)
    rows = Rows(processor)
    return {name: accuracy(model, rows, held_out(count, style)) for name, style in STYLES.items()}


def depths(folder: Path, count: int) -> dict[str, float]:
    """Mean absolute error between the nearest and the farthest point, and share of right orders.

    Args:
        folder: of the depth model. count: scenes.
    """
    estimator = read_depth_estimator(folder, DEPTH_SIZE)
    scenes = held_out(count, RIBS)
    found = [estimator.normalised(one.picture()) for one in scenes]
    right = [ordered(one, depth) for one, depth in zip(scenes, found, strict=True)]
    wanted = [depth / depth.max() for depth in truth(scenes)]
    error = (torch.stack(found) - torch.stack(wanted)).abs().mean().item()
    return {"error": round(error, 4), "ordered": round(float(np.mean(right)), 3)}
