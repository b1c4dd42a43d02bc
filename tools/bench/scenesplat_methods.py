"""The network of scenesplat-lora whose training steps are compared, a batch, and the loss.

Everything is random.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from scenesplat_rooms import room
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from training_step import last_quarter, train_by

from lora_core.config import LoraConfig
from lora_core.module_names import only
from scenesplat_lora import losses
from scenesplat_lora.config import DISTILLATION
from scenesplat_lora.names import chosen_layers
from scenesplat_lora.network.frozen_norms import freeze_statistics
from scenesplat_lora.network.models import LangPretrainer
from scenesplat_lora.network.ptv3 import PointTransformerV3, stages_of
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
        precision: "fp32" or "autocast".
        last_blocks: only the last quarter of the blocks has adapters.
    """

    voxels: int = 2000
    depth: str = "whole"
    width: int = 1
    rank: int = 8
    dropout: float = 0.0
    parts: tuple[Any, ...] = ("enc",)
    precision: str = "fp32"
    checkpointing: bool = False
    last_blocks: bool = False
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

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device, torch.bfloat16, enabled=self.precision != "fp32")


CASES = {
    "fp32": Case(),
    "fp32, dropout": Case(dropout=0.05),
    "fp32, with decoder": Case(parts=("enc", "dec")),
    "autocast": Case(precision="autocast"),
}
VARIANTS: Mapping[str, dict[str, Any]] = {
    "checkpointed": {"checkpointing": True},
    "last blocks": {"last_blocks": True},
}


def random_weights(case: Case) -> dict[str, Tensor]:
    """Those that a new network has."""
    torch.manual_seed(0)
    return LangPretrainer(case.network).to(case.device).state_dict()


def build(method: str, case: Case, weights: Mapping[str, Tensor]) -> nn.Module:
    """The network ready to train by one method; all share weights and frozen statistics."""
    model: Any = LangPretrainer(case.network).to(case.device)
    model.load_state_dict(weights, assign=True)
    model.requires_grad_(False)  # tensors that were assigned want gradients
    freeze_statistics(model)
    if case.checkpointing:
        recompute_blocks(model.backbone)
    paths = [layer.path for layer in chosen_layers(model, case.choice)]
    if case.last_blocks:
        paths = in_last_blocks(paths)
    config = LoraConfig(
        target_modules=only(paths), r=case.rank, lora_alpha=case.rank, lora_dropout=case.dropout
    )
    return train_by(method, model, config)


def recompute_blocks(backbone: PointTransformerV3) -> None:
    """Checkpointing by torch, which the package has no setting for."""
    for stage in (*stages_of(backbone.enc), *stages_of(backbone.dec)):
        for block in stage.blocks():
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)  # type: ignore[method-assign]


def in_last_blocks(paths: Sequence[str]) -> list[str]:
    """Those of the layers, in the order in which they run, that lie in the last of the blocks."""
    blocks = list(dict.fromkeys(path.partition(".attn.")[0] for path in paths))
    last = blocks[-last_quarter(len(blocks)) :]
    return [path for path in paths if path.partition(".attn.")[0] in last]


def step_batch(case: Case, weights: Mapping[str, Tensor]) -> dict[str, Any]:
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


def loss_of(model: nn.Module, batch: dict[str, Any], case: Case) -> Tensor:
    """The default loss of a language model: cosine and L2."""
    with case.autocast():
        pred = model(batch)
        return losses.distillation_loss(
            pred, batch["lang_feat"], batch["valid_feat_mask"], None, TERMS, 0.0
        )[0]
