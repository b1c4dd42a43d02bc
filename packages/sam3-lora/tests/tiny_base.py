"""The small random SAM 3 of the goldens as checkpoint files, and LoRA on it that has learnt."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lora_core.injection import lora_layers
from lora_core.testing import load_golden
from sam3_lora import model as m
from sam3_lora.config import COMPONENTS, Config, Lora, Training

GOLDENS = Path(__file__).parent / "goldens"
PREFIXES = ("detector.", "", "module.", "module.detector.")
CONTAINERS = ("flat.pt", "wrapped.pt", "flat.safetensors")
TRACKER = {  # what stands beside the detector in the published file
    "tracker.mask_decoder.weight": torch.arange(6.0).view(2, 3),
    "tracker.maskmem.scale": torch.tensor([-0.0, 7.5], dtype=torch.float16),
    "tracker.freqs_cis": torch.polar(torch.ones(2, 3), torch.arange(6.0).view(2, 3)),
}
UNUSED = {  # of the detector; the goldens have the weights of point prompts already
    "backbone.vision_backbone.sam2_convs.0.conv_1x1.weight": torch.ones(2, 2).double(),
    "backbone.vision_backbone.trunk.blocks.0.attn.freqs_cis": TRACKER["tracker.freqs_cis"],
}


def settings(words: int | None = None) -> dict[str, Any]:
    """`Sam3Config` as JSON; words: tokens that the text encoder knows, if not 64."""
    found = copy.deepcopy(load_golden(GOLDENS / "transformers_model").config["sam3_config"])
    if words is not None:
        found["text_config"]["vocab_size"] = words
    start = found["text_config"]["vocab_size"] - 2  # with others transformers warns
    found["text_config"] |= {"bos_token_id": start, "eos_token_id": start + 1}
    return found


def detector(words: int | None = None) -> dict[str, Tensor]:
    """Official names without prefix -> tensors, the unused ones included."""
    found = {**load_golden(GOLDENS / "official_model").weights, **UNUSED}
    name = "backbone.language_backbone.encoder.token_embedding.weight"
    if words is not None:
        found[name] = found[name].repeat(-(-words // len(found[name])), 1)[:words].clone()
    return found


def content(prefix: str = "detector.", words: int | None = None) -> dict[str, Tensor]:
    """A whole official file, tracker included."""
    own = "module." if prefix.startswith("module.") else ""
    tensors = {prefix + name: tensor for name, tensor in detector(words).items()}
    return tensors | {own + name: tensor for name, tensor in TRACKER.items()}


def write(
    path: Path, tensors: dict[str, Tensor], words: int | None = None, wrapped: bool = False
) -> Path:
    """A checkpoint with its config beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_file({name: t.contiguous().clone() for name, t in tensors.items()}, path)
    else:
        torch.save({"model": tensors, "epoch": 3} if wrapped else tensors, path)
    path.with_suffix(".json").write_text(json.dumps(settings(words)))
    return path


def packed(folder: Path, prefix: str, container: str) -> Path:
    """The official file in one of its packings."""
    path = folder / f"base{Path(container).suffix}"
    return write(path, content(prefix), wrapped=container.startswith("wrapped"))


def config(checkpoint: Path, **lora: Any) -> Config:
    """A configuration that adapts every component, masks too, at 84 pixels."""
    switches = {f"apply_to_{name}": True for name in COMPONENTS} | lora
    cfg = Config(lora=Lora(**switches), training=Training(enable_segmentation=True), device="cpu")
    cfg.paths.sam3_checkpoint = str(checkpoint)
    cfg.dataset.resolution = "84"
    return cfg


def adapted(checkpoint: Path, **lora: Any) -> Any:
    """A network with an adapter that has learnt something: B is not zero."""
    cfg = config(checkpoint, **lora)
    network = m.build(cfg)
    m.adapt(network, cfg)
    generator = torch.Generator().manual_seed(7)
    for layer in lora_layers(network).values():
        with torch.no_grad():
            layer.lora_factors("default")[1].normal_(std=0.05, generator=generator)
    return network
