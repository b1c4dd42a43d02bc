"""One block against the recorded ones; stochastic depth."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_network import tiny_backbone, voxels
from torch import Tensor, nn

from lora_core.testing import load_golden
from scenesplat_lora import lora
from scenesplat_lora.network.blocks import Block, BlockSettings, DropPath
from scenesplat_lora.network.point_batch import PointBatch
from scenesplat_lora.network.point_set import point_set

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


def test_what_lies_before_the_first_adapted_layer_runs_without_graph() -> None:
    network = tiny_backbone()
    lora.inject_lora_to_ptv3(network, r=2, target_stages=[2])
    lora.mark_only_lora_as_trainable(network)
    order: list[tuple[str, bool]] = []

    def note(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                order.append((name, output.requires_grad))

        return hook

    for name, module in network.named_modules():
        if not any(module.children()) or name.endswith("attn.qkv"):
            module.register_forward_hook(note(name))
    network.train()(voxels(60, 40)).sum().backward()
    first = next(i for i, (name, _) in enumerate(order) if name == "enc.enc2.block0.attn.qkv")
    assert not any(has_graph for _, has_graph in order[:first])
    assert all(has_graph for name, has_graph in order if name.startswith("enc.enc2.block1"))
    assert order[first] == ("enc.enc2.block0.attn.qkv", True)
