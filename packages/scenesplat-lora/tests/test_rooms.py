"""The generated rooms: they are sound scenes, and what they say about themselves is true."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from scenesplat_lora.demo_base import furniture, rooms
from scenesplat_lora.scenes.files import read_scene, write_scene
from scenesplat_lora.scenes.scene import row_wise

STYLES = {"day": rooms.DAY, "night": rooms.NIGHT}


@pytest.fixture(scope="module")
def some() -> dict[str, list[dict]]:
    return {name: [rooms.room((7, i), style) for i in range(8)] for name, style in STYLES.items()}


def surfaces(room: dict) -> dict:
    """Without floaters."""
    return {name: value[room["instance"] >= 0] for name, value in room.items()}


@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
def test_a_room_is_a_function_of_its_seed(style) -> None:
    first, again, other = (rooms.room(seed, style) for seed in ((1, 2), (1, 2), (1, 3)))
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert len(first["coord"]) != len(other["coord"])


@pytest.mark.parametrize("name", STYLES)
def test_a_room_is_read_back_as_it_was_written_and_nothing_is_repaired(
    some, name, tmp_path
) -> None:
    room = some[name][0]
    write_scene(tmp_path / "room", room)
    notes: list[str] = []
    found = read_scene(tmp_path / "room", wanted=("normal", "lang_feat", "segment"), notes=notes)
    assert notes == []
    assert set(row_wise(found)) == set(room)
    for key in set(room) - {"color", "scale"}:
        assert np.array_equal(found[key], room[key]), key
    assert np.abs(found["color"] - room["color"]).max() <= 0.5
    assert np.array_equal(found["scale"], np.clip(room["scale"], 1e-4, 1))


def test_both_styles_are_the_same_rooms(some) -> None:
    for day, night in zip(some["day"], some["night"], strict=True):
        seen = surfaces(night)
        assert np.array_equal(seen["segment"], day["segment"])
        assert np.array_equal(seen["normal"], day["normal"])
        assert np.abs(seen["coord"] - day["coord"]).max() < 0.15
        assert 0.03 < 1 - len(seen["coord"]) / len(night["coord"]) < 0.05


def test_the_night_is_dim_thin_and_of_another_hue(some) -> None:
    day, night = (
        {key: np.concatenate([surfaces(room)[key] for room in some[name]]) for key in some[name][0]}
        for name in STYLES
    )
    assert night["color"].mean() < 0.7 * day["color"].mean()
    for name, by_day, by_night in (("wall", 0.88, 0.71), ("window", 0.29, 0.12)):
        rows = day["segment"] == rooms.CLASSES.index(name)
        assert abs(day["opacity"][rows].mean() - by_day) < 0.02
        assert abs(night["opacity"][rows].mean() - by_night) < 0.02
    floor = day["segment"] == rooms.CLASSES.index("floor")
    assert day["color"][floor].mean(0).argmax() == 0
    assert night["color"][floor].mean(0).argmax() == 1


def test_gaussians_lie_flat_in_their_surfaces(some) -> None:
    for room in some["day"]:
        quat = room["quat"]
        turned = Rotation.from_quat(quat[:, [1, 2, 3, 0]]).apply((0, 0, 1))
        assert np.abs(turned - room["normal"]).max() < 1e-5
        assert (quat[:, 0] >= 0).all()
        assert (room["scale"][:, 2] < room["scale"][:, :2].min(1)).mean() > 0.99


def test_surfaces_look_outwards_and_walls_into_the_room(some) -> None:
    for room in some["day"]:
        name = np.array(rooms.CLASSES)[room["segment"]]
        floor, walls = np.isin(name, ["floor", "rug"]), np.isin(name, ["wall", "door", "window"])
        assert (room["normal"][floor] == (0, 0, 1)).all()
        assert ((room["coord"] * room["normal"])[walls].sum(1) < -1).all()
        for number in np.unique(room["instance"][name == "cabinet"]):
            rows = room["instance"] == number
            middle = (room["coord"][rows].min(0) + room["coord"][rows].max(0)) / 2
            outwards = ((room["coord"][rows] - middle) * room["normal"][rows]).sum(1)
            assert (outwards > 0.1).all()


def test_furniture_stands_in_the_room_and_apart(some) -> None:
    for room in some["day"]:
        name = np.array(rooms.CLASSES)[room["segment"]]
        half = np.abs(room["coord"][np.isin(name, ["floor", "rug"]), :2]).max(0)
        boxes = []
        for number in np.unique(room["instance"][np.isin(name, list(furniture.PIECES))]):
            place = room["coord"][room["instance"] == number, :2]
            assert (np.abs(place) < half).all()
            boxes.append((place.min(0), place.max(0)))
        assert len(boxes) >= 2
        for i, (low, high) in enumerate(boxes):
            for other_low, other_high in boxes[:i]:
                assert ((low > other_high) | (other_low > high)).any()


@pytest.mark.parametrize("quarter", range(4))
def test_a_turned_piece_has_its_back_where_its_place_expects_it(quarter) -> None:
    rng = np.random.default_rng(0)
    points = rooms._moved(furniture.chair(rng).points, quarter, np.zeros(2))
    back = points.coord[points.coord[:, 2] > 0.6].mean(0)
    assert np.allclose(back[:2] / 0.2, ((0, -1), (1, 0), (0, 1), (-1, 0))[quarter], atol=0.25)


def test_all_classes_occur_and_the_rarest_not_too_rarely(some) -> None:
    counts = np.bincount(np.concatenate([room["segment"] for room in some["day"]]))
    assert len(counts) == len(rooms.CLASSES)
    assert (counts / counts.sum()).min() > 0.005


def test_language_vectors_say_the_class(some) -> None:
    texts = rooms.text_vectors()
    for room in some["night"]:
        rows = room["valid_feat_mask"]
        found = (room["lang_feat"][rows].astype(np.float32) @ texts.T).argmax(1)
        assert (found == room["segment"][rows]).mean() > 0.99
        assert np.allclose(np.linalg.norm(room["lang_feat"][rows], axis=1), 1, atol=2e-3)
        assert not room["lang_feat"][~rows].any()
        assert not rows[room["segment"] < 0].any()


def test_related_words_have_closer_vectors() -> None:
    texts = rooms.text_vectors()
    near = texts @ texts.T
    group = {name: number for number, names in enumerate(rooms.GROUPS) for name in names}
    same = np.array([[group[a] == group[b] for b in rooms.CLASSES] for a in rooms.CLASSES])
    others = ~np.eye(len(texts), dtype=bool)
    assert np.allclose(near.diagonal(), 1, atol=1e-6)
    assert np.allclose(near[same & others], 0.2, atol=1e-6)
    assert np.abs(near[~same]).max() < 1e-6


def test_hues_turn_around_grey() -> None:
    turn = rooms.hue_rotation(120)
    assert np.allclose(turn @ (1, 0, 0), (0, 1, 0))  # red becomes green
    assert np.allclose(rooms.hue_rotation(50) @ (1, 1, 1), 1)
    assert np.allclose(rooms.hue_rotation(0), np.eye(3))


def test_held_out_rooms_are_their_own() -> None:
    found = [len(room["coord"]) for room in rooms.held_out(4)]
    assert len(set(found)) == 4
    assert found == [len(rooms.room((rooms.HELD_OUT_SEED, i, 0))["coord"]) for i in range(4)]
