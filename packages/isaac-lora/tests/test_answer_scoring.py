"""Scores of answers against numbers worked out by hand, and their properties."""

from __future__ import annotations

import random
import time
from collections import Counter

import numpy as np
import pytest

from isaac_lora.answers.scoring import (
    anls,
    box_iou,
    exact_match,
    figures,
    levenshtein,
    point_distances,
    pointing_hits,
    polygon_iou,
    score,
)
from isaac_lora.answers.tags import Tag, write


def box(x0: float, y0: float, x1: float, y1: float, mention: str | None = "cup") -> Tag:
    return Tag("box", ((x0, y0), (x1, y1)), mention)


def point(x: float, y: float, mention: str | None = "cup") -> Tag:
    return Tag("point", ((x, y),), mention)


def polygon(*points: tuple[float, float]) -> Tag:
    return Tag("polygon", points, "cup")


def scored(*pairs: tuple[str, str], size: tuple[int, int] = (1000, 1000)) -> dict[str, float]:
    sums: Counter[str] = Counter()
    for predicted, truth in pairs:
        sums.update(score(predicted, truth, size))
    return figures(sums)


# -- words -----------------------------------------------------------------------------------------


def test_a_match_is_exact_but_for_case_blanks_and_the_full_stop() -> None:
    assert exact_match(" The  red\nCup. ", "the red cup")
    assert exact_match("Cafe\u0301", "café")
    assert not exact_match("the red cups", "the red cup")
    assert not exact_match("1.5", "15")


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [
        ("kitten", "sitting", 3),
        ("", "abc", 3),
        ("abc", "", 3),
        ("flaw", "lawn", 2),
        ("aé", "ae", 1),
    ],
)
def test_levenshtein_counts_edits(a: str, b: str, distance: int) -> None:
    assert levenshtein(a, b) == distance == levenshtein(b, a)


def test_levenshtein_is_that_of_the_plain_recursion() -> None:
    chance = random.Random(0)
    for _ in range(200):
        a, b = ("".join(chance.choices("abc", k=chance.randint(0, 9))) for _ in range(2))
        table = [[max(i, j) for j in range(len(b) + 1)] for i in range(len(a) + 1)]
        for i in range(1, len(a) + 1):
            for j in range(1, len(b) + 1):
                swap = table[i - 1][j - 1] + (a[i - 1] != b[j - 1])
                table[i][j] = min(table[i - 1][j] + 1, table[i][j - 1] + 1, swap)
        assert levenshtein(a, b) == table[-1][-1]


def test_anls_is_similarity_above_one_half() -> None:
    assert anls("sitting", "Sitting.") == 1
    assert anls("sittin", "sitting") == pytest.approx(1 - 1 / 7)
    assert anls("abcd", "abxx") == 0  # half of the letters differ
    assert anls("abcde", "abcxx") == pytest.approx(0.6)
    assert anls("", "") == 1
    assert anls("", "a") == anls("a" * 10**6, "a") == 0


def test_words_are_scored_without_the_tags_and_the_thought() -> None:
    said = f"<think>\n\n</think>\n\nThe cup {write([box(1, 1, 9, 9)])} is left."
    assert scored((said, "The cup is left."), ("No.", "Yes.")) == {
        "exact_match": 0.5, "anls": 0.5, "damaged_tags": 0,
    }  # fmt: skip


def test_an_answer_of_tags_alone_is_not_counted_for_words() -> None:
    tags = write([box(0, 0, 10, 10)])
    assert scored((tags, tags)) == {"box_iou": 1, "box_f1": 1, "damaged_tags": 0}
    assert scored(("", "")) == {"exact_match": 1, "anls": 1}


# -- boxes -----------------------------------------------------------------------------------------


def test_box_iou_is_that_of_areas() -> None:
    a = np.array([[0, 0, 10, 10], [0, 0, 0, 0], [20, 20, 30, 40]], dtype=float)
    b = np.array([[5, 0, 15, 10], [0, 0, 10, 10]], dtype=float)
    assert box_iou(a, b) == pytest.approx(np.array([[1 / 3, 1], [0, 0], [0, 0]]))
    assert box_iou(a, np.zeros((0, 4))).shape == (3, 0)


def test_boxes_are_paired_so_that_the_sum_is_largest() -> None:
    truth = [box(0, 0, 10, 10), box(5, 0, 15, 10)]
    said = [box(3, 0, 13, 10), box(9, 0, 19, 10)]
    values = box_iou(
        np.array([[3, 0, 13, 10], [9, 0, 19, 10]], dtype=float),
        np.array([[0, 0, 10, 10], [5, 0, 15, 10]], dtype=float),
    )
    # Taking the best pair first would leave the other box with next to nothing.
    assert values[0, 1] > values[0, 0] > 0
    expected = (values[0, 0] + values[1, 1]) / 2
    assert scored((write(said), write(truth)))["box_iou"] == pytest.approx(expected)
    assert scored((write(said[::-1]), write(truth)))["box_iou"] == pytest.approx(expected)


def test_missing_and_superfluous_boxes_count_as_nothing() -> None:
    one, other = box(0, 0, 10, 10), box(50, 50, 60, 60)
    assert scored((write([one]), write([one, other])))["box_iou"] == 0.5
    assert scored((write([one, other]), write([one])))["box_iou"] == 0.5
    assert scored((write([one, other]), write([one])))["box_f1"] == pytest.approx(2 / 3)
    assert scored(("none", write([one]))) == {"box_iou": 0, "box_f1": 0}
    assert scored((write([one]), "nothing there"), (write([one]), write([one])))["box_iou"] == 0.5


def test_another_mention_is_no_pair() -> None:
    truth = write([box(0, 0, 10, 10, "red cup")])
    assert scored((write([box(0, 0, 10, 10, "Red  cup.")]), truth))["box_iou"] == 1
    assert scored((write([box(0, 0, 10, 10, None)]), truth))["box_iou"] == 1
    assert scored((write([box(0, 0, 10, 10, "cup")]), truth))["box_iou"] == 0
    first, second = (f'<point_box asset_idx="{n}"> (0,0) (9,9) </point_box>' for n in (0, 1))
    assert scored((first, second))["box_iou"] == 0


def test_damaged_tags_are_a_share_of_those_said() -> None:
    said = f"{write([box(0, 0, 9, 9)])} <point_box> (1,2) </point_box> </point> <point> (1,"
    found = scored((said, write([box(0, 0, 9, 9)])))
    assert found == {"box_iou": 1, "box_f1": 1, "damaged_tags": 0.75}


# -- polygons --------------------------------------------------------------------------------------


def test_polygon_iou_is_that_of_areas_at_any_size() -> None:
    for scale in (1.0, 20.0):
        square = polygon((0, 0), (0, 10 * scale), (10 * scale, 10 * scale), (10 * scale, 0))
        half = polygon((0, 0), (10 * scale, 0), (10 * scale, 10 * scale))
        shifted = polygon(*((x + 5 * scale, y) for x, y in square.points))
        assert polygon_iou(square, square) == 1
        assert polygon_iou(square, half) == pytest.approx(1 / 2, abs=0.01)
        assert polygon_iou(square, shifted) == pytest.approx(1 / 3, abs=0.01)
    assert polygon_iou(square, polygon((900, 900), (910, 900), (910, 910))) == 0
    assert polygon_iou(*[polygon((5, 5), (5, 5), (5, 5))] * 2) == 0
    assert scored((write([half]), write([square])))["polygon_iou"] == pytest.approx(0.5, abs=0.01)


# -- points ----------------------------------------------------------------------------------------


def test_distances_are_in_diagonals_of_the_picture() -> None:
    found = point_distances([point(0, 0), point(1000, 0)], [point(1000, 1000)], (300, 400))
    assert found == pytest.approx(np.array([[1.0], [300 / 500]]))


def test_points_hit_near_points_boxes_and_polygons() -> None:
    arrow = polygon((100, 100), (300, 100), (300, 300), (200, 150))
    targets = [point(120, 110), box(100, 100, 200, 200), arrow]
    points = [point(130, 140), point(100, 200), point(290, 200), point(150, 100), point(240, 250)]
    assert pointing_hits(points, targets, (100, 100)).tolist() == [
        [1, 1, 0],
        [0, 1, 0],
        [0, 0, 1],
        [1, 1, 1],
        [0, 0, 0],
    ]


def test_a_point_is_inside_a_polygon_where_its_pixels_are() -> None:
    chance = random.Random(1)
    for _ in range(20):
        corners = [(float(chance.randint(0, 99)), float(chance.randint(0, 99))) for _ in range(6)]
        shape = polygon(*corners)
        for _ in range(20):
            x, y = chance.randint(0, 98) + 0.37, chance.randint(0, 98) + 0.41
            crossings = sum(
                (ya > y) != (yb > y) and x < xa + (y - ya) * (xb - xa) / (yb - ya)
                for (xa, ya), (xb, yb) in zip(corners, corners[1:] + corners[:1], strict=True)
            )
            assert pointing_hits([point(x, y)], [shape], (9, 9))[0, 0] == crossings % 2


def test_pointing_accuracy_counts_hits_one_to_one() -> None:
    truth = write([point(100, 100), point(500, 500)])
    found = scored((write([point(110, 100), point(105, 100)]), truth))
    assert found["pointing_accuracy"] == 0.5
    assert found["point_distance"] == pytest.approx(
        (5 + np.hypot(390, 400)) / 2 / np.hypot(1000, 1000)
    )
    assert scored((write([point(100, 100)] * 4), truth))["pointing_accuracy"] == 0.25
    assert scored(("nowhere", truth)) == {"pointing_accuracy": 0}


def test_pointing_at_things_that_are_drawn_is_the_pointing_game() -> None:
    truth = write([box(0, 0, 100, 100), box(500, 500, 600, 600)])
    found = scored((write([point(50, 50)]), truth))
    assert (found["pointing_accuracy"], found["box_iou"]) == (0.5, 0)
    assert "point_distance" not in found
    assert "pointing_accuracy" not in scored((truth, truth))


# -- sums ------------------------------------------------------------------------------------------


def test_sums_of_parts_are_the_sums_of_all() -> None:
    answers = [
        ("Yes.", "yes"),
        (write([box(0, 0, 9, 9)]), write([box(0, 0, 9, 18)])),
        (write([point(1, 1)]), write([point(5, 5), point(9, 9)])),
        ("", write([polygon((0, 0), (9, 0), (9, 9))])),
    ]
    whole: Counter[str] = Counter()
    for pair in answers:
        whole.update(score(*pair))
    first, second = Counter(score(*answers[0])), Counter[str]()
    for pair in answers[1:]:
        second.update(score(*pair))
    assert figures(first + second) == pytest.approx(figures(whole))
    assert figures({}) == {}


@pytest.mark.parametrize("kind", ["", "<point_box> (1,", "</point>" * 50, "<think>", "\ud800"])
def test_any_output_has_a_score(kind: str) -> None:
    truth = f"The cup {write([box(0, 0, 9, 9), point(3, 3), polygon((0, 0), (9, 0), (9, 9))])}"
    found = scored((kind, truth))
    assert found["box_iou"] == found["pointing_accuracy"] == found["polygon_iou"] == 0


def test_answers_of_many_things_are_scored_in_no_time() -> None:
    chance = random.Random(0)

    def some(count: int) -> str:
        tags = []
        for _ in range(count):
            x, y = chance.randint(0, 980), chance.randint(0, 980)
            tags += [box(x, y, x + 20, y + 20), polygon((x, y), (x + 20, y), (x, y + 20))]
        return write(tags)

    began = time.process_time()
    score(some(100), some(100))
    assert time.process_time() - began < 3
