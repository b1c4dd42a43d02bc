"""surface.npy: every documented layout is read as it is meant, everything else is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pickled_arrays import Hostile, pickled

from lora_core.errors import DataError
from midi3d_lora.scenes import surfaces
from midi3d_lora.scenes.surfaces import Part, Surface, check_parts, draw_surface, open_parts

N = 300


def ball(count: int = N, seed: int = 0) -> NDArray[np.float32]:
    """[N, 6] points of a sphere of radius 0.8 with their normals."""
    normals = np.random.default_rng(seed).normal(size=(count, 3))
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    return np.concatenate([0.8 * normals, normals], axis=1).astype(np.float32)


def saved(folder: Path, array: Any, name: str = "surface.npy") -> Path:
    np.save(folder / name, array)
    return folder


def parts_of(folder: Path, labels: list[int], notes: list[str] | None = None) -> list[Part]:
    notes = [] if notes is None else notes
    parts = open_parts(folder, labels, notes)
    assert check_parts(parts, False, notes) is None
    return parts


def drawn(part: Part, count: int = N, seed: int = 0) -> Surface:
    return draw_surface(part, None, count, np.random.default_rng(seed))


def problem(folder: Path, labels: list[int], normalize: bool = False) -> str:
    with pytest.raises(DataError) as caught:
        check_parts(open_parts(folder, labels, []), normalize, [])
    text = str(caught.value)
    assert text.startswith(str(folder))
    return text.removeprefix(f"{folder}").lstrip("/")


def with_label(array: NDArray[Any], label: float) -> NDArray[Any]:
    return np.concatenate([array, np.full((len(array), 1), label, array.dtype)], axis=1)


# -- columns ---------------------------------------------------------------------------------------


@pytest.mark.fault("P01")
def test_six_columns_are_points_and_normals(tmp_path: Path) -> None:
    notes: list[str] = []
    (part,) = parts_of(saved(tmp_path, ball()), [5], notes)
    found = drawn(part)
    assert part.labels == (5,)
    np.testing.assert_allclose(found.joined(), ball(), atol=1e-6)
    assert found.points.dtype == found.normals.dtype == np.float32
    assert notes == ["surfaces of fewer than 8192 points, of which some are repeated"]


@pytest.mark.fault("P01")
def test_three_columns_get_estimated_normals_and_that_is_said(tmp_path: Path) -> None:
    notes: list[str] = []
    (part,) = parts_of(saved(tmp_path, ball()[:, :3]), [1], notes)
    assert ((drawn(part).normals * ball()[:, 3:]).sum(axis=1) > 0.9).all()
    assert "surfaces without normals: those were estimated" in notes


@pytest.mark.fault("P01")
@pytest.mark.parametrize("width", [3, 6])
def test_a_last_column_with_the_labels_of_seg_divides_the_points(
    tmp_path: Path, width: int
) -> None:
    first, second = ball(seed=1)[:, :width], ball(100, seed=2)[:, :width]
    mixed = np.concatenate([with_label(second, 9), with_label(first, 4)])
    one, other = parts_of(saved(tmp_path, mixed), [4, 9])
    assert (one.labels, other.labels) == ((4,), (9,))
    np.testing.assert_array_equal(drawn(one).points, first[:, :3])
    np.testing.assert_array_equal(drawn(other, 100).points, second[:, :3])


@pytest.mark.fault("P01")
def test_a_fourth_column_that_is_no_label_is_ignored_with_a_warning(tmp_path: Path) -> None:
    values = np.concatenate([ball()[:, :3], ball()[:, 5:]], axis=1)
    notes: list[str] = []
    (part,) = parts_of(saved(tmp_path, values), [1], notes)
    np.testing.assert_array_equal(drawn(part).points, ball()[:, :3])
    assert any("column 4 of surface.npy was ignored" in note for note in notes)


@pytest.mark.fault("P01", "D42")
def test_a_seventh_column_must_hold_the_labels_of_seg(tmp_path: Path) -> None:
    folder = saved(tmp_path, with_label(ball(), 0.5))
    assert problem(folder, [1]).startswith("surface.npy: column 7 is no label")
    saved(tmp_path, with_label(ball(), 3))
    assert "column 7 has the labels 3, but seg.png has 1, 2" in problem(folder, [1, 2])


# -- several instances -----------------------------------------------------------------------------


@pytest.mark.parametrize("width", [3, 6])
def test_slices_belong_to_labels_in_ascending_order(tmp_path: Path, width: int) -> None:
    slices = np.stack([ball(seed=k)[:, :width] for k in range(3)])
    parts = parts_of(saved(tmp_path, slices), [2, 7, 200])
    assert [part.labels for part in parts] == [(2,), (7,), (200,)]
    np.testing.assert_array_equal(drawn(parts[2]).points, slices[2, :, :3])


def test_files_belong_to_the_labels_in_their_names(tmp_path: Path) -> None:
    for label in (10, 9):
        saved(tmp_path, ball(seed=label), f"surface_{label}.npy")
    nine, ten = parts_of(tmp_path, [9, 10])
    np.testing.assert_array_equal(drawn(nine).points, ball(seed=9)[:, :3])
    np.testing.assert_array_equal(drawn(ten).points, ball(seed=10)[:, :3])


def test_an_undivided_cloud_of_several_instances_is_one_row_with_a_warning(tmp_path: Path) -> None:
    notes: list[str] = []
    (part,) = parts_of(saved(tmp_path, ball()), [1, 2, 3], notes)
    assert part.labels == (1, 2, 3)
    assert notes[0].startswith("one cloud for several instances")
    assert notes[0].endswith(": 3 instances")


@pytest.mark.fault("D42")
def test_other_labels_than_those_of_seg_are_shown_beside_them(tmp_path: Path) -> None:
    saved(tmp_path, ball(), "surface_1.npy")
    saved(tmp_path, ball(), "surface_5.npy")
    expected = "the surface_<label>.npy files have the labels 1, 5, but seg.png has 1, 2, 3"
    assert expected in problem(tmp_path, [1, 2, 3])
    saved(tmp_path, np.zeros((2, 100, 6)), "surface.npy")
    assert "both surface.npy and surface_1.npy, surface_5.npy" in problem(tmp_path, [1])


@pytest.mark.fault("D42")
def test_slices_and_labels_must_be_as_many(tmp_path: Path) -> None:
    folder = saved(tmp_path, np.stack([ball(), ball()]))
    assert problem(folder, [1, 2, 8]) == (
        "surface.npy: 2 slices, but seg.png has the labels 1, 2, 8"
    )


@pytest.mark.fault("P43", "D42")
@pytest.mark.parametrize("width", [3, 6])
def test_labels_that_are_off_by_one_are_suspected_of_it(tmp_path: Path, width: int) -> None:
    zero, one = (with_label(ball()[:, :width], label) for label in (0, 1))
    text = problem(saved(tmp_path, np.concatenate([zero, one])), [1, 2])
    assert "the labels 0, 1, but seg.png has 1, 2: off by one?" in text


@pytest.mark.fault("P43")
def test_files_that_are_off_by_one_are_suspected_of_it(tmp_path: Path) -> None:
    for label in (0, 1, 2):
        saved(tmp_path, ball(), f"surface_{label}.npy")
    assert "off by one? seg.png's are one above them" in problem(tmp_path, [1, 2, 3])


# -- files -----------------------------------------------------------------------------------------

SHAPES = {
    (3, 300): "transposed", (6, 300): "transposed", (300, 2): "shape [300, 2], expected [N, 3]",
    (300,): "shape [300], expected", (0, 3): "holds no points", (1, 3): "1 points, expected at",
    (63, 6): "63 points, expected at least 64", (300, 5): "shape [300, 5]",
    (2, 300, 4): "shape [2, 300, 4]", (2, 0, 3): "holds no points",
}  # fmt: skip


@pytest.mark.fault("P02")
@pytest.mark.parametrize("shape", SHAPES)
def test_other_shapes_are_refused_with_the_accepted_ones(
    tmp_path: Path, shape: tuple[int, ...]
) -> None:
    text = problem(saved(tmp_path, np.ones(shape)), [1])
    assert text.startswith("surface.npy: ")
    assert SHAPES[shape] in text


@pytest.mark.fault("P04")
@pytest.mark.parametrize("form", ["<f2", ">f4", "<f8", ">f8"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_other_number_formats_and_orders_are_read(tmp_path: Path, form: str, order: Any) -> None:
    values = np.asarray(ball().astype(form), order=order)
    (part,) = parts_of(saved(tmp_path, values), [1])
    np.testing.assert_array_equal(drawn(part).points, values[:, :3].astype(np.float32))


@pytest.mark.fault("P04", "P07")
def test_whole_numbers_are_read_and_brought_into_the_frame(tmp_path: Path) -> None:
    folder = saved(tmp_path, np.round(1000 * ball()[:, :3]).astype(np.int32))
    notes: list[str] = []
    parts = open_parts(folder, [1], notes)
    frame = check_parts(parts, True, notes)
    points = draw_surface(parts[0], frame, N, np.random.default_rng(0)).points
    assert np.abs(points).max() == pytest.approx(0.95)
    assert any(note.startswith("scenes brought into [-1, 1] as a whole: x -") for note in notes)


@pytest.mark.fault("P05")
def test_pickled_objects_are_refused_and_not_run(tmp_path: Path) -> None:
    folder = saved(tmp_path, np.array({"surface_points": ball()}))
    assert "holds surface_points [300, 6], expected surface_points and" in problem(folder, [1])
    pickled(tmp_path / "surface.npy", {"surface_points": Hostile(tmp_path / "sprung")})
    assert "a pickle that is damaged, or holds more than arrays" in problem(folder, [1])
    assert not (tmp_path / "sprung").exists()


@pytest.mark.fault("P01")
def test_the_published_dictionary_of_points_and_normals_is_read(tmp_path: Path) -> None:
    values = ball()
    held = {"surface_points": values[:, :3], "surface_normals": values[:, 3:]}
    (part,) = open_parts(saved(tmp_path, np.array(held)), [1], [])
    np.testing.assert_array_equal(part.values, values)


@pytest.mark.fault("P05")
@pytest.mark.parametrize("length", [0, 5, 40, 128, 1000])
def test_a_truncated_file_is_refused(tmp_path: Path, length: int) -> None:
    path = saved(tmp_path, ball()) / "surface.npy"
    path.write_bytes(path.read_bytes()[:length])
    assert problem(tmp_path, [1]).startswith("surface.npy: ")


@pytest.mark.fault("P05")
def test_a_header_that_promises_11_terabytes_takes_no_memory(tmp_path: Path) -> None:
    with (tmp_path / "surface.npy").open("wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": (10**12, 3)}
        np.lib.format.write_array_header_1_0(file, header)
        file.write(bytes(1200))
    assert "promises float32 [1000000000000, 3]" in problem(tmp_path, [1])


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert problem(tmp_path, [1]) == ": misses surface.npy"


# -- values ----------------------------------------------------------------------------------------


@pytest.mark.fault("P06")
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("column", [0, 4])
def test_rows_that_are_not_finite_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float, column: int
) -> None:
    monkeypatch.setattr(surfaces, "AT_ONCE", 64)
    values = ball()
    values[[3, 70, 299], column] = value
    text = problem(saved(tmp_path, values), [1])
    assert text == "surface.npy: 3 of 300 rows hold NaN or infinity"


@pytest.mark.fault("P07")
def test_points_beyond_the_frame_are_refused_with_their_range(tmp_path: Path) -> None:
    text = problem(saved(tmp_path, ball() * [2, 2, 2, 1, 1, 1] + [3, 0, 0, 0, 0, 0]), [1])
    assert "points outside of [-1, 1]: x 1.4" in text
    assert "--normalize" in text


@pytest.mark.fault("P07")
def test_points_without_extent_are_refused(tmp_path: Path) -> None:
    values = ball() * [0, 0, 0, 1, 1, 1] + [0.5, 0, 0.25, 0, 0, 0]
    text = problem(saved(tmp_path, values), [1], normalize=True)
    assert text == "surface.npy: all points are the same, 0.5, 0, 0.25: no surface"


@pytest.mark.fault("P07")
def test_instances_are_normalised_together(tmp_path: Path) -> None:
    both = np.stack([ball(), ball() * [0.5, 0.5, 0.5, 1, 1, 1] + [4, 0, 0, 0, 0, 0]])
    parts = open_parts(saved(tmp_path, both), [1, 2], [])
    frame = check_parts(parts, True, [])
    first, second = (
        draw_surface(part, frame, N, np.random.default_rng(0)).points.astype(float)
        for part in parts
    )
    low = np.minimum(first.min(axis=0), second.min(axis=0))
    high = np.maximum(first.max(axis=0), second.max(axis=0))
    np.testing.assert_allclose(low[0], -0.95, atol=1e-6)
    np.testing.assert_allclose(high[0], 0.95, atol=1e-6)
    np.testing.assert_allclose((high + low)[1:], 0, atol=1e-6)
    np.testing.assert_allclose(np.ptp(second, axis=0) / np.ptp(first, axis=0), 0.5, atol=1e-6)


def test_normals_get_length_one_and_those_of_length_zero_are_estimated(tmp_path: Path) -> None:
    values = ball() * [1, 1, 1, 7, 7, 7]
    values[:10, 3:] = 0
    notes: list[str] = []
    (part,) = parts_of(saved(tmp_path, values), [1], notes)
    assert ((drawn(part).normals * ball()[:, 3:]).sum(axis=1) > 0.9).all()
    assert "normals of length zero were estimated anew: 10 of 300" in notes


def test_problems_of_all_instances_are_told_together(tmp_path: Path) -> None:
    values = np.stack([ball(), ball(), ball()])
    values[0, 0, 0], values[2] = np.nan, 0
    lines = problem(saved(tmp_path, values), [1, 2, 3]).splitlines()
    assert len(lines) == 2
    assert "NaN" in lines[0]
    assert "all points are the same" in lines[1]


# -- drawing ---------------------------------------------------------------------------------------


@pytest.mark.fault("P03")
def test_more_points_are_drawn_without_repeats_and_the_same_by_seed(tmp_path: Path) -> None:
    (part,) = parts_of(saved(tmp_path, ball()), [1])
    found = drawn(part, 200, seed=1)
    assert len(np.unique(found.points, axis=0)) == 200
    np.testing.assert_array_equal(found.joined(), drawn(part, 200, seed=1).joined())
    assert (found.points != drawn(part, 200, seed=2).points).any()


@pytest.mark.fault("P03")
def test_fewer_points_are_repeated_and_never_padded_with_zeros(tmp_path: Path) -> None:
    (part,) = parts_of(saved(tmp_path, ball()), [1])
    found = drawn(part, 1000)
    assert found.joined().shape == (1000, 6)
    given = {tuple(row) for row in ball()[:, :3].tolist()}
    assert {tuple(row) for row in found.points.tolist()} == given


@pytest.mark.fault("P42")
def test_a_huge_file_is_drawn_from_without_reading_it(tmp_path: Path) -> None:
    path = tmp_path / "surface.npy"
    with path.open("wb") as file:  # 10^8 rows, of which only the header takes space on disk
        header = {"descr": "<f4", "fortran_order": False, "shape": (10**8, 6)}
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + 24 * 10**8)
    (part,) = open_parts(tmp_path, [1], [])
    assert isinstance(part.values, np.memmap)
    values = np.memmap(path, np.float32, mode="r+", offset=128, shape=(10**8, 6))
    values[: 10**6 : 10**5] = 1
    rows = np.arange(0, 10**6, 10**5)
    few = Part(part.labels, part.values, rows, part.name)
    np.testing.assert_array_equal(drawn(few, 5).points, np.ones((5, 3), np.float32))
