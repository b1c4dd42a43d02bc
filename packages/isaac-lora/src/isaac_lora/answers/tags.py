"""Perceptron's pointing tags: places in a picture, written into an answer.

    <point mention="ball"> (871,179) </point>
    <point_box mention="traffic light"> (808,248) (863,386) </point_box>
    <polygon mention="racket"> (1,2) (30,4) (5,60) </polygon>
    <collection mention="bolt"> <point> (1,2) </point> <point> (3,4) </point> </collection>

Coordinates (x,y) are 0 to 1000 of the picture's width and height, (0,0) its top left corner.
These are the forms that Perceptron publishes (the model's card, and the `perceptron` package); more
are understood: `<box>`, commas between the pairs, fractions, corners in any order, attributes with
other quotes or none. What a `<collection>` or `<track>` says of itself, its children inherit.

A model's output may hold anything. A tag that means nothing is passed over and named in
`Answer.damaged`; nothing raises.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from lora_core.report import plural

SCALE = 1000  # of coordinates
Kind = Literal["point", "box", "polygon"]
Point = tuple[float, float]  # x, y
Size = tuple[int, int]  # (height, width) of a picture in pixels

SHAPES: dict[str, Kind] = {
    "point": "point",
    "point_box": "box",
    "box": "box",
    "polygon": "polygon",
}
WRITTEN = {"point": "point", "box": "point_box", "polygon": "polygon"}
POINTS = {"point": (1, 1), "box": (2, 2), "polygon": (3, 10**6)}  # at least and at most
HINTS = {"point": "POINT", "box": "BOX", "polygon": "POLYGON"}
CONTAINERS = ("collection", "track")
ATTRIBUTES = ("mention", "asset_idx")  # others, such as the time in a video, are passed over

# Possessive quantifiers (*+): no text, however hostile, is gone through twice.
_NAMES = "|".join(sorted([*SHAPES, *CONTAINERS], key=len, reverse=True))
_TAG = re.compile(
    rf"""<(?P<slash>/?)(?P<name>{_NAMES})\b(?P<rest>(?P<attributes>(?:[^<>"]|"[^"]*")*+)>)?""",
    re.IGNORECASE,
)
_ATTRIBUTE = re.compile(r"""([\w-]++)\s*+=\s*+(?:"([^"]*)"|'([^']*)'|([^\s"'/]++))""")
_NUMBER = r"([0-9]{1,9}(?:\.[0-9]{1,9})?)"
_PAIR = re.compile(rf"\(\s*+{_NUMBER}\s*+,\s*+{_NUMBER}\s*+\)")
_BETWEEN = re.compile(r"[\s,;]*+")
_THOUGHT = re.compile(r"\s*<think>.*?(?:</think>|\Z)", re.DOTALL)


@dataclass(frozen=True)
class Tag:
    """A place in a picture.

    Attributes:
        points: (x, y) each, 0 to 1000: one of a point, top left and bottom right of a box, three
            or more of a polygon.
        mention: what is there; None: it does not say.
        asset: number of the picture among several, from 0; None: it does not say, which means the
            last one.
    """

    kind: Kind
    points: tuple[Point, ...]
    mention: str | None = None
    asset: int | None = None


class Answer(NamedTuple):
    """An answer's tags and words.

    Attributes:
        tags: in their order.
        words: the text around the tags, each run of blanks as one.
        damaged: for each tag that means nothing, what is wrong with it.
    """

    tags: tuple[Tag, ...]
    words: str
    damaged: tuple[str, ...]

    def of(self, kind: Kind) -> list[Tag]:
        """The tags of one kind."""
        return [tag for tag in self.tags if tag.kind == kind]


def parse(text: str) -> Answer:
    """Read an answer; a thinking block in front of it is left out."""
    text = without_thought(text)
    reader, words, end = _Reader(), list[str](), 0
    for found in _TAG.finditer(text):
        (reader.inner if reader.open else words).append(text[end : found.start()])
        end = found.end()
        reader.take(found)
    reader.finish()
    if not reader.open:
        words.append(text[end:])
    return Answer(tuple(reader.tags), " ".join(" ".join(words).split()), tuple(reader.damaged))


def without_thought(text: str) -> str:
    """An answer without the `<think>...</think>` that the model writes in front of it.

    Where the output ends before the block does, nothing is left.
    """
    thought = _THOUGHT.match(text)
    return text[thought.end() :] if thought else text


@dataclass
class _Reader:
    """Goes through an answer from tag to tag.

    Attributes:
        open: name and attributes of the shape that is being read.
        inner: its text.
        around: name of each container around it, and what its children inherit.
    """

    open: tuple[str, dict[str, str]] | None = None
    inner: list[str] = field(default_factory=list)
    around: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    tags: list[Tag] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)

    def take(self, found: re.Match[str]) -> None:
        """Take one tag, `<name ...>` or `</name>`."""
        name, said = found["name"].lower(), _attributes(found["attributes"] or "")
        if found["rest"] is None:
            self.damaged.append(f"<{found['slash']}{name} is not closed by >")
        elif found["slash"]:
            self._close(name)
        elif name in CONTAINERS:
            self._drop_open()
            self.around.append((name, self._inherited() | said))
        else:
            self._drop_open()
            self.open = name, said

    def finish(self) -> None:
        """Name what the end of the text left open; tags inside of open containers are kept."""
        if self.open:
            self.damaged.append(f"<{self.open[0]}> has no </{self.open[0]}>")
        self.damaged += [f"<{name}> has no </{name}>" for name, _ in self.around]

    def _inherited(self) -> dict[str, str]:
        return self.around[-1][1] if self.around else {}

    def _drop_open(self) -> None:
        if self.open:
            self.damaged.append(f"<{self.open[0]}> has no </{self.open[0]}>")
        self.open = None
        self.inner.clear()

    def _close(self, name: str) -> None:
        if self.open and self.open[0] == name:
            self._add(name, self.open[1], "".join(self.inner))
            self.open = None
            self.inner.clear()
            return
        self._drop_open()
        if self.around and self.around[-1][0] == name:
            self.around.pop()
        else:
            self.damaged.append(f"</{name}> closes nothing")

    def _add(self, name: str, said: dict[str, str], body: str) -> None:
        kind, points = SHAPES[name], _points(body)
        wrong = _problem(kind, points)
        if wrong or points is None:
            self.damaged.append(f"<{name}> {wrong}")
            return
        said = self._inherited() | said
        asset = said.get("asset_idx", "")
        number = int(asset) if re.fullmatch("[0-9]{1,9}", asset) else None
        self.tags.append(Tag(kind, ordered(kind, points), said.get("mention"), number))


def _attributes(text: str) -> dict[str, str]:
    return {
        name: html.unescape(found[2] or found[3] or found[4] or "")
        for found in _ATTRIBUTE.finditer(text)
        if (name := found[1].lower()) in ATTRIBUTES
    }


def _points(body: str) -> list[Point] | None:
    """The pairs of a tag's text; None if there is anything else in it."""
    points, place = list[Point](), _end_of_gap(body, 0)
    while place < len(body):
        found = _PAIR.match(body, place)
        if found is None:
            return None
        points.append((float(found[1]), float(found[2])))
        place = _end_of_gap(body, found.end())
    return points


def _end_of_gap(body: str, place: int) -> int:
    gap = _BETWEEN.match(body, place)
    return gap.end() if gap else place


def _problem(kind: Kind, points: list[Point] | None) -> str:
    if points is None:
        return "holds something other than (x,y)"
    if max((value for point in points for value in point), default=0) > SCALE:
        return f"has a coordinate beyond {SCALE}"
    least, most = POINTS[kind]
    if least <= len(points) <= most:
        return ""
    expected = f"{least} or more" if most > least else str(least)
    return f"has {plural(len(points), 'point')}, expected {expected}"


def ordered(kind: Kind, points: Sequence[Point]) -> tuple[Point, ...]:
    """The points of a tag; of a box the top left and the bottom right corner."""
    if kind != "box":
        return tuple(points)
    (x0, y0), (x1, y1) = points
    return (min(x0, x1), min(y0, y1)), (max(x0, x1), max(y0, y1))


# -- writing ---------------------------------------------------------------------------------------


def write(tags: Iterable[Tag]) -> str:
    """Tags as Perceptron writes them, with blanks between; `parse` gives them back."""
    return " ".join(map(_written, tags))


def _written(tag: Tag) -> str:
    name, said = WRITTEN[tag.kind], ""
    if tag.mention is not None:
        said += f' mention="{quoted(tag.mention)}"'
    if tag.asset is not None:
        said += f' asset_idx="{tag.asset}"'
    pairs = " ".join(f"({x:.9g},{y:.9g})" for x, y in tag.points)
    return f"<{name}{said}> {pairs} </{name}>"


def quoted(mention: str) -> str:
    """A mention as it stands in a tag: &, <, > and " escaped, apostrophes as they are."""
    return html.escape(mention, quote=False).replace('"', "&quot;")


def hint(kind: Kind) -> str:
    """What a user says to be answered with tags of a kind: `<hint>BOX</hint>`."""
    return f"<hint>{HINTS[kind]}</hint>"


# -- pixels ----------------------------------------------------------------------------------------


def to_pixels(points: Iterable[Point], size: Size) -> list[Point]:
    """Points of tags in pixels, not rounded: (0, 0) is the top left corner of the first pixel,
    (width, height) the bottom right corner of the last."""
    height, width = size
    return [(x * width / SCALE, y * height / SCALE) for x, y in points]


def from_pixels(kind: Kind, points: Iterable[Point], size: Size, mention: str | None = None) -> Tag:
    """A tag for points in pixels; coordinates are rounded, and cut at the edges of the picture.

    A box keeps a width and a height of 1 at least, however small it is in a large picture.
    """
    height, width = size
    scaled = [(_rounded(x, width), _rounded(y, height)) for x, y in points]
    if kind == "box":
        (x0, y0), (x1, y1) = ordered("box", scaled)
        (x0, x1), (y0, y1) = _apart(x0, x1), _apart(y0, y1)
        scaled = [(x0, y0), (x1, y1)]
    return Tag(kind, tuple(scaled), mention)


def _rounded(value: float, extent: int) -> float:
    return float(min(max(round(value * SCALE / extent), 0), SCALE))


def _apart(low: float, high: float) -> Point:
    if low < high:
        return low, high
    low = min(low, SCALE - 1)
    return low, low + 1
