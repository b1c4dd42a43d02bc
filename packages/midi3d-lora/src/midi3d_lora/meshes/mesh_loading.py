"""Meshes from .obj, .ply, .glb, .gltf, .stl and .off: every geometry where its scene places it.

Vertices, faces and transforms alone are read. Textures and materials are out of scope.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_core.data_file import open_regular
from lora_core.errors import ConfigError, DataError, listing, one_line
from midi3d_lora.meshes.mesh_headers import CHECKS, check_header

SUFFIXES = tuple(sorted(CHECKS))
# The ways in which trimesh says that a file is damaged; not MemoryError, which is the machine's.
DAMAGED = (
    OSError, ValueError, LookupError, ArithmeticError, TypeError, AttributeError, AssertionError,
    RuntimeError, struct.error, zlib.error,
)  # fmt: skip


@dataclass(frozen=True)
class Mesh:
    """Triangles.

    Attributes:
        name: of the instance.
        vertices: f64 [V, 3].
        faces: int64 [F, 3], counter-clockwise seen from outside.
    """

    name: str
    vertices: NDArray[np.float64]
    faces: NDArray[np.int64]

    def corners(self) -> NDArray[np.float64]:
        """[F, 3, 3]: face, corner, coordinate."""
        return self.vertices[self.faces]

    def area_vectors(self) -> NDArray[np.float64]:
        """[F, 3] normals whose lengths are the areas: (b - a) x (c - a) / 2."""
        a, b, c = self.corners().transpose(1, 0, 2)
        return np.cross(b - a, c - a) / 2


def read_meshes(path: Path, notes: list[str]) -> list[Mesh]:
    """The geometries of a file in world coordinates, in the order of the file.

    Faces without area are dropped and counted in `notes`, as "what: how much".

    Raises:
        DataError: no mesh in one of the formats, damaged, without faces, or with vertices that are
            not finite.
        ConfigError: trimesh is not installed.
    """
    where = one_line(path)
    if path.suffix.lower() not in CHECKS:
        raise DataError(f"{where}: expected one of {' '.join(SUFFIXES)}")
    try:
        check_header(path)
    except OSError as error:
        raise DataError(f"{where}: cannot be read: {error.strerror}") from None
    scene = _scene(path)
    meshes, problems = [], []
    # trimesh takes the objects of .obj and the nodes of glTF from the end of the file's list.
    for node in reversed(list(scene.graph.nodes_geometry)):
        transform, key = scene.graph[node]
        geometry = scene.geometry[key]
        if len(getattr(geometry, "faces", ())) == 0:
            continue  # points and lines
        name = (
            path.stem if key == path.name else str(key)
        )  # trimesh calls what has none by its file
        mesh = moved(name, geometry.vertices, geometry.faces, np.asarray(transform))
        try:
            meshes.append(checked(mesh, notes))
        except DataError as error:
            problems.append(f"{where}: {one_line(name)}: {error}")
    if problems:
        raise DataError(listing(problems))
    if not meshes:
        raise DataError(f"{where}: no faces in {one_line(path.name)}")
    return meshes


def library() -> Any:
    """trimesh; loaded before workers are forked it is loaded once.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import trimesh
    except ImportError:
        raise ConfigError("meshes are read with trimesh: pip install trimesh") from None
    return trimesh


def _scene(path: Path) -> Any:
    """The file as trimesh's Scene; nothing is merged, so that nothing wrong is lost unseen."""
    trimesh = library()
    kind = path.suffix.lower()[1:]
    options: dict[str, Any] = {"process": False}
    if kind != "stl" and kind != "off":
        options["skip_materials"] = True
    if kind == "obj":
        options |= {"split_objects": True, "group_material": False}
    resolver = trimesh.resolvers.FilePathResolver(str(path))
    try:
        with open_regular(path) as file:
            return trimesh.load_scene(file, file_type=kind, resolver=resolver, **options)
    except DAMAGED as error:
        text = one_line(str(error).partition("\n")[0])[:120]
        raise DataError(f"{one_line(path)}: cannot be read: {text or 'it is damaged'}") from None


def moved(name: str, vertices: Any, faces: Any, transform: NDArray[np.float64]) -> Mesh:
    """The mesh after a [4, 4] transform; a mirror image keeps its outside."""
    points = np.asarray(vertices, np.float64) @ transform[:3, :3].T + transform[:3, 3]
    order = [0, 2, 1] if np.linalg.det(transform[:3, :3]) < 0 else [0, 1, 2]
    return Mesh(name, points, np.asarray(faces, np.int64)[:, order])


def checked(mesh: Mesh, notes: list[str]) -> Mesh:
    """The mesh without faces of zero area.

    Raises:
        DataError: faces that name no vertex, vertices that are not finite, or no area at all.
    """
    count = len(mesh.vertices)
    beyond = int(((mesh.faces < 0) | (mesh.faces >= count)).any(axis=1).sum())
    if beyond:
        raise DataError(f"{beyond} of {len(mesh.faces)} faces name vertices beyond its {count}")
    wrong = int((~np.isfinite(mesh.vertices)).any(axis=1).sum())
    if wrong:
        raise DataError(f"{wrong} of {count} vertices are NaN or infinite")
    area = np.linalg.norm(mesh.area_vectors(), axis=1)
    extent = np.ptp(mesh.vertices, axis=0).max()
    good = area > 1e-12 * extent**2
    if not good.any():
        raise DataError(f"no area: all {len(area)} faces are lines or points")
    if not good.all():
        notes.append(f"faces without area were dropped: {int((~good).sum())} of {len(good)}")
        return replace(mesh, faces=mesh.faces[good])
    return mesh


def joined(meshes: Sequence[Mesh], name: str) -> Mesh:
    """One mesh of several."""
    starts = np.cumsum([0, *(len(mesh.vertices) for mesh in meshes)])
    faces = [mesh.faces + start for mesh, start in zip(meshes, starts[:-1], strict=True)]
    vertices = np.concatenate([mesh.vertices for mesh in meshes])
    return Mesh(name, vertices, np.concatenate(faces))


def outward(mesh: Mesh) -> tuple[Mesh, bool]:
    """The mesh with faces turned outward, and whether it is closed, so that this can be known.

    Closed: every edge between two places in space is run through as often in one direction as in
    the other. Then the volume by the divergence theorem, sum of a . (b x c) / 6, is positive if the
    faces are seen counter-clockwise from outside.
    """
    place = places(mesh.vertices)
    corner = place[mesh.faces]
    begin, end = corner.reshape(-1), np.roll(corner, -1, axis=1).reshape(-1)
    low, high = np.minimum(begin, end), np.maximum(begin, end)
    edge = np.unique(low * (place.max() + 1) + high, return_inverse=True)[1].reshape(-1)
    balance = np.bincount(edge, weights=np.where(begin < end, 1.0, -1.0))
    if balance.any():
        return mesh, False
    centre = (mesh.vertices.min(axis=0) + mesh.vertices.max(axis=0)) / 2
    a, b, c = (mesh.corners() - centre).transpose(1, 0, 2)
    if (a * np.cross(b, c)).sum() < 0:
        return replace(mesh, faces=mesh.faces[:, [0, 2, 1]]), True
    return mesh, True


def places(points: NDArray[np.float64]) -> NDArray[np.int64]:
    """[V] the same number for points [V, 3] that coincide, from 0.

    The inverse of `np.unique(points, axis=0)`, whose sort of rows takes 3.5 times as long as
    these sorts of numbers.
    """
    number = np.zeros(len(points), np.int64)
    for values in points.T:
        held, one = np.unique(values, return_inverse=True)
        number = np.unique(number * len(held) + one.reshape(-1), return_inverse=True)[1]
    return number.reshape(-1)
