"""Generated scenes: exact distances, closed meshes of the same surfaces, and nothing by chance."""

import numpy as np
import pytest

from midi3d_lora.demo_base import objects, scenes
from midi3d_lora.demo_base.solids import Part, Solid, around_y, on_its_side
from midi3d_lora.meshes.mesh_loading import outward
from midi3d_lora.scenes.scene_frame import SceneFrame
from midi3d_lora.sources.prepare_meshes import sample_mesh

PARTS = (
    Part("box", (0.5, 0.2, 0.3)),
    Part("frustum", (0.3, 0.4, 0.2)),
    Part("frustum", (0.3, 0.4, 0.0)),
    Part("frustum", (0.3, 0.0, 0.4)),
    Part("ball", (0.4,)),
    Part("ring", (0.5, 0.15)),
)
NAMES = [f"{part.kind} {part.size}" for part in PARTS]


def placed(part: Part) -> Part:
    """The same solid, turned around two axes and moved."""
    rotation = around_y(0.7) @ on_its_side("z") @ around_y(0.3)
    return Part(part.kind, part.size, np.array([0.1, -0.2, 0.3]), rotation)


@pytest.mark.parametrize("part", PARTS, ids=NAMES)
def test_the_mesh_of_a_part_lies_on_its_zero_surface(part: Part) -> None:
    mesh = placed(part).mesh()
    points = sample_mesh(mesh, 3000, np.random.default_rng(0))
    distances = placed(part).distance(points[:, :3].astype(np.float64))
    assert np.abs(placed(part).distance(mesh.vertices)).max() < 1e-12
    assert np.abs(distances).max() < 0.02  # chords of round parts
    turned, closed = outward(mesh)
    assert closed
    assert np.array_equal(turned.faces, mesh.faces)


@pytest.mark.parametrize("part", PARTS, ids=NAMES)
def test_a_step_along_the_normal_changes_the_distance_by_its_length(part: Part) -> None:
    points = sample_mesh(placed(part).mesh(), 3000, np.random.default_rng(0)).astype(np.float64)
    for step in (0.01, -0.01):
        moved = points[:, :3] + step * points[:, 3:]
        change = placed(part).distance(moved) - placed(part).distance(points[:, :3])
        # Beside edges the nearest surface is another face; chords have other normals.
        assert np.abs(np.median(change) - step) < 2e-4


@pytest.mark.parametrize("part", PARTS, ids=NAMES)
def test_distances_are_those_to_the_nearest_point_of_the_surface(part: Part) -> None:
    rng = np.random.default_rng(1)
    surface = sample_mesh(part.mesh(), 20_000, rng)[:, :3]
    places = rng.uniform(-0.8, 0.8, (60, 3))
    nearest = np.linalg.norm(places[:, None] - surface, axis=-1).min(axis=1)
    assert np.abs(np.abs(part.distance(places)) - nearest).max() < 0.03


def test_an_object_is_the_union_of_its_parts_in_any_frame() -> None:
    solid = objects.make("chair", np.random.default_rng(3))
    frame = SceneFrame((0.2, 0.4, -0.1), 0.7)
    places = np.random.default_rng(0).uniform(-1, 1, (500, 3))
    apart = np.min([part.distance(places) for part in solid.parts], axis=0)
    assert np.array_equal(solid.distance(places), apart)
    moved = solid.in_frame(frame).distance(frame.apply(places))
    assert np.allclose(moved, 0.7 * solid.distance(places), atol=1e-12)
    vertices = solid.moved((1, 0, 0), 0.5).mesh().vertices
    assert np.allclose(vertices, solid.mesh().vertices @ around_y(0.5).T + [1, 0, 0])


@pytest.mark.parametrize("name", [*objects.FURNITURE, *objects.OUTDOORS])
def test_every_object_stands_on_the_floor_and_is_closed(name: str) -> None:
    for seed in range(5):
        mesh = objects.make(name, np.random.default_rng(seed)).mesh()
        low, high = mesh.vertices.min(axis=0), mesh.vertices.max(axis=0)
        assert abs(low[1]) < 1e-9
        assert 0.3 < (high - low).max() < 2.2
        assert outward(mesh)[1]


def test_a_scene_is_a_function_of_its_seed() -> None:
    one, same, other = (scenes.scene(seed) for seed in ((4, 1), (4, 1), (4, 2)))
    assert [solid.name for solid in one.solids] == [solid.name for solid in same.solids]
    assert np.array_equal(one.picture().rgb, same.picture().rgb)
    assert not np.array_equal(one.picture().rgb, other.picture().rgb)


@pytest.mark.parametrize("style", [scenes.INDOORS, scenes.OUTDOORS], ids=["indoors", "outdoors"])
def test_scenes_are_framed_as_prepare_frames_them_and_show_every_object(
    style: scenes.Style,
) -> None:
    for number, scene in enumerate(scenes.held_out(12, style)):
        vertices = np.concatenate([mesh.vertices for mesh in scene.meshes()])
        low, high = vertices.min(axis=0), vertices.max(axis=0)
        assert np.abs(low + high).max() < 1e-9, number
        assert np.isclose((high - low).max(), 1.9)
        assert {solid.name for solid in scene.solids} <= set(style.kinds)
        seen = scene.picture().instances
        shares = [(seen == k + 1).mean() for k in range(len(scene))]
        assert min(shares) >= scenes.SEEN


def test_the_two_styles_share_no_kind_of_object() -> None:
    assert not set(scenes.INDOORS.kinds) & set(scenes.OUTDOORS.kinds)


def test_points_to_learn_a_field_from_are_on_both_sides_of_the_surface() -> None:
    solid = Solid("ball", (Part("ball", (0.5,)),))
    rng = np.random.default_rng(0)
    surface = sample_mesh(solid.mesh(), 500, rng)
    points, distances = scenes.field_points(solid, surface, 1000, rng)
    assert points.dtype == distances.dtype == np.float32
    assert np.abs(points[500:]).max() > 0.9
    assert np.allclose(distances, np.linalg.norm(points, axis=1) - 0.5, atol=1e-6)
    near = np.abs(distances[:500])
    assert near.max() < 0.4
    assert 0.3 < (distances[:500] < 0).mean() < 0.7
