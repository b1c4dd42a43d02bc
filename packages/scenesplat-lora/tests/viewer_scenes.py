"""A scene of three classes whose features say which Gaussian is which."""

from __future__ import annotations

from typing import Any

import made_scenes
import numpy as np
import torch

from scenesplat_lora.language.text_embeddings import TextEmbeddings, text_embeddings
from scenesplat_lora.scene_features import SceneFeatures
from scenesplat_lora.viewer_state import ViewerState

NAMES = ("wall", "floor", "lamp")


def texts() -> TextEmbeddings:
    return text_embeddings(NAMES, torch.eye(3, 6))


def state(rows: int = 90, **given: Any) -> ViewerState:
    """Gaussian i is of class i % 3, a little like floor, and shares its cell with i + 1."""
    scene = made_scenes.made_scene(rows) | {"name": "room"}
    scene["segment"] = np.arange(rows, dtype=np.int32) // 2 % 3
    cells = torch.eye(3, 6)[torch.arange(rows // 2) % 3] + 0.1 * torch.eye(3, 6)[1]
    cells = cells / cells.norm(dim=1, keepdim=True)
    features = SceneFeatures(cells.half(), np.arange(rows) // 2)
    held = {"features": features, "text": texts()} | given
    return ViewerState(scene, NAMES, np.arange(rows) // 2 % 3, **held)
