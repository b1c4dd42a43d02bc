"""Raw data sets as they are distributed, small: a floor of 12 x 12 vertices and objects on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import made_scenes
import numpy as np

from scenesplat_lora.scenes.ply import write_gaussians

SIDE = 12  # vertices along each side of the floor
STEP = 0.2  # metres between them
TYPES = {"f4": "float", "u1": "uchar", "u2": "ushort", "i4": "int"}


def floor() -> np.ndarray:
    """Vertices f32 [144, 3] of a floor at z = 0."""
    x, y = np.meshgrid(np.arange(SIDE), np.arange(SIDE), indexing="ij")
    return np.stack([x.ravel() * STEP, y.ravel() * STEP, np.zeros(SIDE**2)], 1).astype(np.float32)


def triangles() -> np.ndarray:
    """Corners i32 [F, 3] of two triangles in every cell of the floor."""
    cell = np.arange(SIDE**2).reshape(SIDE, SIDE)
    a, b, c, d = (
        part.ravel() for part in (cell[:-1, :-1], cell[1:, :-1], cell[:-1, 1:], cell[1:, 1:])
    )
    return (
        np.stack([np.stack([a, b, c], 1), np.stack([b, d, c], 1)], 1).reshape(-1, 3).astype("<i4")
    )


def write_mesh(
    path: Path, coord: np.ndarray, faces: np.ndarray, order: str = "<", **columns: Any
) -> Path:
    """A binary mesh with colours; columns with as many rows as faces are theirs."""
    vertex = {f"{axis}": coord[:, i].astype("f4") for i, axis in enumerate("xyz")}
    vertex |= {name: np.full(len(coord), 128, "u1") for name in ("red", "green", "blue", "alpha")}
    vertex |= {n: v for n, v in columns.items() if len(v) == len(coord) != len(faces)}
    of_face = {n: v for n, v in columns.items() if n not in vertex}
    form = "little" if order == "<" else "big"
    lines = ["ply", f"format binary_{form}_endian 1.0", "comment VCGLIB generated"]
    lines += [f"element vertex {len(coord)}", *_properties(vertex), f"element face {len(faces)}"]
    lines += ["property list uchar int vertex_indices", *_properties(of_face), "end_header", ""]
    rows = _rows(vertex, order)
    table = {
        "#": np.full(len(faces), faces.shape[1], "u1"),
        "corners": faces.astype("i4"),
        **of_face,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("\n".join(lines).encode() + rows.tobytes() + _rows(table, order).tobytes())
    return path


def _properties(columns: dict[str, np.ndarray]) -> list[str]:
    return [f"property {TYPES[v.dtype.str[1:]]} {name}" for name, v in columns.items()]


def _rows(columns: dict[str, np.ndarray], order: str) -> np.ndarray:
    kinds: list[Any] = [(n, order + v.dtype.str[1:], v.shape[1:]) for n, v in columns.items()]
    rows = np.empty(len(next(iter(columns.values()))), np.dtype(kinds))
    for name, values in columns.items():
        rows[name] = values
    return rows


def write_splat(path: Path, seed: int = 0, shift: float = 0.0) -> Path:
    """300 Gaussians a few centimetres above the floor; every tenth is in the air."""
    scene = made_scenes.made_scene(300, seed=seed, side=(SIDE - 1) * STEP)
    scene["coord"][:, 2] = np.where(np.arange(300) % 10 == 0, 2.0, 0.02)
    scene["coord"] += np.float32(shift)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_gaussians(path, scene)
    return path


def groups(**segments: tuple[str, list[int]]) -> dict[str, Any]:
    """An annotation of objects: name -> (label, segments)."""
    listed = [
        {"id": i, "objectId": i + 1, "label": label, "segments": found}
        for i, (label, found) in enumerate(segments.values())
    ]
    return {"segGroups": listed}


def write_json(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def write_scannet(root: Path, *names: str) -> Path:
    """Scans whose near half is floor (nyu40: 2), whose far half is otherfurniture (39)."""
    x = floor()[:, 0]
    label = np.where(x < 1.1, 2, 39).astype("u2")
    label[x > 2.1] = 22  # no class of the benchmark
    for name in names:
        folder = root / "scans" / name
        write_mesh(folder / f"{name}_vh_clean_2.labels.ply", floor(), triangles(), label=label)
        write_mesh(folder / f"{name}_vh_clean_2.ply", floor(), triangles())
        segments = (np.arange(SIDE**2) // SIDE * 7).tolist()  # one for every x
        content = {"sceneId": name, "segIndices": segments}
        write_json(folder / f"{name}_vh_clean_2.0.010000.segs.json", content)
        far = [7 * row for row in range(6, SIDE)]
        objects = groups(a=("floor", [0, 7, 14]), b=("thing", far))
        write_json(folder / f"{name}.aggregation.json", objects)
    return root


def write_scannetpp(root: Path, *names: str) -> Path:
    """Scans with a table on the floor and a cup on the table; one segment per vertex."""
    everything = list(range(SIDE**2))
    for name in names:
        folder = root / "data" / name / "scans"
        write_mesh(folder / "mesh_aligned_0.05.ply", floor(), triangles())
        write_json(folder / "segments.json", {"segIndices": everything})
        objects = groups(
            a=("floor", everything), b=("dining table", everything[:48]),
            c=("mug", everything[:12]), d=("REMOVE", everything[:6]), e=("dust", everything[:3]),
        )  # fmt: skip
        write_json(folder / "segments_anno.json", objects)
    meta = root / "metadata" / "semantic_benchmark"
    meta.mkdir(parents=True)
    (meta / "top100.txt").write_text("wall\nfloor\ntable\nmug\ndust\n")
    (meta / "map_benchmark.csv").write_text(
        'class,count,semantic_map_to,instance_map_to\nfloor,9,,None\n"dining table",3,table,table\n'
        "dust,2,None,\n"
    )
    return root


def write_matterport(root: Path, *houses: str, regions: int = 2) -> Path:
    """Houses whose regions have a floor, a ceiling where x is large, and faces of no category."""
    faces = triangles()
    x = floor()[faces[:, 0], 0]
    category = np.select([x < 0.5, x < 1.5], [4, 2], 3).astype("i4")
    category[x > 1.9] = -1
    for house in houses:
        for number in range(regions):
            mesh = root / "v1" / "scans" / house / "region_segmentations" / f"region{number}.ply"
            write_mesh(mesh, floor(), faces, category_id=category)
            write_json(mesh.with_suffix(".fsegs.json"), {"segIndices": (category + 1).tolist()})
            objects = groups(a=("floor", [3]), b=("ceiling", [4, 5]))
            write_json(mesh.with_suffix(".semseg.json"), objects)
    table = root / "metadata" / "category_mapping.tsv"
    table.parent.mkdir(parents=True, exist_ok=True)
    table.write_text(
        'index\traw_category\tcount\tnyu40id\tmpcat40\n1\t"wall\t9\t1\twall\n2\tfloor\t9\t2\tfloor\n'
        "3\tceiling\t9\t22\tceiling\n4\t\tthing\t\tvoid\n"
    )
    return root
