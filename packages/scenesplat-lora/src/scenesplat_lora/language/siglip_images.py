"""The vision tower of SigLIP 2 in a model folder of transformers: pictures to unit vectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from lora_core.base_file import no_model_folder
from lora_core.errors import CheckpointError, one_line
from scenesplat_lora.language.siglip import model_settings, read_tower

PICTURES_AT_ONCE = 16


@dataclass(frozen=True)
class VisionTower:
    """The picture half of a SigLIP 2 model, in float32.

    Attributes:
        processor: transformers' own, which resizes and normalises as preprocessor_config.json says.
    """

    model: nn.Module
    processor: Any

    @property
    def width(self) -> int:
        """D, channels of a vector."""
        return int(self.model.config.hidden_size)  # type: ignore[union-attr, arg-type]

    def embed(self, pictures: Sequence[NDArray[np.uint8]]) -> Tensor:
        """Unit vectors of pictures, RGB uint8 [H, W, 3] of any sizes, as float32 [B, D] on the CPU.

        The pooled output, as `get_image_features` gives it.
        """
        device = next(self.model.parameters()).device
        parts = [torch.zeros(0, self.width)]
        with torch.inference_mode():
            for begin in range(0, len(pictures), PICTURES_AT_ONCE):
                some = list(pictures[begin : begin + PICTURES_AT_ONCE])
                inputs = self.processor(
                    images=some, return_tensors="pt", input_data_format="channels_last"
                )
                pooled = self.model(**{k: v.to(device) for k, v in inputs.items()}).pooler_output
                parts.append(F.normalize(pooled.float(), dim=1).cpu())
        return torch.cat(parts)


def open_vision_tower(folder: str | Path, device: torch.device | str = "cpu") -> VisionTower:
    """The vision tower in a model folder, in evaluation mode.

    Raises:
        CheckpointError: no SigLIP 2 folder, or a damaged one.
    """
    folder = Path(folder)
    settings = model_settings(folder)
    if not (folder / "preprocessor_config.json").exists():
        raise no_model_folder(folder, "preprocessor_config.json")
    model = read_tower(folder, settings, "vision").to(device)
    if not model.use_head:
        raise CheckpointError(f"{folder}: its vision tower has no head, and so no vector")
    from transformers import AutoImageProcessor

    try:  # the Pillow one, so that features do not depend on an installed torchvision
        processor = AutoImageProcessor.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, backend="pil"
        )
    except (OSError, ValueError, TypeError, KeyError, ImportError) as error:
        reason = one_line(str(error))[:200]
        raise CheckpointError(f"{folder / 'preprocessor_config.json'}: {reason}") from None
    return VisionTower(model, processor)
