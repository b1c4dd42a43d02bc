"""Image encoder 1: CLIP's vision tower sees one instance on white and gives one vector."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lora_core.weight_files import read_weights
from midi3d_lora.conditioning.encoder_folder import (
    IMAGES_AT_ONCE,
    build_encoder,
    encoder_settings,
)
from midi3d_lora.conditioning.pictures import ScenePictures
from midi3d_lora.conditioning.pixel_values import PictureSettings, pixel_values
from midi3d_lora.official import find_weights

FOLDER = "image_encoder_1"
PROCESSOR_FOLDER, PROCESSOR = "feature_extractor_1", "CLIPImageProcessor"


def read_clip(
    folder: str | Path, dtype: torch.dtype | None = None, variant: str | None = None
) -> nn.Module:
    """transformers' `CLIPVisionModelWithProjection` in a folder, frozen, on the CPU.

    Raises:
        CheckpointError: another model, or weights that do not fit or are damaged.
    """
    folder = Path(folder)
    settings = clip_settings(folder)
    tensors = read_weights(find_weights(folder, variant, stem="model"))
    return build_encoder(
        "CLIPVisionModelWithProjection", "CLIPVisionConfig", folder, settings, tensors, dtype
    )


def clip_settings(folder: Path) -> dict[str, Any]:
    """What its config.json says.

    Raises:
        CheckpointError: another model.
    """
    return encoder_settings(
        folder, "clip_vision_model", "the vision tower of CLIP with its projection"
    )


def clip_pixels(scene: ScenePictures, settings: PictureSettings) -> Tensor:
    """What the tower sees: float32 [K, 3, h, w]; the scene is square."""
    values = [pixel_values(scene.instance(i), settings) for i in range(len(scene))]
    return torch.from_numpy(np.stack(values))


@torch.no_grad()
def clip_embeds(model: nn.Module, pixels: Tensor) -> Tensor:
    """The projected pooled vector of each instance: [K, 3, h, w] -> [K, 1, projection_dim].

    In the dtype and on the device of the tower.
    """
    weight = next(model.parameters())
    parts = [
        model(part.to(weight.device, weight.dtype)).image_embeds
        for part in pixels.split(IMAGES_AT_ONCE)
    ]
    return torch.cat(parts).unsqueeze(1)
