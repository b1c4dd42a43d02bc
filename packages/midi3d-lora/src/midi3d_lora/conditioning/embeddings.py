"""What the transformer is conditioned on: two embeddings per instance, or zeros."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from midi3d_lora.conditioning.clip import clip_embeds, clip_pixels
from midi3d_lora.conditioning.dino import dino_embeds, dino_pixels
from midi3d_lora.conditioning.pictures import ScenePictures, to_square
from midi3d_lora.conditioning.pixel_values import PictureSettings


@dataclass(frozen=True, eq=False)
class ImageEmbeddings:
    """Of the K instances of one scene.

    Attributes:
        image_embeds_1: [K, 1, 768], CLIP.
        image_embeds_2: [K, 1 + P, 1024], DINOv2; 1297 tokens for 512 x 512.
    """

    image_embeds_1: Tensor
    image_embeds_2: Tensor

    def __len__(self) -> int:
        return len(self.image_embeds_1)

    def unconditional(self) -> ImageEmbeddings:
        """Zeros of the same shapes: not the embeddings of an empty picture."""
        return ImageEmbeddings(
            torch.zeros_like(self.image_embeds_1), torch.zeros_like(self.image_embeds_2)
        )

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> ImageEmbeddings:
        """The same on another device or in another dtype."""
        return ImageEmbeddings(
            self.image_embeds_1.to(device, dtype), self.image_embeds_2.to(device, dtype)
        )


def embed_scene(
    scene: ScenePictures,
    image_encoder_1: nn.Module,
    settings_1: PictureSettings,
    image_encoder_2: nn.Module,
    settings_2: PictureSettings,
) -> ImageEmbeddings:
    """The embeddings of a scene's instances; a scene that is no square is extended to one."""
    scene = to_square(scene)
    return ImageEmbeddings(
        clip_embeds(image_encoder_1, clip_pixels(scene, settings_1)),
        dino_embeds(image_encoder_2, dino_pixels(scene, settings_2)),
    )
