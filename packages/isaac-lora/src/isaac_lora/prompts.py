"""What a model is asked in validation: the turns of a conversation up to an answer, and this.

    for question in questions_of(example):
        batch = prompts([question], processor)          # for `generate`, with patches
        score(processor.decode(new_tokens), question.answer, size)

Earlier answers are the true ones, so that one mistake is counted once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from isaac_lora.batches import collate_padded
from isaac_lora.conversations.samples import Sample, assemble, with_pictures
from isaac_lora.conversations.shortening import first_turns
from isaac_lora.conversations.template import render
from isaac_lora.conversations.tokens import encode
from isaac_lora.examples import Example
from isaac_lora.pictures.content import KnownPicture
from isaac_lora.pictures.target_size import patch_grid

if TYPE_CHECKING:
    from isaac_lora.processing import IsaacProcessor


@dataclass(frozen=True)
class Question:
    """The first turns of a conversation, behind which an answer stands.

    Attributes:
        example: the conversation. turns: how many of them are given.
    """

    example: Example
    turns: int

    @property
    def key(self) -> str:
        """Name of the conversation, and the number of the turn."""
        return f"{self.example.key} turn {self.turns}"

    @property
    def answer(self) -> str:
        """The true answer."""
        return self.example.conversation.turns[self.turns].text

    @property
    def text(self) -> str:
        """What is answered: the turns since the answer before, a line for each."""
        turns = self.example.conversation.turns[: self.turns]
        answers = [number for number, turn in enumerate(turns) if turn.role == "assistant"]
        return "\n".join(turn.text for turn in turns[answers[-1] + 1 if answers else 0 :])

    def pictures(self, processor: IsaacProcessor) -> list[KnownPicture]:
        """The pictures of its turns, in the order of their places."""
        asked = first_turns(self.example.conversation, self.turns)
        return self.example.pictures(processor.rules)[: len(asked.images)]

    def outline(self, processor: IsaacProcessor) -> Sample:
        """The sequence of its turns and the beginning of an answer, without patches or labels."""
        asked = first_turns(self.example.conversation, self.turns)
        sizes = self.example.sizes[: len(asked.images)]
        rendered = render(
            asked.turns,
            processor.tokenizer,
            vision_token=processor.vision_token,
            add_generation_prompt=True,
        )
        grids = [patch_grid(height, width, processor.rules) for height, width in sizes]
        pieces = encode(rendered, processor.tokenizer)
        for piece in pieces:  # earlier answers are given, and not learned
            piece.learned = [False] * len(piece.ids)
        return assemble(pieces, grids, processor.rules, processor.image_id, self.key)


def questions_of(example: Example) -> list[Question]:
    """One for each answer of a conversation that something stands before."""
    turns = example.conversation.turns
    return [
        Question(example, number)
        for number, turn in enumerate(turns)
        if number and turn.role == "assistant"
    ]


def prompts(
    questions: Sequence[Question], processor: IsaacProcessor, keep_pictures: bool = False
) -> dict[str, Any]:
    """The batch that `generate` takes, padded on the left, with the patches of its pictures.

    Args:
        keep_pictures: with the pictures too, for a model that was loaded with depth.

    Raises:
        DataError: a picture that cannot be read any more, or no questions.
    """
    samples = [
        with_pictures(
            question.outline(processor),
            [picture.read() for picture in question.pictures(processor)],
            processor.rules,
            keep_pictures,
        )
        for question in questions
    ]
    batch = collate_padded(
        samples,
        pad_id=processor.tokenizer.pad_token_id,
        pixel_shuffle_scale=processor.rules.pixel_shuffle_scale,
        padding_side="left",
    )
    del batch["labels"]
    return batch
