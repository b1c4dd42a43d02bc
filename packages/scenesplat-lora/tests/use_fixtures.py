"""Everything on disk that `evaluate` and `predict` need: a tiny model, texts, labelled rooms."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import lora_models
import made_scenes
import numpy as np
import torch

from scenesplat_lora.labelling import label_scene
from scenesplat_lora.language.text_embeddings import (
    TextEmbeddings,
    text_embeddings,
    write_text_embeddings,
)
from scenesplat_lora.lora import inject_lora_to_ptv3, save_lora_checkpoint
from scenesplat_lora.network.models import LangPretrainer
from scenesplat_lora.scenes.files import write_scene

CLASSES = ("wall", "floor", "chair", "table", "lamp")
CONFIG = replace(lora_models.TINY, in_channels=11)
GRIDS = ["--first_grid", "0.05", "--grid_size", "0.1"]  # the rooms are thinner than real ones


def model(seed: int = 0) -> LangPretrainer:
    """With weights so large that its features are not all alike."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = LangPretrainer(CONFIG).eval()
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.3 * torch.randn(parameter.shape))
        return network


def texts(width: int = 24) -> TextEmbeddings:
    """Directions in which the model's features differ, so that every class is predicted."""
    batch = lora_models.tiny_batch()
    draw = torch.Generator().manual_seed(1)
    feat = torch.randn(len(batch.feat), CONFIG.in_channels, generator=draw)
    with torch.no_grad():
        features = model()(replace(batch, feat=feat))
    return text_embeddings(CLASSES, (features[:5] - features.mean(0))[:, :width])


def write_model(folder: Path) -> list[str]:
    """Write the model, its shape and the texts; gives the flags for them."""
    torch.save({"epoch": 3, "state_dict": model().state_dict()}, folder / "base.pth")
    fields = "order stride enc_depths enc_channels enc_num_head enc_patch_size dec_depths"
    fields += " dec_channels dec_num_head dec_patch_size in_channels"
    settings = ", ".join(f"{name}={getattr(CONFIG, name)!r}" for name in fields.split())
    (folder / "tiny.py").write_text(
        f'model = dict(type="LangPretrainer", backbone=dict(type="PT-v3m1", {settings}))\n'
    )
    write_text_embeddings(folder / "classes.npz", texts())
    flags = {"checkpoint": "base.pth", "network": "tiny.py", "text": "classes.npz"}
    return [word for name, file in flags.items() for word in (f"--{name}", str(folder / file))]


def write_adapter(path: Path) -> None:
    """LoRA with other values than those that it begins with."""
    adapted = inject_lora_to_ptv3(model())
    lora_models.perturb(adapted, scale=1.0)
    save_lora_checkpoint(adapted, path)


def write_rooms(root: Path, count: int = 2) -> None:
    """Rooms whose labels are mostly those that the model predicts."""
    for number in range(count):
        scene = made_scenes.made_scene(400, seed=number)
        scene["name"] = f"room{number}"
        labels = label_scene(model(), scene, texts())
        right = np.random.default_rng(number).random(len(labels)) < 0.7
        scene["segment"] = np.where(right, labels, scene["segment"]).astype(np.int32)
        write_scene(root / "val" / f"room{number}", scene)
