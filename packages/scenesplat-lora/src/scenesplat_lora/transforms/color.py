"""Transforms of colours in 0..255, f32 [N, 3]; defaults are the official training list's."""

from __future__ import annotations

import numpy as np

from scenesplat_lora.scenes.scene import Scene, by_column, highest, lowest


def chromatic_auto_contrast(
    scene: Scene, rng: np.random.Generator, *, p: float = 0.2, blend_factor: float | None = None
) -> Scene:
    """With probability p blend in the colours stretched to 0..255, by `blend_factor` or U(0, 1).

    A channel that is the same everywhere has nothing to stretch and stays.
    """
    if rng.random() >= p:
        return scene
    blend = rng.random() if blend_factor is None else blend_factor
    color = scene["color"]
    low = lowest(color)
    extent = highest(color) - low
    stretch = 255 / np.where(extent > 0, extent, 1)
    wide = by_column(np.multiply, by_column(np.subtract, color, low), stretch)
    stretched = np.where(extent > 0, wide, color)
    return _with(scene, (1 - blend) * color + blend * stretched)


def chromatic_translation(
    scene: Scene, rng: np.random.Generator, *, p: float = 0.95, ratio: float = 0.05
) -> Scene:
    """With probability p add U(-ratio, ratio) · 255 to each channel."""
    if rng.random() >= p:
        return scene
    shift = rng.uniform(-ratio, ratio, (1, 3)) * 255
    return _with(scene, np.clip(by_column(np.add, scene["color"], shift[0]), 0, 255))


def chromatic_jitter(
    scene: Scene, rng: np.random.Generator, *, p: float = 0.95, std: float = 0.05
) -> Scene:
    """With probability p add N(0, 1) · std · 255 to each value."""
    if rng.random() >= p:
        return scene
    noise = rng.standard_normal(scene["color"].shape, dtype=np.float32) * (std * 255)
    return _with(scene, np.clip(scene["color"] + noise, 0, 255))


def normalize_color(scene: Scene, rng: np.random.Generator) -> Scene:
    """0..255 to -1..1."""
    return _with(scene, scene["color"] / 127.5 - 1)


def _with(scene: Scene, color: np.ndarray) -> Scene:
    return scene | {"color": color.astype(np.float32)}
