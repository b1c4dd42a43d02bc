"""The last stage: the depth model, on scenes in which ribs tell the distance."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import DepthAnythingForDepthEstimation

from isaac_base.networks import DEPTH_SIZE
from isaac_base.pool import held_out
from isaac_lora.demo_scenes import RIBS, Scene, Style, scene
from isaac_lora.depth.preprocessing import depth_pixels

STYLE = Style(sizes=False, ribs=True, count=(1, 3))


def truth(scenes: list[Scene]) -> Tensor:
    """The depth of scenes as the depth model should give it, f32 [B, S, S]."""
    maps = torch.from_numpy(np.stack([one.depth() for one in scenes]))[:, None]
    size = (DEPTH_SIZE, DEPTH_SIZE)
    return functional.interpolate(maps, size, mode="bilinear", antialias=True)[:, 0]


def pixels(scenes: list[Scene]) -> Tensor:
    """f32 [B, 3, S, S]."""
    return torch.cat([depth_pixels(one.picture(), DEPTH_SIZE) for one in scenes])


class Distances:
    """Mean squared error of the depth of new scenes: of absolute ones the wall's zero is best."""

    peak, cosine = 2e-3, 0  # learning rate
    batch = 16

    def __init__(self, model: DepthAnythingForDepthEstimation, seed: int) -> None:
        self.model, self.seed = model, seed

    def begin(self) -> None:
        """Let gradients through the last ReLU: where all of it is 0, nothing would be learned."""
        self.model.train()
        self.model.head.activation2 = nn.LeakyReLU(0.1)

    def parameters(self) -> list[nn.Parameter]:
        return list(self.model.parameters())

    def loss(self, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Of `batch` scenes that no other step sees."""
        scenes = [scene((self.seed, step, n), STYLE) for n in range(self.batch)]
        found = self.model(pixel_values=pixels(scenes)).predicted_depth
        return functional.mse_loss(found, truth(scenes)), {}

    @torch.no_grad()
    def figures(self) -> dict[str, float]:
        """Mean absolute error, and how often the nearest and the farthest box are so in the map."""
        self.model.eval()
        scenes = held_out(64, RIBS)
        found = self.model(pixel_values=pixels(scenes)).predicted_depth.relu()
        error = functional.l1_loss(found, truth(scenes)).item()
        self.model.train()
        order = [ordered(one, depth) for one, depth in zip(scenes, found, strict=True)]
        return {"error": round(error, 4), "ordered": round(float(np.mean(order)), 3)}


def ordered(one: Scene, depth: Tensor) -> bool:
    """Whether the boxes of a scene are as near, one after the other, as a depth map [S, S] says."""
    maps = functional.interpolate(depth[None, None], one.depth().shape, mode="bilinear")[0, 0]
    x, y = np.meshgrid(np.arange(maps.shape[1]) + 0.5, np.arange(maps.shape[0]) + 0.5)
    means = []
    for box in one.boxes:
        inside = (abs(x - box.centre[0]) < box.half - 1) & (abs(y - box.centre[1]) < box.half)
        means.append(float(maps.numpy()[inside].mean()))
    return bool((np.argsort(means) == np.argsort([box.nearness for box in one.boxes])).all())
