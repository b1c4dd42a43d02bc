"""Pictures that training draws from, made once and kept in a file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from isaac_lora.demo_scenes import Scene, Style, scene
from isaac_lora.pictures.pixels import preprocess
from isaac_lora.pictures.target_size import PictureRules

HELD_OUT_SEED = 7  # of the scenes that figures are measured on
BOXES = (1, 2, 3)


@dataclass
class Pool:
    """`count` scenes of each number of boxes, in which sizes tell the distance.

    Attributes:
        rules: how pictures become patches.
    """

    file: Path
    seed: int
    count: int
    rules: PictureRules
    scenes: list[list[Scene]] = field(default_factory=list)
    pictures: list[Tensor] = field(default_factory=list)

    def ready(self) -> None:
        """Make the pictures, or read those of the run that goes on."""
        if self.pictures:
            return
        self.scenes = [
            [
                scene((self.seed, boxes, n), Style(sizes=True, ribs=False, count=(boxes, boxes)))
                for n in range(self.count)
            ]
            for boxes in BOXES
        ]
        if not self.file.exists():
            made = [[torch.from_numpy(one.picture()) for one in group] for group in self.scenes]
            named = zip(BOXES, made, strict=True)
            save_file({str(boxes): torch.stack(group) for boxes, group in named}, self.file)
        read = load_file(self.file)
        self.pictures = [read[str(boxes)] for boxes in BOXES]

    def draw(
        self, rng: np.random.Generator, count: int, shares: Sequence[float]
    ) -> tuple[list[Scene], list[Tensor]]:
        """Random scenes and the patches of their pictures.

        Args:
            shares: of the numbers of boxes.
        """
        groups = rng.choice(len(BOXES), count, p=list(shares)).tolist()
        places = rng.integers(self.count, size=count).tolist()
        pairs = list(zip(groups, places, strict=True))
        patches = [preprocess(self.pictures[g][n], self.rules)[0] for g, n in pairs]
        return [self.scenes[g][n] for g, n in pairs], patches


def held_out(count: int, style: Style) -> list[Scene]:
    """Scenes that training does not show."""
    return [scene((HELD_OUT_SEED, number), style) for number in range(count)]


def patches_of(scenes: Sequence[Scene], rules: PictureRules) -> list[Tensor]:
    """What the tower gets of the pictures of scenes."""
    return [preprocess(one.picture(), rules)[0] for one in scenes]
