"""Folders of meshes as people have them, for tests of `prepare`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from mesh_shapes import box, obj_text
from PIL import Image

from midi3d_lora.meshes.mesh_loading import Mesh

SMALL = ["--num_samples", "100", "--image_size", "32"]


def write_obj(path: Path, mesh: Mesh) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(obj_text(mesh))
    return path


def write_rooms(root: Path, count: int) -> Path:
    """`count` scenes of two boxes side by side, each scene of another size."""
    for number in range(count):
        folder = root / f"scene_{number:04}"
        write_obj(folder / "a.obj", box((0, 0, 0), (1, 1 + number / 7, 1)))
        write_obj(folder / "b.obj", box((1.5, 0, 0), (2.5, 1, 1)))
    return root


def write_picture(path: Path, values: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values.astype(np.uint8)).save(path)
    return path


def halves(height: int, width: int, left: int = 1, right: int = 2) -> np.ndarray:
    """A map of two instances side by side, above a strip of background."""
    values = np.full((height, width), left)
    values[:, width // 2 :] = right
    values[-height // 8 :] = 0
    return values


def tree(root: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too."""
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}
