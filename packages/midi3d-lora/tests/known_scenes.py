"""For tests of using a model: the recorded tiny model, pictures, and scenes with known surfaces."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from lora_core.testing import load_golden
from midi3d_lora import lora
from midi3d_lora.adapter_files import save_adapter
from midi3d_lora.official_model import load_component
from midi3d_lora.transformer.dit import TripoSGDiTModel

GOLDEN = load_golden(Path(__file__).parent / "goldens" / "pipeline")
MODEL, BLOCKS = GOLDEN.folder / "model", GOLDEN.config["multi_instance_blocks"]
# As small as shows everything: two steps, 32 tokens, a grid of 17^3 points.
QUICK = [
    "--pretrained_model", str(MODEL), "--device", "cpu", "--num_inference_steps", "2",
    "--num_tokens", "32", "--octree_depth", "4", "--coarse_depth", "3", "--inside", "negative",
]  # fmt: skip
WITH_BLOCKS = ["--mi_attention_blocks", *BLOCKS]


def write_pictures(folder: Path) -> list[str]:
    """The recorded picture and its map of three instances; gives the flags for them."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("rgb", "seg"):
        Image.fromarray(GOLDEN.io[name].numpy()).save(folder / f"{name}.png")
    return ["--rgb_image", str(folder / "rgb.png"), "--seg_image", str(folder / "seg.png")]


def write_adapter(path: Path, scale: float = 0.3, seed: int = 0) -> Path:
    """An adapter of the recorded model that changes what it makes."""
    model = load_component(TripoSGDiTModel, MODEL, "transformer")
    choice = lora.LoraChoice(rank=2, alpha=4, dropout=0.0, multi_instance_blocks=tuple(BLOCKS))
    lora.inject(model, choice)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in lora.lora_parameters(model):
            parameter.copy_(scale * torch.randn(parameter.shape, generator=draw))
    return save_adapter(model, path)


def ball(centre: tuple[float, float, float], radius: float, count: int) -> NDArray[np.float32]:
    """Points on a ball with normals, [count, 6]."""
    normals = np.random.default_rng(0).normal(size=(count, 3))
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    points = np.array(centre) + radius * normals
    return np.concatenate([points, normals], axis=1).astype(np.float32)


def write_scene_folders(root: Path, count: int = 2) -> Path:
    """Scenes of two balls each, in the layout that training takes."""
    for number in range(count):
        folder = root / f"scene_{number:04}"
        folder.mkdir(parents=True)
        rgb = np.full((56, 56, 3), 40 * number + 90, np.uint8)
        seg = np.zeros((56, 56), np.uint8)
        seg[10:30, 6:26], seg[25:50, 30:52] = 1, 2
        for name, pixels in (("rgb", rgb), ("scene_rgb", rgb), ("seg", seg)):
            Image.fromarray(pixels).save(folder / f"{name}.png")
        first, second = (ball((0.4 * side, 0.1 * number, 0), 0.3, 300) for side in (-1, 1))
        labels = np.repeat([[1.0], [2.0]], 300, axis=0)
        surface = np.concatenate([np.concatenate([first, second]), labels], axis=1)
        np.save(folder / "surface.npy", surface.astype(np.float32))
    return root
