"""Overlays: colours, names that can be read, legends."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageFont

from lora_core.pictures import overlay
from lora_core.pictures.overlay import PALETTE, Place, draw, panels
from sam3_lora.overlays import colours_of, drawn, sheet
from sam3_lora.postprocess import encode
from sam3_lora.predictor import Prediction
from sam3_lora.user_prompts import Prompt

GREY = np.full((200, 300, 3), 90, dtype=np.uint8)  # enlarged by 3


def square(x: int, y: int, side: int = 40) -> NDArray[np.bool_]:
    mask = np.zeros((200, 300), dtype=bool)
    mask[y : y + side, x : x + side] = True
    return mask


def prediction(phrase: str, *corners: tuple[int, int], score: float = 0.8) -> Prediction:
    import torch

    masks = torch.from_numpy(np.stack([square(x, y) for x, y in corners]))
    boxes = np.array([[x, y, x + 40, y + 40] for x, y in corners], dtype=np.float32)
    scores = np.full(len(corners), score, dtype=np.float32)
    return Prediction(phrase, scores, boxes, (200, 300), encode(masks))


def has(pixels: NDArray[np.uint8], colour: tuple[int, int, int]) -> NDArray[np.bool_]:
    found: NDArray[np.bool_] = (pixels == np.array(colour, dtype=np.uint8)).all(-1)
    return found


def test_each_phrase_has_its_own_colour_in_masks_boxes_and_legend() -> None:
    found = [prediction("bolt", (20, 60), (120, 60)), prediction("nut", (220, 60))]
    colours = colours_of(["bolt", "nut"])
    picture = drawn(GREY, found, colours)
    columns = [has(picture, colours[name]).any(0).nonzero()[0] // 3 for name in ("bolt", "nut")]
    assert columns[0].min() < 30
    assert columns[0].max() < 215 < columns[1].min()
    page = sheet([("LoRA", picture)], "a.png", colours)
    legend = page[picture.shape[0] + 60 :]
    assert all(has(legend, colour).any() for colour in colours.values())


def test_an_object_without_a_mask_does_not_shift_the_colours_of_others() -> None:
    """The best object has no mask; the other's is still its own colour."""
    first = prediction("nut", (20, 60), score=0.9)
    bare = replace(first, rles=None)
    colours = colours_of(["nut", "bolt"])
    picture = drawn(GREY, [bare, prediction("bolt", (120, 60), score=0.5)], colours)
    inside = picture[230, 420].astype(int)  # of the second square, away from edges and captions
    expected = 0.6 * 90 + 0.4 * np.array(colours["bolt"])
    assert np.abs(inside - expected).max() <= 1


def test_captions_stand_at_their_boxes_and_do_not_cover_each_other() -> None:
    rng = np.random.default_rng(0)
    taken: list[Place] = []
    for x, y in rng.integers(0, 800, (12, 2)).tolist():
        place = overlay._free_place((x, y, x + 90, y + 90), (80, 16), (1000, 1000), taken)
        assert not any(overlay._common(place, other) for other in taken)
        assert x - 80 <= place[0] <= x + 90
        assert y - 16 <= place[1] <= y + 90
        taken.append(place)


@pytest.mark.parametrize("box", [(0, 0, 5, 5), (295, 195, 300, 200), (0, 0, 300, 200)])
def test_captions_stay_inside_the_picture(box: Place) -> None:
    place = overlay._free_place(box, (80, 16), (300, 200), [])
    assert place[0] >= 0
    assert place[1] >= 0
    assert place[2] <= 300
    assert place[3] <= 200


@pytest.mark.parametrize("colour", [*PALETTE, overlay.PAPER, (0, 0, 0), (128, 128, 128)])
def test_captions_can_be_read_on_every_colour(colour: tuple[int, int, int]) -> None:
    """WCAG 2: a contrast of at least 4.5."""

    def luminance(rgb: tuple[int, int, int]) -> float:
        parts = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4
                 for v in (part / 255 for part in rgb)]  # fmt: skip
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    light, dark = sorted([luminance(colour), luminance(overlay._ink_on(colour))], reverse=True)
    assert (light + 0.05) / (dark + 0.05) >= 4.5


def test_the_caption_is_the_name_and_the_score() -> None:
    """The same pixels as the text written by PIL."""
    picture = drawn(GREY, [prediction("hex nut", (100, 100), score=0.876)], {"hex nut": PALETTE[1]})
    letters = max(12, min(picture.shape[:2]) // 42)
    width = ImageFont.load_default(size=letters).getlength("hex nut 0.88")
    above = has(picture[: 100 * 3 - 4], PALETTE[1])
    columns = above.any(0).nonzero()[0]
    assert abs(np.ptp(columns) - (width + 2 * max(2, letters // 5))) <= 4
    bare = drawn(GREY, [prediction("hex nut", (100, 100))], {"hex nut": PALETTE[1]}, scores=False)
    assert has(bare[: 100 * 3 - 4], PALETTE[1]).sum() < above.sum()


def test_example_boxes_are_white_and_on_top() -> None:
    found = [prediction("nut", (100, 100))]
    asked = [Prompt("nut", ((100, 100, 140, 140), (10, 100, 60, 160)), (1, 0))]
    picture = drawn(GREY, found, {"nut": PALETTE[1]}, asked)
    edges = [picture[330, 300], picture[400, 30]]
    assert all((edge == 255).all() for edge in edges)


def test_a_legend_takes_as_many_lines_as_it_needs() -> None:
    names = [(f"a rather long phrase {k}", PALETTE[k % 7]) for k in range(12)]
    picture = draw(GREY)
    few, many, none = (panels([("x", picture)], "t", some) for some in (names[:2], names, ()))
    assert none.shape[0] < few.shape[0] < many.shape[0]
    assert none.shape[1] == few.shape[1] == many.shape[1]
    assert (many[: none.shape[0]] == none).all()


def test_drawing_without_captions_is_as_before(tmp_path: Path) -> None:
    """One mask and its box in the first colour of the palette."""
    picture = draw(GREY, [square(100, 100)], boxes=[(100, 100, 140, 140)])
    assert has(picture, PALETTE[0]).any()
    overlay.save(tmp_path / "a.png", picture)
    assert (np.asarray(Image.open(tmp_path / "a.png")) == picture).all()


def test_hostile_names_are_drawn_on_one_line() -> None:
    colours = colours_of(["a\nb\x1b[31m" + "x" * 500])
    found = [prediction(next(iter(colours)), (100, 100))]
    page = sheet([("LoRA", drawn(GREY, found, colours))], "bad\n\udcff.png", colours)
    assert page.shape[1] < 1000
