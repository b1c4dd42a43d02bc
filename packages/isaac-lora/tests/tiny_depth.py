"""The recorded tiny Depth-Anything-V2 as files, in the original's form and in transformers'."""

from __future__ import annotations

import json
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from isaac_lora.depth.checkpoint import DepthCheckpoint, empty_network, find_depth_checkpoint
from isaac_lora.depth.checkpoint_names import from_original
from lora_core.testing.goldens import load_golden

GOLDENS = Path(__file__).parent / "goldens"
GOLDEN = load_golden(GOLDENS / "depth_estimator")
SETTINGS = GOLDEN.config["transformers"]
SIZE = GOLDEN.config["original"]["input_size"]
OLDER_NAMES = {
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
}


def write_original(path: Path, tensors: dict[str, Tensor] | None = None) -> Path:
    """A file as the authors of Depth-Anything-V2 publish it."""
    torch.save(GOLDEN.weights if tensors is None else tensors, path)
    return path


def find_original(path: Path) -> DepthCheckpoint:
    return find_depth_checkpoint(path, SETTINGS)


def renamed() -> dict[str, Tensor]:
    """The recorded tensors under the names of transformers 5."""
    wanted = empty_network(DepthCheckpoint(Path(), "custom", SETTINGS, 14)).state_dict()
    tensors, left = from_original(GOLDEN.weights, wanted)
    assert not left
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def write_folder(folder: Path, older_names: bool = False, **changes: object) -> Path:
    """A folder of transformers; with the names of version 4, as on the hub, or of version 5."""
    folder.mkdir(parents=True)
    tensors = renamed()
    if older_names:
        for newer, older in OLDER_NAMES.items():
            tensors = {name.replace(newer, older): tensor for name, tensor in tensors.items()}
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    settings = {"model_type": "depth_anything", **SETTINGS, **changes}
    (folder / "config.json").write_text(json.dumps(settings))
    return folder
