"""The network against recorded numbers of the official implementation and of transformers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Sam3Config

from lora_core.testing import Golden, load_golden
from sam3_lora import decoder, network, prompts
from sam3_lora.losses import LossSettings, loss
from sam3_lora.matching import MatchSettings
from sam3_lora.names import to_official, to_transformers
from sam3_lora.outputs import Targets
from sam3_lora.positions import corners, position_map

GOLDENS = Path(__file__).parent / "goldens"
TOLERANCE = 1e-4
MAPS = 1e-3  # masks and feature maps, whose values go to 40


@pytest.fixture(scope="module")
def official() -> Golden:
    return load_golden(GOLDENS / "official_model")


@pytest.fixture(scope="module")
def library() -> Golden:
    return load_golden(GOLDENS / "transformers_model")


@pytest.fixture
def model(official: Golden, library: Golden) -> Any:
    """The official weights, put into a network that was built without values."""
    model = network.build_network(Sam3Config(**library.config["sam3_config"]), "meta")
    model.load_state_dict(to_transformers(official.weights), strict=True, assign=True)
    return model.requires_grad_(False)


def close(actual: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def training(model: Any) -> Any:
    """In training mode, without dropout."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.train()


def batch_of(io: dict[str, Tensor], boxes: bool = False) -> dict[str, Any]:
    batch: dict[str, Any] = {
        "pixel_values": io["pixel_values"],
        "input_ids": io["input_ids"],
        "attention_mask": (io["input_ids"] != 0).long(),
        "image_ids": io["img_ids"],
        "text_ids": io["text_ids"],
    }
    if boxes:
        labels = io["boxes.input_boxes_labels"]
        valid = io.get("boxes.input_boxes_valid", labels != prompts.PADDING).bool()
        batch["exemplars"] = io["boxes.input_boxes"]
        batch["exemplar_labels"] = labels.masked_fill(~valid, prompts.PADDING)
    return batch


def test_feature_maps_and_their_positions(model: Any, official: Golden) -> None:
    features = network.encode_images(model, official.io["pixel_values"])
    for level, feature_map in enumerate((*features.fine, features.map)):
        close(feature_map, official.io[f"fpn.{level}"], MAPS)
        code = position_map(*feature_map.shape[-2:], feature_map.shape[1], feature_map.device)
        close(code.permute(2, 0, 1)[None], official.io[f"fpn_pos.{level}"], 1e-6)
    close(features.position, official.io["fpn_pos.2"][0].flatten(1).T, 1e-6)


def test_text_features(model: Any, official: Golden) -> None:
    valid = official.io["language_mask"].bool()
    text = network.encode_text(model, official.io["input_ids"], valid)
    assert text.shape == official.io["language_features"].shape
    close(text[valid], official.io["language_features"][valid])


@pytest.mark.parametrize("case", ["text", "boxes"])
def test_stages_between_prompt_and_heads(model: Any, official: Golden, case: str) -> None:
    io, batch = official.io, batch_of(official.io, boxes=case == "boxes")
    features = network.encode_images(model, batch["pixel_values"])
    text = network.encode_text(model, batch["input_ids"], batch["attention_mask"])
    tokens, valid = prompts.encode_exemplars(
        model, features, io["img_ids"], batch.get("exemplars"), batch.get("exemplar_labels")
    )
    text_valid = batch["attention_mask"][io["text_ids"]].bool()
    prompt = decoder.Prompt(
        torch.cat([text[io["text_ids"]], tokens], 1), torch.cat([text_valid, valid], 1)
    )
    # Padded boxes stand behind the class token there and before it here: compare what is valid.
    close(prompt.tokens[prompt.valid], io[f"{case}.prompt"][io[f"{case}.prompt_mask"].bool()])
    memory = decoder.encode(model, features, prompt, io["img_ids"])
    close(memory, io[f"{case}.encoder_hidden_states"], MAPS)
    layers = decoder.decode(model, memory, features, prompt, one_to_many=False)
    close(layers[-1].hidden, io[f"{case}.queries"])


@pytest.mark.parametrize("case", ["text", "boxes"])
def test_outputs(model: Any, official: Golden, case: str) -> None:
    io = official.io
    batch = batch_of(io, boxes=case == "boxes")
    out = network.forward(model, batch, masks=True, one_to_many=False)
    (last,), (presence,) = out.one_to_one, out.presence
    assert out.one_to_many == []
    close(last.logits, io[f"{case}.pred_logits"][..., 0])
    close(last.boxes, io[f"{case}.pred_boxes"])
    close(corners(last.boxes), io[f"{case}.pred_boxes_xyxy"])
    close(presence, io[f"{case}.presence_logit"][:, 0])
    assert last.masks is not None
    assert out.semantic is not None
    close(last.masks.all(), io[f"{case}.pred_masks"], MAPS)
    close(out.semantic, io[f"{case}.semantic_seg"], MAPS)


@pytest.mark.parametrize("case", ["text_with_cls", "boxes"])
def test_outputs_with_the_epsilon_of_the_library(model: Any, library: Golden, case: str) -> None:
    for module in model.vision_encoder.backbone.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = library.config["vit_layer_norm_eps"]
    io = library.io
    out = network.forward(model, batch_of(io, boxes=case == "boxes"), masks=True, one_to_many=False)
    last = out.one_to_one[-1]
    close(last.logits, io[f"{case}.pred_logits"])
    close(corners(last.boxes), io[f"{case}.pred_boxes"])
    close(out.presence[-1], io[f"{case}.presence_logits"][:, 0])
    assert last.masks is not None
    assert out.semantic is not None
    close(last.masks.all(), io[f"{case}.pred_masks"], MAPS)
    close(out.semantic, io[f"{case}.semantic_seg"], MAPS)
    close(torch.stack(references(model, io, case)), io[f"{case}.decoder_reference_boxes"])


def references(model: Any, io: dict[str, Tensor], case: str) -> list[Tensor]:
    """What every decoder layer starts from: the boxes of the one before."""
    count = len(io["img_ids"])
    first = model.detr_decoder.reference_points.weight.sigmoid().expand(count, -1, -1)
    batch = batch_of(io, boxes=case == "boxes")
    layers = network.forward(training(model), batch, masks=False, one_to_many=False).one_to_one
    return [first, *(layer.boxes for layer in layers[:-1])]


def test_the_container_itself_computes_as_before(model: Any, library: Golden) -> None:
    """Its own forward, phrases only: rotary tables and other buffers came to be without values."""
    io = library.io
    with torch.no_grad():
        out = model(
            pixel_values=io["pixel_values"][io["img_ids"]],
            input_ids=io["input_ids"][io["text_ids"]],
            attention_mask=io["attention_mask"][io["text_ids"]],
        )
    close(out.pred_logits, io["text.pred_logits"])
    close(out.pred_boxes, io["text.pred_boxes"])
    close(out.pred_masks, io["text.pred_masks"], MAPS)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_outputs_of_every_layer_and_half(model: Any, checkpointing: bool) -> None:
    io = load_golden(GOLDENS / "train_step").io
    network.set_gradient_checkpointing(model, checkpointing)
    model = training(model).requires_grad_(True)
    out = network.forward(model, batch_of(io), masks=True, one_to_many=True)
    for k, layer in enumerate(("aux0", "aux1", "final")):
        close(out.presence[k], io[f"{layer}.presence_logit"][:, 0])
        for found, end in ((out.one_to_one[k], ""), (out.one_to_many[k], "_o2m")):
            close(found.logits, io[f"{layer}.pred_logits{end}"][..., 0])
            close(found.boxes, io[f"{layer}.pred_boxes{end}"])
            assert (found.masks is not None) == (layer == "final")
            if found.masks is not None:
                close(found.masks.all(), io[f"final.pred_masks{end}"], MAPS)
    assert out.semantic is not None
    close(out.semantic, io["final.semantic_seg"], MAPS)


def test_a_whole_training_step(model: Any) -> None:
    """From pixels to the gradient of every parameter."""
    golden = load_golden(GOLDENS / "train_step")
    io, model = golden.io, training(model).requires_grad_(True)
    out = network.forward(model, batch_of(io), masks=True, one_to_many=True)
    masks = Targets(io["target.boxes"], io["target.num_boxes"], io["target.masks"])
    matching = MatchSettings(o2m_threshold=golden.config["o2m"]["threshold"])
    total, _ = loss(out, masks, LossSettings(matching=matching))
    torch.testing.assert_close(total, io["loss.core_loss"], rtol=1e-5, atol=0)
    total.backward()
    grads = {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in model.named_parameters()
    }
    official = to_official(grads)
    norms = {k.removeprefix("gradnorm."): v for k, v in io.items() if k.startswith("gradnorm.")}
    assert official.keys() - norms.keys() <= set(golden.config["params_without_gradient"])
    largest = max(norms.values())
    for name, norm in norms.items():
        if name in official:  # those of point prompts have no gradient there, and no place here
            # Below 1e-6 of the largest it is rounding: a bias on all of a softmax's scores.
            torch.testing.assert_close(
                official[name].norm(), norm, rtol=1e-3, atol=1e-6 * largest.item()
            )
    for key, expected in io.items():
        if key.startswith("grad."):
            bound = 1e-3 * expected.abs().max().item()
            close(official[key.removeprefix("grad.")], expected, bound)
