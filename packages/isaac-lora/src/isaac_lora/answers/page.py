"""A question on one page: its pictures with the tags of all answers, and below them the words."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from isaac_lora.answers.overlay import Pixels, sheet
from isaac_lora.answers.tags import parse
from lora_core.errors import one_line
from lora_core.pictures.overlay import INK, LARGEST, PAPER, SMALLEST

if TYPE_CHECKING:
    from isaac_lora.processing import IsaacProcessor
    from isaac_lora.prompts import Question

MOST_LINES = 8  # of the question, and of each answer
COLUMNS = 3  # panels in a row, at most
WIDEST, LETTERS = 1600, 16  # pixels: a page, and the height of all its letters
GAP = LETTERS * 8 // 5 // 2  # between panels, as `panels` leaves it
TRUTH = "truth"


def page_of(
    question: Question, said: Sequence[tuple[str, str]], processor: IsaacProcessor
) -> Pixels:
    """The page of a question, with the true answer as the last one where there is one.

    Args:
        said: (who answers, answer) each.

    Raises:
        DataError: a picture that cannot be read any more.
    """
    if question.answer is not None:
        said = [*said, (TRUTH, question.answer)]
    pictures = [picture.read() for picture in question.pictures(processor)]
    return page(pictures, question.line, said)


def page(pictures: Sequence[Pixels], question: str, said: Sequence[tuple[str, str]]) -> Pixels:
    """Pictures below each other, a panel of each for every answer; then all texts.

    Answers without any tag share one panel. Pictures are enlarged or made smaller, so that the
    panels of a row fit in `WIDEST` pixels.

    Args:
        pictures: uint8 [H, W, 3] each. A tag that names none of several means the last one.
        said: (who answers, answer) each.

    Returns:
        uint8 [H', W', 3].
    """
    several, last = len(pictures) > 1, len(pictures) - 1
    has_tags = any(parse(text).tags for _, text in said)
    panels = said if has_tags else [("", "")]
    parts = []
    for number, picture in enumerate(pictures):
        strip = picture.shape[1] > 2 * picture.shape[0]
        columns = 1 if strip else min(COLUMNS, len(panels))
        answers = [(who, _of_last(text, number == last)) for who, text in panels]
        title, asset = (f"image {number}", number) if several else ("", None)
        part = sheet(
            fitted(picture, columns), answers, title, asset, columns=columns, letters=LETTERS
        )
        parts.append(part)
    width = max([SMALLEST, *(part.shape[1] for part in parts)])
    parts.append(text_block([("question", question), *said], width))
    return np.concatenate([_widened(part, width) for part in parts])


def fitted(picture: Pixels, columns: int) -> Pixels:
    """The picture in the size in which it is drawn: so many fit beside each other on a page.

    Args:
        picture: uint8 [H, W, 3].

    Returns:
        uint8 [H', W', 3].
    """
    height, width = picture.shape[:2]
    room, longer = (WIDEST - GAP) // columns - GAP, max(height, width)
    scale = min(max(1, SMALLEST / longer), LARGEST / longer, room / width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC))


def _of_last(text: str, is_last: bool) -> str:
    """An answer whose tags without a picture are left out, but for the last picture."""
    if is_last:
        return text
    from isaac_lora.answers.tags import write

    return write(tag for tag in parse(text).tags if tag.asset is not None)


def _widened(part: Pixels, width: int) -> Pixels:
    missing = width - part.shape[1]
    return np.pad(part, ((0, 0), (0, missing), (0, 0)), constant_values=PAPER[0])


# -- texts -----------------------------------------------------------------------------------------


def text_block(texts: Sequence[tuple[str, str]], width: int) -> Pixels:
    """Texts with who says them, in lines of `width` pixels; uint8 [h, width, 3]."""
    letters = max(16, width // 96)
    font, line, gap = ImageFont.load_default(size=letters), letters * 8 // 5, letters * 4 // 5
    margin = gap + max(round(font.getlength(f"{who}  ")) for who, _ in texts)
    rows = list[tuple[str, str]]()  # who, where its text begins; a line of the text
    for who, text in texts:
        lines = wrapped(one_line(text), font, width - margin - gap) or [""]
        rows += zip([one_line(who), *[""] * (len(lines) - 1)], lines, strict=True)
    block = Image.new("RGB", (width, len(rows) * line + 2 * gap), PAPER)
    pen = ImageDraw.Draw(block)
    for number, (who, text) in enumerate(rows):
        y = gap + number * line
        pen.text((gap, y), who, fill=INK, font=font)
        pen.text((margin, y), text, fill=INK, font=font)
    return np.asarray(block)


def wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """A text in at most `MOST_LINES` lines of `width` pixels; a longer word is cut into parts."""
    lines = [""]
    for word in text[: MOST_LINES * width].split(" "):  # no letter is narrower than a pixel
        longer = f"{lines[-1]} {word}" if lines[-1] else word
        if font.getlength(longer) <= width:
            lines[-1] = longer
            continue
        begun = lines if lines[-1] else []
        lines = [*begun, *_parts(word, font, width)]
        if len(lines) > MOST_LINES:
            return [*lines[: MOST_LINES - 1], f"{lines[MOST_LINES - 1][:-3]}..."]
    return lines


def _parts(
    word: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int
) -> Iterator[str]:
    """A word in parts that fit, of at least a letter each."""
    while word:
        fitting = range(1, min(len(word), width) + 1)
        count = bisect_right(fitting, width, key=lambda n: math.ceil(font.getlength(word[:n])))
        yield word[: max(count, 1)]
        word = word[max(count, 1) :]
