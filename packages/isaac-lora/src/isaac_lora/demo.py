"""The embedded default: a tiny pretrained Isaac with its depth model, and questions about nearness.

The base tells near boxes by their size. Here boxes have any size, and those with wide ribs are
near, which it has never been taught to see; the depth model beside it does. Everything is a
function of its arguments: the same call writes the same files.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from PIL import Image

from isaac_lora.demo_questions import Question, nearness, record
from isaac_lora.demo_scenes import RIBS, Scene, Seed, scene

SEED = 12  # of the data set; the base is trained and measured on others
SPLITS = {"train": 300, "val": 30, "test": 100}  # pictures of each split
MODEL, DEPTH = "model", "depth"
IMAGES = "images"
DEPTH_INPUT = 56  # pixels of the square that the tiny depth model sees


def write(folder: str | Path, splits: Mapping[str, int] = SPLITS) -> Path:
    """Write `<split>.json` with its pictures in `images/`, and the tiny models.

    Args:
        folder: made if it does not exist.
        splits: pictures of each split; its names are those of `SPLITS`.

    Returns:
        The folder.
    """
    folder = Path(folder)
    for split, count in splits.items():
        names = {f"{split}_{number:04}": scene_of(split, number) for number in range(count)}
        write_split(folder, split, names)
    for name in (MODEL, DEPTH):
        shutil.copytree(base(name), folder / name)
    return folder


def write_split(
    folder: Path,
    split: str,
    scenes: Mapping[str, Scene],
    ask: Callable[[Scene], Sequence[Question]] = nearness,
) -> Path:
    """Write the pictures of scenes and `<split>.json`, a conversation for each question.

    Args:
        scenes: by the names of their pictures.
        ask: gives the questions about a scene: which shape is nearest, which one farthest.
    """
    (folder / IMAGES).mkdir(parents=True, exist_ok=True)
    records = []
    for name, one in scenes.items():
        picture = f"{name}.png"
        Image.fromarray(one.picture()).save(folder / IMAGES / picture)
        asked = enumerate(ask(one))
        records += [record(f"{name}_{n}", picture, question) for n, question in asked]
    path = folder / f"{split}.json"
    path.write_text(json.dumps(records, indent=1) + "\n", "utf-8")
    return path


def base(name: str) -> Path:
    """The packaged tiny Isaac (`MODEL`) or Depth Anything V2 (`DEPTH`), a folder as published."""
    return Path(__file__).parent / "demo_base" / name


def scene_of(split: str, number: int) -> Scene:
    """One scene of a split."""
    seed: Seed = (SEED, list(SPLITS).index(split), number)
    return scene(seed, RIBS)
