"""Estimated normals lie on the surface's outer side, also where it is not convex."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from midi3d_lora.meshes.normals import estimate_normals

Pair = tuple[NDArray[np.float64], NDArray[np.float64]]


def sphere(count: int, rng: np.random.Generator) -> Pair:
    normals = rng.normal(size=(count, 3))
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    return 0.7 * normals, normals


def torus(count: int, rng: np.random.Generator) -> Pair:
    u, v = rng.uniform(0, 2 * np.pi, (2, count))
    around = np.stack([np.cos(u), np.zeros(count), np.sin(u)], axis=1)
    normals = np.cos(v)[:, None] * around + np.sin(v)[:, None] * np.array([0, 1.0, 0])
    return 0.6 * around + 0.25 * normals, normals


def box(count: int, rng: np.random.Generator) -> Pair:
    points = rng.uniform(-0.5, 0.5, (count, 3))
    axis, side = rng.integers(0, 3, count), rng.choice([-1.0, 1.0], count)
    normals = np.zeros((count, 3))
    normals[np.arange(count), axis] = side
    points[np.arange(count), axis] = 0.5 * side
    return points, normals


@pytest.mark.parametrize("shape", [sphere, torus, box])
def test_normals_of_a_bare_cloud_point_outward(shape: object) -> None:
    points, truth = shape(6000, np.random.default_rng(0))  # type: ignore[operator]
    normals = estimate_normals(points)
    assert normals.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(normals, axis=1), 1, atol=1e-6)
    cosine = (normals * truth).sum(axis=1)
    assert (cosine > 0).mean() > 0.995
    assert np.degrees(np.arccos(cosine.clip(-1, 1))).mean() < 8


def test_each_of_two_separate_parts_has_its_own_outside() -> None:
    points, truth = sphere(3000, np.random.default_rng(1))
    both = np.concatenate([points - [2, 0, 0], 0.5 * points + [2, 0, 0]])
    cosine = (estimate_normals(both) * np.concatenate([truth, truth])).sum(axis=1)
    assert (cosine > 0.9).all()


def test_copies_of_points_change_nothing() -> None:
    points, _ = torus(1000, np.random.default_rng(2))
    once = estimate_normals(points)
    several = estimate_normals(np.repeat(points, 20, axis=0))
    np.testing.assert_array_equal(several, np.repeat(once, 20, axis=0))


def test_a_plane_has_one_side() -> None:
    points = np.random.default_rng(3).uniform(-1, 1, (500, 3)) * [1, 0, 1]
    normals = estimate_normals(points)
    assert (np.abs(normals[:, 1]) > 0.999).all()
    assert abs(normals[:, 1].sum()) > 499


def test_too_few_points_are_refused() -> None:
    with pytest.raises(ValueError, match="3 distinct points, expected at least 4"):
        estimate_normals(np.repeat(np.eye(3), 5, axis=0))
