"""Training runs of a second: the recorded small model directory and scenes of a few points.

Not a test: `conftest.py` puts this folder on the path.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

MODEL = Path(__file__).parent / "goldens" / "pipeline" / "model"
BLOCKS = ("blocks.1", "blocks.2", "blocks.3")
SIZE = 48  # pixels
POINTS = 80  # of an instance


def write_scenes(root: Path, train: int = 3, val: int = 1) -> Path:
    """Scenes of one, two and three spheres in turn, below `train` and `val`."""
    for split, count in (("train", train), ("val", val)):
        for number in range(count):
            seed = 10 * number + (split == "val")
            write_scene(root / split / f"scene_{number}", seed, 1 + (number + (val > 0)) % 3)
    return root


def write_scene(folder: Path, seed: int, instances: int) -> Path:
    """Spheres side by side, each with its stripe in the map."""
    rng = np.random.default_rng(seed)
    seg, parts = np.zeros((SIZE, SIZE), np.uint8), []
    for k, stripe in enumerate(np.array_split(np.arange(SIZE), instances), start=1):
        seg[8:40, stripe] = k
        normals = rng.normal(size=(POINTS, 3))
        normals /= np.linalg.norm(normals, axis=1, keepdims=True)
        centre = [(stripe.mean() + 0.5) / SIZE * 1.2 - 0.6, 0, 0]
        radius = rng.uniform(0.1, 0.3)
        parts.append(np.c_[radius * normals + centre, normals, np.full(POINTS, k)])
    scene = rng.integers(0, 255, (SIZE, SIZE, 3), dtype=np.uint8)
    folder.mkdir(parents=True, exist_ok=True)
    for name, picture in (("rgb", scene), ("scene_rgb", scene), ("seg", seg)):
        Image.fromarray(picture).save(folder / f"{name}.png")
    np.save(folder / "surface.npy", np.concatenate(parts).astype(np.float32))
    return folder


def settings(data: Path, output: Path, **given: Any) -> dict[str, Any]:
    """Settings of two epochs over three scenes, two updates each."""
    found: dict[str, Any] = {
        "pretrained_model": MODEL,
        "data_dir": data / "train",
        "val_data_dir": data / "val",
        "output_dir": output,
        "cache_dir": output.parent / "cache",
        "mi_attention_blocks": BLOCKS,
        "image_size": SIZE,
        "num_points": POINTS,
        "num_tokens": 8,
        "surface_draws": 2,
        "lora_rank": 2,
        "lora_alpha": 4,
        "batch_size": 2,
        "num_epochs": 2,
        "learning_rate": 1e-2,
        "save_every_n_epochs": 1,
        "checkpointing_steps": 3,
        "preview_scenes": 0,
        "log_steps": 1,
        "num_workers": 0,
        "tensorboard": "false",
        "device": "cpu",
    }
    return found | given


def command(data: Path, output: Path, **given: Any) -> list[str]:
    """Flags of `settings`; None leaves one out."""
    words = []
    for name, value in settings(data, output, **given).items():
        if value is not None:
            words += [f"--{name}", *(value if isinstance(value, tuple) else [str(value)])]
    return words


def rows(output: Path, split: str = "") -> list[dict[str, str]]:
    """The figures of a run, without what time decides."""
    with (output / "metrics.csv").open(newline="") as file:
        found = [{**row, "seconds": ""} for row in csv.DictReader(file)]
    return [row for row in found if split in ("", row["split"])]
