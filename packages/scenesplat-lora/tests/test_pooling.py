"""Pooling and unpooling against the recorded stages, and their gradients."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_network import voxels
from torch import nn

from lora_core.testing import load_golden
from scenesplat_lora.network.point_batch import PointBatch
from scenesplat_lora.network.point_set import PointSet, point_set
from scenesplat_lora.network.pooling import (
    SerializedPooling,
    SerializedUnpooling,
    pool_points,
    reduce_rows,
    spread_rows,
)
from scenesplat_lora.network.ptv3_config import CURVES

CASE = load_golden(Path(__file__).parent / "goldens" / "pooling")
RECORDED = {case["tag"]: case for case in CASE.config["cases"]}


def recorded_points(tag: str) -> PointSet:
    io = CASE.io
    batch = PointBatch(io[f"{tag}.feat"], io["grid_coord"], io["offset"], io["coord"])
    return point_set(batch, CASE.config["orders"])


def fill(module: nn.Module, prefix: str) -> None:
    found = {n.removeprefix(prefix): t for n, t in CASE.weights.items() if n.startswith(prefix)}
    module.load_state_dict(found)
    module.eval()


def recorded_pooling(tag: str) -> SerializedPooling:
    case = RECORDED[tag]
    down = SerializedPooling(
        case["in_channels"], case["out_channels"], case["stride"], case["reduce"]
    )
    fill(down, f"{tag}.down.")
    return down


@pytest.mark.parametrize("tag", RECORDED)
def test_pooled_voxels_are_the_recorded_ones(tag: str) -> None:
    points = recorded_points(tag)
    assert points.depth == RECORDED[tag]["depth_in"]
    pooled, clusters = pool_points(points, RECORDED[tag]["stride"])
    assert pooled.depth == RECORDED[tag]["depth_out"]
    assert torch.equal(clusters.cluster, CASE.io[f"{tag}.cluster"])
    for name in ("grid_coord", "batch", "code", "order", "inverse"):
        assert torch.equal(getattr(pooled, name), CASE.io[f"{tag}.out_{name}"]), name
    assert torch.cumsum(torch.tensor(pooled.sizes), 0).tolist() == (
        CASE.io[f"{tag}.out_offset"].tolist()
    )
    assert pooled.coord is not None
    torch.testing.assert_close(pooled.coord, CASE.io[f"{tag}.out_coord"])


@pytest.mark.parametrize("tag", RECORDED)
def test_features_there_and_back_are_the_recorded_ones(tag: str) -> None:
    case: dict[str, Any] = RECORDED[tag]
    skip = CASE.io[f"{tag}.feat"]
    coarse, _, clusters = recorded_pooling(tag)(skip, recorded_points(tag))
    torch.testing.assert_close(coarse, CASE.io[f"{tag}.out_feat"], rtol=0, atol=1e-5)
    up = SerializedUnpooling(case["out_channels"], case["in_channels"], case["unpool_out_channels"])
    fill(up, f"{tag}.up.")
    out, branch = up(coarse, skip, clusters)
    torch.testing.assert_close(out, CASE.io[f"{tag}.unpool_feat"], rtol=0, atol=1e-5)
    torch.testing.assert_close(branch, up.proj_skip(skip))


def test_a_permutation_permutes_the_curves_and_no_cluster() -> None:
    points = point_set(voxels(50, 60), CURVES)
    plain, clusters = pool_points(points, 2)
    turned, same = pool_points(points, 2, torch.tensor([2, 0, 3, 1]))
    assert torch.equal(clusters.cluster, same.cluster)
    assert torch.equal(turned.code, plain.code[[2, 0, 3, 1]])
    assert torch.equal(turned.order, plain.order[[2, 0, 3, 1]])


@pytest.mark.fault("R47")
def test_voxels_too_few_for_the_stride_are_not_pooled_but_coincident_ones_are() -> None:
    grid = torch.tensor([[1, 0, 0], [0, 1, 1], [1, 0, 0]])
    points = point_set(PointBatch(torch.zeros(3, 1), grid, torch.tensor([3])), CURVES)
    pooled, clusters = pool_points(points, 4)
    assert pooled.depth == points.depth == 1
    assert clusters.cluster[0] == clusters.cluster[2] != clusters.cluster[1]
    assert sorted(pooled.grid_coord.tolist()) == [[0, 1, 1], [1, 0, 0]]


@pytest.mark.parametrize("reduce", ["mean", "sum", "min", "max"])
def test_reduction_and_gradient_are_those_of_cluster_after_cluster(reduce: str) -> None:
    points = point_set(voxels(40, 30), CURVES)
    pooled, clusters = pool_points(points, 4)
    feat = torch.randn(70, 3, dtype=torch.float64, requires_grad=True)
    out = reduce_rows(feat, clusters, reduce)
    parts = [feat[clusters.cluster == j] for j in range(sum(pooled.sizes))]
    one = {"mean": torch.mean, "sum": torch.sum, "min": torch.amin, "max": torch.amax}[reduce]
    slow = torch.stack([one(part, dim=0) for part in parts])
    torch.testing.assert_close(out, slow)
    direction = torch.randn_like(out)
    grads = [torch.autograd.grad((x * direction).sum(), feat)[0] for x in (out, slow)]
    torch.testing.assert_close(*grads)


def test_half_precision_is_reduced_in_float32() -> None:
    points = point_set(voxels(200), CURVES)
    _, clusters = pool_points(points, 8)
    feat = torch.randn(200, 3).bfloat16()
    out = reduce_rows(feat, clusters, "sum")
    assert torch.equal(out, reduce_rows(feat.float(), clusters, "sum").bfloat16())


def test_spreading_is_indexing_with_the_same_gradient() -> None:
    points = point_set(voxels(40, 30), CURVES)
    pooled, clusters = pool_points(points, 2)
    coarse = torch.randn(sum(pooled.sizes), 3, dtype=torch.float64, requires_grad=True)
    out, slow = spread_rows(coarse, clusters), coarse[clusters.cluster]
    assert torch.equal(out, slow)
    direction = torch.randn_like(out)
    grads = [torch.autograd.grad((x * direction).sum(), coarse)[0] for x in (out, slow)]
    torch.testing.assert_close(*grads)
