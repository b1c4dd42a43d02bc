"""Small meshes that tests know everything about."""

from __future__ import annotations

import numpy as np

from midi3d_lora.meshes.mesh_loading import Mesh

CORNERS = np.array([[x, y, z] for x in (0, 1) for y in (0, 1) for z in (0, 1)], dtype=np.float64)
QUADS = [(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)]


def box(
    low: tuple[float, ...] = (-1, -1, -1), high: tuple[float, ...] = (1, 1, 1), name: str = "box"
) -> Mesh:
    """A closed box of 12 triangles that face outward."""
    faces = [face for a, b, c, d in QUADS for face in ((a, b, c), (a, c, d))]
    vertices = np.array(low) + CORNERS * (np.array(high) - np.array(low))
    return Mesh(name, vertices, np.array(faces, dtype=np.int64))


def obj_text(mesh: Mesh, first: int = 1) -> str:
    """The mesh in OBJ's language; `first` is the number of its first vertex."""
    lines = [f"o {mesh.name}"]
    lines += [f"v {x:.9g} {y:.9g} {z:.9g}" for x, y, z in mesh.vertices]
    lines += [f"f {a + first} {b + first} {c + first}" for a, b, c in mesh.faces]
    return "\n".join(lines) + "\n"
