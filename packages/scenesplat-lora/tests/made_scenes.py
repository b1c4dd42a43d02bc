"""Scenes for tests: a room's floor of Gaussians, with everything that a scene can have."""

from __future__ import annotations

from typing import Any

import numpy as np


def made_scene(rows: int = 200, seed: int = 0, side: float = 4.0, width: int = 6) -> dict[str, Any]:
    """A scene of `rows` Gaussians on a floor of `side` metres; every fourth has no feature."""
    rng = np.random.default_rng(seed)
    quat = rng.standard_normal((rows, 4))
    quat *= np.where(quat[:, :1] < 0, -1, 1) / np.linalg.norm(quat, axis=1, keepdims=True)
    valid = np.arange(rows) % 4 != 0
    lang_feat = rng.standard_normal((rows, width)) * valid[:, None]
    normal = rng.standard_normal((rows, 3))
    return {
        "coord": (rng.random((rows, 3)) * [side, side, 0.3]).astype(np.float32),
        "color": rng.integers(0, 256, (rows, 3)).astype(np.float32),
        "opacity": rng.uniform(0.05, 0.95, (rows, 1)).astype(np.float32),
        "scale": rng.uniform(0.01, 0.1, (rows, 3)).astype(np.float32),
        "quat": quat.astype(np.float32),
        "normal": (normal / np.linalg.norm(normal, axis=1, keepdims=True)).astype(np.float32),
        "segment": rng.integers(-1, 5, rows).astype(np.int32),
        "instance": rng.integers(-1, 9, rows).astype(np.int32),
        "lang_feat": lang_feat.astype(np.float16),
        "valid_feat_mask": valid,
    }
