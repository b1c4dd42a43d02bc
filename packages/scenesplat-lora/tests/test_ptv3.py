"""The whole backbone against the recorded network, and its promises."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_network import tiny_backbone, tiny_config, voxels
from torch import Tensor, nn
from torch.nn import functional as F

from lora_core.errors import ConfigError, DataError
from lora_core.testing import load_golden
from scenesplat_lora.network.models import DefaultSegmentorV2, LangPretrainer
from scenesplat_lora.network.point_batch import PointBatch
from scenesplat_lora.network.ptv3 import PointTransformerV3, stages_of
from scenesplat_lora.network.ptv3_config import LANGUAGE, SEGMENTATION, PTv3Config

GOLDENS = Path(__file__).parent / "goldens"
CASE = load_golden(GOLDENS / "ptv3_tiny")
IO = CASE.io
BATCH = PointBatch(IO["feat"], IO["grid_coord"], IO["offset"], IO["coord"])


def recorded_network(compute_dtype: torch.dtype | None = None, **changes: Any) -> Any:
    config = PTv3Config.from_dict({**CASE.config["backbone"], **changes})
    network = PointTransformerV3(config, compute_dtype)
    network.load_state_dict(CASE.weights)
    return network.eval()


def close(actual: Tensor, expected: Tensor, atol: float = 5e-5) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


# -- recorded numbers ----------------------------------------------------------------------------


@torch.no_grad()
def test_every_stage_is_the_recorded_one() -> None:
    network = recorded_network()
    found: dict[str, tuple[Tensor, Any]] = {}

    def keep(name: str) -> Any:
        return lambda module, inputs, out: found.update({name: (out, inputs[1])})

    network.embedding.register_forward_hook(keep("stem"))
    for name, stage in [*network.enc.items(), *network.dec.items()]:
        stage.register_forward_hook(keep(name))
    out = network(BATCH, list(IO["perms"]))
    assert set(found) == {"stem", "enc0", "enc1", "enc2", "dec0", "dec1"}
    for name, (feat, points) in found.items():
        close(feat, IO[f"mid.{name}"])
        if f"mid.{name}.grid_coord" in IO:
            assert torch.equal(points.grid_coord, IO[f"mid.{name}.grid_coord"])
            ends = torch.cumsum(torch.tensor(points.sizes), 0)
            assert torch.equal(ends, IO[f"mid.{name}.offset"])
    close(out, IO["out"])
    close(F.normalize(out, dim=1), IO["out_normalized"])


@torch.no_grad()
def test_evaluation_without_permutations_is_the_recorded_one() -> None:
    close(recorded_network()(BATCH), IO["out_noshuffle"])


@torch.no_grad()
def test_the_patch_rule_without_flash_is_another_function_and_the_recorded_one() -> None:
    out = recorded_network(enable_flash=False)(BATCH)
    close(out, IO["out_noshuffle_fixed_patch"])
    assert (out - IO["out_noshuffle"]).abs().max() > 1


@torch.no_grad()
def test_half_precision_attention_is_as_near_as_the_official_kernel() -> None:
    out = recorded_network(torch.float16)(BATCH, list(IO["perms"]))
    error = (out - IO["out_half_qkv"]).abs().max()
    assert error <= 2 * (IO["out_half_qkv"] - IO["out"]).abs().max()


def recorded_step() -> tuple[PointTransformerV3, Tensor, Tensor, Tensor]:
    """Network after backward, normalised features, both losses."""
    network = recorded_network().train()
    torch.manual_seed(CASE.config["train_seed"])
    feat = F.normalize(network(BATCH), dim=1)
    mask = IO["train.valid_feat_mask"]
    target = IO["train.lang_feat"].float()[mask]
    cosine = (1 - F.cosine_similarity(feat[mask], target, dim=1)).mean()
    l2 = (feat[mask] - target).pow(2).sum(1).mean()
    (cosine + l2).backward()
    return network, feat, cosine, l2


def test_a_training_step_is_the_recorded_one() -> None:
    network, feat, cosine, l2 = recorded_step()
    close(feat.detach(), IO["train.feat_normalized"])
    torch.testing.assert_close(cosine.detach(), IO["train.loss_cosine"][0])
    torch.testing.assert_close(l2.detach(), IO["train.loss_l2"][0])
    parameters = dict(network.named_parameters())
    prefix = "train.grad."
    gradients = [name.removeprefix(prefix) for name in IO if name.startswith(prefix)]
    assert len(gradients) == 7
    for name in gradients:
        expected, found = IO[prefix + name], parameters[name].grad
        assert found is not None
        assert (found - expected).abs().max() <= 1e-4 * expected.abs().max(), name
    norms = [parameters[name].grad.norm() for name in CASE.config["grad_norm_names"]]  # type: ignore[union-attr]
    torch.testing.assert_close(torch.stack(norms), IO["train.grad_norms"], rtol=1e-3, atol=1e-4)
    buffers = dict(network.named_buffers())
    prefix = "train.buffer."
    for name in (name for name in IO if name.startswith(prefix)):
        close(buffers[name.removeprefix(prefix)], IO[name])


# -- names, sizes --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "parameters"), [("language", 91_712_800), ("segmentation", 46_199_572)]
)
def test_names_shapes_and_order_are_those_of_the_released_models(
    kind: str, parameters: int
) -> None:
    with torch.device("meta"):
        model: nn.Module = (
            LangPretrainer(LANGUAGE)
            if kind == "language"
            else DefaultSegmentorV2(SEGMENTATION, num_classes=20)
        )
    recorded = json.loads((GOLDENS / "keys" / f"{kind}.json").read_text("utf-8"))
    assert [(n, list(t.shape)) for n, t in model.state_dict().items()] == list(recorded.items())
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_drop_rates_grow_in_the_encoder_and_fall_in_each_decoder_stage() -> None:
    network = PointTransformerV3(tiny_config(enc_depths=(2, 1, 3), dec_depths=(2, 3)))

    def rates(group: nn.Module) -> list[float]:
        return [
            round(block.drop_path[0].p, 6)  # type: ignore[union-attr, arg-type]
            for stage in stages_of(group)
            for block in stage.blocks()
        ]

    assert rates(network.enc) == pytest.approx([0, 0.06, 0.12, 0.18, 0.24, 0.3])
    assert rates(network.dec) == pytest.approx([0.3, 0.225, 0.15, 0.075, 0])
    curves = [b.curve for s in stages_of(network.enc) for b in s.blocks()]
    assert curves == [0, 1, 0, 0, 1, 2]


# -- promises ------------------------------------------------------------------------------------


@torch.no_grad()
def test_evaluation_gives_the_same_bits_each_time_and_draws_nothing() -> None:
    network, batch = tiny_backbone(), voxels(80, 50)
    state = torch.get_rng_state()
    assert torch.equal(network(batch), network(batch))
    assert torch.equal(state, torch.get_rng_state())


@torch.no_grad()
def test_training_permutes_the_curves_once_for_the_stem_and_once_per_pooling() -> None:
    network, batch = recorded_network().train(), BATCH
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.eval()
    torch.manual_seed(CASE.config["seed"])
    close(network(batch), IO["out"])
    fixed = recorded_network(shuffle_orders=False).train()
    for module in fixed.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.eval()
    close(fixed(batch), IO["out_noshuffle"])


@torch.no_grad()
def test_clouds_of_a_batch_do_not_change_each_other() -> None:
    network, both = tiny_backbone(), voxels(90, 40)
    first, second = both.rows(0, 90), both.rows(90, 130)
    alone = torch.cat([network(first), network(second)])
    torch.testing.assert_close(network(both), alone, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_rows_in_another_order_give_the_same_features() -> None:
    network, batch = tiny_backbone(), voxels(120)
    order = torch.randperm(120, generator=torch.Generator().manual_seed(0))
    moved = PointBatch(batch.feat[order], batch.grid_coord[order], batch.offset)
    torch.testing.assert_close(network(moved), network(batch)[order], rtol=1e-4, atol=1e-5)


def test_the_first_block_of_a_decoder_stage_convolves_the_skip_branch() -> None:
    network = tiny_backbone()
    seen: list[tuple[Any, ...]] = []
    for stage in stages_of(network.dec):
        stage.block0.register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    network(voxels(100))
    assert len(seen) == 2
    for feat, _, conv_input in seen:
        assert conv_input.shape == feat.shape
        assert not torch.equal(conv_input, feat)


@pytest.mark.fault("P18", "P24", "R47")
@torch.no_grad()
def test_duplicates_one_voxel_and_clouds_smaller_than_the_strides_run() -> None:
    network = tiny_backbone()
    batch = voxels(60)
    twice = PointBatch(batch.feat.repeat(2, 1), batch.grid_coord.repeat(2, 1), torch.tensor([120]))
    assert network(twice).isfinite().all()
    assert torch.equal(network(twice), network(twice))
    one = PointBatch(torch.randn(1, 11), torch.zeros(1, 3, dtype=torch.int32), torch.tensor([1]))
    assert network(one).shape == (1, 12)


def test_class_mode_ends_with_the_encoder() -> None:
    network = PointTransformerV3(tiny_config(cls_mode=True)).eval()
    batch = voxels(80)
    assert network(batch).shape[1] == 16
    assert not any(name.startswith("dec") for name in network.state_dict())


@torch.no_grad()
def test_a_mapping_is_a_batch_too_and_its_language_features_are_ignored() -> None:
    network, batch = tiny_backbone(), voxels(50)
    mapping = {
        "feat": batch.feat,
        "coord": batch.grid_coord * 0.02 + 0.001,
        "grid_size": 0.02,
        "offset": batch.offset,
        "lang_feat": torch.zeros(50, 768),
    }
    made = replace(batch, grid_coord=batch.grid_coord - batch.grid_coord.amin(0))
    torch.testing.assert_close(network(mapping), network(made))


def test_another_number_of_features_or_permutations_is_refused() -> None:
    network = tiny_backbone()
    with pytest.raises(DataError, match=r"feat has 6 columns.* in_channels = 11"):
        network(voxels(20, channels=6))
    for wrong in ([torch.arange(4)] * 2, [torch.tensor([0, 1, 2, 2])] * 3):
        with pytest.raises(ConfigError, match=r"expected 3 .stem and 2 poolings"):
            network(voxels(20), wrong)


@pytest.mark.gpu
def test_a_gpu_gives_the_recorded_features_and_the_same_gradients_each_time() -> None:
    network = recorded_network().cuda()
    with torch.no_grad():
        close(network(BATCH.to("cuda")).cpu(), IO["out_noshuffle"], atol=1e-3)
    network.requires_grad_(False)
    feat = BATCH.feat.cuda().requires_grad_()
    batch = replace(BATCH.to("cuda"), feat=feat)
    first, second = (torch.autograd.grad(network(batch).sum(), feat)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_bfloat16_autocast_trains() -> None:
    network = tiny_backbone().train()
    with torch.autocast("cpu", torch.bfloat16):
        out = network(voxels(100, 60))
    out.float().pow(2).mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
