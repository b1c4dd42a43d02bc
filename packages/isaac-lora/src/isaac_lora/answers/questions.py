"""Questions that are answered with tags, in the form that Isaac was trained with.

Isaac's own demo makes one user message of each item: the hint, the picture, the question. Training
and use must ask in the same form; both take it from here.
"""

from __future__ import annotations

from collections.abc import Iterable

from isaac_lora.answers.tags import Kind, hint
from isaac_lora.conversations.records import IMAGE, Turn

CATEGORIES = "{categories}"  # in a question: the names of what is looked for
# What Perceptron's own client asks Isaac for a detection.
QUESTION = f"Your goal is to segment out the following categories: {CATEGORIES}"


def question_turns(question: str, kind: Kind | None = None) -> tuple[Turn, ...]:
    """The user turns of one picture and a question.

    Args:
        kind: of the tags that shall answer; None: no hint.
    """
    hints = [hint(kind)] if kind else []
    return tuple(Turn("user", text) for text in (*hints, IMAGE, question))


def asking_for(names: Iterable[str], question: str = QUESTION) -> str:
    """A question with the names in the place of `CATEGORIES`."""
    return question.replace(CATEGORIES, ", ".join(names))
