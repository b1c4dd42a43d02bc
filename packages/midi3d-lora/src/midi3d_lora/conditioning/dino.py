"""Image encoder 2: DINOv2 with 7 channels sees an instance, its scene and its mask."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lora_core.errors import CheckpointError
from lora_core.weight_files import read_weights
from midi3d_lora.conditioning.encoder_folder import (
    IMAGES_AT_ONCE,
    build_encoder,
    encoder_settings,
)
from midi3d_lora.conditioning.pictures import ScenePictures
from midi3d_lora.conditioning.pixel_values import PictureSettings, mask_values, pixel_values
from midi3d_lora.official import find_weights

FOLDER = "image_encoder_2"
PROCESSOR_FOLDER, PROCESSOR = "feature_extractor_2", "BitImageProcessor"
CHANNELS = 7  # rgb of the instance, rgb of the scene, mask


def read_dino(
    folder: str | Path, dtype: torch.dtype | None = None, variant: str | None = None
) -> nn.Module:
    """transformers' `Dinov2Model` in a folder, frozen, on the CPU.

    Raises:
        CheckpointError: another model, fewer channels, or weights that do not fit or are damaged.
    """
    folder = Path(folder)
    settings = dino_settings(folder)
    tensors = read_weights(find_weights(folder, variant, stem="model"))
    return build_encoder("Dinov2Model", "Dinov2Config", folder, settings, tensors, dtype)


def dino_settings(folder: Path) -> dict[str, Any]:
    """What its config.json says.

    Raises:
        CheckpointError: another model, or one that does not see 7 channels.
    """
    settings = encoder_settings(folder, "dinov2", "DINOv2 with 7 channels")
    channels = settings.get("num_channels", 3)
    if channels != CHANNELS:
        raise CheckpointError(
            f"{folder / 'config.json'}: num_channels is {channels!r}, expected 7 (instance, scene, "
            "mask): an ordinary DINOv2 does not know the scene; take the encoder of MIDI-3D"
        )
    return settings


def dino_pixels(scene: ScenePictures, settings: PictureSettings) -> Tensor:
    """What the encoder sees: float32 [K, 7, h, w]; the scene is square.

    Channels 0-2 the instance on white, 3-5 the whole scene, both normalised; 6 the mask, 0 or 1.
    """
    whole = pixel_values(scene.scene, settings)
    rows = [
        np.concatenate(
            [
                pixel_values(scene.instance(i), settings),
                whole,
                mask_values(scene.mask(i), settings)[None],
            ]
        )
        for i in range(len(scene))
    ]
    return torch.from_numpy(np.stack(rows))


@torch.no_grad()
def dino_embeds(model: nn.Module, pixels: Tensor) -> Tensor:
    """All tokens after the last norm, the class token first: [K, 7, h, w] -> [K, 1 + P, hidden].

    P = floor(h / patch) · floor(w / patch). In the dtype and on the device of the encoder.
    """
    weight = next(model.parameters())
    parts = [
        model(part.to(weight.device, weight.dtype)).last_hidden_state
        for part in pixels.split(IMAGES_AT_ONCE)
    ]
    return torch.cat(parts)
