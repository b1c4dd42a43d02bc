"""Pictures with several questions each: one row, in which no question sees another one.

    <|im_start|>user\\n <picture> | question 1, answer 1 | question 2, answer 2 | ...

Each part behind the picture sees the picture and itself, from the same position on, so that every
one gives what its own conversation would give, and the picture is computed once for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from isaac_lora.conversations.records import IMAGE, Conversation, Turn
from isaac_lora.conversations.samples import IGNORED, Sample, outline
from isaac_lora.demo_questions import Question
from isaac_lora.demo_scenes import HEIGHT, WIDTH
from isaac_lora.processing import IsaacProcessor

ROOM = 16  # places of a question with its answer


@dataclass
class Rows:
    """Makes rows, and remembers the tokens of questions."""

    processor: IsaacProcessor
    known: dict[tuple[str, str], Sample] = field(default_factory=dict)

    def sample(self, question: Question) -> Sample:
        """The sequence of a conversation of one question, without patches."""
        key = question.text, question.answer
        if key not in self.known:
            turns = Turn("user", IMAGE + question.text), Turn("assistant", question.answer)
            record = Conversation(0, "", turns, ("",))
            self.known[key] = outline(record, [(HEIGHT, WIDTH)], self.processor)
        return self.known[key]

    def batch(
        self, pictures: Sequence[Tensor], asked: Sequence[Sequence[Question]]
    ) -> dict[str, Tensor]:
        """The model's inputs, B rows.

        Args:
            pictures: patches uint8 [N, 3 p²] of each.
            asked: questions of each, everywhere the same number of them.
        """
        shared = self._shared(self.sample(asked[0][0]))
        ids = [[self._part(self.sample(one), shared, "input_ids") for one in row] for row in asked]
        labels = [[self._part(self.sample(one), shared, "labels") for one in row] for row in asked]
        first = self.sample(asked[0][0])
        parts = len(asked[0])
        head = first.input_ids[:shared].expand(len(asked), -1)
        image = first.image_mask[:shared]
        mask = torch.cat([image, torch.zeros(parts * ROOM, dtype=torch.bool)])
        return {
            "input_ids": torch.cat([head, torch.stack([torch.cat(row) for row in ids])], 1),
            "labels": torch.cat(
                [torch.full_like(head, IGNORED), torch.stack([torch.cat(row) for row in labels])], 1
            ),
            "image_mask": mask.expand(len(asked), -1),
            "attention_mask": visible(shared, parts).expand(len(asked), 1, -1, -1),
            "position_ids": positions(first, shared, parts).expand(len(asked), -1, -1),
            "patches": torch.cat(list(pictures)),
            "grids": first.grids.expand(len(asked), -1),
        }

    @staticmethod
    def _shared(sample: Sample) -> int:
        """Places up to the end of the picture."""
        return int(sample.image_mask.nonzero().max()) + 1

    def _part(self, sample: Sample, shared: int, name: str) -> Tensor:
        """A question's own places, filled up to `ROOM`."""
        values: Tensor = getattr(sample, name)[shared:]
        filling = IGNORED if name == "labels" else int(self.processor.tokenizer.pad_token_id)
        whole = values.new_full((ROOM,), filling)
        whole[: len(values)] = values
        return whole


def visible(shared: int, parts: int) -> Tensor:
    """Which place sees which, bool [1, 1, L, L]."""
    length = shared + parts * ROOM
    part = torch.cat([torch.zeros(shared), 1 + torch.arange(parts).repeat_interleave(ROOM)])
    seen = (part[None, :] == 0) | (part[None, :] == part[:, None])
    return (seen & torch.ones(length, length).tril().bool())[None, None]


def positions(sample: Sample, shared: int, parts: int) -> Tensor:
    """(time, row, column) of every place, i64 [1, L, 3]."""
    from isaac_lora.network.positions import mrope_position_ids

    whole = torch.zeros(1, shared + ROOM, dtype=torch.bool)
    whole[0, :shared] = sample.image_mask[:shared]
    found = mrope_position_ids(whole, sample.grids, 2)
    return torch.cat([found[:, :shared], found[:, shared:].repeat(1, parts, 1)], 1)


def chosen(
    questions: Sequence[Question], kinds: Sequence[str], count: int, rng: np.random.Generator
) -> list[Question]:
    """`count` random questions: first a kind for each, then one of it."""
    found = []
    for kind in rng.choice(list(kinds), count):
        of_kind = [one for one in questions if one.kind == kind]
        found.append(of_kind[rng.integers(len(of_kind))])
    return found
