"""The networks of scenesplat-lora that are compared, a batch, and the loss; all is random."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import peft
import torch
from floor import begin_graph_at
from scenesplat_rooms import room
from torch import Tensor, nn

from scenesplat_lora import lora, losses
from scenesplat_lora.config import DISTILLATION
from scenesplat_lora.names import chosen_layers
from scenesplat_lora.network.frozen_norms import freeze_statistics
from scenesplat_lora.network.models import LangPretrainer
from scenesplat_lora.network.ptv3_config import LANGUAGE, PTv3Config
from scenesplat_lora.presets import LoraChoice

DEPTHS = {
    "short": ((1, 1, 1, 1), (1, 1, 1)),
    "half": ((1, 1, 1, 3), (1, 1, 1)),
    "whole": (LANGUAGE.enc_depths, LANGUAGE.dec_depths),
}  # blocks of the encoder's and the decoder's stages
TERMS = [losses.Term(**term) for term in DISTILLATION]


@dataclass(frozen=True)
class Case:
    """What is trained on how many voxels.

    Attributes:
        depth: see `DEPTHS`. width: what the released channels are divided by.
        parts: that have adapters: "enc", "dec".
    """

    voxels: int
    depth: str = "short"
    width: int = 1
    rank: int = 8
    dropout: float = 0.0
    parts: tuple[Any, ...] = ("enc",)
    device: str = "cpu"

    @property
    def choice(self) -> LoraChoice:
        """qkv and proj, as the guide has it."""
        return LoraChoice(self.rank, self.rank, parts=self.parts, lora_dropout=self.dropout)

    @property
    def network(self) -> PTv3Config:
        """The released language model with this depth and width; no head is wider."""
        encoder, decoder = DEPTHS[self.depth]
        narrow = {
            name: tuple(max(1, value // self.width) for value in getattr(LANGUAGE, name))
            for name in ("enc_channels", "dec_channels", "enc_num_head", "dec_num_head")
        }
        return replace(LANGUAGE, enc_depths=encoder, dec_depths=decoder, **narrow)


def build(method: str, case: Case) -> nn.Module:
    """The network ready to train by one method; all have the same weights and frozen statistics."""
    torch.manual_seed(0)
    model: nn.Module = LangPretrainer(case.network).to(case.device).requires_grad_(False)
    freeze_statistics(model)
    if method == "lora_core":
        lora.inject_choice(model, case.choice)
    elif method == "PEFT":
        model = with_peft(model, case)
    elif method == "full":
        model.requires_grad_(True)
    else:
        begin_graph_at(model, [layer.path for layer in chosen_layers(model, case.choice)])
    return model.train()


def with_peft(model: Any, case: Case) -> nn.Module:
    """PEFT's adapters on the layers that `lora.inject_choice` would take."""
    paths = [layer.path for layer in chosen_layers(model, case.choice)]
    config = peft.LoraConfig(
        r=case.rank, lora_alpha=case.rank, lora_dropout=case.dropout, target_modules=paths
    )
    return peft.get_peft_model(model, config)


def random_batch(case: Case) -> dict[str, Any]:
    """One room, with random features and a language feature for nine of ten voxels."""
    grid = room(case.voxels)
    generator = torch.Generator().manual_seed(0)
    lang = torch.randn(len(grid), case.network.out_channels, generator=generator)
    batch = {
        "feat": torch.randn(len(grid), LANGUAGE.in_channels, generator=generator),
        "grid_coord": grid,
        "coord": grid * 0.02,
        "offset": torch.tensor([len(grid)]),
        "lang_feat": nn.functional.normalize(lang, dim=1),
        "valid_feat_mask": torch.rand(len(grid), generator=generator) < 0.9,
    }
    return {name: tensor.to(case.device) for name, tensor in batch.items()}


def loss_of(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """The default loss of a language model: cosine and L2."""
    pred = model(batch)
    return losses.distillation_loss(
        pred, batch["lang_feat"], batch["valid_feat_mask"], None, TERMS, 0.0
    )[0]
