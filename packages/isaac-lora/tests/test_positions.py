"""Positions of text and images, written out by the rule and compared."""

import pytest
import torch
from torch import Tensor

from isaac_lora.network.positions import document_positions, mrope_position_ids, rotary_cos_sin
from lora_core.errors import DataError

Piece = int | tuple[int, int]  # tokens of text, or patch rows and columns of an image


def by_the_rule(pieces: list[Piece], scale: int) -> tuple[list[list[int]], list[bool]]:
    """Count as the rule says, piece by piece."""
    time, positions, mask = 0, [], []
    for piece in pieces:
        if isinstance(piece, int):
            positions += [[time + i, 0, 0] for i in range(piece)]
            mask += [False] * piece
            time += piece
        else:
            rows, columns = piece[0] // scale, piece[1] // scale
            positions += [[time, a, b] for a in range(rows) for b in range(columns)]
            mask += [True] * (rows * columns)
            time += 1
    return positions, mask


def grids_of(*rows: list[Piece]) -> Tensor:
    return torch.tensor([piece for row in rows for piece in row if isinstance(piece, tuple)])


ROWS: list[list[Piece]] = [
    [3, (4, 6), 2, (2, 2), (2, 8), 1],
    [(6, 4), 9],
    [5],
    [1, (2, 2)],
]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_count_as_the_rule_says(side: str) -> None:
    rows = [by_the_rule(row, 2) for row in ROWS]
    longest = max(len(positions) for positions, _ in rows)
    expected = torch.zeros(len(rows), longest, 3, dtype=torch.long)
    image_mask, real = torch.zeros(2, len(rows), longest).bool()
    for index, (positions, mask) in enumerate(rows):
        length = len(positions)
        places = slice(longest - length, longest) if side == "left" else slice(0, length)
        expected[index, places] = torch.tensor(positions)
        image_mask[index, places] = torch.tensor(mask)
        real[index, places] = True
    grids = grids_of(*ROWS)
    assert torch.equal(mrope_position_ids(image_mask, grids, 2, real.long()), expected)


def test_every_document_of_a_packed_row_begins_at_zero() -> None:
    rows = [by_the_rule(row, 2) for row in ROWS]
    mask = torch.tensor([[place for _, places in rows for place in places]])
    numbers = torch.tensor([[7 * i for i, (_, places) in enumerate(rows) for _ in places]])
    expected = torch.tensor([[place for places, _ in rows for place in places]])
    positions = mrope_position_ids(mask, grids_of(*ROWS), 2, document_ids=numbers)
    assert torch.equal(positions, expected)
    counted = [i for places, _ in rows for i in range(len(places))]
    assert document_positions(numbers)[0].tolist() == counted


def test_text_alone_is_rotated_as_ordinary_text() -> None:
    times = torch.tensor([[0, 1, 2, 700]])
    positions = torch.stack([times, times * 0, times * 0], dim=-1)
    cos, sin = rotary_cos_sin(positions, None, 16, 10_000.0, torch.float64)
    phase = times[..., None].double() / 10_000.0 ** (torch.arange(0, 16, 2).double() / 16)
    torch.testing.assert_close(cos, torch.cat([phase, phase], -1).cos(), rtol=0, atol=1e-4)
    torch.testing.assert_close(sin, torch.cat([phase, phase], -1).sin(), rtol=0, atol=1e-4)


def test_an_image_turns_half_by_time_a_quarter_by_row_and_a_quarter_by_column() -> None:
    place = torch.tensor([[[5, 2, 3]]])
    cos, _ = rotary_cos_sin(place, torch.ones(1, 1).bool(), 16, 1.0, torch.float32)  # all f_k = 1
    axes = torch.tensor([5.0, 5, 5, 5, 2, 2, 3, 3])
    assert torch.equal(cos[0, 0], torch.cat([axes, axes]).cos())


def test_rows_and_columns_of_text_are_not_read() -> None:
    places = torch.tensor([[[5, 0, 0]], [[5, 9, 9]]])
    cos, sin = rotary_cos_sin(places, torch.zeros(2, 1).bool(), 16, 1e4, torch.float32)
    assert torch.equal(cos[0], cos[1])
    assert torch.equal(sin[0], sin[1])


def test_places_and_grids_that_do_not_fit_are_refused() -> None:
    mask = torch.tensor([[True, True, False, True, True]])
    with pytest.raises(DataError, match="4 image places, but `grids` is of 0 images"):
        mrope_position_ids(mask, None, 1)
    with pytest.raises(DataError, match="4 image places, but `grids` is of 1 image with 6"):
        mrope_position_ids(mask, torch.tensor([[2, 3]]), 1)
    with pytest.raises(DataError, match="interrupted by text"):
        mrope_position_ids(mask, torch.tensor([[1, 1], [1, 3]]), 1)
    two_rows = torch.tensor([[False, True], [True, False]])
    with pytest.raises(DataError, match="over the end of a row"):
        mrope_position_ids(two_rows, torch.tensor([[1, 2]]), 1)
