"""The network: transformers' `Sam3Model` as container of the weights, run as the official model.

Its own forward differs: no class token without boxes, another epsilon, corner boxes, no training
outputs, and an image size fixed when it is built. Here the image encoder runs once per image, the
text encoder once per phrase, the rest once per query, at any size of whole patches.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sam3_lora import decoder
from sam3_lora.outputs import Detections, Masks, Outputs
from sam3_lora.prompts import encode_exemplars, encode_text
from sam3_lora.vision import Features, encode_images, feature_maps

if TYPE_CHECKING:
    from transformers import Sam3Config, Sam3Model

__all__ = [
    "Features",
    "build_network",
    "detect",
    "divisible",
    "drop_text_encoder",
    "encode_images",
    "encode_text",
    "feature_maps",
    "forward",
    "set_gradient_checkpointing",
    "trains_text",
]

LAYER_NORM_EPS = 1e-5  # everywhere in the official model; transformers has 1e-6 in the ViT


def build_network(config: Sam3Config, device: str = "cpu") -> Sam3Model:
    """The network with the library's initial weights, float32, in evaluation mode.

    Args:
        config: changed in place: the epsilon of the vision transformer.
        device: of the parameters. With "meta" they have no values; load some with
            `load_state_dict(state, assign=True)`. Buffers that are in no checkpoint have their
            values in any case (on the CPU then).
    """
    from lora_core import preflight

    preflight.torchvision()
    from transformers import Sam3Model

    config.vision_config.backbone_config.layer_norm_eps = LAYER_NORM_EPS
    with torch.device(device):
        model = Sam3Model._from_config(config, attn_implementation="sdpa")
    if device == "meta":
        _compute_buffers(model)
    return model.eval()


def _compute_buffers(model: Sam3Model) -> None:
    """Give the buffers that no checkpoint holds their values, on the CPU."""
    config = model.config.vision_config.backbone_config
    for module in model.modules():
        if hasattr(module, "precompute_positions"):  # a block of the vision transformer
            module.position_ids = nn.Buffer(
                module.precompute_positions(config, module.window_size), persistent=False
            )
        if hasattr(module, "compute_axial_rope_parameters"):
            frequencies, _ = module.compute_axial_rope_parameters(config)
            module.inv_freq = nn.Buffer(frequencies, persistent=False)
            module.original_inv_freq = nn.Buffer(frequencies.clone(), persistent=False)
    text = model.text_encoder.text_model.embeddings
    places = torch.arange(text.position_embedding.num_embeddings)[None]
    text.position_ids = nn.Buffer(places, persistent=False)


def set_gradient_checkpointing(model: Sam3Model, enabled: bool = True) -> None:
    """Compute every block again in the backward pass instead of keeping its activations.

    Results and gradients stay the same, dropout included. Blocks before the first trainable
    parameter keep nothing in any case, and are not computed twice.
    """
    model.sam3_checkpointing = enabled


def divisible(model: Sam3Model) -> list[nn.Module]:
    """The modules that hold most of the image encoder's weights, each called once per forward.

    Its blocks themselves are not: their parts are called one by one.
    """
    blocks = model.vision_encoder.backbone.layers
    attention = ("q_proj", "k_proj", "v_proj", "o_proj")
    projections = [getattr(block.attention, name) for block in blocks for name in attention]
    return [*projections, *(block.mlp for block in blocks)]


def trains_text(model: Sam3Model) -> bool:
    """Whether what `encode_text` gives changes in training."""
    parts = (model.text_encoder, model.text_projection)
    return any(parameter.requires_grad for part in parts for parameter in part.parameters())


def drop_text_encoder(model: Sam3Model) -> None:
    """Free the text encoder (354 of 840 M parameters) of a model that gets `text_features`."""
    del model.text_encoder, model.text_projection


def forward(model: Sam3Model, batch: dict[str, Any], *, masks: bool, one_to_many: bool) -> Outputs:
    """Detections for B queries, pairs of one of I images and one of P phrases.

    In training mode every decoder layer is returned, and one-to-many halves if asked for; in
    evaluation mode the last layer only. Scores and boxes are float32, masks have the precision of
    the computation.

    Args:
        batch: pixel_values f32 [I, 3, H, W]; input_ids and attention_mask i64 [P, L]; image_ids
            and text_ids i64 [B]. Optional: exemplars f32 [B, K, 4] with exemplar_labels i64 [B, K]
            (1, 0, or -10 for padding); text_features [P, L, C], of `encode_text`, instead of
            input_ids; trunk [I, h, w, width], of `vision.encode_trunk`, instead of pixel_values.
        masks: whether to run the mask head, which costs much memory.
    """
    if "trunk" in batch:
        features = feature_maps(model, batch["trunk"], masks=masks)
    else:
        features = encode_images(model, batch["pixel_values"], masks=masks)
    text = batch.get("text_features")
    if text is None:
        text = encode_text(model, batch["input_ids"], batch["attention_mask"])
    return detect(model, features, text, batch, masks=masks, one_to_many=one_to_many)


def detect(
    model: Sam3Model,
    features: Features,
    text: Tensor,
    batch: dict[str, Any],
    *,
    masks: bool,
    one_to_many: bool = False,
) -> Outputs:
    """As `forward`, with images and phrases already encoded.

    Args:
        features: of I images, with the finer maps if `masks`.
        text: [P, L, C].
        batch: attention_mask, image_ids, text_ids, exemplars, exemplar_labels: see `forward`.

    Raises:
        ValueError: masks are asked for, but the features were made without the finer maps.
    """
    if masks and not features.fine:
        raise ValueError("masks need features of encode_images(..., masks=True)")
    text_ids = batch["text_ids"]
    image_ids = _unless_in_order(batch["image_ids"], len(features.map))
    exemplars = batch.get("exemplars"), batch.get("exemplar_labels")
    examples, here = encode_exemplars(model, features, image_ids, *exemplars)
    prompt = decoder.Prompt(
        torch.cat([text[text_ids], examples], 1),
        torch.cat([batch["attention_mask"][text_ids].bool(), here], 1),
    )
    memory = decoder.encode(model, features, prompt, image_ids)
    layers = decoder.decode(model, memory, features, prompt, one_to_many and model.training)
    kept = layers if model.training else layers[-1:]
    logits = decoder.scores(model, torch.stack([layer.hidden for layer in kept]), prompt)
    drawn = semantic = None
    if masks:
        drawn, semantic = decoder.draw_masks(
            model, memory, features, prompt, image_ids, layers[-1].hidden
        )
    return _collect(kept, logits, drawn, semantic, model.detr_decoder.query_embed.num_embeddings)


def _unless_in_order(image_ids: Tensor, images: int) -> Tensor | None:
    """None where query b asks about image b: then nothing is copied."""
    if len(image_ids) != images:
        return image_ids
    in_order = torch.equal(image_ids, torch.arange(images, device=image_ids.device))
    return None if in_order else image_ids


def _collect(
    layers: list[decoder.Refined],
    logits: Tensor,
    masks: Masks | None,
    semantic: Tensor | None,
    queries: int,
) -> Outputs:
    """Part the one-to-one from the one-to-many half; masks belong to the last layer."""
    last = len(layers) - 1
    halves: list[list[Detections]] = [[], []]
    for k, layer in enumerate(layers):
        for half in range(layer.hidden.shape[1] // queries):
            part = slice(half * queries, (half + 1) * queries)
            drawn = masks.half(part) if masks is not None and k == last else None
            halves[half].append(Detections(logits[k][:, part], layer.boxes[:, part], drawn))
    return Outputs(halves[0], halves[1], [layer.presence for layer in layers], semantic)
