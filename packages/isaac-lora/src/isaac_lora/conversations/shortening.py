"""A conversation that is too long, cut after an answer; never inside a turn or a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from isaac_lora.conversations.records import IMAGE, Conversation, Turn
from isaac_lora.conversations.samples import outline

if TYPE_CHECKING:
    from isaac_lora.processing import IsaacProcessor


def shortened(
    conversation: Conversation,
    sizes: Sequence[tuple[int, int]],
    processor: IsaacProcessor,
    max_seq_length: int,
) -> Conversation:
    """The longest beginning of a conversation that ends with an answer and fits.

    What is kept is a conversation of its own, with the pictures of its turns: its last answer is
    written as the template writes last ones. Where not even the first answer fits, it comes back
    as it is.

    Args:
        sizes: (height, width) of its pictures.

    Raises:
        DataError: as `outline`.
    """
    if _length(conversation, sizes, processor) <= max_seq_length:
        return conversation
    counts = [n for n, turn in enumerate(conversation.turns, start=1) if turn.role == "assistant"]
    fits, no_more = 0, len(counts)  # answers: so many fit; this many do not, or need not be tried
    if counts[-1] < len(conversation.turns):  # without the questions behind it, the last may fit
        no_more += 1
    while no_more - fits > 1:
        middle = (fits + no_more) // 2
        part = first_turns(conversation, counts[middle - 1])
        if _length(part, sizes[: len(part.images)], processor) <= max_seq_length:
            fits = middle
        else:
            no_more = middle
    return first_turns(conversation, counts[fits - 1]) if fits else conversation


def first_turns(conversation: Conversation, count: int) -> Conversation:
    """The first `count` turns of a conversation, with their pictures."""
    turns = conversation.turns[:count]
    images = conversation.images[: sum(map(_pictures_in, turns))]
    return replace(conversation, turns=turns, images=images)


def _pictures_in(turn: Turn) -> int:
    return turn.text.count(IMAGE) if turn.role != "assistant" else 0


def _length(
    conversation: Conversation, sizes: Sequence[tuple[int, int]], processor: IsaacProcessor
) -> int:
    return len(outline(conversation, sizes, processor))
