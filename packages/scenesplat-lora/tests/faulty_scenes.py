"""Data sets of a few small scenes with something wrong in them, and how a command answers them.

Not a test: `conftest.py` puts this folder on the path.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import tiny_scenes
from made_scenes import made_scene

from lora_core.config import parse
from lora_core.testing.no_device import no_device
from scenesplat_lora.__main__ import main
from scenesplat_lora.config import Config
from scenesplat_lora.data import Needs, Splits, load
from scenesplat_lora.scenes.files import write_scene

ROWS = 60


def write_data(root: Path, rows: int = ROWS) -> Path:
    """Splits train (room_0, room_1) and val (room_0) with language features and labels."""
    return tiny_scenes.write_scenes(root, train=2, val=1, rows=rows)


def change(folder: Path, **arrays: Any) -> Path:
    """Replace arrays of a scene, or remove those that are None; a function is given the old one."""
    for name, value in arrays.items():
        path = folder / f"{name}.npy"
        if callable(value):
            value = value(np.load(path))
        path.unlink(missing_ok=True)
        if value is not None:
            np.save(path, value)
    return folder


def small_scene(folder: Path, coord: np.ndarray, **arrays: Any) -> Path:
    """Write a scene of these positions in which every row can be learned from."""
    count = len(coord)
    scene = made_scene(count, width=tiny_scenes.WIDTH)
    scene["segment"] = np.arange(count, dtype=np.int32) % len(tiny_scenes.CLASSES)
    scene["lang_feat"] = tiny_scenes.class_features()[scene["segment"]].astype(np.float16)
    scene["valid_feat_mask"] = np.ones(count, bool)
    write_scene(folder, scene | {"coord": np.asarray(coord, np.float32)} | arrays)
    return folder


def train(base: Path, data: Path, output: Path, **given: Any) -> int:
    """Exit status of `scenesplat-lora train`, one epoch unless told otherwise."""
    return main(["train", *tiny_scenes.command(base, data, output, **{"epoch": 1, **given})])


def refused(capsys: Any, base: Path, data: Path, output: Path, **given: Any) -> str:
    """The message with which `scenesplat-lora train` refuses a data set, checked as all of them.

    Neither weights nor a GPU are touched before it, and no run is begun.
    """
    capsys.readouterr()
    with no_device():
        status = train(base, data, output, **given)
    message: str = capsys.readouterr().err
    assert status == 2, message
    assert message.startswith("error: ")
    assert "Traceback" not in message
    assert not output.exists()
    return message


def loaded(base: Path, data: Path, output: Path, **given: Any) -> Splits:
    """The scenes of a data set that may be used, as a run has them."""
    words = tiny_scenes.command(base, data, output, **given)
    cfg = parse(Config, words, prog="train")
    return load(cfg, Needs(True, 11, tiny_scenes.WIDTH))
