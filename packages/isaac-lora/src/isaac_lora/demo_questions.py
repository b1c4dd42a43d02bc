"""Questions about the scenes of `demo_scenes`, with answers of one word, and their files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from isaac_lora.demo_scenes import COLOURS, PLACES, SHAPES, Box, Scene

WHERE = {"left": "on the left", "middle": "in the middle", "right": "on the right"}
KINDS = ("shape", "colour", "place", "nearest")


@dataclass(frozen=True)
class Question:
    """A question about one scene.

    Attributes:
        kind: one of `KINDS`: what is asked for; "nearest" asks for the shape of the nearest or
            the farthest sign.
        text, answer: as they stand in a conversation, without the picture.
    """

    kind: str
    text: str
    answer: str


def questions(scene: Scene) -> list[Question]:
    """All questions about a scene."""
    return [*looks(scene), *nearness(scene)]


def looks(scene: Scene) -> list[Question]:
    """The questions that the picture itself answers."""
    return [question for box in scene.boxes for question in _about(box)]


def _about(box: Box) -> list[Question]:
    where = WHERE[box.place]
    return [
        Question("shape", f"Which shape is {where}?", box.shape),
        Question("shape", f"Which shape is {box.colour}?", box.shape),
        Question("colour", f"Which colour is {where}?", box.colour),
        Question("colour", f"Which colour is the {box.shape}?", box.colour),
        Question("place", f"Where is the {box.shape}?", box.place),
        Question("place", f"Where is the {box.colour} shape?", box.place),
    ]


def nearness(scene: Scene) -> list[Question]:
    """The questions for which one must know how near the boxes are."""
    order = sorted(scene.boxes, key=lambda box: box.nearness)
    return [
        Question("nearest", "Which shape is nearest?", order[-1].shape),
        Question("nearest", "Which shape is farthest?", order[0].shape),
    ]


def words() -> list[str]:
    """Texts with every word of questions and answers, for a tokenizer."""
    texts = [
        f"Which {what} is {where}?" for what in ("shape", "colour") for where in WHERE.values()
    ]
    texts += [f"Which shape is {word}?" for word in (*COLOURS, "nearest", "farthest")]
    texts += [f"Which colour is the {shape}? Where is the {shape}?" for shape in SHAPES]
    texts += [f"Where is the {colour} shape?" for colour in COLOURS]
    return [*texts, *SHAPES, *COLOURS, *PLACES]


def record(name: str, picture: str, question: Question) -> dict[str, Any]:
    """A question and its answer as a record of the guide's format.

    Args:
        name: its id. picture: file name.
    """
    return {
        "id": name,
        "image": picture,
        "conversations": [
            {"from": "human", "value": f"<image>{question.text}"},
            {"from": "gpt", "value": question.answer},
        ],
    }
