"""Answers drawn on their picture, side by side: boxes with their mentions, points, polygons.

A mention has one colour in all answers of a picture; a tag without one is white, and called by its
number in the answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from isaac_lora.answers.tags import Answer, Tag, parse, to_pixels
from lora_core.errors import one_line
from lora_core.pictures.encodings import decode_polygon
from lora_core.pictures.overlay import PALETTE, PAPER, Colour, draw, panels
from lora_core.report import plural

LONGEST = 40  # letters of a mention that are shown
FRAME = 0.012  # longer sides of the picture from a point to its frame, which a click fits into
KINDS = {"point": ("point", "points"), "box": ("box", "boxes"), "polygon": ("polygon", "polygons")}

Pixels = NDArray[np.uint8]


def sheet(
    rgb: Pixels,
    answers: Sequence[tuple[str, str]],
    title: str = "",
    asset: int | None = None,
    *,
    columns: int | None = None,
    letters: int | None = None,
) -> Pixels:
    """Panels of one picture, one for each answer, with a legend of the mentions; uint8 [H', W', 3].

    Args:
        rgb: uint8 [H, W, 3].
        answers: (who answers, answer) each: ("base", "..."), ("adapted", "..."), ("truth", "...").
        title: a line above all panels.
        asset: the picture's number, if it is one of several: only tags of this picture are drawn,
            and those that name none.
        columns, letters: as for `panels`.
    """
    read = [(who, _of_picture(parse(text), asset)) for who, text in answers]
    colours = colours_of(tag for _, answer in read for tag in answer.tags)
    pictures = [(counted(who, answer), drawn(rgb, answer.tags, colours)) for who, answer in read]
    legend = [(short(name), tint) for name, tint in colours.items()]
    return panels(pictures, one_line(title), legend, columns=columns, letters=letters)


def drawn(rgb: Pixels, tags: Sequence[Tag], colours: Mapping[str, Colour] | None = None) -> Pixels:
    """The picture with tags; uint8 [H', W', 3], enlarged or made smaller as `draw` does.

    Args:
        rgb: uint8 [H, W, 3].
        colours: of mentions; None: `colours_of` the tags.
    """
    colours = colours_of(tags) if colours is None else colours
    size = (rgb.shape[0], rgb.shape[1])
    # Mask, box and caption of one number have one colour; polygons come first, for their masks.
    order = sorted(enumerate(tags, start=1), key=lambda pair: pair[1].kind != "polygon")
    placed = [(tag, to_pixels(tag.points, size)) for _, tag in order]
    rings = [np.array(corners) for tag, corners in placed if tag.kind == "polygon"]
    clicks = [corners[0] for tag, corners in placed if tag.kind == "point"]
    return draw(
        rgb,
        (decode_polygon([ring], size).mask for ring in rings),
        boxes=[_place(tag, corners, FRAME * max(size)) for tag, corners in placed],
        points=[(x - 0.5, y - 0.5) for x, y in clicks],  # `draw` counts from the pixel's centre
        colours=[colours.get(tag.mention or "", PAPER) for tag, _ in placed] or PALETTE,
        captions=[short(tag.mention or str(number)) for number, tag in order],
    )


def _place(
    tag: Tag, corners: Sequence[tuple[float, float]], half: float
) -> tuple[float, float, float, float]:
    """The box that is drawn, beside which the caption stands: of a point a frame around it, of a
    polygon its highest corner.

    Args:
        half: pixels from a point to its frame.
    """
    if tag.kind == "box":
        return (*corners[0], *corners[1])
    if tag.kind == "point":
        x, y = corners[0]
        return x - half, y - half, x + half, y + half
    top = min(corners, key=lambda corner: (corner[1], corner[0]))
    return (*top, *top)


def _of_picture(answer: Answer, asset: int | None) -> Answer:
    if asset is None:
        return answer
    return answer._replace(tags=tuple(t for t in answer.tags if t.asset in (None, asset)))


def colours_of(tags: Iterable[Tag]) -> dict[str, Colour]:
    """A colour for each mention, in their order; from the first one again after the last."""
    names = dict.fromkeys(tag.mention for tag in tags if tag.mention)
    return {name: PALETTE[number % len(PALETTE)] for number, name in enumerate(names)}


def counted(who: str, answer: Answer) -> str:
    """A panel's caption: "adapted: 3 boxes, 1 point, 1 damaged tag"."""
    counts = {kind: len(answer.of(kind)) for kind in ("box", "point", "polygon")}
    said = [f"{n} {KINDS[kind][n != 1]}" for kind, n in counts.items() if n]
    if answer.damaged:
        said.append(plural(len(answer.damaged), "damaged tag"))
    return f"{one_line(who)}: {', '.join(said)}" if said else one_line(who)


def short(mention: str) -> str:
    """A mention as it is written on pictures: one line of at most `LONGEST` letters."""
    mention = one_line(mention)
    return mention if len(mention) <= LONGEST else f"{mention[: LONGEST - 3]}..."
