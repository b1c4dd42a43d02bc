"""The transformer against the recorded cases, and what it promises beside them."""

import json
from typing import Any

import pytest
import torch
from tiny_transformers import CASES, GOLDENS, inputs_of, random_inputs, recorded_transformer
from torch import Tensor

from lora_core.errors import ConfigError
from lora_core.testing.goldens import Golden
from midi3d_lora.transformer.dit import RELEASED_MULTI_INSTANCE_BLOCKS, TripoSGDiTModel
from midi3d_lora.transformer.groups import guidance_groups, official_groups, scene_groups

TOLERANCE: dict[str, Any] = {"rtol": 0.0, "atol": 2e-5}
recorded = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@pytest.fixture
def five() -> TripoSGDiTModel:
    return recorded_transformer(CASES["dit_5_layers"])


@torch.no_grad()
def run(model: TripoSGDiTModel, inputs: dict[str, Any], **kwargs: Any) -> Tensor:
    return model(**inputs, **kwargs).sample


# -- recorded numbers ----------------------------------------------------------------------------


@recorded
def test_single_rows_are_the_recorded_ones_block_by_block(case: Golden) -> None:
    model = recorded_transformer(case)
    outputs: list[Tensor] = []
    tokens: list[Tensor] = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, output: outputs.append(output))
    model.time_proj.register_forward_hook(lambda module, args, output: tokens.append(output))
    sample = run(model, inputs_of(case, "single"))
    torch.testing.assert_close(tokens[0][:, None], case.io["single.temb"], **TOLERANCE)
    assert len(outputs) == case.config["model"]["num_layers"]
    for index, output in enumerate(outputs):
        torch.testing.assert_close(output, case.io[f"single.block_output.{index}"], **TOLERANCE)
    torch.testing.assert_close(sample, case.io["single.sample"], **TOLERANCE)
    torch.testing.assert_close(sample, case.io["single.sample_plain"], **TOLERANCE)


@recorded
def test_rows_of_a_scene_see_each_other_as_recorded(case: Golden) -> None:
    model, inputs = recorded_transformer(case), inputs_of(case, "mi")
    count = int(case.io["mi.num_instances"])
    together = run(model, inputs, instance_groups=[5] * count)
    torch.testing.assert_close(together, case.io["mi.sample"], **TOLERANCE)
    alone = run(model, inputs)
    torch.testing.assert_close(alone, case.io["mi.sample_without_mi"], **TOLERANCE)
    assert (together - alone).abs().max() > 0.01


@recorded
def test_the_batch_doubled_for_guidance_is_the_recorded_one(case: Golden) -> None:
    model, inputs = recorded_transformer(case), inputs_of(case, "mi")
    count = int(case.io["mi.num_instances"])
    timestep = inputs.pop("timestep")
    doubled = {
        name: torch.cat([t if name == "hidden_states" else torch.zeros_like(t), t])
        for name, t in inputs.items()
    } | {"timestep": timestep}
    groups = guidance_groups(scene_groups([count]))
    by_groups = run(model, doubled, instance_groups=groups)
    torch.testing.assert_close(by_groups, case.io["mi.sample_cfg"], **TOLERANCE)
    by_count = run(model, doubled, attention_kwargs={"num_instances": count})
    assert torch.equal(by_groups, by_count)


@recorded
def test_the_padded_layout_of_training_is_the_recorded_one(case: Golden) -> None:
    model, inputs = recorded_transformer(case), inputs_of(case, "train")
    counts = {
        "num_instances": case.io["train.num_instances"],
        "num_instances_per_batch": case.io["train.num_instances_per_batch"],
    }
    by_counts = run(model, inputs, attention_kwargs=counts)
    torch.testing.assert_close(by_counts, case.io["train.sample"], **TOLERANCE)
    groups = official_groups(len(inputs["hidden_states"]), **counts)
    assert torch.equal(run(model, inputs, instance_groups=groups), by_counts)


def test_the_released_sizes_have_the_official_keys_and_shapes() -> None:
    keys = json.loads((GOLDENS / "keys" / "transformer.json").read_text())
    with torch.device("meta"):
        model = TripoSGDiTModel()
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes == keys["keys"]
    assert len(shapes) == keys["tensors"]
    assert model.num_parameters() == keys["parameters"]
    targets = json.loads((GOLDENS / "keys" / "lora_targets.json").read_text())["modules"]
    for name, (inputs, outputs) in targets.items():
        linear = model.get_submodule(name)
        assert (linear.in_features, linear.out_features) == (inputs, outputs)


# -- scenes --------------------------------------------------------------------------------------


def test_a_scene_may_lie_anywhere_in_a_batch_of_scenes_of_all_sizes(five: TripoSGDiTModel) -> None:
    inputs = random_inputs(five, rows=9)
    groups = torch.tensor([7, 2, 7, 0, 2, 7, 1, 2, 4])
    out = run(five, inputs, instance_groups=groups)
    for group in groups.unique():
        rows = groups == group
        scene = {name: tensor[rows] for name, tensor in inputs.items()}
        alone = run(five, scene, instance_groups=[0] * int(rows.sum()))
        torch.testing.assert_close(out[rows], alone, **TOLERANCE)


def test_scenes_of_one_instance_are_exactly_ordinary_attention(five: TripoSGDiTModel) -> None:
    inputs = random_inputs(five, rows=3)
    plain = run(five, inputs)
    assert torch.equal(plain, run(five, inputs, instance_groups=[4, 9, 1]))
    five.set_multi_instance_blocks([])
    assert torch.equal(plain, run(five, inputs, instance_groups=[1, 1, 1]))


def test_blocks_are_named_whole(five: TripoSGDiTModel) -> None:
    with torch.device("meta"):
        model = TripoSGDiTModel(2, 8, num_layers=21)
    model.set_multi_instance_blocks(["blocks.1", "blocks.2"])
    assert model.multi_instance_blocks == ("blocks.1", "blocks.2")
    model.set_multi_instance_blocks()
    assert model.multi_instance_blocks == RELEASED_MULTI_INSTANCE_BLOCKS
    with pytest.raises(ConfigError, match=r"no blocks 'blocks\.5', 'attn': .* to blocks\.4"):
        five.set_multi_instance_blocks(["blocks.0", "blocks.5", "attn"])


def test_a_scene_without_blocks_for_it_is_refused() -> None:
    model = TripoSGDiTModel(2, 8, 4, 3, 6, 6)
    inputs = random_inputs(model, rows=2)
    assert run(model, inputs, instance_groups=[0, 1]).isfinite().all()
    with pytest.raises(ConfigError, match="call set_multi_instance_blocks"):
        model(**inputs, instance_groups=[0, 0])


# -- what has no effect --------------------------------------------------------------------------


def test_leaving_out_the_dead_cross_attention_changes_nothing(five: TripoSGDiTModel) -> None:
    inputs = random_inputs(five, rows=2)
    # The same token twice: the softmax is over two equal keys, so the values average to the value,
    # and the ordinary way of the attention is taken.
    twice = inputs | {"encoder_hidden_states": inputs["encoder_hidden_states"].repeat(1, 2, 1)}
    torch.testing.assert_close(run(five, inputs), run(five, twice), **TOLERANCE)
    block: Any = five.blocks[1]
    context = inputs["encoder_hidden_states"]
    with torch.no_grad():
        x = torch.randn(2, 5, five.config.width)
        full = block.attn2(block.norm2(x), context)
        short = block.attn2.of_single_token(context).expand_as(full)
    torch.testing.assert_close(full, short, rtol=0, atol=1e-6)


def test_what_the_dead_cross_attention_reads_gets_no_gradient(five: TripoSGDiTModel) -> None:
    five(**random_inputs(five, rows=2)).sample.square().mean().backward()
    dead = {name for name, weight in five.named_parameters() if weight.grad is None}
    parts = ["attn2.to_q.weight", "attn2.norm_q.weight", "attn2.norm_k.weight"]
    parts += ["norm2.weight", "norm2.bias"]
    assert dead == {f"blocks.{index}.{part}" for index in range(5) for part in parts}


# -- gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("adapted", ["proj_in.weight", "blocks.1.attn1.to_q.weight"])
def test_gradient_checkpointing_gives_the_same_gradients(
    five: TripoSGDiTModel, adapted: str
) -> None:
    five.requires_grad_(False)
    weight = five.get_parameter(adapted).requires_grad_()
    inputs = random_inputs(five, rows=5)
    found = []
    for on in (False, True):
        (five.enable_gradient_checkpointing if on else five.disable_gradient_checkpointing)()
        assert five.is_gradient_checkpointing is on
        calls: list[int] = []
        hook = five.blocks[2].register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        loss = five(**inputs, instance_groups=[0, 0, 0, 1, 1]).sample.square().mean()
        found.append(torch.autograd.grad(loss, weight)[0])
        assert len(calls) == 1 + on
        hook.remove()
    assert found[0].abs().max() > 0
    assert torch.equal(*found)


def test_a_model_in_bfloat16_takes_inputs_of_any_dtype(five: TripoSGDiTModel) -> None:
    inputs = random_inputs(five, rows=3)
    exact = run(five, inputs, instance_groups=[0, 0, 0])
    half = run(five.to(torch.bfloat16), inputs, instance_groups=[0, 0, 0])
    assert half.dtype == torch.bfloat16
    assert 0 < (half - exact).abs().max() < 0.1 * exact.abs().max()


def test_autocast_keeps_the_norms_in_float32(five: TripoSGDiTModel) -> None:
    inputs = random_inputs(five, rows=2)
    exact = run(five, inputs)
    seen: list[tuple[torch.dtype, torch.dtype]] = []
    five.get_submodule("blocks.3.norm3").register_forward_hook(
        lambda module, args, output: seen.append((args[0].dtype, output.dtype))
    )
    with torch.autocast("cpu", torch.bfloat16):
        half = run(five, inputs)
    assert len(set(seen[0])) == 1
    assert 0 < (half - exact).abs().max() < 0.1 * exact.abs().max()


# -- mistakes ------------------------------------------------------------------------------------


def test_inputs_that_do_not_belong_together_are_told_at_once(five: TripoSGDiTModel) -> None:
    inputs = random_inputs(five, rows=3)
    wrong = inputs | {
        "encoder_hidden_states": inputs["encoder_hidden_states"][:2],
        "encoder_hidden_states_2": inputs["encoder_hidden_states_2"][..., :5],
        "timestep": torch.ones(2),
    }
    with pytest.raises(ConfigError) as caught:
        five(**wrong)
    assert str(caught.value).splitlines() == [
        "encoder_hidden_states is [2, 1, 12]: expected [3, tokens, 12]",
        "encoder_hidden_states_2 is [3, 4, 5]: expected [3, tokens, 20]",
        "timestep is [2]: expected [3] or one number",
    ]


def test_groups_said_twice_are_refused(five: TripoSGDiTModel) -> None:
    with pytest.raises(ConfigError, match="not both"):
        five(
            **random_inputs(five, rows=2),
            instance_groups=[0, 0],
            attention_kwargs={"num_instances": 2},
        )


def test_sizes_that_make_no_model_are_told_at_once() -> None:
    with pytest.raises(ConfigError, match=r"(?s)width is 0.*num_layers is 2\.5"):
        TripoSGDiTModel(width=0, num_layers=2.5)
    with pytest.raises(ConfigError, match="even multiple of 3 heads"):
        TripoSGDiTModel(num_attention_heads=3)
    with pytest.raises(ConfigError, match="TripoSG"):
        TripoSGDiTModel(cross_attention_2_dim=None)
