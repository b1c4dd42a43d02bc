"""Adapter files as other programs write them: without the facts and checksums that ours hold."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."


def rewrite(path: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], object]) -> None:
    """Change an adapter, a directory or a single file, in place.

    Args:
        change: gets (config, tensors) with the names of tensors as ours, and changes them.
    """
    if path.is_dir():
        tensors = safetensors.torch.load_file(path / WEIGHTS)
        tensors = {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}
        config = json.loads((path / CONFIG).read_text())
        change(config, tensors)
        (path / CONFIG).write_text(json.dumps(config))
        tensors = {PREFIX + key: tensor.contiguous() for key, tensor in tensors.items()}
        safetensors.torch.save_file(tensors, path / WEIGHTS)
        return
    content = torch.load(path, weights_only=True)
    config = {key: value for key, value in content["config"].items() if key != "lora_core"}
    change(config, content["tensors"])
    torch.save(content | {"config": config}, path)
