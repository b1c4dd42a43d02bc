"""One block against the recorded ones; stochastic depth."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lora_core.testing import load_golden
from scenesplat_lora.blocks import Block, BlockSettings, DropPath
from scenesplat_lora.point_batch import PointBatch
from scenesplat_lora.point_set import point_set

CASE = load_golden(Path(__file__).parent / "goldens" / "block")


@pytest.mark.parametrize("case", CASE.config["cases"], ids=lambda case: case["tag"])
def test_outputs_are_the_recorded_ones(case: dict[str, Any]) -> None:
    tag = case["tag"]
    settings = BlockSettings(
        mlp_ratio=case["mlp_ratio"], pre_norm=case["pre_norm"], varlen=case["enable_flash"]
    )
    block = Block(
        case["channels"], case["num_heads"], case["patch_size"], 0.3, case["order_index"], settings
    ).eval()
    prefix = f"{tag}."
    block.load_state_dict(
        {n.removeprefix(prefix): t for n, t in CASE.weights.items() if n.startswith(prefix)}
    )
    feat = CASE.io[f"{tag}.feat"]
    batch = PointBatch(feat, CASE.io["grid_coord"], CASE.io["offset"])
    points = point_set(batch, CASE.config["orders"])
    position = block.position(feat, points)
    torch.testing.assert_close(position, CASE.io[f"{tag}.after_cpe"], rtol=0, atol=1e-5)
    out = block(feat, points)
    torch.testing.assert_close(out, CASE.io[f"{tag}.out"], rtol=0, atol=1e-5)


def test_stochastic_depth_drops_voxels_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    x = torch.ones(20_000, 3)
    out = DropPath(0.25).train()(x)
    assert ((out == 0).all(1) | (out == 4 / 3).all(1)).all()
    assert (out == 0).float().mean().item() == pytest.approx(0.25, abs=0.02)
    assert DropPath(0.25).eval()(x) is x
    assert DropPath(0.0).train()(x) is x
