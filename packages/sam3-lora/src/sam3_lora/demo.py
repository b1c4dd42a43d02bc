"""The embedded default: a tiny pretrained SAM 3, and a data set that it does badly on.

The pictures are generated: `demo_base.scenes` says how. The base knows every word of the phrases,
but never saw two adjectives together, nor pictures of this kind. Everything is a function of its
arguments: the same call writes the same files.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from PIL import Image

from lora_core.pictures.write_coco import Annotated, write_coco
from sam3_lora.demo_base import scenes

SEED = 4  # of the data set; the base was trained and measured on others
# Pictures of each split, by the name of its folder.
SPLITS = {"train": 240, "valid": 60, "test": 100}
PHRASES = (
    "small red shape", "large blue shape", "small white shape", "large yellow shape",
    "striped green shape", "dotted purple shape", "small striped circle", "large dotted square",
    "large striped triangle", "small dotted cross", "large red circle", "small green square",
)  # fmt: skip
BASE_FILES = ("sam3_demo.safetensors", "sam3_demo.json", "vocabulary.txt")


def write(folder: str | Path, splits: Mapping[str, int] = SPLITS) -> Path:
    """Write `train/`, `valid/` and `test/` as COCO, and the tiny base with what belongs to it.

    Args:
        folder: made if it does not exist.
        splits: pictures of each split.

    Returns:
        The folder.
    """
    folder = Path(folder)
    for split, count in splits.items():
        write_pictures(folder / split, pictures_of(split, count), PHRASES)
    for name in BASE_FILES:
        shutil.copyfile(base_checkpoint().with_name(name), folder / name)
    return folder


def base_checkpoint() -> Path:
    """The packaged tiny SAM 3; its `Sam3Config` and its vocabulary lie beside it."""
    return Path(__file__).parent / "demo_base" / BASE_FILES[0]


def pictures_of(split: str, count: int) -> Iterator[scenes.Scene]:
    """The first pictures of a split."""
    place = list(SPLITS).index(split)
    return (scenes.scene((SEED, place, number), scenes.SHIFTED) for number in range(count))


def write_pictures(folder: Path, pictures: Iterable[scenes.Scene], phrases: Sequence[str]) -> Path:
    """Write scenes as PNG files and `_annotations.coco.json`, with the objects of some phrases.

    Returns:
        The folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for number, scene in enumerate(pictures):
        name = f"{folder.name}_{number:03}.png"
        Image.fromarray(scene.image).save(folder / name)
        written.append(Annotated(name, scene.image.shape[:2], objects(scene, phrases)))
    write_coco(folder, written, phrases)
    return folder


def objects(scene: scenes.Scene, phrases: Sequence[str]) -> list[tuple[str, scenes.Mask]]:
    """(phrase, mask) of every object; one that several phrases describe is there for each."""
    return [
        (phrase, scene.things[index].mask) for phrase in phrases for index in scene.answers(phrase)
    ]
