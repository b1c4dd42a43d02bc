"""Pictures for people: what was found, with names and scores, in a colour for each phrase."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain, repeat
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from lora_core.errors import one_line
from lora_core.pictures.files import read_image
from lora_core.pictures.overlay import PALETTE, PAPER, Colour, draw, panels
from sam3_lora.predictor import Prediction, Predictor, only

if TYPE_CHECKING:
    from sam3_lora.data import EvalRecord
    from sam3_lora.user_prompts import Prompt

LONGEST = 40  # letters of a phrase that are shown


def colours_of(phrases: Iterable[str]) -> dict[str, Colour]:
    """A colour for each phrase, in their order; from the first one again after the seventh."""
    names = dict.fromkeys(phrases)
    return {name: PALETTE[number % len(PALETTE)] for number, name in enumerate(names)}


def drawn(
    rgb: NDArray[np.uint8],
    found: Sequence[Prediction],
    colours: dict[str, Colour],
    prompts: Sequence[Prompt] = (),
    scores: bool = True,
) -> NDArray[np.uint8]:
    """The picture with masks, boxes and captions; example boxes are white, marked + or -.

    Args:
        rgb: uint8 [H, W, 3].
        prompts: whose example boxes are shown.
        scores: write them behind the names.
    """
    objects = [(one, number) for one in found for number in range(len(one))]
    # The best first, so that their captions have the best places.
    objects.sort(key=lambda pair: -pair[0].scores[pair[1]])
    examples = [
        pair for prompt in prompts for pair in zip(prompt.boxes, prompt.labels, strict=True)
    ]
    boxes = [list(box) for box, _ in examples]
    boxes += [one.boxes[number].tolist() for one, number in objects]
    tints = [PAPER] * len(examples) + [colours[one.phrase] for one, _ in objects]
    captions = ["+ example" if label else "- not this" for _, label in examples]
    for one, number in objects:
        score = f" {one.scores[number]:.2f}" if scores else ""
        captions.append(_short(one.phrase) + score)
    nothing = np.zeros(rgb.shape[:2], dtype=bool)
    masks = chain(
        repeat(nothing, len(examples)),
        (nothing if one.rles is None else one.mask(number) for one, number in objects),
    )
    return draw(rgb, masks, boxes=boxes, colours=tints or PALETTE, captions=captions)


def sheet(
    pictures: Sequence[tuple[str, NDArray[np.uint8]]], name: str, colours: dict[str, Colour]
) -> NDArray[np.uint8]:
    """Panels under the picture's name, with a legend of the phrases."""
    legend = [(_short(phrase), colour) for phrase, colour in colours.items()]
    return panels(pictures, one_line(name), legend)


def counted(caption: str, found: Sequence[Prediction]) -> str:
    """A panel's caption: "LoRA: 3 objects"."""
    count = sum(map(len, found))
    return f"{caption}: {count} object{'s' * (count != 1)}"


def _short(phrase: str) -> str:
    phrase = one_line(phrase)
    return phrase if len(phrase) <= LONGEST else f"{phrase[: LONGEST - 3]}..."


# -- of an evaluation ----------------------------------------------------------------------------


def example(predictor: Predictor, record: EvalRecord, models: Sequence[str]) -> NDArray[np.uint8]:
    """Panels of one picture, uint8 [H, W, 3]: what each model finds from a score of 0.5 on, and
    the truth."""
    rgb = read_image(record.image)
    truth = truth_of(record)
    masks = any(one.rles is not None for one in truth)
    found = {}
    for name in models:
        with only(predictor, name):
            predictor.set_image(rgb)
            found[name] = predictor.predict(record.phrases, masks=masks)
    there = [one.phrase for one in truth if len(one)]
    there += [one.phrase for some in found.values() for one in some if len(one)]
    colours = colours_of(there)
    pictures = [(counted(name, some), drawn(rgb, some, colours)) for name, some in found.items()]
    pictures.append((counted("truth", truth), drawn(rgb, truth, colours, scores=False)))
    return sheet(pictures, record.key, colours)


def truth_of(record: EvalRecord) -> list[Prediction]:
    """The annotated objects, as if they had been found; of crowds none."""
    objects = []
    for phrase, annotated in zip(record.phrases, record.truth, strict=True):
        for known in (True, False):  # whether there is a mask
            some = [
                one
                for one in annotated
                if not one["iscrowd"] and bool(one["segmentation"]) == known
            ]
            boxes = np.array([one["bbox"] for one in some], dtype=np.float32).reshape(-1, 4)
            boxes[:, 2:] += boxes[:, :2]
            rles = [one["segmentation"] for one in some] if known else None
            scores = np.ones(len(some), dtype=np.float32)
            objects.append(Prediction(phrase, scores, boxes, record.size, rles))
    return objects
