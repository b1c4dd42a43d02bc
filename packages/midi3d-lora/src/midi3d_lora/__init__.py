"""LoRA for MIDI-3D: one picture and a segmentation map to a 3D scene of separate meshes.

The public names are loaded on first use, so that importing the package does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "LoraChoice": "lora_choice",
    "MIDIPipeline": "pipeline",
    "RectifiedFlowScheduler": "flow.rectified_flow",
    "TripoSGDiTModel": "transformer.dit",
    "TripoSGVAEModel": "vae.autoencoder",
    "inject": "lora",
    "load_adapter": "adapter_files",
    "read_adapter": "adapter_files",
    "remove": "lora",
    "save_adapter": "adapter_files",
}
__all__ = sorted(_HOME)

if TYPE_CHECKING:
    from midi3d_lora.adapter_files import load_adapter as load_adapter
    from midi3d_lora.adapter_files import read_adapter as read_adapter
    from midi3d_lora.adapter_files import save_adapter as save_adapter
    from midi3d_lora.flow.rectified_flow import RectifiedFlowScheduler as RectifiedFlowScheduler
    from midi3d_lora.lora import inject as inject
    from midi3d_lora.lora import remove as remove
    from midi3d_lora.lora_choice import LoraChoice as LoraChoice
    from midi3d_lora.pipeline import MIDIPipeline as MIDIPipeline
    from midi3d_lora.transformer.dit import TripoSGDiTModel as TripoSGDiTModel
    from midi3d_lora.vae.autoencoder import TripoSGVAEModel as TripoSGVAEModel


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'midi3d_lora' has no attribute {name!r}")
    globals()[name] = getattr(import_module(f"midi3d_lora.{_HOME[name]}"), name)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
