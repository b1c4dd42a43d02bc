"""Perceptron's tags: every published form is read, what is written is read back, nothing raises."""

from __future__ import annotations

import random
import time

import pytest

from isaac_lora.answers.tags import Tag, from_pixels, hint, parse, to_pixels, without_thought, write

BOX = Tag("box", ((808.0, 248.0), (863.0, 386.0)), "traffic light")


@pytest.mark.parametrize(
    ("text", "tag"),
    [
        ('<point_box mention="traffic light"> (808,248) (863,386) </point_box>', BOX),
        ('<point_box mention="traffic light" t="0.5">(808, 248), (863, 386)</point_box>', BOX),
        ('<box mention="traffic light">(808,248)(863,386)</box>', BOX),
        ("<POINT_BOX MENTION='traffic light'> (863,386) (808,248) </POINT_BOX>", BOX),
        ('<point_box mention="traffic light">(863,248) (808,386)</point_box>', BOX),
        ('<point mention="ball">(871,179)</point>', Tag("point", ((871, 179),), "ball")),
        ("<point mention=ball>(871.5,179)</point>", Tag("point", ((871.5, 179),), "ball")),
        ("<point> (0,1000) </point>", Tag("point", ((0, 1000),))),
        ('<point asset_idx="1"> (1,2) </point>', Tag("point", ((1, 2),), None, 1)),
        ('<point mention="a &quot;b&quot; &gt; c&#x27;s"> (1,2) </point>',
         Tag("point", ((1, 2),), "a \"b\" > c's")),
        ('<polygon mention="racket">(1,2) (3,4) (5,6)</polygon>',
         Tag("polygon", ((1, 2), (3, 4), (5, 6)), "racket")),
        ('<collection mention="dog" asset_idx="2"> <track> <point> (1,2) </point></track>'
         "</collection>", Tag("point", ((1, 2),), "dog", 2)),
        ('<collection mention="dog"> <point mention="cat"> (1,2) </point> </collection>',
         Tag("point", ((1, 2),), "cat")),
    ],
)  # fmt: skip
def test_published_forms_are_read(text: str, tag: Tag) -> None:
    assert parse(text) == ((tag,), "", ())


def test_words_stand_around_the_tags() -> None:
    text = f"No, it is not safe: {write([BOX])} the light\nis {write([BOX])} red."
    answer = parse(f"<think>\n\n</think>\n\n{text}")
    assert answer.words == "No, it is not safe: the light is red."
    assert answer.tags == (BOX, BOX)
    assert parse("a < b, x<y> and <points> are words").words == (
        "a < b, x<y> and <points> are words"
    )


def test_a_thought_is_no_answer() -> None:
    assert without_thought("<think>\n\n</think>\n\nYes.") == "\n\nYes."
    assert without_thought("Yes <think>.") == "Yes <think>."
    assert parse("<think>\nat <point> (1,2) </point> there is") == ((), "", ())


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("<point_box> (1,2) </point_box>", "<point_box> has 1 point, expected 2"),
        ("<point> </point>", "<point> has 0 points, expected 1"),
        ("<polygon>(1,2) (3,4)</polygon>", "<polygon> has 2 points, expected 3 or more"),
        ("<point> (1,1001) </point>", "<point> has a coordinate beyond 1000"),
        ("<point> (-1,5) </point>", "<point> holds something other than (x,y)"),
        ("<point> (1e9,5) </point>", "<point> holds something other than (x,y)"),
        ("<point> (nan,5) </point>", "<point> holds something other than (x,y)"),
        ("<point> 1,5 </point>", "<point> holds something other than (x,y)"),
        ("<point> (1,2) left </point>", "<point> holds something other than (x,y)"),
        ("<point> (1,2)", "<point> has no </point>"),
        ("(1,2) </point>", "</point> closes nothing"),
        ('<point mention="x', "<point is not closed by >"),
        ("</point_bo", ""),
        ("<collection> ", "<collection> has no </collection>"),
        ("</collection>", "</collection> closes nothing"),
    ],
)
def test_a_damaged_tag_is_counted_and_its_neighbours_are_kept(text: str, reason: str) -> None:
    answer = parse(f"{write([BOX])} {text}")
    assert answer.tags == (BOX,)
    assert answer.damaged == ((reason,) if reason else ())


def test_a_tag_that_is_not_closed_spares_the_next_one() -> None:
    answer = parse(f"<point> (1,2) {write([BOX])} and <point_box> (3,4) {write([BOX])}")
    assert answer.tags == (BOX, BOX)
    assert answer.damaged == ("<point> has no </point>", "<point_box> has no </point_box>")
    cut = parse(f'<collection mention="light"> {write([BOX])} <point_box> (1,2)')
    assert cut.tags == (BOX,)
    assert len(cut.damaged) == 2


def test_what_is_written_is_read_back() -> None:
    mentions = (None, "", "bolt", 'a "b" & <c>', "driver's seat", "螺栓", "</point>", "a=b")
    tags = [
        Tag(kind, points, mention, asset)
        for kind, points in (
            ("point", ((1.0, 2.5),)),
            ("box", ((0.0, 0.0), (1000.0, 999.0))),
            ("polygon", ((1.0, 2.0), (3.0, 4.0), (5.0, 1.0))),
        )
        for mention in mentions
        for asset in (None, 3)
    ]
    assert parse(write(tags)) == (tuple(tags), "", ())
    assert write([BOX]) == '<point_box mention="traffic light"> (808,248) (863,386) </point_box>'
    assert hint("box") == "<hint>BOX</hint>"


def test_pixels_are_shares_of_width_and_height() -> None:
    assert to_pixels(((0, 0), (500, 250), (1000, 1000)), (400, 200)) == [
        (0, 0),
        (100, 100),
        (200, 400),
    ]
    for size in ((480, 640), (3000, 4000), (1000, 7)):
        assert from_pixels("box", to_pixels(BOX.points, size), size, BOX.mention) == BOX


def test_pixels_are_rounded_and_cut_and_a_box_keeps_an_area() -> None:
    cut = from_pixels("box", [(-5, 20.4), (120, 10)], (100, 100))
    assert cut.points == ((0, 100), (1000, 204))
    for x in (0, 1234.5, 8000):
        (x0, y0), (x1, y1) = from_pixels("box", [(x, x), (x + 1, x + 1)], (8000, 8000)).points
        assert (x1 - x0, y1 - y0) == (1, 1)
        assert 0 <= x0 < x1 <= 1000


def test_no_output_of_a_model_raises() -> None:
    pieces = [
        "<point", ">", "</point>", "<point_box ", 'mention="', '"', "(1,2)", "(", "999999999999",
        ")", "<collection>", "</collection>", "</", " ", "a=", "&#9999999999;", "\ud800", "\0",
        "<polygon>", "</polygon>", "<think>", "</think>", "'", "/", "<box>", "</box>",
    ]  # fmt: skip
    chance = random.Random(0)
    for _ in range(1000):
        text = "".join(chance.choices(pieces, k=chance.randint(1, 30)))
        answer = parse(text)
        assert parse(write(answer.tags)).tags == answer.tags


@pytest.mark.parametrize(
    "text",
    [
        '<point "' * 5000, "<point mention=" * 5000, "<point>(1,2) " * 5000,
        "<point>" + " " * 200_000, "<point a=" + "b" * 200_000, "<point " + "a" * 200_000 + "=",
        "<collection mention=a>" * 5000 + "<point>(1,2)</point>" * 1000,
        "<collection " * 5000 + '"', "<think>" * 20_000, "<point>" + "(1,2)" * 20_000,
    ],
    ids=range(10),  # the texts would be their names
)  # fmt: skip
def test_hostile_text_takes_no_time(text: str) -> None:
    began = time.process_time()
    parse(text)
    assert time.process_time() - began < 1
