"""The networks that `midi3d_step.py` compares, a batch, and the loss; all is random."""

from __future__ import annotations

from dataclasses import dataclass

import peft
import torch
from floor import begin_graph_at
from torch import Tensor, nn

from midi3d_lora import lora
from midi3d_lora.flow.losses import NoisyRows, Weighting, add_noise, velocity_loss
from midi3d_lora.flow.rectified_flow import RectifiedFlowScheduler
from midi3d_lora.lora_choice import (
    RELEASED_LAYERS,
    RELEASED_MULTI_INSTANCE_BLOCKS,
    LoraChoice,
)
from midi3d_lora.transformer.dit import TripoSGDiTModel

HEAD = 128  # channels of a head, as released


@dataclass(frozen=True)
class Case:
    """What is trained on what.

    Attributes:
        width, layers: of the transformer; its middle block joins the instances of a scene, or those
            of the released model at its depth.
        instances: of the one scene. tokens: of each. picture_tokens: of DINOv2, for each.
        precision: "fp32", "autocast", or "bf16": base weights in bf16 too, as `train` has them.
    """

    width: int = 2048
    layers: int = 3
    instances: int = 2
    tokens: int = 128
    picture_tokens: int = 82
    rank: int = 16
    dropout: float = 0.1
    precision: str = "fp32"
    checkpointing: bool = False
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


def build(method: str, case: Case, weights: dict[str, Tensor]) -> nn.Module:
    """The transformer ready to train by one method; the frozen weights are shared by all."""
    model: nn.Module = base(case).to(case.device)
    model.load_state_dict(weights, assign=method != "full")
    if method == "lora_core":
        lora.inject(model, case.choice)
    elif method == "PEFT":
        model = with_peft(model, case)
    elif method == "full":
        model.requires_grad_(True)
    else:
        begin_graph_at(model, lora.adapted_layers(model, case.choice))
    return model.train()


def adapted_skeleton(case: Case) -> TripoSGDiTModel:
    """The transformer with the adapters of `train` on the meta device, in training."""
    with torch.device("meta"):
        model = base(case)
    lora.inject(model, case.choice)
    return model.train()


def with_peft(model: TripoSGDiTModel, case: Case) -> nn.Module:
    """PEFT's adapters on the layers that `lora.inject` would take."""
    paths = lora.adapted_layers(model, case.choice)
    config = peft.LoraConfig(
        r=case.rank, lora_alpha=case.rank, lora_dropout=case.dropout, target_modules=paths
    )
    return peft.get_peft_model(model, config)


@dataclass(frozen=True)
class Batch:
    """One scene: its rows at one noise level, and both picture embeddings of each."""

    rows: NoisyRows
    embeds: tuple[Tensor, Tensor]

    def tensors(self) -> list[Tensor]:
        return [*vars(self.rows).values(), *self.embeds]


def random_batch(case: Case) -> Batch:
    """As the encoder cache gives it: embeddings in the dtype of the weights."""
    draw = torch.Generator().manual_seed(0)
    count = case.instances
    latents, noise = (torch.randn(count, case.tokens, 64, generator=draw) for _ in range(2))
    one_scene = torch.zeros(count, dtype=torch.int64)
    sigmas = torch.full((1,), 0.5)
    rows = add_noise(latents.to(case.device), noise, sigmas, one_scene, RectifiedFlowScheduler())
    dtype = torch.bfloat16 if case.precision == "bf16" else torch.float32
    first = torch.randn(count, 1, 768, generator=draw)
    second = torch.randn(count, case.picture_tokens, 1024, generator=draw)
    return Batch(rows, (first.to(case.device, dtype), second.to(case.device, dtype)))


def loss_of(model: nn.Module, batch: Batch, case: Case) -> Tensor:
    """The loss of `midi3d-lora train`: squared error of the velocity."""
    rows = batch.rows
    with case.autocast():
        predicted = model(
            rows.noisy_latents, rows.timesteps, *batch.embeds,
            instance_groups=[0] * case.instances, return_dict=False,
        )[0]  # fmt: skip
        return velocity_loss(predicted, rows, Weighting())[0]
