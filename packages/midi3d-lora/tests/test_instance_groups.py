"""Group ids of rows: from counts, doubled, and folded into few attention calls."""

import pytest
import torch

from lora_core.errors import ConfigError
from midi3d_lora.transformer.groups import (
    from_attention_kwargs,
    group_plan,
    guidance_groups,
    official_groups,
    scene_groups,
)


def test_counts_become_ids() -> None:
    assert scene_groups([3, 1, 2]).tolist() == [0, 0, 0, 1, 2, 2]
    assert official_groups(6, 2).tolist() == [0, 0, 1, 1, 2, 2]
    assert official_groups(4, [3, 1]).tolist() == [0, 0, 0, 1]
    assert official_groups(6, torch.tensor([2, 1]), 3).tolist() == [0, 0, 1, 2, 3, 4]


def test_doubling_for_guidance_keeps_the_halves_apart() -> None:
    doubled = guidance_groups(torch.tensor([4, 4, -2])).tolist()
    assert doubled[:3] == [4, 4, -2]
    assert doubled[3] == doubled[4] != doubled[5]
    assert not set(doubled[:3]) & set(doubled[3:])


@pytest.mark.parametrize(
    ("rows", "counts", "message"),
    [
        (7, {"num_instances": 3}, "has 7 rows: expected a multiple"),
        (7, {"num_instances": 0}, "expected a multiple"),
        (7, {"num_instances": [3, 3]}, r"\[3, 3\] are 6 rows, but the batch has 7"),
        (3, {"num_instances": [3, 0]}, "at least one instance"),
        (7, {"num_instances": [3, 3], "num_instances_per_batch": 4}, "8 rows, but the batch has 7"),
        (8, {"num_instances": [3, 5], "num_instances_per_batch": 4}, "expected 1 to 4"),
        (8, {"num_instances": [3, 0], "num_instances_per_batch": 4}, "expected 1 to 4"),
        (8, {"num_instances_per_batch": 4}, "without num_instances"),
        (8, {"num_instance": 4}, "did you mean 'num_instances'"),
        (8, {"num_instances": 2.0}, "whole numbers"),
    ],
)
def test_counts_that_do_not_fit_the_batch_are_errors(
    rows: int, counts: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        from_attention_kwargs(rows, counts)


def test_no_counts_say_nothing() -> None:
    assert from_attention_kwargs(3, None) is None
    assert from_attention_kwargs(3, {"num_instances": None}) is None


@pytest.mark.parametrize("groups", [[0, 0], [0, 0, 1, 1], torch.tensor(3), [0.0, 1.0, 2.0]])
def test_a_group_for_each_row_is_needed(groups: object) -> None:
    with pytest.raises(ConfigError, match=r"has 3 rows|whole numbers"):
        group_plan(groups, rows=3)  # type: ignore[arg-type]


def test_rows_are_moved_only_where_that_saves_calls() -> None:
    assert group_plan([3, 1, 2], rows=3) is None
    in_place = group_plan([0, 0, 0, 1, 1, 1], rows=6)
    assert in_place is not None
    assert (in_place.sizes, in_place.order) == (((2, 3),), None)
    ragged = group_plan([8, 8, 8, 5, 5], rows=5)
    assert ragged is not None
    assert (ragged.sizes, ragged.order) == (((1, 3), (1, 2)), None)
    moved = group_plan([0, 0, 1, 2, 2, 3], rows=6)
    assert moved is not None
    assert moved.order is not None
    assert moved.inverse is not None
    assert moved.sizes == ((2, 1), (2, 2))
    assert moved.order.tolist() == [2, 5, 0, 1, 3, 4]
    assert moved.order[moved.inverse].tolist() == list(range(6))
