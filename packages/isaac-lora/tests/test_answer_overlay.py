"""Tags are drawn where they say, in the colours of their mentions."""

from __future__ import annotations

import numpy as np
import pytest

from isaac_lora.answers.overlay import colours_of, counted, drawn, sheet, short
from isaac_lora.answers.page import WIDEST, fitted, page
from isaac_lora.answers.tags import Tag, parse, write
from lora_core.pictures.overlay import BACKGROUND, FOREGROUND, PALETTE, PAPER

GREY = np.full((400, 800, 3), 128, dtype=np.uint8)  # as large as it is drawn
BOX = Tag("box", ((100.0, 250.0), (500.0, 750.0)), "cup")
POINT = Tag("point", ((750.0, 500.0),), "ball")
TRIANGLE = Tag("polygon", ((600.0, 100.0), (900.0, 100.0), (900.0, 900.0)), "flag")


def where(picture: np.ndarray, colour: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """x0, y0, x1, y1 around the pixels of a colour."""
    rows, columns = np.nonzero((picture == colour).all(-1))
    return columns.min(), rows.min(), columns.max(), rows.max()


def test_a_box_is_drawn_at_its_share_of_the_picture() -> None:
    picture = drawn(GREY, [BOX])
    assert picture.shape == GREY.shape
    x0, _, x1, y1 = where(picture[80:], PALETTE[0])
    assert (x0, x1) == pytest.approx((80, 400), abs=1)
    assert y1 + 80 == pytest.approx(300, abs=1)
    assert (picture[200, 200] == 128).all()
    assert (picture[200, 80:83] == PALETTE[0]).all(-1).any()


def test_a_point_is_drawn_around_its_place() -> None:
    picture = drawn(GREY, [POINT])
    x0, y0, x1, y1 = where(picture, FOREGROUND)
    assert ((x0 + x1 + 1) / 2, (y0 + y1 + 1) / 2) == pytest.approx((600, 200), abs=1)
    assert not (picture == BACKGROUND).all(-1).any()
    x0, _, x1, y1 = where(picture[201:], PALETTE[0])  # its frame, in the colour of the mention
    assert (x0, x1, y1 + 201) == pytest.approx((590, 610, 210), abs=1)


def test_a_tag_without_a_mention_is_white_and_numbered() -> None:
    picture = drawn(GREY, [BOX, Tag("box", ((600, 600), (800, 800)))])
    x0, _, x1, y1 = where(picture[250:], PAPER)
    assert (x0, x1, y1 + 250) == pytest.approx((480, 640, 320), abs=1)


def test_a_polygon_is_tinted_inside_alone() -> None:
    picture = drawn(GREY, [BOX, TRIANGLE]).astype(int)
    assert abs(picture[100, 680] - 128).max() > 20  # inside
    assert (picture[300, 520] == 128).all()  # left of its slanted side
    assert (picture[150, 200] == 128).all()  # in the box, which has no mask
    # Its colour is that of the second mention, the box's that of the first.
    assert where(picture, PALETTE[1])[0] == pytest.approx(480, abs=2)
    assert where(picture[150:], PALETTE[0])[0] == pytest.approx(80, abs=2)


def test_a_mention_has_one_colour_in_all_answers() -> None:
    cup, ball = Tag("box", BOX.points, "cup"), Tag("box", BOX.points, "ball")
    assert colours_of([cup, ball, cup]) == {"cup": PALETTE[0], "ball": PALETTE[1]}
    colours = colours_of([ball, cup])
    picture = drawn(GREY, [cup], colours)
    assert not (picture == colours["ball"]).all(-1).any()
    assert (picture == colours["cup"]).all(-1).any()


def test_answers_stand_side_by_side_with_a_legend() -> None:
    answers = [("base", "I see nothing."), ("adapted", write([BOX, POINT])), ("truth", "<point>")]
    alone = sheet(GREY, answers[:1])
    together = sheet(GREY, answers, "a\npicture.jpg")
    assert together.shape[1] > 3 * GREY.shape[1]
    assert together.shape[0] > alone.shape[0]  # title and legend
    # The base draws nothing: its panel has no colour of a mention.
    assert not (together[:440, : GREY.shape[1]] == PALETTE[0]).all(-1).any()
    assert (together[:440, GREY.shape[1] :] == PALETTE[0]).all(-1).any()


def test_answers_stand_in_rows_of_three_on_a_page_that_can_be_read() -> None:
    box = write([BOX])
    few, many = (page([GREY], "What?", [("who", box)] * n) for n in (3, 5))
    assert WIDEST - 8 < many.shape[1] == few.shape[1] <= WIDEST
    height = fitted(GREY, 3).shape[0]
    assert height < many.shape[0] - few.shape[0] < 2 * height  # a second row, and two answers
    middles = [column * WIDEST // 3 + WIDEST // 6 for column in range(3)]
    below = many[few.shape[0] - height // 2 : few.shape[0]]
    drawn_there = [(below[:, x - 200 : x + 200] == 128).all(-1).any() for x in middles]
    assert drawn_there == [True, True, False]


@pytest.mark.parametrize("shape", [(1, 1), (48, 64), (3000, 2000), (400, 801), (10, 4000)])
def test_no_page_is_wider_than_it_may_be(shape: tuple[int, int]) -> None:
    picture = np.zeros((*shape, 3), dtype=np.uint8)
    for count in (1, 2, 3, 5):
        assert page([picture, picture], "What?", [("who", write([BOX]))] * count).shape[1] <= WIDEST
        place = fitted(picture, min(count, 3))
        assert drawn(place, []).shape == place.shape  # which is not enlarged again


def test_captions_count_what_an_answer_holds() -> None:
    assert counted("base", parse("nothing")) == "base"
    answer = parse(f"{write([BOX, BOX, POINT, TRIANGLE])} <point>")
    assert counted("adapted", answer) == "adapted: 2 boxes, 1 point, 1 polygon, 1 damaged tag"


def test_of_several_pictures_each_shows_its_own() -> None:
    first, second = Tag("box", BOX.points, "a", 0), Tag("box", BOX.points, "b", 1)
    text = write([first, second, second])
    pictures = [sheet(GREY, [("x", text)], asset=asset) for asset in (0, 1)]
    assert (pictures[0] == sheet(GREY, [("x", write([first]))])).all()
    assert (pictures[1] == sheet(GREY, [("x", write([second, second]))])).all()


@pytest.mark.fault("H32", "H47")
def test_any_mention_and_any_picture_can_be_drawn() -> None:
    assert short("a\x1b[2J\nb") == "a\\x1b[2J\\nb"
    assert len(short("x" * 500)) == 40
    mentions = ["%s{0}", "</b>", "x" * 500, "", "螺栓", "a\0b"]
    tags = [Tag(t.kind, t.points, m) for m in mentions for t in (BOX, POINT, TRIANGLE)]
    edges = [
        Tag("point", ((0, 0),)), Tag("point", ((1000, 1000),)), Tag("box", ((0, 0), (1000, 1000))),
        Tag("box", ((5, 5), (5, 5))), Tag("polygon", ((9, 9), (9, 9), (9, 9))),
    ]  # fmt: skip
    for shape in ((1, 1), (1, 300), (300, 1), (30, 40)):
        assert drawn(np.zeros((*shape, 3), dtype=np.uint8), [*tags, *edges]).ndim == 3
    assert drawn(GREY, []).shape == GREY.shape
