"""Serialized attention against the recorded layers and against attention written out."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_network import voxels
from torch import Tensor

from lora_core.testing import load_golden
from scenesplat_lora.network.attention import SerializedAttention
from scenesplat_lora.network.point_batch import PointBatch
from scenesplat_lora.network.point_set import PointSet, point_set
from scenesplat_lora.network.ptv3_config import CURVES

CASE = load_golden(Path(__file__).parent / "goldens" / "attention")
RECORDED = {case["tag"]: case for case in CASE.config["cases"]}


def recorded_points() -> PointSet:
    grid = CASE.io["grid_coord"]
    points = PointBatch(CASE.io["varlen.feat"], grid, CASE.io["offset"])
    found = point_set(points, CASE.config["orders"])
    assert torch.equal(found.order, CASE.io["order"])
    assert torch.equal(found.inverse, CASE.io["inverse"])
    return found


def recorded_layer(case: dict[str, Any]) -> SerializedAttention:
    layer = SerializedAttention(
        case["channels"],
        case["num_heads"],
        case["patch_size"],
        case["qkv_bias"],
        case["qk_scale"],
        varlen=case["enable_flash"],
        enable_rpe=case["enable_rpe"],
        compute_dtype=torch.float32 if case["upcast_softmax"] else None,
    )
    prefix = f"{case['tag']}."
    weights = {n.removeprefix(prefix): t for n, t in CASE.weights.items() if n.startswith(prefix)}
    layer.load_state_dict(weights)
    return layer.eval()


@pytest.mark.parametrize("tag", RECORDED)
def test_outputs_are_the_recorded_ones(tag: str) -> None:
    case = RECORDED[tag]
    out = recorded_layer(case)(CASE.io[f"{tag}.feat"], recorded_points(), case["order_index"])
    torch.testing.assert_close(out, CASE.io[f"{tag}.out"], rtol=0, atol=1e-5)


def written_out(layer: SerializedAttention, feat: Tensor, points: PointSet, curve: int) -> Tensor:
    """Patch after patch: softmax(q k^T / sqrt(d)) v, its padded copies thrown away."""
    table = points.patch_rows(curve, layer.patch_size) and points._tables[layer.patch_size]
    qkv = layer.qkv(feat)[points.order[curve][table.pad]]
    parts = []
    for a, b in zip(table.cu_seqlens[:-1], table.cu_seqlens[1:], strict=True):
        q, k, v = qkv[a:b].view(b - a, 3, layer.num_heads, -1).permute(1, 2, 0, 3)
        out = (layer.scale * q @ k.mT).softmax(-1) @ v
        parts.append(out.transpose(0, 1).flatten(1))
    padded = torch.cat(parts)
    return layer.proj(padded[table.unpad[points.inverse[curve]]])


@pytest.mark.parametrize("sizes", [(300,), (70, 5, 33, 5, 16, 1)])
@pytest.mark.parametrize("curve", range(4))
def test_grouped_patches_give_what_patch_after_patch_gives(
    sizes: tuple[int, ...], curve: int
) -> None:
    torch.manual_seed(0)
    batch = voxels(*sizes, channels=12)
    points = point_set(batch, CURVES)
    layer = SerializedAttention(12, 3, patch_size=16).double()
    feat = batch.feat.double().requires_grad_()
    out, slow = layer(feat, points, curve), written_out(layer, feat, points, curve)
    torch.testing.assert_close(out, slow)
    weight = torch.randn_like(out)
    inputs = [feat, *layer.parameters()]
    grads = torch.autograd.grad((out * weight).sum(), inputs)
    slow_grads = torch.autograd.grad((slow * weight).sum(), inputs)
    torch.testing.assert_close(grads, slow_grads)


def test_a_small_cloud_does_not_shorten_the_patches_of_others() -> None:
    both = voxels(120, 3)
    large = both.rows(0, 120)
    layer = SerializedAttention(11, 1, patch_size=16).eval()
    alone = layer(large.feat, point_set(large, CURVES), 0)
    beside = layer(both.feat, point_set(both, CURVES), 0)[:120]
    torch.testing.assert_close(alone, beside)
    layer.varlen = False
    fixed = layer(both.feat, point_set(both, CURVES), 0)[:120]
    assert (fixed - alone).abs().max() > 0.01


def test_clouds_do_not_see_each_other() -> None:
    batch = voxels(40, 50)
    points = point_set(batch, CURVES)
    layer = SerializedAttention(11, 1, patch_size=16).eval()
    changed = batch.feat.clone()
    changed[40:] += 1
    before, after = layer(batch.feat, points, 2), layer(changed, points, 2)
    torch.testing.assert_close(before[:40], after[:40])
    assert not torch.isclose(before[40:], after[40:]).any(1).all()


def test_half_precision_of_the_kernel_changes_no_dtype_and_little_else() -> None:
    case = RECORDED["varlen"]
    layer = recorded_layer(case)
    layer.compute_dtype = torch.float16
    out = layer(CASE.io["varlen.feat"], recorded_points(), case["order_index"])
    assert out.dtype == torch.float32
    error = (out - CASE.io["varlen.out"]).abs().max()
    assert 0 < error < 5e-3


def test_dropout_of_the_probabilities_acts_in_training_only() -> None:
    batch = voxels(60)
    points = point_set(batch, CURVES)
    layer = SerializedAttention(11, 1, patch_size=16, attn_drop=0.5)
    plain = layer.eval()(batch.feat, points, 0)
    assert torch.equal(plain, layer(batch.feat, points, 0))
    torch.manual_seed(0)
    assert not torch.allclose(plain, layer.train()(batch.feat, points, 0))


def test_tables_are_worked_out_once_for_each_curve_and_patch_size() -> None:
    points = point_set(voxels(60), CURVES)
    first = points.patch_rows(1, 16)
    assert points.patch_rows(5, 16) is first  # 4 curves
    assert points.patch_rows(1, 8) is not first
    assert points.neighbours(3) is points.neighbours(3)


def kept(layer: SerializedAttention, points: PointSet, feat: Tensor) -> int:
    """Bytes that are kept for the backward pass, parameters apart."""
    known = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    found: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known and tensor.is_floating_point():
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(feat, points, 0).sum().backward()
    return sum(found.values())


def test_training_the_output_projection_keeps_no_copy_of_its_input() -> None:
    torch.manual_seed(0)
    batch = voxels(300, channels=12)
    points, feat = point_set(batch, CURVES), batch.feat.requires_grad_()
    layer = SerializedAttention(12, 3, patch_size=16).requires_grad_(False)
    frozen = kept(layer, points, feat)
    layer.proj.requires_grad_()
    assert kept(layer, points, feat) == frozen
    layer.qkv.requires_grad_()
    assert kept(layer, points, feat) > frozen
