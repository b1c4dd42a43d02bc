"""The partition of serialized clouds into patches, against the recorded tables."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_core.testing import load_golden
from scenesplat_lora.network.patches import PatchTable, fixed_patch_size, partition

CASE = load_golden(Path(__file__).parent / "goldens" / "patch_padding")


def table_of(case: dict[str, Any]) -> PatchTable:
    size = case["patch_size_max"]
    if case["mode"] == "fixed":
        size = fixed_patch_size(case["sizes"], size)
    assert size == case["patch_size_used"]
    return partition(case["sizes"], size)


@pytest.mark.parametrize("case", CASE.config["cases"], ids=lambda case: case["tag"])
def test_tables_are_the_recorded_ones(case: dict[str, Any]) -> None:
    table = table_of(case)
    for name in ("pad", "unpad", "cu_seqlens"):
        recorded = CASE.io[f"{case['tag']}.{name}"]
        assert getattr(table, name).dtype == recorded.dtype
        assert torch.equal(getattr(table, name), recorded), name


@pytest.mark.parametrize("case", CASE.config["cases"], ids=lambda case: case["tag"])
def test_groups_hold_every_patch_once(case: dict[str, Any]) -> None:
    table = table_of(case)
    total = len(table.pad)
    grouped = torch.arange(total) if table.grouped is None else table.grouped
    patches = {tuple(range(a, b)) for a, b in pairwise(table.cu_seqlens.tolist())}
    found, start = [], 0
    for count, length in table.sizes:
        rows = grouped[start : start + count * length].view(count, length)
        found += [tuple(row) for row in rows.tolist()]
        start += count * length
    assert len(found) == len(patches)
    assert set(found) == patches
