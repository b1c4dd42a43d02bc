"""Which Gaussians a view sees, against slow exact code, known occlusion and generated rooms."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import made_scenes
import numpy as np
import posed_scenes
import pytest
import torch

from scenesplat_lora.demo_base import rooms
from scenesplat_lora.posed import back_projection, splat_depth
from scenesplat_lora.posed.back_projection import (
    Labelled,
    Sight,
    Votes,
    collect_votes,
    seen_from,
    unit_rows,
)
from scenesplat_lora.posed.pinhole import View
from scenesplat_lora.posed.splat_depth import depth_map, project, splats

# -- depth -----------------------------------------------------------------------------------------


def slow_depth(scene: dict[str, Any], view: View, size: tuple[int, int], k: float) -> np.ndarray:
    """The definition, Gaussian by Gaussian and pixel by pixel, in float64."""
    rows, columns = np.mgrid[: size[0], : size[1]] + 0.5
    light, depth = np.ones(size), np.full(size, np.inf)
    points = scene["coord"] @ view.rotation.T + view.translation
    for n in np.argsort(points[:, 2]):
        x, y, z = points[n]
        if z <= splat_depth.NEAR:
            continue
        f, c = np.array(view.focal) / k, np.array(view.centre) / k
        ratio = np.array([x, y]) / z
        limits = np.array(size[::-1])
        edge = np.clip(ratio, -1.3 * c / f, 1.3 * (limits - c) / f)
        affine = np.array([[f[0] / z, 0, -f[0] * edge[0] / z], [0, f[1] / z, -f[1] * edge[1] / z],
                           [0, 0, 1]])  # fmt: skip
        w, a, b, d = scene["quat"][n].astype(np.float64)
        turn = np.array([
            [w * w + a * a - b * b - d * d, 2 * (a * b - w * d), 2 * (a * d + w * b)],
            [2 * (a * b + w * d), w * w - a * a + b * b - d * d, 2 * (b * d - w * a)],
            [2 * (a * d - w * b), 2 * (b * d + w * a), w * w - a * a - b * b + d * d],
        ])  # fmt: skip
        spread = turn @ np.diag(scene["scale"][n].astype(np.float64) ** 2) @ turn.T
        seen = affine @ view.rotation @ spread @ view.rotation.T @ affine.T
        flat = seen[:2, :2] + 0.3 * np.eye(2)
        strength = scene["opacity"][n, 0] * math.sqrt(
            np.linalg.det(seen[:2, :2]) / np.linalg.det(flat)
        )
        offset = np.stack([columns, rows], axis=-1) - (f * ratio + c)
        solved = offset @ np.linalg.inv(flat)
        alpha = np.minimum(strength * np.exp(-0.5 * (solved * offset).sum(-1)), 0.99)
        alpha[alpha < 0.02] = 0
        after = light * (1 - alpha)
        here = (light > 0.5) & (after <= 0.5)
        depth[here] = (z / np.clip(1 - solved @ seen[2, :2] / z, 1 / 3, 3))[here]
        light = after
    return depth


@pytest.mark.parametrize("side", [32, 64])
def test_depth_is_that_of_the_definition(side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = made_scenes.made_scene(150, seed=3, side=1.0)
    scene["opacity"][:] = np.linspace(0.1, 1, 150)[:, None]
    view = posed_scenes.look((0.5, -0.6, 0.3), (0.4, 0.5, 0.1), size=(48, 64))
    k = 64 / side
    expected = slow_depth(scene, view, (round(48 / k), round(64 / k)), k)
    assert np.isfinite(expected).mean() > 0.2
    for fragments in (splat_depth.FRAGMENTS, 500):  # in one block, and in many
        monkeypatch.setattr(splat_depth, "FRAGMENTS", fragments)
        found = depth_map(splats(scene), view, side)
        assert found.per_pixel == k
        same = np.isclose(found.depth.numpy(), expected, atol=1e-3)
        assert same.mean() > 0.995, "but for pixels whose light is within rounding of a half"


def test_a_slanted_wall_has_its_own_depth_and_not_that_of_centres() -> None:
    """Discs of 20 cm in the plane y = 1: the depths of their centres are off by 40 cm."""
    scene = posed_scenes.plane(1, 3, 0.2, 0)
    view = posed_scenes.look((-1.5, 0, 0), (0.5, 1, 0))
    found = depth_map(splats(scene), view, 64).depth.numpy()
    row, column = np.mgrid[:48, :64] + 0.5
    ray = np.stack([(column - 32) / 50, (row - 24) / 50, np.ones_like(row)], -1) @ view.rotation
    off = np.abs(found - 1 / ray[..., 1])[14:34, 12:52]
    assert np.median(off) < 0.03


def test_nothing_opaque_has_no_depth() -> None:
    scene = posed_scenes.plane(1, 0.5, 0.05, 0)
    scene["opacity"][:] = 0.03
    view = posed_scenes.look((0, -1, 0), (0, 2, 0))
    found = depth_map(splats(scene), view, 64)
    assert bool(found.depth.isinf().all())
    assert bool((found.front == -1).all())
    rows, _ = seen_from(splats(scene), view, Sight(64))
    assert len(rows) == len(scene["coord"]), "through thin ones all are seen"


# -- visibility ------------------------------------------------------------------------------------


@pytest.mark.parametrize("x", [0.0, 0.6, -1.0])
def test_what_is_behind_the_small_wall_gets_nothing_and_the_rest_its_class(x: float) -> None:
    scene = posed_scenes.two_planes()
    view = posed_scenes.look((x, -1, 0.1), (0, 2, 0))
    labels = posed_scenes.plane_labels(view)
    votes = collect_votes(scene, [Labelled(view, labels, np.eye(2, dtype=np.float32))], Sight(64))
    features, valid = (np.concatenate(part) for part in zip(*votes.features(), strict=True))
    # Where the line from the eye to a Gaussian of the large wall passes y = 1.
    eye = np.array([x, -1, 0.1])
    past = eye + (scene["coord"] - eye) * ((1 - eye[1]) / (scene["coord"][:, 1] - eye[1]))[:, None]
    off = np.maximum(np.abs(past[:, 0]), np.abs(past[:, 2])) - 0.3  # beyond the small wall's rim
    far = scene["segment"] == 1
    pixel = 2 * 2 / 50  # metres per pixel at the small wall
    assert not valid[far & (off < -pixel)].any(), "hidden ones get nothing"
    _, place = project(torch.from_numpy(scene["coord"]).double(), view)
    inside = ((place > 0.01) & (place < torch.tensor([63.99, 47.99]))).all(dim=1).numpy()
    clear = inside & (~far | (off > pixel + 0.1))
    rim = np.abs(np.abs(scene["coord"][:, [0, 2]]).max(1) - np.where(far, 1.2, 0.3)) < 0.07
    sure = clear & ~rim
    assert sure[far].sum() > 100
    assert sure[~far].sum() > 100
    assert valid[sure].all(), "visible ones get a feature"
    assert np.array_equal(features[sure].argmax(1), scene["segment"][sure]), "of the right class"
    wrong = valid & (features.argmax(1) != scene["segment"])
    assert wrong[~rim].sum() == 0


def test_what_is_outside_or_behind_the_camera_is_not_seen() -> None:
    scene = posed_scenes.two_planes()
    away = posed_scenes.look((0, -1, 0), (0, -2, 0))
    assert len(seen_from(splats(scene), away, Sight(64))[0]) == 0
    view = posed_scenes.look((0, -1, 0), (0, 2, 0), size=(9, 12))
    rows, pixel = seen_from(splats(scene), view, Sight(64))
    assert (pixel >= 0).all()
    assert (pixel < (9, 12)).all()
    assert 0 < len(rows) < len(scene["coord"])
    assert (np.diff(rows) > 0).all()


def test_a_lens_shows_the_same_gaussians_elsewhere() -> None:
    """Against OpenCV's rule written out; what it folds back is not seen."""
    scene = posed_scenes.two_planes()
    straight = posed_scenes.look((0.3, -0.5, 0), (0, 2, 0))
    k1, k2, p1, p2, k3 = bend = (-0.25, 0.02, 0.01, -0.02, 0.003)
    lens = replace(straight, bend=bend)
    gaussians = splats(scene)
    rows, pixel = seen_from(gaussians, straight, Sight(64))
    found, moved = seen_from(gaussians, lens, Sight(64))
    assert set(found) <= set(rows)
    assert len(found) > 0.9 * len(rows)
    seen = scene["coord"][found] @ straight.rotation.T + straight.translation
    a, b = seen[:, 0] / seen[:, 2], seen[:, 1] / seen[:, 2]
    s = a**2 + b**2
    g = 1 + k1 * s + k2 * s**2 + k3 * s**3
    u = 50 * (a * g + 2 * p1 * a * b + p2 * (s + 2 * a**2)) + 32
    v = 50 * (b * g + p1 * (s + 2 * b**2) + 2 * p2 * a * b) + 24
    assert np.abs(moved + 0.5 - np.stack([v, u], axis=1)).max() <= 0.5 + 1e-3
    assert np.abs(moved - pixel[np.isin(rows, found)]).max() >= 2, "it bends by pixels"
    strong = replace(straight, bend=(-3.0, 0.0, 0.0, 0.0, 0.0))
    inner, _ = seen_from(gaussians, strong, Sight(64))
    seen = scene["coord"][inner] @ straight.rotation.T + straight.translation
    assert 0 < len(inner) < len(rows)
    assert ((seen[:, :2] / seen[:, 2:]) ** 2).sum(1).max() <= 1 / 9


@pytest.mark.parametrize("style", [rooms.DAY, rooms.NIGHT], ids=["day", "night"])
def test_features_of_rooms_are_those_of_the_labels_but_for_few(style: rooms.Style) -> None:
    """Masks are the classes that a picture of higher resolution shows, from 4 places."""
    scene = rooms.room((5, 0, 0), style)
    low, high = scene["coord"].min(0), scene["coord"].max(0)
    middle, turn = (low + high) / 2, np.arange(4) * math.pi / 2
    around = np.stack([np.cos(turn), np.sin(turn), 0 * turn], axis=1)
    views = [
        posed_scenes.look(
            [*(middle + 0.8 * side)[:2], 1.6], [*(middle - 1.2 * side)[:2], 0.7],
            size=(90, 120), focal=75,
        )
        for side in around
    ]  # fmt: skip
    texts, gaussians, shots = rooms.text_vectors(), splats(scene), []
    for view in views:
        front = depth_map(gaussians, view, 120).front.numpy()
        labels = np.where(front >= 0, scene["segment"][front] + 1, 0)
        shots.append(Labelled(view, labels, texts))
    votes = collect_votes(scene, shots, Sight(80))
    features, valid = (np.concatenate(part) for part in zip(*votes.features(), strict=True))
    judged = valid & (scene["segment"] >= 0)
    right = ((features @ texts.T).argmax(1) == scene["segment"])[judged]
    assert judged.mean() > 0.3
    assert right.mean() >= 0.95


# -- sums ------------------------------------------------------------------------------------------


def test_features_are_normalised_sums_over_views(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(back_projection, "ROWS_AT_ONCE", 7)  # several blocks
    rng = np.random.default_rng(0)
    votes, total, count = Votes(20), np.zeros((20, 5)), np.zeros(20, int)
    for _ in range(4):
        rows = np.sort(rng.permutation(20)[:12])
        table = unit_rows(rng.standard_normal((6, 5)))
        table[2] = 0  # a mask without a feature
        labels = rng.integers(0, 7, 12)
        votes.add(rows, labels, table)
        for row, label in zip(rows, labels, strict=True):
            if label and label != 3:
                total[row] += table[label - 1]
                count[row] += 1
    assert np.array_equal(votes.seen(), count)
    for least in (1, 3):
        found, valid = (np.concatenate(part) for part in zip(*votes.features(least), strict=True))
        assert np.array_equal(valid, count >= least)
        expected = total / np.maximum(np.linalg.norm(total, axis=1, keepdims=True), 1e-9)
        assert np.allclose(found, expected * valid[:, None], atol=1e-6)


def test_opposite_features_cancel_to_none() -> None:
    votes = Votes(1)
    for sign in (1, -1):
        votes.add(np.array([0]), np.array([1]), sign * np.ones((1, 3), np.float32) / 3**0.5)
    ((features, valid),) = votes.features()
    assert not valid[0]
    assert (features == 0).all()
