"""Fields to meshes: the recorded ones, spheres whose place is known, and what may go wrong."""

import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lora_core.errors import ConfigError, NumericError
from lora_core.testing import load_golden
from midi3d_lora.meshes import extraction
from midi3d_lora.meshes.extraction import ExtractionSettings, Mesh, extract_mesh, extract_meshes
from midi3d_lora.meshes.grid import Grid, cube

GOLDENS = Path(__file__).parent / "goldens"
CASE = load_golden(GOLDENS / "pipeline")
RECORDED = cube(CASE.config["bbox"][1], CASE.config["octree_depth"])
PLAIN = ExtractionSettings(depth=5, coarse_depth=3, smooth=False)
Field = Callable[[Tensor], Tensor]


def sphere(radius: float, centre: tuple[float, float, float] = (0, 0, 0)) -> Field:
    """Signed distance, positive outside."""
    return lambda points: (points - torch.tensor(centre)).norm(dim=1) - radius


def torus(points: Tensor) -> Tensor:
    ring = points[:, [0, 2]].norm(dim=1) - 0.6
    return torch.stack([ring, points[:, 1]], 1).norm(dim=1) - 0.2


def volume(mesh: Mesh) -> float:
    """Signed: positive if faces look outwards."""
    a, b, c = mesh.vertices.astype(np.float64)[mesh.faces].transpose(1, 0, 2)
    return float((np.cross(a, b) * c).sum() / 6)


def counted(field: Field) -> tuple[Field, list[int]]:
    calls: list[int] = []

    def with_count(points: Tensor) -> Tensor:
        calls.append(len(points))
        return field(points)

    return with_count, calls


@pytest.mark.parametrize("instance", range(3))
def test_meshes_are_the_recorded_ones(instance: int) -> None:
    # Recorded with the divisor n instead of n - 1.
    box = [CASE.io[f"progressive.bbox_{end}"][instance].tolist() for end in ("min", "max")]
    depth = CASE.config["octree_depth"]
    grid = Grid(tuple(box[0]), tuple(box[1]), depth, depth)
    mesh = extraction.marching_cubes(CASE.io["smoothed"][instance].numpy(), grid)
    assert mesh is not None
    assert np.array_equal(mesh.faces, CASE.io[f"mesh.{instance}.faces"].numpy())
    lower, n = np.array(box[0]), grid.size
    original = CASE.io[f"mesh.{instance}.vertices_original"].numpy()
    expected = lower + (original - lower) * n / (n - 1)
    np.testing.assert_allclose(mesh.vertices, expected, rtol=0, atol=2e-6)


def test_smoothing_is_the_recorded_one_inside_and_keeps_constants_at_the_border() -> None:
    for values, recorded in zip(
        CASE.io["progressive.grid_logits"].numpy(), CASE.io["smoothed"].numpy(), strict=True
    ):
        ours = extraction.smoothed(values)[1:-1, 1:-1, 1:-1]
        np.testing.assert_allclose(ours, recorded[1:-1, 1:-1, 1:-1], rtol=0, atol=2e-6)
    ones = np.ones((5, 5, 5), np.float32)
    np.testing.assert_allclose(extraction.smoothed(ones), ones, rtol=1e-6)


def test_boxes_of_the_second_pass_are_the_recorded_ones_and_a_cell() -> None:
    for i, values in enumerate(CASE.io["grid_logits"].numpy()):
        lower, upper = extraction.inside_box(values, RECORDED)
        recorded = (CASE.io[f"progressive.bbox_{end}"][i].numpy() for end in ("min", "max"))
        expected = [next(recorded) - RECORDED.cell, next(recorded) + RECORDED.cell]
        np.testing.assert_allclose([lower, upper], np.clip(expected, -1.055, 1.055), atol=1e-6)


def test_grid_points_are_the_recorded_ones() -> None:
    vae = load_golden(GOLDENS / "vae")
    grid = cube(1.005, vae.config["grid_depth"])
    assert torch.equal(grid.points(range(grid.size**3)), vae.io["grid_points"])


def test_coarse_points_are_points_of_the_full_grid_bit_for_bit() -> None:
    full = Grid((-0.71, -1.0, 0.1), (0.3, 0.77, 0.9), 7, 7)
    for level in (3, 6):
        for fine, coarse in zip(full.axes(), full.at(level).axes(), strict=True):
            assert np.array_equal(fine[:: 2 ** (7 - level)], coarse)


@pytest.mark.parametrize("fit_box", [False, True])
@pytest.mark.parametrize("centre", [(0.0, 0.0, 0.0), (0.3, -0.2, 0.1)])
def test_a_sphere_is_where_it_is(fit_box: bool, centre: tuple[float, float, float]) -> None:
    mesh = extract_mesh(sphere(0.5, centre), replace(PLAIN, fit_box=fit_box))
    assert mesh is not None
    offset = mesh.vertices - np.array(centre)
    cell = 2.01 / 32
    assert np.abs(np.linalg.norm(offset, axis=1) - 0.5).max() < cell**2
    assert np.abs((offset.min(0) + offset.max(0)) / 2).max() < 1e-3
    assert volume(mesh) == pytest.approx(4 / 3 * np.pi * 0.5**3, rel=0.02)


@pytest.mark.parametrize("field", [sphere(0.5, (0.2, 0.1, -0.3)), torus], ids=["sphere", "torus"])
@pytest.mark.parametrize("smooth", [False, True])
def test_coarse_to_fine_is_the_dense_mesh(field: Field, smooth: bool) -> None:
    settings = ExtractionSettings(depth=6, coarse_depth=3, smooth=smooth, fit_box=False)
    counting, calls = counted(field)
    mesh = extract_mesh(counting, settings)
    dense = extract_mesh(field, replace(settings, coarse_depth=6))
    assert mesh is not None
    assert dense is not None
    assert np.array_equal(mesh.faces, dense.faces)
    assert np.array_equal(mesh.vertices, dense.vertices)
    assert sum(calls) < 0.4 * 65**3


def test_a_part_thinner_than_the_coarse_cells_is_followed() -> None:
    def lollipop(points: Tensor) -> Tensor:
        stick = torch.stack([points[:, 0].abs() - 0.04, points[:, 2].abs() - 0.04], 1).amax(1)
        stick = torch.maximum(stick, points[:, 1].abs() - 0.9)
        return torch.minimum(sphere(0.3, (0, 0.6, 0))(points), stick)

    settings = ExtractionSettings(depth=6, coarse_depth=3, smooth=False, fit_box=False)
    shifted: Field = lambda points: lollipop(points - 0.12)  # noqa: E731
    mesh, dense = (extract_mesh(shifted, replace(settings, coarse_depth=depth)) for depth in (3, 6))
    assert mesh is not None
    assert dense is not None
    assert np.array_equal(mesh.vertices, dense.vertices)
    assert mesh.vertices[:, 1].min() < -0.75  # the foot of the stick


def test_an_object_between_coarse_points_is_found() -> None:
    mesh = extract_mesh(sphere(0.05, (0.12, 0.12, 0.12)), PLAIN)
    assert mesh is not None
    np.testing.assert_allclose(mesh.vertices.mean(0), 0.12, atol=0.005)


def test_the_own_box_gives_small_objects_the_full_depth() -> None:
    field = sphere(0.1, (0.5, 0.5, 0.5))
    whole, own = (extract_mesh(field, replace(PLAIN, fit_box=fit)) for fit in (False, True))
    assert whole is not None
    assert own is not None
    assert len(own.faces) > 10 * len(whole.faces)


def signed(field: Field, sign: float) -> Field:
    return lambda points: sign * field(points)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_inside_is_found_whatever_its_sign(sign: float) -> None:
    for field in (sphere(0.5), sphere(0.6, (0.7, 0.0, 0.0))):  # the second crosses the box
        mesh = extract_mesh(signed(field, sign), PLAIN)
        assert mesh is not None
        assert volume(mesh) > 0.4


def test_the_sign_can_be_given() -> None:
    hollow = lambda points: -sphere(0.5)(points)  # noqa: E731
    found, given = (
        extract_mesh(hollow, replace(PLAIN, inside=inside, fit_box=False))
        for inside in ("auto", "negative")
    )
    assert found is not None
    assert given is not None
    assert volume(found) == pytest.approx(-volume(given), rel=1e-3)


def test_empty_instances_leave_the_others_alone() -> None:
    nothing: Field = lambda points: torch.ones(len(points))  # noqa: E731
    first, empty, last = extract_meshes([sphere(0.5), nothing, sphere(0.4)], PLAIN)
    assert first is not None
    assert empty is None
    assert last is not None
    assert volume(last) == pytest.approx(4 / 3 * np.pi * 0.4**3, rel=0.02)


def test_smoothing_does_not_lose_an_object_of_one_point() -> None:
    settings = ExtractionSettings(depth=4, coarse_depth=4, fit_box=False)
    assert extract_mesh(sphere(0.05), settings) is not None


def test_fields_that_are_not_numbers_are_refused() -> None:
    broken: Field = lambda points: torch.where(points[:, 0] > 0.5, torch.nan, 1.0)  # noqa: E731
    with pytest.raises(NumericError, match=r"NaN or infinite at \d+ of \d+ points"):
        extract_mesh(broken, PLAIN)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"depth": 0}, r"depth 0: expected 1 \.\.\. 10"),
        ({"chunk_size": 0}, "chunk_size 0: expected"),
        ({"inside": "minus"}, "inside 'minus': expected auto, negative or positive"),
    ],
)
def test_settings_that_cannot_be_are_refused(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ExtractionSettings(**wrong)  # type: ignore[arg-type]


def test_chunks_change_nothing_and_bound_the_points_of_a_call() -> None:
    counting, calls = counted(torus)
    mesh = extract_mesh(counting, replace(PLAIN, chunk_size=777))
    whole = extract_mesh(torus, PLAIN)
    assert max(calls) <= 777
    assert mesh is not None
    assert whole is not None
    assert np.array_equal(mesh.vertices, whole.vertices)


def test_257_points_a_side_need_less_than_a_gigabyte() -> None:
    counting, calls = counted(torus)
    tracemalloc.start()
    mesh = extract_mesh(counting, ExtractionSettings())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert mesh is not None
    assert peak < 2**29  # half of it is for the decoder's activations
    assert sum(calls) < 0.2 * 257**3
