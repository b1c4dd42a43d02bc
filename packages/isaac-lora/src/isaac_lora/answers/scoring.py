"""How right answers are: sums over answers, and the figures that follow from them.

    sums = Counter()
    for predicted, truth, size in answers:
        sums.update(score(predicted, truth, size))
    figures(sums)          # {"exact_match": 0.75, "anls": 0.81, "box_iou": 0.63, ...}

Sums of several batches or processes add up to those of all, so that figures do not depend on how
the answers were divided. A figure is missing where the truth has nothing for it.

    exact_match        share of answers whose words are those of the truth
    anls               average normalised Levenshtein similarity of the words
    box_iou            mean IoU of boxes: sum over pairs / max(boxes said, true boxes)
    box_f1             2 pairs / (boxes said + true boxes), of pairs with an IoU of 0.5 or more
    polygon_iou        as box_iou, of polygons
    pointing_accuracy  points said that hit / max(points said, true things)
    point_distance     mean distance of pairs of points, in diagonals of the picture
    damaged_tags       share of the tags said that mean nothing

Words are what stands around the tags; an answer of tags alone is not counted for them. Things are
paired one to one so that the sum of what is compared is as large as it can be (Hungarian
algorithm); things with different mentions, or of different pictures, are no pair. What is missing
counts as 0, and so does what is superfluous.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from isaac_lora.answers.tags import SCALE, Answer, Size, Tag, parse, to_pixels
from lora_core.pictures.encodings import decode_polygon

Values = NDArray[np.float64]

ANLS_THRESHOLD = 0.5  # Biten et al. 2019, "Scene Text Visual Question Answering", eq. 1
HIT = 0.5  # IoU from which on a box counts as found, as in Pascal VOC
TOLERANCE = 0.05  # diagonals of the picture: a point this near to the true one hits it
RASTER = 512  # pixels along the longer side of what two polygons cover together

RATIOS = {  # figure -> what is divided, by what, and what the truth must have
    "exact_match": ("exact", "texts", "texts"),
    "anls": ("anls", "texts", "texts"),
    "box_iou": ("box_iou", "most_boxes", "true_boxes"),
    "box_f1": ("boxes_in_hits", "boxes", "true_boxes"),
    "polygon_iou": ("polygon_iou", "most_polygons", "true_polygons"),
    "pointing_accuracy": ("hits", "most_points", "targets"),
    "point_distance": ("distance", "pairs", "pairs"),
    "damaged_tags": ("damaged", "tags", "tags"),
}


def score(predicted: str, truth: str, size: Size = (SCALE, SCALE)) -> dict[str, float]:
    """Sums for one answer, from which `figures` makes figures; none is negative.

    Args:
        predicted: what the model said.
        truth: what it should have said.
        size: (height, width) of the picture, for distances between points.
    """
    said, true = parse(predicted), parse(truth)
    return {
        "damaged": float(len(said.damaged)),
        "tags": float(len(said.tags) + len(said.damaged)),
        **_word_sums(said, true),
        **_box_sums(said, true),
        **_polygon_sums(said, true),
        **_pointing_sums(said, true, size),
    }


def figures(sums: Mapping[str, float]) -> dict[str, float]:
    """The figures that follow from sums over any number of answers."""
    return {
        name: sums.get(above, 0.0) / sums[below]
        for name, (above, below, needed) in RATIOS.items()
        if sums.get(needed)
    }


def _word_sums(said: Answer, true: Answer) -> dict[str, float]:
    if true.tags and not true.words:
        return {}
    words = said.words, true.words
    return {"texts": 1.0, "exact": float(exact_match(*words)), "anls": anls(*words)}


def _box_sums(said: Answer, true: Answer) -> dict[str, float]:
    mine, others = said.of("box"), true.of("box")
    values = paired(mine, others, box_iou(_corners(mine), _corners(others)))
    return {
        "box_iou": float(values.sum()),
        "most_boxes": float(max(len(mine), len(others))),
        "boxes_in_hits": 2.0 * float((values >= HIT).sum()),
        "boxes": float(len(mine) + len(others)),
        "true_boxes": float(len(others)),
    }


def _polygon_sums(said: Answer, true: Answer) -> dict[str, float]:
    mine, others = said.of("polygon"), true.of("polygon")
    values = np.array([[polygon_iou(a, b) for b in others] for a in mine])
    return {
        "polygon_iou": float(paired(mine, others, values).sum()),
        "most_polygons": float(max(len(mine), len(others))),
        "true_polygons": float(len(others)),
    }


def _pointing_sums(said: Answer, true: Answer, size: Size) -> dict[str, float]:
    """Points are compared with true points; where the truth draws boxes or polygons and the answer
    points instead, with those."""
    mine, targets = said.of("point"), true.of("point")
    if not targets and mine and len(mine) == len(said.tags):
        targets = list(true.tags)
    sums = {
        "hits": float(paired(mine, targets, pointing_hits(mine, targets, size)).sum()),
        "most_points": float(max(len(mine), len(targets))),
        "targets": float(len(targets)),
    }
    if all(tag.kind == "point" for tag in targets):
        near = 2 - point_distances(mine, targets, size)  # 1 to 2: no distance is above 1
        distances = 2 - paired(mine, targets, near)
        sums |= {"distance": float(distances.sum()), "pairs": float(len(distances))}
    return sums


# -- words -----------------------------------------------------------------------------------------


def plain(text: str) -> str:
    """What is compared of a text: NFC, lower case, single blanks, no full stop at the end."""
    words = " ".join(unicodedata.normalize("NFC", text).casefold().split())
    return words.removesuffix(".").rstrip()


def exact_match(predicted: str, truth: str) -> bool:
    """Whether two texts are equal, as `plain` has them."""
    return plain(predicted) == plain(truth)


def anls(predicted: str, truth: str) -> float:
    """Normalised Levenshtein similarity of two texts, as `plain` has them.

    s = 1 - d / max(|a|, |b|), and 0 where d / max(|a|, |b|) is `ANLS_THRESHOLD` or more
    (Biten et al. 2019, "Scene Text Visual Question Answering").
    """
    a, b = plain(predicted), plain(truth)
    longer = max(len(a), len(b))
    if not longer:
        return 1.0
    if abs(len(a) - len(b)) >= ANLS_THRESHOLD * longer:
        return 0.0  # the distance is the difference in length at least
    distance = levenshtein(a, b) / longer
    return 1.0 - distance if distance < ANLS_THRESHOLD else 0.0


def levenshtein(a: str, b: str) -> int:
    """The least number of letters to insert, delete or replace to make `b` of `a`.

    Row by row, D[i, j] = min(D[i-1, j] + 1, D[i-1, j-1] + [a_i != b_j], D[i, j-1] + 1); the last
    of them over a whole row is min over k <= j of (D[i, k] + j - k).
    """
    letters = np.array([ord(letter) for letter in b], dtype=np.int64)
    steps = np.arange(len(b) + 1)
    row = steps.copy()
    for number, letter in enumerate(a, start=1):
        above = np.minimum(row[1:] + 1, row[:-1] + (letters != ord(letter)))
        row = np.minimum.accumulate(np.concatenate([[number], above]) - steps) + steps
    return int(row[-1])


# -- things ----------------------------------------------------------------------------------------


def paired(mine: Sequence[Tag], others: Sequence[Tag], values: Values) -> Values:
    """The values of the pairs of the one-to-one assignment with the largest sum; all above 0.

    Args:
        values: [mine, others], 0 or more: how well each would fit each.
    """
    if not mine or not others:
        return np.zeros(0)
    values = np.where(_comparable(mine, others), values, 0.0)
    rows, columns = linear_sum_assignment(values, maximize=True)
    found: Values = values[rows, columns]
    return found[found > 0]


def _comparable(mine: Sequence[Tag], others: Sequence[Tag]) -> NDArray[np.bool_]:
    """Whether two tags may mean the same thing, [mine, others]: one that has no mention may mean
    anything, one that names no picture any picture."""
    mentions = [[plain(tag.mention or "") for tag in tags] for tags in (mine, others)]
    assets = [[tag.asset for tag in tags] for tags in (mine, others)]
    same = [[not a or not b or a == b for b in mentions[1]] for a in mentions[0]]
    here = [[None in (a, b) or a == b for b in assets[1]] for a in assets[0]]
    return np.array(same) & np.array(here)


def _corners(tags: Sequence[Tag]) -> Values:
    """[n, 4]: x0, y0, x1, y1."""
    return np.array([tag.points for tag in tags], dtype=np.float64).reshape(-1, 4)


def box_iou(a: Values, b: Values) -> Values:
    """Intersection over union of boxes, [n, m], 0 to 1; 0 where neither has an area.

    Args:
        a: [n, 4], x0, y0, x1, y1 with x0 <= x1 and y0 <= y1. b: [m, 4].
    """
    low = np.maximum(a[:, None, :2], b[None, :, :2])  # [n, m, 2]
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    common = (high - low).clip(min=0).prod(-1)
    areas = [(box[:, 2:] - box[:, :2]).prod(-1) for box in (a, b)]
    together = areas[0][:, None] + areas[1][None, :] - common
    return np.divide(common, together, out=np.zeros_like(common), where=together > 0)


def polygon_iou(a: Tag, b: Tag) -> float:
    """Intersection over union of two polygons, 0 to 1 (even-odd rule); 0 where neither has an area.

    Counted in pixels of a picture of what both cover, `RASTER` along its longer side.
    """
    rings = [np.array(tag.points, dtype=np.float64) for tag in (a, b)]
    lows, highs = ([find(ring, axis=0) for ring in rings] for find in (np.min, np.max))
    if (np.maximum(*lows) >= np.minimum(*highs)).any():
        return 0.0  # apart, as most pairs of a picture are
    low, high = np.minimum(*lows), np.maximum(*highs)
    extent = float((high - low).max())
    size = (RASTER, RASTER)
    masks = [decode_polygon([(ring - low) * (RASTER / extent)], size).mask for ring in rings]
    union = int((masks[0] | masks[1]).sum())
    return int((masks[0] & masks[1]).sum()) / union if union else 0.0


def point_distances(points: Sequence[Tag], others: Sequence[Tag], size: Size) -> Values:
    """Distances of points in the picture, [n, m], 0 to 1: in its diagonals.

    Args:
        size: (height, width) of the picture in pixels.
    """
    a, b = (
        np.array(to_pixels([tag.points[0] for tag in tags], size)).reshape(-1, 2)
        for tags in (points, others)
    )
    return np.linalg.norm(a[:, None] - b[None], axis=-1) / np.hypot(*size)


def pointing_hits(points: Sequence[Tag], targets: Sequence[Tag], size: Size) -> Values:
    """Whether each point hits each target, [n, m], 0 or 1.

    A box or a polygon is hit inside and on its border ("pointing game": Zhang et al. 2018,
    "Top-down Neural Attention by Excitation Backprop"), a point within `TOLERANCE` diagonals.
    """
    near = point_distances(points, targets, size) <= TOLERANCE
    hits = np.zeros((len(points), len(targets)))
    for row, point in enumerate(points):
        for column, target in enumerate(targets):
            is_hit = near[row, column] if target.kind == "point" else _inside(point, target)
            hits[row, column] = float(is_hit)
    return hits


def _inside(point: Tag, target: Tag) -> bool:
    """Whether a point lies in a box or a polygon (even-odd rule), or on its border."""
    (x, y), corners = point.points[0], target.points
    if target.kind == "box":
        (x0, y0), (x1, y1) = corners
        return x0 <= x <= x1 and y0 <= y <= y1
    odd = False
    for (xa, ya), (xb, yb) in zip(corners, (*corners[1:], corners[0]), strict=True):
        # Twice the signed area of the triangle of the edge and the point; 0: on its line.
        area = (xb - xa) * (y - ya) - (yb - ya) * (x - xa)
        if area == 0 and min(xa, xb) <= x <= max(xa, xb) and min(ya, yb) <= y <= max(ya, yb):
            return True
        if (ya > y) != (yb > y):
            odd ^= (area > 0) == (yb > ya)
    return odd
