"""From a scene's meshes to points on its instances: one frame, sampled by area with normals.

instances = read_instances(paths, notes)
placed, frame = place(instances, up="y", yaw=0.0, normalize=True)
points = sample_mesh(placed[0], 20480, sampling_rng(42, "scene_0001", 0))
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lora_core.errors import DataError, listing, one_line
from midi3d_lora.meshes.mesh_loading import SUFFIXES, Mesh, joined, outward, read_meshes
from midi3d_lora.scenes.scene_frame import BOUND, SceneFrame, fit_frame, turn


def mesh_files(folder: Path) -> list[Path]:
    """The mesh files directly in a folder, sorted by name."""
    found = [path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES]
    return sorted(path for path in found if not path.name.startswith(".") and path.is_file())


def read_instances(paths: Sequence[Path], notes: list[str]) -> list[Mesh]:
    """The instances of a scene: each of several files, or each geometry of a single one.

    Args:
        paths: in the order of the instances.
        notes: takes what was repaired, and what may make the result worse.

    Raises:
        DataError: everything that is wrong with the files.
    """
    instances: list[Mesh] = []
    problems = []
    for path in paths:
        try:
            meshes = read_meshes(path, notes)
        except DataError as error:
            problems.append(str(error))
            continue
        instances += meshes if len(paths) == 1 else [joined(meshes, path.stem)]
    if problems:
        raise DataError(listing(problems))
    return [faced(mesh, notes) for mesh in _named_apart(instances)]


def faced(mesh: Mesh, notes: list[str]) -> Mesh:
    """The mesh with faces turned outward if it is closed, and a note if it is not."""
    turned, closed = outward(mesh)
    if not closed:
        notes.append(
            "not closed, or faces turned both ways, so that normals are taken as the file has "
            f"them: {one_line(mesh.name)}"
        )
    return turned


def _named_apart(meshes: Sequence[Mesh]) -> list[Mesh]:
    """Meshes of the same name as one before get a number."""
    taken: set[str] = set()
    named = []
    for mesh in meshes:
        name, number = mesh.name, 1
        while name in taken:
            number += 1
            name = f"{mesh.name}_{number}"
        taken.add(name)
        named.append(replace(mesh, name=name))
    return named


def place(
    meshes: Sequence[Mesh], up: str, yaw: float, normalize: bool
) -> tuple[list[Mesh], SceneFrame | None]:
    """The meshes in the scene's frame: turned to y up, and all normalised by one transform.

    Args:
        up: axis of the files that points up, "y" or "z".
        yaw: degrees around y, counter-clockwise seen from above.

    Returns:
        The meshes, and the transform that followed the rotation; None without `normalize`.

    Raises:
        DataError: no extent, or not normalised and beyond [-1.05, 1.05].
    """
    rotation = turn(up, yaw)
    turned = [replace(mesh, vertices=mesh.vertices @ rotation.T) for mesh in meshes]
    # Vertices that no face uses would move the box.
    used = [mesh.corners().reshape(-1, 3) for mesh in turned]
    low = np.min([points.min(axis=0) for points in used], axis=0)
    high = np.max([points.max(axis=0) for points in used], axis=0)
    if normalize:
        try:
            frame = fit_frame(low, high)
        except ValueError as error:
            raise DataError(str(error)) from None
        return [replace(mesh, vertices=frame.apply(mesh.vertices)) for mesh in turned], frame
    if max(np.abs(low).max(), np.abs(high).max()) > BOUND:
        ranges = zip("xyz", low, high, strict=True)
        extent = ", ".join(f"{axis} {least:.4g}..{most:.4g}" for axis, least, most in ranges)
        raise DataError(f"outside of [-1, 1]: {extent}; prepare with --normalize true")
    return turned, None


def sampling_rng(seed: int, scene: str, instance: int) -> np.random.Generator:
    """Random numbers of one instance, whatever else is prepared, in which order, by how many."""
    digest = hashlib.blake2b(scene.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return np.random.default_rng([seed, int.from_bytes(digest, "little"), instance])


@dataclass(frozen=True)
class Drawing:
    """How points and pictures are made: points of an instance, pixels of a picture's side."""

    seed: int
    num_samples: int
    image_size: int

    def rng(self, scene: str, instance: int) -> np.random.Generator:
        """Random numbers of one instance."""
        return sampling_rng(self.seed, scene, instance)


def sample_mesh(mesh: Mesh, count: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """Points drawn uniformly by area, with the normals of their faces: f32 [count, 6].

    With r, s uniform in 0..1, folded so that r + s <= 1: p = a + r (b - a) + s (c - a).
    """
    vectors = mesh.area_vectors()
    area = np.linalg.norm(vectors, axis=1)
    total = np.cumsum(area)
    face = np.searchsorted(total, rng.random(count) * total[-1], side="right")
    face = face.clip(max=int(np.flatnonzero(area)[-1]))  # the product may be rounded up
    r, s = rng.random((2, count, 1))
    beyond = r + s > 1
    r, s = np.where(beyond, 1 - r, r), np.where(beyond, 1 - s, s)
    a, b, c = mesh.vertices[mesh.faces[face]].transpose(1, 0, 2)
    points = a + r * (b - a) + s * (c - a)
    normals = vectors[face] / area[face, None]
    return np.concatenate([points, normals], axis=1).astype(np.float32)
