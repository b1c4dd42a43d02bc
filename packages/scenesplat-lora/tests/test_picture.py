"""Pictures of scenes: who covers whom, where up is, how far one sees, and what is left out."""

from __future__ import annotations

import numpy as np
import pytest

from scenesplat_lora.picture import (
    AZIMUTHS,
    BORDER,
    MOST_REACH,
    NO_LABEL,
    REACH,
    WIDTH,
    best_azimuth,
    class_colours,
    label_colours,
    painted,
    project,
    scene_sheet,
    shown,
    view,
    visible,
)

UPRIGHT = np.array([np.sqrt(0.5), np.sqrt(0.5), 0, 0])  # (w, x, y, z): turns z to -y


def scene_of(coord, scale=0.01, quat=(1, 0, 0, 0)) -> dict:
    coord = np.asarray(coord, np.float32).reshape(-1, 3)
    rows = len(coord)
    return {
        "coord": coord,
        "scale": np.broadcast_to(np.float32(scale), (rows, 3)),
        "quat": np.broadcast_to(np.float32(quat), (rows, 4)),
        "opacity": np.ones((rows, 1), np.float32),
        "color": np.zeros((rows, 3), np.float32),
    }


def plane(x=(-1, 1), y=(-1, 1), z=(0, 0), step=0.05) -> np.ndarray:
    axes = [np.arange(low, high + step / 2, step) for low, high in (x, y, z)]
    return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)


PER_METRE = 200  # pixels
FRAME = 2 * PER_METRE + 1 + 2 * BORDER  # pixels of what is from -1 to 1 m
MIDDLE = PER_METRE + BORDER
CORNERS = ((-1, -1, 0), (1, 1, 0), (-1, 1, 0), (1, -1, 0))  # keep the frame


def test_the_nearer_gaussian_covers_the_farther() -> None:
    coord = np.array([*CORNERS, (0, 0, 0), (0, 0, 1)], np.float32)
    for rows in (np.arange(6), np.arange(6)[::-1]):
        seen = visible(scene_of(coord[rows], scale=0.05), elevation=90, width=101)
        middle = seen.shape[0] // 2, seen.shape[1] // 2
        assert rows[seen[middle]] == 5  # seen from above


def test_up_in_the_scene_is_up_in_the_picture_and_right_is_right() -> None:
    slope = np.stack([np.linspace(0, 1, 50), np.zeros(50), np.linspace(0, 1, 50)], axis=1)
    seen = visible(scene_of(slope, scale=0.001), elevation=0, width=60)
    rows, columns = np.nonzero(seen >= 0)
    order = np.argsort(seen[rows, columns])
    assert seen.shape[0] == 60
    assert (np.diff(columns[order]) > 0).all()
    assert (np.diff(rows[order]) < 0).all()


@pytest.mark.parametrize(("azimuth", "right"), [(0, (1, 0, 0)), (90, (0, 1, 0)), (180, (-1, 0, 0))])
def test_the_viewer_goes_round_from_the_south_to_the_east(azimuth, right) -> None:
    axes = view(azimuth, 30)
    assert np.allclose(axes @ axes.T, np.eye(3))
    assert np.linalg.det(axes) == pytest.approx(1)
    assert np.allclose(axes[0], right, atol=1e-12)
    assert axes[1, 2] > 0
    assert axes[2, 2] > 0


def test_an_ellipse_has_the_outline_of_its_gaussian() -> None:
    coord = [*CORNERS, (0, 0, 0)]
    quat = [np.cos(np.pi / 6), 0, 0, np.sin(np.pi / 6)]  # 60 degrees to the left
    scene = scene_of(coord, scale=(0.02, 0.01, 0.001), quat=quat)
    seen = visible(scene, elevation=90, width=FRAME)
    rows, columns = np.nonzero(seen == 4)
    away = np.stack([columns, -rows], axis=1) - MIDDLE * np.array([1, -1])
    turn = np.radians(60)
    away = away / PER_METRE
    along = away @ (np.cos(turn), np.sin(turn))
    across = away @ (-np.sin(turn), np.cos(turn))
    assert ((along / 0.02) ** 2 + (across / 0.01) ** 2).max() < REACH**2 * 1.1
    area = np.pi * REACH**2 * 0.02 * 0.01 * PER_METRE**2  # pixels
    assert len(rows) == pytest.approx(area, rel=0.1)


def test_a_flat_gaussian_is_a_line_from_its_side() -> None:
    coord = [(-1, 0, -1), (1, 0, 1), (0, 0, 0)]
    scale = (0.02, 0.02, 0.0001)
    lying = visible(scene_of(coord, scale), elevation=0, width=FRAME) == 2
    standing = visible(scene_of(coord, scale, UPRIGHT), elevation=0, width=FRAME) == 2
    assert np.ptp(np.nonzero(lying)[0]) == 0
    assert np.ptp(np.nonzero(standing)[0]) == np.ptp(np.nonzero(standing)[1]) == 16


def test_huge_gaussians_are_bounded_and_tiny_ones_are_a_pixel() -> None:
    scene = scene_of([*CORNERS, (0, 0, 0)], scale=0.0001)
    scene["scale"] = scene["scale"].copy()
    scene["scale"][4] = 50
    seen = visible(scene, elevation=90, width=FRAME)
    rows, columns = np.nonzero(seen == 4)
    assert np.ptp(rows) == np.ptp(columns)
    assert np.ptp(rows) == pytest.approx(2 * MOST_REACH * FRAME, abs=2)
    assert np.count_nonzero(seen == 0) == 1


def test_gaussians_far_away_do_not_shrink_the_scene() -> None:
    floor = plane()
    away = np.concatenate([floor, [(500, 0, 0), (0, -300, 0)]])
    near, far = (project(scene_of(c), 0, 90, 200) for c in (floor, away))
    assert far.shape[0] == pytest.approx(near.shape[0], rel=0.05)
    spread = [np.ptp(e.column[np.argsort(e.order)][: len(floor)]) for e in (near, far)]
    assert spread[1] > 0.75 * spread[0]


@pytest.mark.parametrize(
    ("wall", "good"),
    [
        ({"y": (-1, -1)}, {115.0, 205.0}),  # not over the wall in the south: 25 and 295 do
        ({"y": (1, 1)}, {25.0, 295.0}),
        ({"x": (1, 1)}, {205.0, 295.0}),
    ],
)
def test_one_looks_into_a_room_where_it_has_no_wall(wall, good) -> None:
    room = np.concatenate([plane(), plane(**wall, z=(0, 2))])
    assert best_azimuth(scene_of(room, scale=0.03)) in good


def test_ceilings_and_faint_gaussians_are_not_drawn() -> None:
    z = np.repeat([0.0, 1.0, 2.5], 10)
    scene = {
        "coord": np.stack([np.zeros(30), np.zeros(30), z], axis=1),
        "opacity": np.tile([0.9, 0.01], 15)[:, None],
    }
    assert np.array_equal(shown(scene, 0.8), (z < 2) & (scene["opacity"][:, 0] > 0.5))


def test_a_scene_of_faint_gaussians_is_drawn_as_it_is() -> None:
    scene = scene_of(plane())
    scene["opacity"] = np.full_like(scene["opacity"], 0.01)
    assert shown(scene, 0.8).all()


def test_classes_have_different_colours() -> None:
    colours = class_colours(100).astype(int)
    assert len(np.unique(colours, axis=0)) == 100
    few = class_colours(12).astype(int)
    apart = np.abs(few[:, None] - few[None]).sum(-1) + 1000 * np.eye(12)
    assert apart.min() > 30
    assert label_colours(np.array([-1]), 3).tolist() == [list(NO_LABEL)]


def test_nothing_is_white_and_colours_are_those_of_the_gaussians() -> None:
    seen = np.array([[-1, 1], [0, 1]])
    color = np.array([[10, 20, 30], [300, -5, 7.9]])
    assert painted(seen, color).tolist() == [
        [[255, 255, 255], [255, 0, 7]], [[10, 20, 30], [255, 0, 7]],
    ]  # fmt: skip


def test_panels_of_a_sheet_show_the_same_gaussians_and_names_of_what_is_there() -> None:
    scene = scene_of(plane(), scale=0.03) | {"name": "office"}
    one = np.zeros(len(scene["coord"]), np.int64)
    sheets = [
        scene_sheet(scene, panels, ("wall", "floor", "lamp"), width=200)
        for panels in ([("a", one)], [("a", one), ("b", one + 1)], [("a", one), ("b", one)])
    ]
    colours = class_colours(3)
    counts = [[(sheet == colour).all(-1).sum() for colour in colours] for sheet in sheets]
    assert counts[0][1] == counts[0][2] == counts[1][2] == 0
    patch = 2 * counts[0][0] - counts[2][0]  # of the legend; the sheets differ by one panel
    assert counts[1][0] == counts[1][1] == counts[0][0]
    assert 0 < patch < counts[0][0] / 4
    assert sheets[1].shape[1] - sheets[0].shape[1] >= 200


def test_a_sheet_is_as_wide_as_its_panels() -> None:
    scene = scene_of(plane(), scale=0.03)
    labels = np.zeros(len(scene["coord"]), np.int64)
    assert scene_sheet(scene, [("a", labels)], ["wall"]).shape[1] > 2 * WIDTH
    assert len(AZIMUTHS) == 4
