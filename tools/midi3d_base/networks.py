"""The networks of the tiny base, from random weights, and their model directory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2Model,
)

from midi3d_lora.conditioning.pixel_values import PictureSettings
from midi3d_lora.demo_base.scenes import IMAGE_SIZE, NUM_TOKENS
from midi3d_lora.flow.rectified_flow import RectifiedFlowScheduler
from midi3d_lora.pipeline import MIDIPipeline
from midi3d_lora.transformer.dit import TripoSGDiTModel
from midi3d_lora.vae.autoencoder import TripoSGVAEModel

CHANNELS = 8  # of a latent token
# Of coordinates; as good with 4 after 300 steps as with 6 after 500.
FREQUENCIES = 4
MULTI_INSTANCE_BLOCKS = ("blocks.2", "blocks.3", "blocks.4")  # the middle of 7
CLIP_WIDTH, CLIP_SIZE = 16, 32
IMAGENET = {"image_mean": (0.485, 0.456, 0.406), "image_std": (0.229, 0.224, 0.225)}


@dataclass
class Networks:
    """All that is trained, and CLIP's tower, which is not: it stands for the real one."""

    vae: TripoSGVAEModel
    transformer: TripoSGDiTModel
    dino: Dinov2Model
    clip: CLIPVisionModelWithProjection

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Weights by the name of the network."""
        return {name: module.state_dict() for name, module in vars(self).items()}

    def restore(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Take what `state` gave."""
        for name, module in vars(self).items():
            module.load_state_dict(state[name])


def new_networks(seed: int) -> Networks:
    """Random weights of a seed."""
    torch.manual_seed(seed)
    vae = TripoSGVAEModel(
        latent_channels=CHANNELS, num_attention_heads=4, width_encoder=64, width_decoder=64,
        num_layers_encoder=2, num_layers_decoder=3, embed_frequency=FREQUENCIES,
    )  # fmt: skip
    look_nearby(vae.encoder.blocks[0].attn2)
    transformer = TripoSGDiTModel(
        num_attention_heads=4, width=NUM_TOKENS, in_channels=CHANNELS, num_layers=7,
        cross_attention_dim=CLIP_WIDTH, cross_attention_2_dim=64,
    )  # fmt: skip
    transformer.set_multi_instance_blocks(MULTI_INSTANCE_BLOCKS)
    nn.init.zeros_(transformer.proj_out.weight)
    dino = Dinov2Model(
        Dinov2Config(
            hidden_size=64, num_hidden_layers=3, num_attention_heads=4, mlp_ratio=2,
            image_size=IMAGE_SIZE, patch_size=8, num_channels=7,
        )
    )  # fmt: skip
    clip = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=CLIP_WIDTH, intermediate_size=2 * CLIP_WIDTH, num_hidden_layers=1,
            num_attention_heads=2, image_size=CLIP_SIZE, patch_size=16, projection_dim=CLIP_WIDTH,
        )
    )  # fmt: skip
    return Networks(vae, transformer, dino, clip.eval().requires_grad_(False))


@torch.no_grad()
def look_nearby(attention: nn.Module) -> None:
    """Tie keys to queries, orthogonal with gain 1.6: at first a point attends to those around it.

    Both sides hold the same features, and the product of two frequency embeddings is the larger
    the nearer their points are. Of the slots of [to_k; to_v] head h takes 2h as key.
    """
    heads = attention.heads
    nn.init.orthogonal_(attention.to_q.weight, gain=1.6)
    wanted = attention.to_q.weight.unflatten(0, (heads, -1))
    places = [(part, slot) for part in (attention.to_k, attention.to_v) for slot in range(heads)]
    for head, (part, slot) in enumerate(places[::2]):
        part.weight.unflatten(0, (heads, -1))[slot] = wanted[head]


def picture_settings() -> tuple[PictureSettings, PictureSettings]:
    """Of CLIP and of DINOv2."""
    both = []
    for size in (CLIP_SIZE, IMAGE_SIZE):
        crop = (("height", size), ("width", size))
        both.append(replace(PictureSettings(), size=(("shortest_edge", size),), crop_size=crop))
    return both[0], replace(both[1], **IMAGENET)


def pipeline(networks: Networks) -> MIDIPipeline:
    """The networks as users get them."""
    settings_1, settings_2 = picture_settings()
    return MIDIPipeline(
        vae=networks.vae.eval(),
        transformer=networks.transformer.eval(),
        scheduler=RectifiedFlowScheduler(),
        image_encoder_1=networks.clip,
        image_encoder_2=networks.dino.eval(),
        feature_extractor_1=settings_1,
        feature_extractor_2=settings_2,
    )


def write_base(networks: Networks, folder: Path) -> Path:
    """The model directory: transformer and VAE in half precision, encoders in float32.

    Encoders keep the precision of their files when they are read, and half of it is slow on a CPU.
    """
    whole = networks.state()
    networks.vae.half()
    networks.transformer.half()
    pipeline(networks).save_pretrained(folder)
    networks.vae.float()
    networks.transformer.float()
    networks.restore(whole)
    return folder


@torch.no_grad()
def standardise_latents(vae: TripoSGVAEModel, means: Tensor) -> None:
    """Make every channel of the latents N(0, 1)-like, exactly, within the weights around them.

    The flow knows no scale factor: z' = (z - μ) / s goes into `quant`, and its inverse into
    `post_quant`, so that the fields stay what they were.

    Args:
        means: of posteriors [..., C].
    """
    flat = means.reshape(-1, means.shape[-1])
    shift, scale = flat.mean(dim=0), flat.std(dim=0)
    channels = len(shift)
    quant, post = vae.quant, vae.post_quant
    quant.weight[:channels] /= scale[:, None]
    quant.bias[:channels] = (quant.bias[:channels] - shift) / scale
    quant.bias[channels:] -= 2 * scale.log()
    post.bias += post.weight @ shift
    post.weight *= scale
