"""The first stage: the vision tower alone learns what is where, as SigLIP2 is trained before Isaac.

A linear head, which is thrown away afterwards, says of each token in which box's middle it lies:
the sign's shape and colour, the box's place and size. Without it most of the answers' time goes by
until the tower sees shapes at all.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from isaac_base.networks import PATCH, SHUFFLE
from isaac_base.pool import Pool, held_out, patches_of
from isaac_lora.demo_scenes import (
    COLOURS,
    HEIGHT,
    LARGEST,
    PLACES,
    SHAPES,
    SIZES,
    SMALLEST,
    WIDTH,
    Scene,
)
from isaac_lora.network.isaac import IsaacForConditionalGeneration

TOKEN = PATCH * SHUFFLE  # pixels
HEADS = {"shape": SHAPES, "colour": tuple(COLOURS), "place": PLACES}
NOTHING = -100  # a token without a sign


class Looks:
    """Cross entropy of shape, colour and place at tokens with a sign, and error of the size."""

    peak, cosine = 2e-3, 0  # learning rate
    batch = 32

    def __init__(
        self, model: IsaacForConditionalGeneration, head: nn.Linear, pool: Pool, seed: int
    ) -> None:
        self.tower, self.head, self.pool, self.seed = (
            model.model.vision_embedding[0],
            head,
            pool,
            seed,
        )

    def begin(self) -> None:
        """Make or read the pictures."""
        self.pool.ready()
        self.tower.train()

    def parameters(self) -> list[nn.Parameter]:
        return [*self.tower.parameters(), *self.head.parameters()]

    def loss(self, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Of random pictures of the pool."""
        rng = np.random.default_rng((self.seed, step))
        scenes, patches = self.pool.draw(rng, self.batch, (0.2, 0.3, 0.5))
        found, wanted = self.seen(patches), truth(scenes)
        parts = {
            name: functional.cross_entropy(found[name], wanted[name], ignore_index=NOTHING)
            for name in HEADS
        }
        signs = wanted["shape"] != NOTHING
        parts["size"] = functional.mse_loss(found["size"][signs, 0], wanted["size"][signs])
        return torch.stack(list(parts.values())).sum(), parts

    def seen(self, patches: Sequence[Tensor]) -> dict[str, Tensor]:
        """Logits of each head at each token, [B * tokens, classes]."""
        grid = torch.tensor([[HEIGHT // PATCH, WIDTH // PATCH]]).expand(len(patches), -1)
        values = self.head(self.tower(torch.cat(list(patches)), grid))
        sizes = [*(len(names) for names in HEADS.values()), 1]
        return dict(zip([*HEADS, "size"], values.split(sizes, dim=-1), strict=True))

    @torch.no_grad()
    def figures(self) -> dict[str, float]:
        """Share of tokens with a sign that are right, and the mean error of sizes."""
        self.tower.eval()
        scenes = held_out(64, SIZES)
        found, wanted = self.seen(patches_of(scenes, self.pool.rules)), truth(scenes)
        self.tower.train()
        signs = wanted["shape"] != NOTHING
        shares = {
            name: (found[name].argmax(-1) == wanted[name])[signs].float().mean() for name in HEADS
        }
        shares["size"] = (found["size"][:, 0] - wanted["size"])[signs].abs().mean()
        return {name: round(value.item(), 3) for name, value in shares.items()}


def new_head(width: int, seed: int) -> nn.Linear:
    """From a token of the tower to all that is asked for."""
    torch.manual_seed(seed)
    return nn.Linear(width, sum(map(len, HEADS.values())) + 1)


def truth(scenes: Sequence[Scene]) -> dict[str, Tensor]:
    """Classes, and sizes -1..1, of each token, row by row, [B * tokens] each."""
    found: dict[str, list[float]] = {name: [] for name in [*HEADS, "size"]}
    for one in scenes:
        for row in range(HEIGHT // TOKEN):
            for column in range(WIDTH // TOKEN):
                values = _at(one, (column + 0.5) * TOKEN, (row + 0.5) * TOKEN)
                for name, value in values.items():
                    found[name].append(value)
    classes = {name: torch.tensor(found[name], dtype=torch.int64) for name in HEADS}
    return classes | {"size": torch.tensor(found["size"])}


def _at(one: Scene, x: float, y: float) -> dict[str, float]:
    """What is at a point; signs are counted a little larger than they are."""
    for box in one.boxes:
        if max(abs(x - box.centre[0]), abs(y - box.centre[1])) < 0.68 * box.half + 2:
            classes = {name: HEADS[name].index(getattr(box, name)) for name in HEADS}
            return classes | {"size": 2 * (box.half - SMALLEST) / (LARGEST - SMALLEST) - 1}
    return {**dict.fromkeys(HEADS, NOTHING), "size": 0.0}
