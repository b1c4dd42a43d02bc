"""Which rows of a batch are the instances of one scene: a group id per row.

A row is one instance. Rows with the same id attend to each other in the multi-instance blocks; the
ids are otherwise free, and scenes of one batch may differ in their number of instances.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from lora_core.errors import ConfigError, near

OFFICIAL_KEYS = ("num_instances", "num_instances_per_batch")


@dataclass(frozen=True)
class GroupPlan:
    """How to fold the rows of a batch into scenes, with as few attention calls as there are sizes.

    Attributes:
        sizes: (scenes, instances in each), for runs of rows in `order`.
        order: int64 [B] rows in the order of `sizes`; None: as they are in the batch.
        inverse: int64 [B] the way back; None: as `order`.
    """

    sizes: tuple[tuple[int, int], ...]
    order: Tensor | None = None
    inverse: Tensor | None = None


# -- making ids ----------------------------------------------------------------------------------


def scene_groups(num_instances: Sequence[int]) -> Tensor:
    """Ids of scenes with so many instances each, one after the other: int64 [sum].

    Raises:
        ConfigError: a scene without instances.
    """
    counts = [int(count) for count in num_instances]
    if not counts or min(counts) < 1:
        raise ConfigError(f"num_instances is {counts}: every scene needs at least one instance")
    return torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))


def guidance_groups(groups: Tensor) -> Tensor:
    """Ids of a batch doubled for guidance, [unconditional rows; conditional rows]: [B] -> [2 B].

    The two halves do not see each other.
    """
    return torch.cat([groups, groups + (groups.max() - groups.min() + 1)])


def official_groups(
    rows: int,
    num_instances: int | Sequence[int] | Tensor,
    num_instances_per_batch: int | Tensor | None = None,
) -> Tensor:
    """Ids from the counts that the official code passes in `attention_kwargs`: int64 [rows].

    Args:
        rows: B of the batch.
        num_instances: n, every n consecutive rows are a scene (inference); or one count per scene.
        num_instances_per_batch: P rows for each scene (training): the first n_s of them are its
            instances, every other one is a scene of its own. None: a scene has n_s rows.

    Raises:
        ConfigError: the counts do not give `rows`.
    """
    counts = _whole_numbers(num_instances)
    if isinstance(counts, int):
        if counts < 1 or rows % counts:
            raise ConfigError(
                f"num_instances is {counts}, but the batch has {rows} rows: expected a multiple"
            )
        counts = [counts] * (rows // counts)
    padded = None if num_instances_per_batch is None else _whole_numbers(num_instances_per_batch)
    if padded is None:
        _refuse_other_rows(sum(counts), rows, f"num_instances {counts}")
        return scene_groups(counts)
    if not isinstance(padded, int):
        raise ConfigError(f"num_instances_per_batch is {padded}: expected one number")
    _refuse_other_rows(len(counts) * padded, rows, f"{len(counts)} scenes of {padded} rows")
    if not all(1 <= count <= padded for count in counts):
        raise ConfigError(f"num_instances is {counts}: expected 1 to {padded} in every scene")
    return scene_groups([size for count in counts for size in (count, *[1] * (padded - count))])


def from_attention_kwargs(rows: int, attention_kwargs: Mapping[str, Any] | None) -> Tensor | None:
    """Ids from the official keyword arguments of a call; None where they say nothing.

    Raises:
        ConfigError: other keys, or counts that do not fit.
    """
    given = {key: value for key, value in (attention_kwargs or {}).items() if value is not None}
    unknown = [key for key in given if key not in OFFICIAL_KEYS]
    if unknown:
        hint = near(unknown[0], OFFICIAL_KEYS)
        raise ConfigError(
            f"attention_kwargs has {', '.join(map(repr, unknown))}: expected "
            f"{' and '.join(OFFICIAL_KEYS)}{hint and '; ' + hint}"
        )
    if not given:
        return None
    if "num_instances" not in given:
        raise ConfigError("attention_kwargs has num_instances_per_batch without num_instances")
    return official_groups(rows, given["num_instances"], given.get("num_instances_per_batch"))


# -- using ids -----------------------------------------------------------------------------------


def group_plan(
    groups: Tensor | Sequence[int], rows: int, device: torch.device | None = None
) -> GroupPlan | None:
    """How to fold the rows; None: every row is a scene of its own.

    Args:
        groups: one whole number per row; on a GPU, reading them waits for it.
        rows: B of the batch. device: of the plan's tables.

    Raises:
        ConfigError: not one id per row.
    """
    ids = _whole_numbers(groups)
    if isinstance(ids, int) or len(ids) != rows:
        count = 1 if isinstance(ids, int) else len(ids)
        raise ConfigError(f"instance_groups has {count} ids, but the batch has {rows} rows")
    members: dict[int, list[int]] = {}
    for row, group in enumerate(ids):
        members.setdefault(group, []).append(row)
    scenes = list(members.values())
    if all(len(scene) == 1 for scene in scenes):
        return None
    if len(_runs(scenes)) > len({len(scene) for scene in scenes}):
        scenes.sort(key=len)  # one attention call for each size
    order = [row for scene in scenes for row in scene]
    if order == list(range(rows)):
        return GroupPlan(_runs(scenes))
    table = torch.tensor(order)
    return GroupPlan(_runs(scenes), table.to(device), table.argsort().to(device))


def _runs(scenes: Sequence[Sequence[int]]) -> tuple[tuple[int, int], ...]:
    """(scenes, instances in each) of neighbours with the same number of instances."""
    return tuple((len(list(run)), size) for size, run in groupby(scenes, key=len))


def _refuse_other_rows(counted: int, rows: int, what: str) -> None:
    if counted != rows:
        raise ConfigError(f"{what} are {counted} rows, but the batch has {rows}")


def _whole_numbers(values: int | Sequence[int] | Tensor) -> int | list[int]:
    found = values.tolist() if isinstance(values, Tensor) else values
    flat = list(found) if isinstance(found, Sequence) else [found]
    if not all(type(value) is int for value in flat):
        raise ConfigError(f"instances are counted in whole numbers, not {values}")
    return found if isinstance(found, int) else flat
