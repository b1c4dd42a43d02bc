"""A picture of ratios: a line for each case, a dot on it for each method, logarithmic."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

Rows = Sequence[tuple[str, Mapping[str, float]]]

SCALE = 3  # drawn so much larger and made smaller, for smooth edges
WIDTH, LEFT, RIGHT = 960, 290, 30  # of the picture, of the names of the cases, of the margin
LINE, HEAD = 24, 46  # heights of a case and of a title
DOT = 6  # radius
FONT = 14
TICKS = (0.8, 1, 1.25, 1.5, 2, 3, 4, 6, 8, 12)
COLOURS = ("#9a9a9a", "#d9822b", "#1668b5")  # of methods; ours, the last one, lies on top
INK, GRID, ONE = "#222222", "#dddddd", "#222222"


def draw(title: str, panels: Sequence[tuple[str, Rows]], path: Path) -> None:
    """Write the picture.

    Args:
        panels: title and rows of each; a row is a name and method -> ratio. The first row has all
            methods, three at most.
    """
    values = [v for _, rows in panels for _, one in rows for v in one.values()]
    low = max(tick for tick in TICKS if tick <= min(*values, 1))
    high = min([tick for tick in TICKS if tick >= max(values)] or [max(values)])

    def x(value: float) -> float:
        share = math.log(value / low) / math.log(high / low)
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    height = HEAD + 30 + sum(HEAD + LINE * len(rows) + 24 for _, rows in panels)
    canvas = _Canvas(WIDTH, height)
    canvas.text(WIDTH / 2, 16, title, "mm")
    methods = list(panels[0][1][0][1])
    for number, method in enumerate(methods):
        place = LEFT + 190 * number
        canvas.dot(place, 44, COLOURS[number])
        canvas.text(place + 12, 44, method, "lm")
    top = HEAD + 24
    for name, rows in panels:
        canvas.text(LEFT, top + 18, name, "lm")
        top += HEAD - 10
        bottom = top + LINE * len(rows)
        for tick in TICKS:
            if low <= tick <= high:
                canvas.line(x(tick), top, x(tick), bottom, ONE if tick == 1 else GRID)
                canvas.text(x(tick), bottom + 12, f"{tick:g}", "mm")
        for number, (case, one) in enumerate(rows):
            y = top + LINE * (number + 0.5)
            canvas.text(LEFT - 12, y, case, "rm")
            canvas.line(x(min(one.values())), y, x(max(one.values())), y, GRID)
            for method, value in sorted(one.items(), key=lambda item: methods.index(item[0])):
                canvas.dot(x(value), y, COLOURS[methods.index(method)])
        top = bottom + 34
    canvas.save(path)


class _Canvas:
    """A white picture, in units of its final pixels."""

    def __init__(self, width: int, height: int) -> None:
        self.picture = Image.new("RGB", (width * SCALE, height * SCALE), "white")
        self.draw = ImageDraw.Draw(self.picture)
        self.font = ImageFont.load_default(FONT * SCALE)

    def text(self, x: float, y: float, text: str, anchor: str) -> None:
        self.draw.text((x * SCALE, y * SCALE), text, INK, self.font, anchor)

    def line(self, x0: float, y0: float, x1: float, y1: float, colour: str) -> None:
        self.draw.line([v * SCALE for v in (x0, y0, x1, y1)], colour, SCALE)

    def dot(self, x: float, y: float, colour: str) -> None:
        self.draw.circle((x * SCALE, y * SCALE), DOT * SCALE, colour)

    def save(self, path: Path) -> None:
        width, height = self.picture.size
        small = self.picture.resize((width // SCALE, height // SCALE), Image.Resampling.LANCZOS)
        small.quantize(64).save(path, optimize=True)
