"""The embedded default: a tiny pretrained MIDI-3D, and scenes that it does badly on.

The scenes are generated as meshes, for `midi3d-lora prepare`: vehicles and trees, where the base
has learned from furniture; `demo_base.scenes` says how. Everything is a function of its arguments:
the same call writes the same files.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from midi3d_lora.demo_base import scenes
from midi3d_lora.meshes.extraction import Mesh
from midi3d_lora.meshes.mesh_files import write_instances

SEED = 10  # of the data set; the base is trained and measured on others
SPLITS = {"train": 60, "val": 12, "test": 24}  # scenes of each split, by the name of its folder
MODEL = "model"
MESHES = "meshes"
# Blocks of the base in which the instances of a scene attend to each other: the middle of 7.
BLOCKS = ("blocks.2", "blocks.3", "blocks.4")


def write(folder: str | Path, splits: Mapping[str, int] = SPLITS) -> Path:
    """Write `meshes/<split>/<scene>/instance_<k>.ply` of every split, and the tiny base, `model/`.

    Args:
        folder: made if it does not exist.
        splits: scenes of each split, at most; its names are those of `SPLITS`.

    Returns:
        The folder.
    """
    folder = Path(folder)
    for split, count in splits.items():
        made = {f"{split}_{number:03}": scene_of(split, number) for number in range(count)}
        write_meshes(folder / MESHES / split, made)
    shutil.copytree(base_model(), folder / MODEL)
    return folder


def write_meshes(folder: Path, made: Mapping[str, scenes.Scene]) -> None:
    """Write the objects of scenes, `<scene>/instance_<k>.ply`."""
    for name, scene in made.items():
        meshes = {
            k: Mesh(mesh.vertices.astype(np.float32), mesh.faces.astype(np.int32))
            for k, mesh in enumerate(scene.meshes())
        }
        write_instances(folder / name, meshes, "ply")


def base_model() -> Path:
    """The packaged tiny MIDI-3D, a folder in the released layout."""
    return Path(__file__).parent / "demo_base" / MODEL


def scene_of(split: str, number: int) -> scenes.Scene:
    """One scene of a split."""
    return scenes.scene((SEED, list(SPLITS).index(split), number), scenes.OUTDOORS)
