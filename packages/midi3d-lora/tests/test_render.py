"""Renders show what a pinhole camera on +z sees, as the arithmetic says, without GL."""

from __future__ import annotations

import numpy as np
import pytest
from mesh_shapes import box

from midi3d_lora.meshes.mesh_loading import Mesh
from midi3d_lora.meshes.render import Camera, render, visible_faces

SIZE = 64


def test_a_box_covers_the_pixels_that_its_front_projects_to() -> None:
    camera = Camera(fov=90.0, distance=3.0)
    seen = render([box((-0.5, -0.5, -0.5), (0.5, 0.5, 0.5))], SIZE, camera)
    # f = 32 px, the front is at distance 2.5: half a unit is 6.4 px around the middle.
    expected = np.zeros((SIZE, SIZE), np.uint8)
    expected[26:38, 26:38] = 1
    np.testing.assert_array_equal(seen.instances, expected)
    np.testing.assert_allclose(seen.depth[expected > 0], 2.5, rtol=1e-6)
    assert np.isinf(seen.depth[expected == 0]).all()
    assert (seen.rgb[:25] == 255).all()
    assert (seen.rgb[27:37, 27:37] < 240).all()


def test_y_is_up_and_x_is_right_and_near_hides_far() -> None:
    high = box((-0.2, 0.5, -0.1), (0.2, 0.9, 0.1))
    right = box((0.5, -0.2, -0.1), (0.9, 0.2, 0.1))
    behind = box((-0.9, -0.9, -0.9), (0.9, 0.9, -0.8))
    index = render([high, right, behind], SIZE).instances
    rows, columns = np.nonzero(index == 1)
    assert rows.max() < SIZE / 2
    assert abs(columns.mean() - 31.5) < 0.6
    assert np.nonzero(index == 2)[1].min() > SIZE / 2
    assert (index == 3).sum() > 500


def test_distances_on_a_slanted_plane_are_those_of_the_rays() -> None:
    corners = np.array([[[-0.9, -0.9, -0.9], [0.9, -0.9, 0.7], [-0.9, 0.9, -0.9]]])
    camera = Camera()
    face, depth = visible_faces(corners, SIZE, camera)
    row, column = np.nonzero(face == 0)
    assert len(row) > 300
    # Plane z = -0.9 + (x + 0.9) 8/9, ray x = (u - S/2) t / f, z = distance - t.
    across = (column + 0.5 - SIZE / 2) / camera.focal(SIZE)
    expected = (camera.distance + 0.9 - 0.8) / (1 + across * 8 / 9)
    np.testing.assert_allclose(depth[row, column], expected, rtol=1e-6)


def test_adjacent_triangles_leave_no_gap_and_small_batches_change_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    steps = np.linspace(-0.9, 0.9, 41)
    x, y = np.meshgrid(steps, steps)
    vertices = np.stack([x.ravel(), y.ravel(), 0.1 * np.sin(9 * x.ravel())], axis=1)
    cell = (np.arange(40)[:, None] * 41 + np.arange(40)).ravel()
    faces = np.concatenate(
        [np.stack([cell, cell + 1, cell + 42], 1), np.stack([cell, cell + 42, cell + 41], 1)]
    )
    sheet = Mesh("sheet", vertices, faces)
    seen = render([sheet], SIZE)
    assert (seen.instances[12:52, 12:52] == 1).all()
    monkeypatch.setattr("midi3d_lora.meshes.render.AT_ONCE", 64)
    again = render([sheet], SIZE)
    for one, other in zip(seen, again, strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_whole_frame_fits_into_the_default_picture() -> None:
    index = render([box((-0.95, -0.95, -0.95), (0.95, 0.95, 0.95))], SIZE).instances
    assert index[1:-1, 1:-1].mean() > 0.8
    assert not index[0].any()
    assert not index[:, 0].any()


def test_camera_json_projects_points_to_where_they_are_drawn() -> None:
    camera = Camera()
    document = camera.document(SIZE)
    point = np.array([0.3, -0.2, 0.4])
    x, y, z, _ = np.array(document["world_to_camera"]) @ [*point, 1]
    u, v, w = np.array(document["intrinsics"]) @ [x, -y, -z]
    pixel, depth = camera.project(point, SIZE)
    np.testing.assert_allclose([u / w, v / w], pixel)
    assert w == pytest.approx(float(depth))


def test_a_scene_that_reaches_the_camera_is_refused() -> None:
    with pytest.raises(ValueError, match="normalise the scene"):
        render([box((0, 0, 0), (1, 1, 5))], SIZE)
