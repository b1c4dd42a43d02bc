"""The networks that the benchmarks of isaac-lora compare, a batch, and the loss; all is random."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from training_step import last_quarter, train_by

from isaac_lora import lora
from isaac_lora.batches import Batch
from isaac_lora.conversations.samples import IGNORED
from isaac_lora.lora_choice import LoraChoice
from isaac_lora.model import checkpoint_activations
from isaac_lora.network.configuration import IsaacConfig
from isaac_lora.network.isaac import IsaacForConditionalGeneration

PATCH, SHUFFLE, TOWER_WIDTH = 16, 2, 1152  # of Isaac-0.1
RELEASED = {"layers": 28, "tower_layers": 27, "vocabulary": 151936}


@dataclass(frozen=True)
class Case:
    """What is trained on what.

    Attributes:
        layers, tower_layers: of the decoder and the vision tower; their widths are Isaac-0.1's.
        vocabulary: words.
        samples: of the batch. tokens: of each, its picture's included. labels: of each.
        side: rows and columns of patches of each picture, four of which become a token; 0: none.
        cached: the batch has features of the pictures in place of patches.
        last_blocks: only the last quarter of the decoder's layers has adapters.
        precision: "fp32", or "bf16": frozen weights in bf16, all under autocast, as `train --bf16`.
    """

    layers: int = 2
    tower_layers: int = 2
    vocabulary: int = 4096
    samples: int = 1
    tokens: int = 1024
    labels: int = 128
    side: int = 32
    cached: bool = False
    rank: int = 128
    dropout: float = 0.05
    precision: str = "fp32"
    checkpointing: bool = False
    last_blocks: bool = False
    device: str = "cpu"

    @property
    def choice(self) -> LoraChoice:
        """The default layers; those of blocks if not all blocks are adapted."""
        choice = LoraChoice(self.rank, 2 * self.rank, self.dropout)
        # The projector lies before all blocks.
        return replace(choice, target_modules=("attention", "mlp")) if self.last_blocks else choice

    @property
    def dtype(self) -> torch.dtype:
        """Of frozen weights."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device, torch.bfloat16, enabled=self.precision == "bf16")


CASES = {
    "fp32": Case(),
    "fp32, no dropout": Case(dropout=0.0),
    "bf16 base": Case(precision="bf16"),
    "bf16 base, no dropout": Case(precision="bf16", dropout=0.0),
}
VARIANTS: Mapping[str, dict[str, Any]] = {
    "checkpointed": {"checkpointing": True},
    "last blocks": {"last_blocks": True},
    "cached": {"cached": True},
}


def configuration(case: Case) -> IsaacConfig:
    """Isaac-0.1's, but for depth and vocabulary."""
    return IsaacConfig(
        vocab_size=case.vocabulary, hidden_size=2048, intermediate_size=6144, head_dim=128,
        num_hidden_layers=case.layers, num_attention_heads=16, num_key_value_heads=8,
        max_position_embeddings=40960, rope_scaling={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=False, video_patch_size=PATCH, pixel_shuffle_scale=SHUFFLE,
        vision_max_num_patches=6144, bos_token_id=None, eos_token_id=None, pad_token_id=None,
        vision_config={
            "hidden_size": TOWER_WIDTH, "intermediate_size": 4304, "patch_size": PATCH,
            "num_hidden_layers": case.tower_layers, "num_attention_heads": 16,
            "num_patches": 256, "pixel_shuffle_scale_factor": SHUFFLE,
        },
    )  # fmt: skip


# -- networks --------------------------------------------------------------------------------------


def skeleton(case: Case) -> IsaacForConditionalGeneration:
    """The frozen model on the meta device."""
    with torch.device("meta"):
        model = IsaacForConditionalGeneration(configuration(case))
    model = model.to(case.dtype).requires_grad_(False)
    if case.checkpointing:
        checkpoint_activations(model)
    return model


def random_weights(case: Case) -> dict[str, Tensor]:
    """Of the whole model: normal with deviation 0.02, but norms are 1 and biases 0."""
    draw = torch.Generator().manual_seed(0)
    found = {}
    for name, tensor in skeleton(case).state_dict().items():
        value = torch.full(tensor.shape, 0.0 if name.endswith("bias") else 1.0)
        if tensor.dim() > 1:
            value.normal_(std=0.02, generator=draw)
        found[name] = value.to(case.device, case.dtype)
    return found


def frozen(case: Case, weights: Mapping[str, Tensor]) -> IsaacForConditionalGeneration:
    """The frozen model, with these very weights."""
    model = skeleton(case)
    model.load_state_dict(weights, assign=True)
    return model.requires_grad_(False)  # tensors that were assigned want gradients


def build(method: str, case: Case, weights: Mapping[str, Tensor]) -> nn.Module:
    """The model ready to train by one method; the frozen weights are shared by all."""
    return adapted(method, frozen(case, weights), case)


def adapted(method: str, model: IsaacForConditionalGeneration, case: Case) -> nn.Module:
    """The frozen model, in training by one method; full fine-tuning leaves the tower as it is."""
    config = case.choice.config(lora.adapted_layers(model, case.choice))
    if case.last_blocks:
        config = replace(config, last_blocks={"model.layers": last_quarter(case.layers)})
    return train_by(method, model, config, never=["model.vision_embedding.0"])


# -- batch and loss --------------------------------------------------------------------------------


def random_batch(case: Case) -> Batch:
    """Conversations about a picture each, whose last words are learned; without padding."""
    draw = torch.Generator().manual_seed(0)
    shape = (case.samples, case.tokens)
    ids = torch.randint(0, case.vocabulary, shape, generator=draw)
    labels = ids.clone()
    labels[:, : -case.labels] = IGNORED
    image_mask = torch.zeros(shape, dtype=torch.bool)
    batch = {"input_ids": ids, "labels": labels, "image_mask": image_mask}
    if case.side:
        patches = case.side**2
        image_mask[:, 4 : 4 + patches // SHUFFLE**2] = True
        batch["grids"] = torch.full((case.samples, 2), case.side)
        rows, values = case.samples * patches, 3 * PATCH**2
        name = "patches"
        if case.cached:
            name, rows, values = (
                "vision_features", rows // SHUFFLE**2, TOWER_WIDTH * SHUFFLE**2,
            )  # fmt: skip
        batch[name] = torch.randn(rows, values, generator=draw)
    return {name: tensor.to(case.device) for name, tensor in batch.items()}


def step_batch(case: Case, weights: Mapping[str, Tensor]) -> Batch:
    """The same, with what the vision tower makes of the pictures."""
    batch = random_batch(replace(case, cached=False))
    with torch.no_grad(), case.autocast():
        tower = frozen(case, weights).eval().model
        batch["vision_features"] = tower.get_vision_features(batch["patches"], batch["grids"])
    return batch


def loss_of(model: nn.Module, batch: Mapping[str, Any], case: Case) -> Tensor:
    """Mean cross entropy of the labels."""
    without = "patches" if case.cached else "vision_features"
    given = {name: value for name, value in batch.items() if name != without}
    with case.autocast():
        loss: Tensor = model(**given).loss
    return loss
