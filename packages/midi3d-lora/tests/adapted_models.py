"""A small transformer with LoRA whose effect shows, for tests of files and of merging."""

from typing import Any

import torch
from tiny_transformers import CASES, random_inputs, recorded_transformer
from torch import Tensor

from midi3d_lora.lora import LoraChoice, inject
from midi3d_lora.transformer.dit import TripoSGDiTModel

MIDDLE = ("blocks.1", "blocks.2", "blocks.3")


def base() -> TripoSGDiTModel:
    """The recorded transformer of five blocks, in evaluation mode."""
    return recorded_transformer(CASES["dit_5_layers"])


def adapted(**settings: Any) -> TripoSGDiTModel:
    """It, with LoRA of rank 4 and alpha 8 whose B is not zero."""
    model = base()
    defaults: dict[str, Any] = {"rank": 4, "alpha": 8, "multi_instance_blocks": MIDDLE}
    inject(model, LoraChoice(**(defaults | settings)))
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".lora_B." in name:
                weight.normal_(0, 0.05, generator=draw)
    return model


@torch.no_grad()
def outputs(model: Any, rows: int = 3) -> Tensor:
    """The output for fixed inputs of one scene; takes wrapped models too."""
    inputs = random_inputs(base(), rows)
    out: Tensor = model(**inputs, instance_groups=[0] * rows).sample
    return out


def plain_tensors(model: TripoSGDiTModel) -> dict[str, Tensor]:
    """The adapter under PEFT's names without the adapter's name."""
    return {
        name.replace(".default.", "."): tensor.clone()
        for name, tensor in model.state_dict().items()
        if ".lora_" in name
    }
