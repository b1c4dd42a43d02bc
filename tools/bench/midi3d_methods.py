"""The transformer of midi3d-lora whose training steps are compared, a batch, and the loss.

Everything is random.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from training_step import last_quarter, train_by
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2Model,
)

from midi3d_lora import lora
from midi3d_lora.flow.losses import NoisyRows, Weighting, add_noise, velocity_loss
from midi3d_lora.flow.rectified_flow import RectifiedFlowScheduler
from midi3d_lora.lora_choice import (
    RELEASED_LAYERS,
    RELEASED_MULTI_INSTANCE_BLOCKS,
    LoraChoice,
)
from midi3d_lora.transformer.dit import TripoSGDiTModel
from midi3d_lora.vae.autoencoder import TripoSGVAEModel

HEAD = 128  # channels of a head, as released
PATCH = 14  # pixels, of both encoders of pictures
POINTS_PER_TOKEN = 10  # of a surface, as released
ENCODER_LAYERS = {"CLIP": 24, "DINOv2": 24, "VAE": 8}


@dataclass(frozen=True)
class Case:
    """What is trained on what.

    Attributes:
        width, layers: of the transformer; its middle block joins the instances of a scene, or those
            of the released model at its depth.
        instances: of the one scene. tokens: of each. picture_tokens: of DINOv2, for each.
        precision: "fp32", "autocast", or "bf16": base weights in bf16 too, as `train` has them.
        last_blocks: only the last quarter of the blocks has adapters.
        cached: latents and picture embeddings are given.
    """

    width: int = 2048
    layers: int = 3
    instances: int = 2
    tokens: int = 512
    picture_tokens: int = 325
    rank: int = 16
    dropout: float = 0.1
    precision: str = "fp32"
    checkpointing: bool = False
    last_blocks: bool = False
    cached: bool = True
    device: str = "cpu"

    @property
    def choice(self) -> LoraChoice:
        """The guide's targets."""
        blocks: tuple[str, ...] = (f"blocks.{self.layers // 2}",)
        if self.layers == RELEASED_LAYERS:
            blocks = RELEASED_MULTI_INSTANCE_BLOCKS
        return LoraChoice(self.rank, self.rank, self.dropout, multi_instance_blocks=blocks)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device, torch.bfloat16, enabled=self.precision != "fp32")


CASES = {
    "fp32": Case(),
    "fp32, no dropout": Case(dropout=0.0),
    "bf16 base": Case(precision="bf16"),
    "bf16 base, no dropout": Case(precision="bf16", dropout=0.0),
}
VARIANTS: Mapping[str, dict[str, Any]] = {
    "checkpointed": {"checkpointing": True},
    "last blocks": {"last_blocks": True},
    "uncached": {"cached": False},
}


def base(case: Case) -> TripoSGDiTModel:
    """The frozen transformer with random weights."""
    torch.manual_seed(0)
    model = TripoSGDiTModel(case.width // HEAD, case.width, num_layers=case.layers)
    model.set_multi_instance_blocks(case.choice.multi_instance_blocks)
    if case.precision == "bf16":
        nn.Module.to(model, torch.bfloat16)  # diffusers' own warns
    if case.checkpointing:
        model.enable_gradient_checkpointing()
    return model.requires_grad_(False)


def random_weights(case: Case) -> dict[str, Tensor]:
    """Of the transformer."""
    return base(case).to(case.device).state_dict()


def build(method: str, case: Case, weights: Mapping[str, Tensor]) -> nn.Module:
    """The transformer ready to train by one method; the frozen weights are shared by all."""
    model = base(case).to(case.device)
    model.load_state_dict(weights, assign=True)
    model.requires_grad_(False)  # tensors that were assigned want gradients
    config = case.choice.config()
    if case.last_blocks:
        config = replace(config, last_blocks={"blocks": last_quarter(case.layers)})
    return train_by(method, model, config)


def adapted_skeleton(case: Case) -> TripoSGDiTModel:
    """The transformer with the adapters of `train` on the meta device, in training."""
    with torch.device("meta"):
        model = base(case)
    lora.inject(model, case.choice)
    return model.train()


# -- frozen encoders -------------------------------------------------------------------------------


def clip_model(side: int, narrower: int = 1, layers: int = ENCODER_LAYERS["CLIP"]) -> nn.Module:
    """The vision tower of CLIP ViT-L/14, random.

    Args:
        side: pixels of its pictures. narrower: what the released channels are divided by.
    """
    config = CLIPVisionConfig(
        hidden_size=1024 // narrower, intermediate_size=4096 // narrower,
        num_hidden_layers=layers, num_attention_heads=16, image_size=side, patch_size=PATCH,
        projection_dim=768,
    )  # fmt: skip
    return CLIPVisionModelWithProjection(config).eval()


def dino_model(narrower: int = 1, layers: int = ENCODER_LAYERS["DINOv2"]) -> nn.Module:
    """DINOv2-large with 7 channels, random; `narrower` as for `clip_model`."""
    config = Dinov2Config(
        hidden_size=1024 // narrower, num_hidden_layers=layers, num_attention_heads=16,
        image_size=518, patch_size=PATCH, num_channels=7,
    )  # fmt: skip
    return Dinov2Model(config).eval()


def vae_encoder(narrower: int = 1, layers: int = ENCODER_LAYERS["VAE"]) -> TripoSGVAEModel:
    """The autoencoder, random; its decoder has one layer, since nothing runs it."""
    model = TripoSGVAEModel(
        width_encoder=512 // narrower,
        width_decoder=8,
        num_layers_encoder=layers,
        num_layers_decoder=1,
    )
    return model.eval()


Embeds = tuple[Tensor, Tensor]


def encoders(case: Case) -> Callable[[], tuple[Tensor, Embeds]]:
    """What computes latents and picture embeddings of all instances, each time again.

    The encoders have the released widths, as much of their depth as the transformer has of its own,
    and as much of their input as it has tokens.
    """
    torch.manual_seed(0)
    share = case.layers / RELEASED_LAYERS
    depth = {name: max(1, round(share * layers)) for name, layers in ENCODER_LAYERS.items()}
    side = PATCH * round((case.picture_tokens - 1) ** 0.5)  # of 512 pixels as released
    clip_side = PATCH * max(1, round(side * 224 / 512 / PATCH))
    tower = clip_model(clip_side, layers=depth["CLIP"]).to(case.device).requires_grad_(False)
    eye = dino_model(layers=depth["DINOv2"]).to(case.device).requires_grad_(False)
    vae = vae_encoder(layers=depth["VAE"]).to(case.device).requires_grad_(False)
    count = case.instances
    crops = torch.randn(count, 3, clip_side, clip_side, device=case.device)
    pictures = torch.randn(count, 7, side, side, device=case.device)
    surface = torch.randn(count, POINTS_PER_TOKEN * case.tokens, 6, device=case.device)
    dtype = torch.bfloat16 if case.precision == "bf16" else torch.float32

    def encode() -> tuple[Tensor, Embeds]:
        with torch.no_grad(), torch.autocast(case.device, enabled=False):
            (found,) = vae.encode(surface, case.tokens, seed=0, return_dict=False)
            first = tower(crops).image_embeds[:, None]
            second = eye(pictures).last_hidden_state
        return found.mode(), (first.to(dtype), second.to(dtype))

    return encode


# -- batch and loss --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """One scene: its rows at one noise level, both picture embeddings of each, and what makes them.

    Attributes:
        encode: computes latents and embeddings again; only where nothing is cached.
    """

    rows: NoisyRows
    embeds: Embeds
    encode: Callable[[], tuple[Tensor, Embeds]] | None = None


def noisy(latents: Tensor, case: Case) -> NoisyRows:
    """The rows of one scene [R, N, C] at the middle noise level."""
    draw = torch.Generator().manual_seed(0)
    noise = torch.randn(latents.shape, generator=draw)
    one_scene = torch.zeros(case.instances, dtype=torch.int64)
    sigmas = torch.full((1,), 0.5)
    return add_noise(latents, noise, sigmas, one_scene, RectifiedFlowScheduler())


def random_batch(case: Case) -> Batch:
    """As the encoder cache gives it: embeddings in the dtype of the weights."""
    draw = torch.Generator().manual_seed(1)
    count = case.instances
    latents = torch.randn(count, case.tokens, 64, generator=draw)
    dtype = torch.bfloat16 if case.precision == "bf16" else torch.float32
    first = torch.randn(count, 1, 768, generator=draw).to(case.device, dtype)
    second = torch.randn(count, case.picture_tokens, 1024, generator=draw).to(case.device, dtype)
    return Batch(noisy(latents.to(case.device), case), (first, second))


def step_batch(case: Case, weights: Mapping[str, Tensor]) -> Batch:
    """The same, with what the encoders make of random pictures and surfaces."""
    encode = encoders(case)
    latents, embeds = encode()
    return Batch(noisy(latents, case), embeds, encode)


def loss_of(model: nn.Module, batch: Batch, case: Case) -> Tensor:
    """The loss of `midi3d-lora train`: squared error of the velocity."""
    rows, embeds = batch.rows, batch.embeds
    if not case.cached:
        assert batch.encode is not None
        latents, embeds = batch.encode()
        rows = noisy(latents, case)
    with case.autocast():
        predicted = model(
            rows.noisy_latents, rows.timesteps, *embeds,
            instance_groups=[0] * case.instances, return_dict=False,
        )[0]  # fmt: skip
        return velocity_loss(predicted, rows, Weighting())[0]
