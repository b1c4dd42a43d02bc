"""Training runs of a second: a small random language model and scenes of a few hundred Gaussians.

Not a test: `conftest.py` puts this folder on the path.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from made_scenes import made_scene
from tiny_network import SETTINGS

from scenesplat_lora.network.models import DefaultSegmentorV2, LangPretrainer
from scenesplat_lora.network.official import write_official
from scenesplat_lora.network.ptv3_config import PTv3Config
from scenesplat_lora.scenes.files import write_scene

WIDTH = 12  # of the small network's features
BACKBONE = {key: list(v) if isinstance(v, tuple) else v for key, v in SETTINGS.items()}
CLASSES = ("wall", "floor", "chair", "table", "lamp")


def write_base(path: Path, classes: int | None = None) -> Path:
    """A checkpoint with random weights as the official trainer packs it, and settings beside it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = PTv3Config(**SETTINGS)
        net = LangPretrainer(config) if classes is None else DefaultSegmentorV2(config, classes)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps({"model": {"backbone": BACKBONE}}))
    return write_official(path, net.state_dict())


def write_scenes(root: Path, train: int = 3, val: int = 1, rows: int = 240) -> Path:
    """Scenes whose language features are those of their labels, in two splits."""
    texts = class_features()
    for split, count in (("train", train), ("val", val)):
        for number in range(count):
            scene = made_scene(rows, seed=10 * number + (split == "val"), side=0.4, width=WIDTH)
            known = scene["segment"] >= 0
            scene["lang_feat"] = texts[scene["segment"]].astype(np.float16)
            scene["valid_feat_mask"] = known
            scene["lang_feat"][~known] = 0
            write_scene(root / split / f"room_{number}", scene)
    return root


def class_features() -> np.ndarray:
    """Unit vectors of the classes, f32 [classes, WIDTH]."""
    draws = np.random.default_rng(1).standard_normal((len(CLASSES), WIDTH))
    return (draws / np.linalg.norm(draws, axis=1, keepdims=True)).astype(np.float32)


def write_texts(path: Path) -> Path:
    """Text embeddings of the classes, with their names."""
    np.savez(path, names=np.array(CLASSES), embeddings=class_features())
    return path


def settings(base: Path, data: Path, output: Path, **given: Any) -> dict[str, Any]:
    """Settings of two epochs over three scenes, two updates each; names with __ for the dot."""
    found: dict[str, Any] = {
        "lora_training.pretrained_path": base,
        "lora_training.save_epoch": 1,
        "config": base.with_suffix(".json"),  # the network's shape
        "data.train.data_root": data,
        "data.grid_size": 0.05,
        "lora.r": 2,
        "lora.lora_dropout": 0.1,
        "optimizer.lr": 1e-2,
        "epoch": 2,
        "num_worker": 0,
        "log_steps": 1,
        "mix_prob": 0.5,
        "save_path": output,
        "tensorboard": "false",
        "device": "cpu",
    }
    return found | {name.replace("__", "."): value for name, value in given.items()}


def command(base: Path, data: Path, output: Path, **given: Any) -> list[str]:
    """Flags of `settings`."""
    pairs = settings(base, data, output, **given).items()
    return [word for name, value in pairs for word in (f"--{name}", str(value))]


def rows(output: Path, split: str = "") -> list[dict[str, str]]:
    """The figures of a run, without what time decides."""
    with (output / "metrics.csv").open(newline="") as file:
        found = [{**row, "seconds": ""} for row in csv.DictReader(file)]
    return [row for row in found if split in ("", row["split"])]
