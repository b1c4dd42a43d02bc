"""What a model is asked: the turns of a conversation up to an answer, and this.

    for question in questions_of(example):
        batch = prompts([question], processor)          # for `generate`, with patches
        score(processor.decode(new_tokens), question.answer, size)

Earlier answers are the true ones, so that one mistake is counted once.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from isaac_lora.batches import collate_padded
from isaac_lora.conversations.records import IMAGE, Conversation
from isaac_lora.conversations.samples import Sample, assemble, with_pictures
from isaac_lora.conversations.shortening import first_turns
from isaac_lora.conversations.template import render
from isaac_lora.conversations.tokens import encode
from isaac_lora.examples import Example
from isaac_lora.pictures.content import KnownPicture
from isaac_lora.pictures.target_size import patch_grid

if TYPE_CHECKING:
    from isaac_lora.depth.controls import DepthSource
    from isaac_lora.processing import IsaacProcessor
    from isaac_lora.vision_cache import VisionFeatures


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
    def answer(self) -> str | None:
        """The true answer; None: nobody has given one."""
        turns = self.example.conversation.turns
        return turns[self.turns].text if self.turns < len(turns) else None

    @property
    def text(self) -> str:
        """What is answered: the turns since the answer before, a line for each."""
        turns = self.example.conversation.turns[: self.turns]
        answers = [number for number, turn in enumerate(turns) if turn.role == "assistant"]
        return "\n".join(turn.text for turn in turns[answers[-1] + 1 if answers else 0 :])

    @property
    def line(self) -> str:
        """`text` on one line, without markers of pictures where none stands between its words."""
        text = " ".join(self.text.split())
        inner = re.sub(f"^(?:{IMAGE} ?)+|(?: ?{IMAGE})+$", "", text)
        return text if IMAGE in inner else inner

    @property
    def asked(self) -> Conversation:
        """The conversation up to the answer."""
        return first_turns(self.example.conversation, self.turns)

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """(height, width) of the pictures of its turns."""
        return self.example.sizes[: len(self.asked.images)]

    def pictures(self, processor: IsaacProcessor) -> list[KnownPicture]:
        """The pictures of its turns, in the order of their places."""
        return self.example.pictures(processor.rules)[: len(self.asked.images)]

    def outline(self, processor: IsaacProcessor) -> Sample:
        """The sequence of its turns and the beginning of an answer, without patches or labels."""
        rendered = render(
            self.asked.turns,
            processor.tokenizer,
            vision_token=processor.vision_token,
            add_generation_prompt=True,
        )
        grids = [patch_grid(height, width, processor.rules) for height, width in self.sizes]
        pieces = encode(rendered, processor.tokenizer)
        for piece in pieces:  # earlier answers are given, and not learned
            piece.learned = [False] * len(piece.ids)
        return assemble(pieces, grids, processor.rules, processor.image_id, self.key)


def questions_of(example: Example, unanswered: bool = False) -> list[Question]:
    """One for each answer of a conversation that something stands before.

    Args:
        unanswered: one for the end of a conversation, too, if it does not end with an answer.
    """
    turns = example.conversation.turns
    places = [n for n, turn in enumerate(turns) if n and turn.role == "assistant"]
    if unanswered and turns[-1].role != "assistant":
        places.append(len(turns))
    return [Question(example, number) for number in places]


def prompts(
    questions: Sequence[Question],
    processor: IsaacProcessor,
    keep_pictures: bool = False,
    vision: VisionFeatures | None = None,
    depth: DepthSource | None = None,
) -> dict[str, Any]:
    """The batch that `generate` takes, padded on the left, with the patches of its pictures.

    Args:
        keep_pictures: with the pictures too, for a model that was loaded with depth.
        vision, depth: with `vision_parts` in place of patches, and with `depth_parts`, as
            `FrozenFeatures.inputs` takes them.

    Raises:
        DataError: a picture that cannot be read any more, or no questions.
    """
    samples, parts = list[Sample](), dict[str, list[Any]]()
    for question in questions:
        sample = question.outline(processor)
        pictures = [picture.once() for picture in question.pictures(processor)]
        if vision is not None:
            parts.setdefault("vision_parts", []).extend(map(vision.part, pictures))
        if depth is not None:
            parts.setdefault("depth_parts", []).extend(map(depth.part, pictures))
        if vision is None or keep_pictures:
            loaded = [picture.read() for picture in pictures]
            sample = with_pictures(sample, loaded, processor.rules, keep_pictures)
        samples.append(sample)
    batch = collate_padded(
        samples,
        pad_id=processor.tokenizer.pad_token_id,
        pixel_shuffle_scale=processor.rules.pixel_shuffle_scale,
        padding_side="left",
    )
    del batch["labels"]
    return batch | parts
