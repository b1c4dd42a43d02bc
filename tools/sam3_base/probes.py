"""What training says of single cells of the maps: a dense signal that object queries lack."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sam3_base.new_network import GRID
from sam3_lora.demo_base import scenes
from sam3_lora.matching import overlaps

# Phrases of one word, and of one word before the noun that names every object.
BASIC = [
    p
    for p, phrase in enumerate(scenes.PHRASES)
    if phrase in scenes.SHAPES or phrase.endswith(scenes.ANY)
]


class Probes(nn.Module):
    """What training says of single cells of the maps; thrown away with the last stage.

    Every cell of the image's map names its object (one logit per phrase, an inner product with the
    phrase's mean feature) and draws its box; every cell of a query's memory says whether its
    object is meant.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.cell, self.phrase = nn.Linear(width, width), nn.Linear(width, width)
        self.bias = nn.Parameter(torch.tensor(-2.0))
        self.box = nn.Linear(width, 4)
        self.meant = nn.Linear(width, 1)

    def cells(
        self, map_: Tensor, text: Tensor, batch: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of the image's map [I, C, g, g], given mean phrase features [P, C]; F1 of cells.

        The phrases of one word alone count once more in the cells of objects: what an object is
        like is learned late otherwise, shapes and surfaces long after colours.
        """
        x = map_.flatten(2).transpose(1, 2)  # [I, g g, C]
        logits = self.cell(x) @ self.phrase(text).T / x.shape[-1] ** 0.5 + self.bias
        owner, named = batch["owner"].flatten(1), batch["named"]  # [I, g g], [I, T, P]
        here = owner >= 0
        rows = torch.arange(len(owner), device=owner.device)[:, None]
        wanted = (named[rows, owner.clamp(min=0)] & here[..., None]).float()
        said = F.binary_cross_entropy_with_logits(logits, wanted)
        centre = (torch.arange(GRID, device=x.device) + 0.5) / GRID
        cy, cx = torch.meshgrid(centre, centre, indexing="ij")
        base = torch.stack([cx, cy], -1).flatten(0, 1)
        raw = self.box(x)
        boxes = torch.cat([base + 0.2 * raw[..., :2], 0.3 * (0.5 * raw[..., 2:]).exp()], -1)[here]
        truth = batch["thing_boxes"][rows, owner.clamp(min=0)][here]
        _, giou = overlaps(boxes, truth)
        z, y = logits[here][:, BASIC], wanted[here][:, BASIC]
        basic = F.binary_cross_entropy_with_logits(z, y)
        drawn = 2 * (boxes - truth).abs().sum(-1).mean() + (1 - giou).mean()
        figures = {"cells_f1": f1(logits > 0, wanted > 0), "basic_f1": f1(z > 0, y > 0)}
        return 10 * said + 4 * basic + 0.5 * drawn, figures

    def memory(self, memory: Tensor, batch: dict[str, Any]) -> Tensor:
        """Loss of the memory [B, g g, C] of each query."""
        owner = batch["owner"].flatten(1)[batch["image_ids"]]  # [B, g g]
        named = batch["named"][batch["image_ids"], :, batch["text_ids"]]  # [B, T]
        wanted = named.gather(1, owner.clamp(min=0)) & (owner >= 0)
        return F.binary_cross_entropy_with_logits(self.meant(memory)[..., 0], wanted.float())


def f1(said: Tensor, wanted: Tensor) -> Tensor:
    """F1 of two boolean tensors."""
    return 2 * (said & wanted).sum() / (said.sum() + wanted.sum()).clamp(min=1)
