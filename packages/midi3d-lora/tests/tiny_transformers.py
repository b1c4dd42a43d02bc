"""Small transformers for tests: those of the recorded cases, and random inputs for them."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_core.testing.goldens import Golden, load_golden
from midi3d_lora.transformer.dit import TripoSGDiTModel

GOLDENS = Path(__file__).parent / "goldens"
CASES = {name: load_golden(GOLDENS / name) for name in ("dit_4_layers", "dit_5_layers")}


def recorded_transformer(case: Golden) -> TripoSGDiTModel:
    """With the recorded weights and multi-instance blocks."""
    model = TripoSGDiTModel(**case.config["model"])
    model.load_state_dict(case.weights)
    model.set_multi_instance_blocks(case.config["multi_instance_blocks"])
    return model.eval()


def inputs_of(case: Golden, kind: str) -> dict[str, Tensor]:
    """The recorded inputs of "single", "mi" or "train", by the names of `forward`."""
    names = ("hidden_states", "timestep", "encoder_hidden_states", "encoder_hidden_states_2")
    return {name: case.io[f"{kind}.{name}"] for name in names}


def random_inputs(model: TripoSGDiTModel, rows: int, tokens: int = 7) -> dict[str, Any]:
    """Inputs of a seed for any small model."""
    draw = torch.Generator().manual_seed(rows)
    config = model.config
    return {
        "hidden_states": torch.randn(rows, tokens, config.in_channels, generator=draw),
        "timestep": torch.rand(rows, generator=draw) * 1000,
        "encoder_hidden_states": torch.randn(rows, 1, config.cross_attention_dim, generator=draw),
        "encoder_hidden_states_2": torch.randn(
            rows, 4, config.cross_attention_2_dim, generator=draw
        ),
    }
