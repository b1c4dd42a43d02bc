"""The second stage: all of Isaac, on questions about scenes in which sizes tell the distance."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from isaac_base.pool import Pool, held_out, patches_of
from isaac_base.rows import ROOM, Rows, chosen
from isaac_lora.conversations.samples import IGNORED
from isaac_lora.demo_questions import KINDS, questions
from isaac_lora.demo_scenes import RIBS, SIZES, Scene
from isaac_lora.network.isaac import IsaacForConditionalGeneration

STYLES = {"sizes": SIZES, "ribs": RIBS}
# One box, then one or two, then mostly three: until the step, by the number of boxes.
CURRICULUM = ((300, (1.0, 0.0, 0.0)), (1000, (0.3, 0.7, 0.0)), (10**9, (0.05, 0.15, 0.8)))


class Answers:
    """Cross entropy of answers of one word and their end tokens."""

    peak, cosine = 2e-3, 7000  # learning rate, and steps until it is lowest
    batch, asked = 16, 8  # pictures, questions of each
    curriculum = CURRICULUM

    def __init__(
        self, model: IsaacForConditionalGeneration, rows: Rows, pool: Pool, seed: int
    ) -> None:
        self.model, self.rows, self.pool, self.seed = model, rows, pool, seed

    def begin(self) -> None:
        """Make or read the pictures."""
        self.pool.ready()
        self.model.train()

    def parameters(self) -> list[nn.Parameter]:
        return list(self.model.parameters())

    def loss(self, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Of random questions about random pictures of the pool."""
        rng = np.random.default_rng((self.seed, step))
        shares = next(shares for until, shares in self.curriculum if step < until)
        scenes, patches = self.pool.draw(rng, self.batch, shares)
        asked = [chosen(questions(one), KINDS, self.asked, rng) for one in scenes]
        loss: Tensor = self.model(**self.rows.batch(patches, asked)).loss
        return loss, {}

    def figures(self) -> dict[str, dict[str, float]]:
        """Share of right answers by kind of question, on scenes of both styles."""
        self.model.eval()
        found = {
            name: accuracy(self.model, self.rows, held_out(64, style))
            for name, style in STYLES.items()
        }
        self.model.train()
        return found


class Smaller(Answers):
    """Go on with image tokens of the size of what depth adds to them.

    After the stage before they are forty times as large: of depth nothing would be left behind the
    first norm. They are made smaller at once, and kept from growing again.
    """

    peak, cosine = 1.2e-3, 0
    divisor = 25.0
    weight = 3e-3  # of the mean square of image tokens
    curriculum = CURRICULUM[-1:]

    def __init__(
        self, model: IsaacForConditionalGeneration, rows: Rows, pool: Pool, seed: int
    ) -> None:
        super().__init__(model, rows, pool, seed)
        self.tokens = torch.zeros(0)  # of the images of the last batch, [tokens, C]
        model.model.vision_embedding[-1].register_forward_hook(self.remember)

    def remember(self, module: nn.Module, inputs: object, tokens: Tensor) -> None:
        """Keep what the projector gave."""
        self.tokens = tokens

    def loss(self, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of the answers, and the mean square of image tokens."""
        if step == 0:
            with torch.no_grad():
                self.model.model.vision_embedding[-1].weight /= self.divisor
        loss, parts = super().loss(step)
        return loss + self.weight * self.tokens.square().mean(), parts

    def figures(self) -> dict[str, dict[str, float]]:
        """Those of the answers, and the root mean square of image tokens."""
        found = super().figures()
        return {**found, "tokens": {"rms": round(self.tokens.square().mean().sqrt().item(), 2)}}


@torch.no_grad()
def accuracy(
    model: IsaacForConditionalGeneration, rows: Rows, scenes: Sequence[Scene]
) -> dict[str, float]:
    """Share of answers of which both tokens, the word and the end, are the likeliest."""
    right: dict[str, list[bool]] = defaultdict(list)
    for start in range(0, len(scenes), 16):
        part = scenes[start : start + 16]
        asked = [questions(one) for one in part]
        batch = rows.batch(patches_of(part, rows.processor.rules), asked)
        labels = batch.pop("labels")[:, 1:]
        found = model(**batch).logits[:, :-1].argmax(-1)
        wrong = ((found != labels) & (labels != IGNORED)).float()
        first = wrong.shape[1] - len(asked[0]) * ROOM
        errors = wrong[:, first:].unflatten(1, (len(asked[0]), ROOM)).sum(-1)
        for row, kinds in zip(errors.tolist(), asked, strict=True):
            for count, question in zip(row, kinds, strict=True):
                right[question.kind].append(count == 0)
    return {kind: round(float(np.mean(values)), 3) for kind, values in right.items()}
