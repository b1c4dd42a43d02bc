"""Generated pictures and questions: what they promise about distances, and nothing by chance."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from isaac_lora import demo, demo_questions
from isaac_lora.conversations.records import read_conversations
from isaac_lora.demo_scenes import (
    COLOURS,
    HEIGHT,
    PLACES,
    RIBS,
    SHAPES,
    SIZES,
    WIDTH,
    Box,
    Scene,
    Style,
    scene,
)

FEW = {"train": 3, "val": 1, "test": 2}
FEWER = Style(sizes=True, ribs=False, count=(1, 3))


def box(place: str, shape: str, colour: str, nearness: float) -> Box:
    x = WIDTH / 6 * (2 * PLACES.index(place) + 1)
    return Box(place, shape, colour, nearness, (x, HEIGHT / 2), 10.0, 6.0, 0.5, 0.0, 0.5)


def three() -> Scene:
    boxes = (
        box("left", "circle", "red", 0.65),
        box("middle", "cross", "blue", 0.35),
        box("right", "ring", "green", 0.95),
    )
    return Scene(boxes, (0.8, 0.9), 0)


# -- pictures --------------------------------------------------------------------------------------


def test_a_scene_is_a_function_of_its_seed() -> None:
    first, again, other = (scene((1, n), RIBS) for n in (0, 0, 1))
    assert first == again
    assert np.array_equal(first.picture(), again.picture())
    assert not np.array_equal(first.picture(), other.picture())
    assert first.picture().shape == (HEIGHT, WIDTH, 3)


@pytest.mark.parametrize(
    ("style", "tells", "does_not"), [(SIZES, "half", "period"), (RIBS, "period", "half")]
)
def test_one_property_tells_the_distance_and_the_other_does_not(style, tells, does_not) -> None:
    scenes = [scene((2, n), style) for n in range(300)]
    first = {"half": 0, "period": 0}
    for one in scenes:
        nearest = max(one.boxes, key=lambda box: box.nearness)
        for name in first:
            first[name] += max(one.boxes, key=lambda box: getattr(box, name)) is nearest
    assert first[tells] == len(scenes)
    assert first[does_not] / len(scenes) == pytest.approx(1 / 3, abs=0.1)


def test_boxes_stand_apart_inside_the_picture() -> None:
    for n in range(100):
        boxes = scene((3, n), FEWER).boxes
        edges = [(b.centre[0] - b.half, b.centre[0] + b.half) for b in boxes]
        assert all(right <= left for (_, right), (left, _) in pairwise(edges))
        assert edges[0][0] >= 0
        assert edges[-1][1] <= WIDTH
        assert all(1.3 * b.half <= min(b.centre[1], HEIGHT - b.centre[1]) for b in boxes)
        assert [PLACES.index(b.place) for b in boxes] == [
            int(b.centre[0] * 3 / WIDTH) for b in boxes
        ]


def test_signs_have_their_colour_and_shape() -> None:
    picture = three().picture() / 255
    centres = [tuple(int(value) for value in b.centre) for b in three().boxes]
    middles = [picture[y, x] for x, y in centres]
    assert middles[0] == pytest.approx(COLOURS["red"], abs=0.1)
    assert middles[1] == pytest.approx(COLOURS["blue"], abs=0.1)
    assert np.ptp(middles[2]) < 0.15  # a ring: the grey of the box
    x, y = centres[2]
    assert picture[y, x + 5] == pytest.approx(COLOURS["green"], abs=0.1)


def test_all_shapes_look_different_and_are_about_as_large() -> None:
    blue = []
    for shape in SHAPES:
        one = Scene((box("middle", shape, "blue", 0.5),), (0.8, 0.8), 0)
        values = one.picture().astype(int)
        blue.append((values[..., 2] - values[..., 0]) > 80)
    areas = [mask.sum() for mask in blue]
    assert max(areas) < 2.2 * min(areas)
    for number, mask in enumerate(blue):
        assert all((mask ^ other).sum() > 25 for other in blue[:number])


def test_the_depth_is_that_of_the_box_or_of_the_wall() -> None:
    depth = three().depth()
    assert depth.shape == (HEIGHT, WIDTH)
    for b in three().boxes:
        x, y = (int(value) for value in b.centre)
        assert depth[y - 8 : y + 8, x - 8 : x + 8] == pytest.approx(b.nearness)
    assert not depth[:8].any()


# -- questions -------------------------------------------------------------------------------------


def test_answers_are_what_the_scene_shows() -> None:
    found = {(q.kind, q.text): q.answer for q in demo_questions.questions(three())}
    assert found["shape", "Which shape is in the middle?"] == "cross"
    assert found["shape", "Which shape is green?"] == "ring"
    assert found["colour", "Which colour is on the left?"] == "red"
    assert found["colour", "Which colour is the cross?"] == "blue"
    assert found["place", "Where is the ring?"] == "right"
    assert found["place", "Where is the red shape?"] == "left"
    assert found["nearest", "Which shape is nearest?"] == "ring"
    assert found["nearest", "Which shape is farthest?"] == "cross"
    assert {kind for kind, _ in found} == set(demo_questions.KINDS)
    assert len(found) == 3 * 6 + 2


def test_the_words_for_the_tokenizer_are_those_of_all_questions() -> None:
    known = " ".join(demo_questions.words())
    for n in range(50):
        for question in demo_questions.questions(scene((4, n), FEWER)):
            assert all(f" {word}" in f" {known}" for word in question.text.split(" "))
            assert question.answer in demo_questions.words()


# -- files -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return demo.write(tmp_path_factory.mktemp("demo") / "data", FEW)


def content(folder: Path) -> dict[Path, bytes]:
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_same_call_writes_the_same_files(folder: Path, tmp_path: Path) -> None:
    assert content(demo.write(tmp_path / "again", FEW)) == content(folder)


def test_every_split_asks_what_depth_must_answer_about_its_pictures(folder: Path) -> None:
    for split, count in FEW.items():
        reading = read_conversations(folder / f"{split}.json")
        assert not reading.bad
        assert len(reading.records) == 2 * count
        for number, one in enumerate(reading.records):
            made = demo.scene_of(split, number // 2)
            with Image.open(folder / demo.IMAGES / one.images[0]) as picture:
                assert np.array_equal(np.asarray(picture), made.picture())
            asked = demo_questions.nearness(made)[number % 2]
            assert [turn.text for turn in one.turns] == [f"<image>{asked.text}", asked.answer]


def test_records_have_the_form_of_the_guide(folder: Path) -> None:
    first = json.loads((folder / "train.json").read_text("utf-8"))[0]
    assert set(first) == {"id", "image", "conversations"}
    assert [turn["from"] for turn in first["conversations"]] == ["human", "gpt"]


def test_no_picture_is_in_two_splits() -> None:
    made = {demo.scene_of(split, n).picture().tobytes() for split in demo.SPLITS for n in range(20)}
    assert len(made) == 20 * len(demo.SPLITS)
