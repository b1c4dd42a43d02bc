"""The embedded default: a tiny pretrained SceneSplat, and rooms by night that it does badly on.

The rooms are generated, in the official layout of scenes: `demo_base.rooms` says how. Everything
is a function of its arguments: the same call writes the same files.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch

from scenesplat_lora.demo_base import rooms
from scenesplat_lora.language.text_embeddings import (
    TextEmbeddings,
    text_embeddings,
    write_text_embeddings,
)
from scenesplat_lora.scenes.files import write_scene
from scenesplat_lora.scenes.scene import Scene

SEED = 8  # of the data set; the base is trained and measured on others
SPLITS = {"train": 24, "val": 6, "test": 20}  # rooms of each split, by the name of its folder
TEXTS = "text_embeddings.npz"
BASE = "scenesplat_demo.safetensors"


def write(
    folder: str | Path, splits: Mapping[str, int] = SPLITS, style: rooms.Style = rooms.NIGHT
) -> Path:
    """Write `<split>/<room>/*.npy` of every split, the classes' text embeddings, the tiny base.

    Args:
        folder: made if it does not exist.
        splits: rooms of each split, at most; its names are those of `SPLITS`.
        style: how the rooms were captured.

    Returns:
        The folder.

    Raises:
        DataError: a room's folder exists.
    """
    folder = Path(folder)
    for split, count in splits.items():
        for number in range(count):
            write_scene(folder / split / f"{split}_{number:03}", room_of(split, number, style))
    write_text_embeddings(folder / TEXTS, texts())
    shutil.copyfile(base_checkpoint(), folder / BASE)
    return folder


def base_checkpoint() -> Path:
    """The packaged tiny SceneSplat, which describes its own network."""
    return Path(__file__).parent / "demo_base" / BASE


def room_of(split: str, number: int, style: rooms.Style = rooms.NIGHT) -> Scene:
    """One room of a split; furniture and walls are the same in every style."""
    return rooms.room((SEED, list(SPLITS).index(split), number), style)


def texts() -> TextEmbeddings:
    """The classes' names and unit vectors, as of a text tower."""
    return text_embeddings(rooms.CLASSES, torch.from_numpy(rooms.text_vectors()))
