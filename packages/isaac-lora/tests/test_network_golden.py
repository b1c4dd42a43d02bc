"""The network against the recorded numbers of the original implementation."""

import json
from typing import Any

import pytest
import torch
from recorded_isaac import (
    CASE,
    GOLDENS,
    SAMPLES,
    WITH_IMAGES,
    labels_of,
    padded,
    recorded_model,
    sample,
)
from recorded_isaac import packed as packed_batch
from torch import Tensor, nn

from isaac_lora.network.configuration import IsaacConfig
from isaac_lora.network.isaac import IsaacForConditionalGeneration
from isaac_lora.network.positions import mrope_position_ids, rotary_cos_sin

TOLERANCE: dict[str, Any] = {"rtol": 0.0, "atol": 1e-5}
io = CASE.io


@pytest.fixture(scope="module")
def model() -> IsaacForConditionalGeneration:
    return recorded_model()


def near(actual: Tensor, name: str) -> None:
    expected = io[name]
    torch.testing.assert_close(actual.detach().reshape(expected.shape), expected, **TOLERANCE)


def test_the_published_model_has_its_750_tensors_and_shapes() -> None:
    config = IsaacConfig.from_pretrained(GOLDENS / "keys" / "isaac_0_1_config.json")
    with torch.device("meta"):
        full = IsaacForConditionalGeneration(config)
    names = json.loads((GOLDENS / "keys" / "keys.json").read_text("utf-8"))
    shapes = {name: list(tensor.shape) for name, tensor in full.state_dict().items()}
    assert shapes == {name: list(shape) for name, shape in names.items()}
    assert len(shapes) == 750
    assert sum(parameter.numel() for parameter in full.parameters()) == 2_567_073_008


@pytest.mark.parametrize("name", ["image1", "image2"])
def test_every_step_of_tower_and_projector_is_the_recorded_one(
    model: IsaacForConditionalGeneration, name: str
) -> None:
    tower: Any = model.model.vision_embedding[0]
    steps: dict[str, nn.Module] = {
        "vision_embeddings": tower.embeddings,
        "vision_layer0": tower.encoder.layers[0],
        "vision_layer1": tower.encoder.layers[1],
        "vision_post_layernorm": tower.post_layernorm,
        "vision_tower": tower,
        "projector": model.model.vision_embedding[3],
    }
    seen: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_hook(lambda _, __, out, step=step: seen.update({step: out}))
        for step, module in steps.items()
    ]
    with torch.no_grad():
        model.model.get_image_features(io[f"{name}.patches"], io[f"{name}.grids"])
    for hook in hooks:
        hook.remove()
    for step in steps:
        near(seen[step], f"{name}.{step}")


@pytest.mark.parametrize("name", SAMPLES)
def test_positions_and_their_rotation_are_the_recorded_ones(name: str) -> None:
    mask, grids = io[f"{name}.image_mask"].bool(), io.get(f"{name}.grids")
    positions = mrope_position_ids(mask, grids, CASE.config["pixel_shuffle_scale"])
    assert torch.equal(positions, io[f"{name}.position_ids"])
    assert positions[0, -1, 0] + 1 == io[f"{name}.next_time_position"]
    cos, sin = rotary_cos_sin(positions, mask, 16, CASE.config["rope_theta"], torch.float32)
    near(cos, f"{name}.cos")
    near(sin, f"{name}.sin")


@pytest.mark.parametrize("name", SAMPLES)
def test_the_decoder_is_the_recorded_one_layer_by_layer(
    model: IsaacForConditionalGeneration, name: str
) -> None:
    layers: list[Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda _, __, out: layers.append(out))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        output = model(**sample(name), output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    near(output.hidden_states[0], f"{name}.inputs_embeds")
    for index, layer in enumerate(layers):
        near(layer, f"{name}.layer{index}")
    near(output.hidden_states[-1], f"{name}.last_hidden")
    near(output.logits, f"{name}.logits")


@pytest.mark.parametrize("name", ["text", "image1", "image2"])
def test_loss_and_gradients_are_the_recorded_ones(name: str) -> None:
    model = recorded_model()
    loss = model(**sample(name), labels=labels_of(name)).loss
    assert loss.item() == pytest.approx(io[f"{name}.loss"].item(), abs=1e-5)
    loss.backward()
    recorded = [key for key in io if key.startswith(f"{name}.grad.")]
    for key in recorded:
        near(model.get_parameter(key.removeprefix(f"{name}.grad.")).grad, key)
    assert len(recorded) == (3 if name == "image2" else 0)


@pytest.mark.parametrize("name", WITH_IMAGES)
def test_greedy_answers_are_those_of_a_full_recomputation(
    model: IsaacForConditionalGeneration, name: str
) -> None:
    inputs = sample(name)
    output = model.generate(
        **inputs,
        max_new_tokens=5,
        do_sample=False,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert torch.equal(output.sequences[:, :-5], inputs["input_ids"])
    assert torch.equal(output.sequences[0, -5:], io[f"{name}.greedy_time_axis.tokens"])
    near(torch.cat(output.logits), f"{name}.greedy_time_axis.logits")


def test_the_rule_for_new_positions_is_seen_in_the_answer() -> None:
    time, all_axes = (io[f"short.greedy_{rule}_axis.tokens"] for rule in ("time", "max"))
    assert not torch.equal(time, all_axes)


@pytest.mark.parametrize("form", ["left", "right", "packed"])
def test_the_loss_of_a_batch_weighs_label_tokens_as_recorded(
    model: IsaacForConditionalGeneration, form: str
) -> None:
    batch = packed_batch(SAMPLES) if form == "packed" else padded(SAMPLES, form)
    with torch.no_grad():
        loss = model(**batch).loss
    assert loss.item() == pytest.approx(io["batch.loss_token_mean"].item(), abs=1e-5)
    count = io["batch.num_label_tokens"].item()
    with torch.no_grad():
        total = model(**batch, num_items_in_batch=1).loss
    assert total.item() == pytest.approx(loss.item() * count, rel=1e-6)
