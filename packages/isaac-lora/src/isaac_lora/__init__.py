"""LoRA for Isaac, a vision-language model, with depth from Depth Anything V2.

The public names are loaded on first use, so that importing the package does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "IsaacConfig": "network.configuration",
    "IsaacForConditionalGeneration": "network.isaac",
    "IsaacModel": "network.isaac",
    "IsaacProcessor": "processing",
}
__all__ = sorted(_HOME)

if TYPE_CHECKING:
    from isaac_lora.network.configuration import IsaacConfig as IsaacConfig
    from isaac_lora.network.isaac import (
        IsaacForConditionalGeneration as IsaacForConditionalGeneration,
    )
    from isaac_lora.network.isaac import IsaacModel as IsaacModel
    from isaac_lora.processing import IsaacProcessor as IsaacProcessor


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'isaac_lora' has no attribute {name!r}")
    globals()[name] = getattr(import_module(f"isaac_lora.{_HOME[name]}"), name)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
