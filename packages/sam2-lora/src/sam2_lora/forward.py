"""The forward pass: from pictures and prompts to masks, at any image size.

`encode` and `decode` are the image path of transformers' `Sam2Model` with gradient and flat over
objects: each object names the picture that it lies in, so pictures with different numbers of
objects share a batch without padding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lora_core.errors import ConfigError
from sam2_lora.config import STRIDE
from sam2_lora.image import as_tensor, preprocess

if TYPE_CHECKING:
    from transformers import Sam2Model

# -- running it ----------------------------------------------------------------------------------


class Features(NamedTuple):
    """What the decoder needs of B pictures of H x W pixels; C is 256 in the published models."""

    image_embed: Tensor  # [B, C, H/16, W/16]
    feat_s0: Tensor  # [B, C/8, H/4, W/4]
    feat_s1: Tensor  # [B, C/4, H/8, W/8]


class Decoded(NamedTuple):
    """Prediction for N objects, float32: M = 3 masks, or 1."""

    masks: Tensor  # [N, M, H/4, W/4] logits
    iou: Tensor  # [N, M] predicted IoU, 0..1
    object_score: Tensor  # [N, 1] logit: is there an object at all


def encode(model: Sam2Model, pixel_values: Tensor) -> Features:
    """Image features, with gradient.

    Args:
        model: a network whose image size (`set_image_size`) is that of the pictures.
        pixel_values: f32 [B, 3, H, W], normalised (`image.preprocess`).

    Raises:
        ValueError: the pictures have another size.
    """
    batch, size = pixel_values.shape[0], tuple(pixel_values.shape[-2:])
    if size != image_size(model):
        raise ValueError(f"pictures of {size} pixels, but the model is set to {image_size(model)}")
    levels = model.get_image_features(pixel_values, return_dict=True).fpn_hidden_states
    feat_s0, feat_s1, embed = (
        level.permute(1, 2, 0).reshape(batch, -1, size[0] // stride, size[1] // stride)
        for level, stride in zip(levels, (4, 8, 16), strict=True)
    )
    # The decoder was trained on features that say "there is no earlier frame".
    return Features(embed + model.no_memory_embedding.reshape(1, -1, 1, 1), feat_s0, feat_s1)


def encode_pictures(model: Sam2Model, pictures: Sequence[Tensor | NDArray[np.uint8]]) -> Features:
    """As `encode`, of pictures as files have them, resized and normalised on the model's device.

    So do training and prediction: a data loader's workers, and the way to a GPU, carry bytes.

    Args:
        pictures: B times uint8 [H, W, 3], each of any size, on any device.
    """
    device, size = next(model.parameters()).device, image_size(model)
    found = (one if isinstance(one, Tensor) else as_tensor(one) for one in pictures)
    return encode(model, torch.stack([preprocess(one.to(device), size) for one in found]))


def decode(
    model: Sam2Model,
    features: Features,
    image: Tensor,
    points: Tensor | None = None,
    labels: Tensor | None = None,
    boxes: Tensor | None = None,
    mask_input: Tensor | None = None,
    multimask: bool = True,
    stability: bool = False,
) -> Decoded:
    """Masks of N objects, with gradient; the same in training and in evaluation mode.

    All objects of one call have equally many points: a padding point would not be neutral.

    Args:
        model: the network.
        features: of B pictures.
        image: int64 [N], the row of `features` in which each object lies.
        points: [N, P, 2] (x, y) in model pixels.
        labels: int64 [N, P]: 1 foreground, 0 background; None: all foreground.
        boxes: [N, 4] corners (x0, y0, x1, y1) in model pixels.
        mask_input: [N, 1, H/4, W/4] logits of an earlier prediction.
        multimask: three masks (for a single click) instead of one (for a box or several clicks).
        stability: with one mask: where its border moves much between the logits -0.05 and 0.05,
            take the best-scored of the three instead, as the official predictor does.

    Raises:
        ValueError: neither points nor boxes.
    """
    if points is None and boxes is None:
        raise ValueError("decode needs points or boxes")
    if points is not None and labels is None:
        labels = torch.ones(points.shape[:2], dtype=torch.int64, device=points.device)
    # Positions in half precision are off by whole pixels, so autocast stays out of here.
    with torch.autocast(features.image_embed.device.type, enabled=False):
        sparse, dense = model.prompt_encoder(
            input_points=None if points is None else _on_square(model, points)[:, None],
            input_labels=None if labels is None else labels[:, None],
            input_boxes=None if boxes is None else _on_square(model, boxes)[:, None],
            input_masks=mask_input,
        )
        positions = model.get_image_wide_positional_embeddings()
    with _single_mask_rule(model.mask_decoder, stability):
        masks, iou, _, score = model.mask_decoder(
            image_embeddings=features.image_embed[image],
            image_positional_embeddings=positions.expand(len(image), -1, -1, -1),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=multimask,
            high_resolution_features=[features.feat_s0[image], features.feat_s1[image]],
        )
    return Decoded(masks[:, 0].float(), iou[:, 0].float(), score[:, 0].float())


@contextmanager
def _single_mask_rule(decoder: Any, stability: bool) -> Iterator[None]:
    """Let the caller, not the training mode, decide on the stability fallback.

    Only the decoder's own flag changes: its submodules keep their mode.
    """
    kept = decoder.training, decoder.dynamic_multimask_via_stability
    decoder.training = decoder.training and not stability
    decoder.dynamic_multimask_via_stability = stability
    try:
        yield
    finally:
        decoder.training, decoder.dynamic_multimask_via_stability = kept


# -- image size ----------------------------------------------------------------------------------


def image_size(model: Sam2Model) -> tuple[int, int]:
    """(height, width) in pixels of the pictures that the model takes."""
    height, width = model.prompt_encoder.mask_input_size  # a quarter of the picture
    return 4 * height, 4 * width


def set_image_size(model: Sam2Model, size: tuple[int, int]) -> None:
    """Let the model take pictures of another size, rectangles too; no weight changes.

    Positions are interpolated by the network itself. `model.config` keeps the size it was read
    with. With a rectangle call `decode`, not the model's own forward, which knows only squares.

    Args:
        model: the network.
        size: (height, width), both multiples of 32: 4-pixel patches in windows of 8.

    Raises:
        ConfigError: a side that is no multiple of 32.
    """
    height, width = size
    if height < STRIDE or width < STRIDE or height % STRIDE or width % STRIDE:
        raise ConfigError(f"image size {height}x{width}: both sides must be multiples of {STRIDE}")
    model.backbone_feature_sizes = [[height // s, width // s] for s in (4, 8, 16)]
    prompts = model.prompt_encoder
    prompts.image_embedding_size = (height // 16, width // 16)
    prompts.mask_input_size = (height // 4, width // 4)
    prompts.input_image_size = width  # the class knows one side only: see _on_square


def _on_square(model: Sam2Model, xy: Tensor) -> Tensor:
    """Stretch y so that dividing by the width gives the share of the height.

    The prompt encoder computes (x + 0.5) / S and (y + 0.5) / S with one S, which is the width here:
    y' = (y + 0.5) W / H - 0.5. Takes points [..., 2] and boxes [..., 4]; float32.
    """
    height, width = image_size(model)
    xy = xy.float()
    if height == width:
        return xy
    x, y = xy.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([x, (y + 0.5) * (width / height) - 0.5], -1).flatten(-2)
