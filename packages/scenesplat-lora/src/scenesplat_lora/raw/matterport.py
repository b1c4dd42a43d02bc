"""Matterport3D as it is distributed, to labelled clouds of 21 classes.

    v1/scans/17DRP5sb8fy/region_segmentations/region0.ply           faces with a category
                                              region0.fsegs.json    segment of every face
                                              region0.semseg.json   objects
    category_mapping.tsv                                            columns index, nyu40id

A scene is a region of a house, 17DRP5sb8fy_00. The classes are ScanNet's 20 and the ceiling, 20. A
vertex has the most frequent class of its faces; faces of no class count as one, and of equally
frequent ones the smallest number wins, none before all. Source: data_organization.md and the table
`metadata/category_mapping.tsv` at github.com/niessner/Matterport; the rule for vertices is that of
OpenScene and of Pointcept.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lora_core.errors import DataError, listing, one_line
from scenesplat_lora.raw.scannet import NYU40_OF_20, classes_of
from scenesplat_lora.raw.scans import (
    Cloud,
    Indices,
    RawDataset,
    Scan,
    coordinates,
    digest,
    instances,
    read_groups,
    read_segments,
    read_table,
)
from scenesplat_lora.scenes.ply import read_triangles

NYU40_OF_21 = (*NYU40_OF_20, 22)  # 22: ceiling
REGION = re.compile(r"region(\d{1,6})\.ply")
CATEGORY = ("category_id", "face_category")  # in the files, and in the description
CORNERS = ("vertex_indices", "vertex_index")
NUMBER = re.compile(r"(\d{1,9})(?:\.0)?")  # some categories of the table have none
MOST_CATEGORIES = 100_000


def matterport(source: Path, categories: Path | None) -> RawDataset:
    """The regions of all houses below the data set's folder, or below the folder of houses.

    Args:
        categories: `category_mapping.tsv`; None: in `metadata` beside the data.

    Raises:
        DataError: no such table.
    """
    if categories is None:
        places = [folder / "metadata" for folder in (source, source.parent, source.parent.parent)]
        found = [place / "category_mapping.tsv" for place in places]
        categories = next((path for path in found if path.exists()), None)
        if categories is None:
            raise DataError(
                f"{one_line(source.absolute())}: no metadata/category_mapping.tsv: give --label_map"
            )
    table = class_table(categories)
    scans: dict[str, Scan] = {}
    groups: dict[str, list[str]] = {}
    for house, folder in _houses(source).items():
        regions = {name: _scan(name, mesh) for name, mesh in _regions(house, folder).items()}
        scans |= regions
        groups[house] = sorted(regions)
    settings = {"label_map": digest(table.tolist())}
    return RawDataset(scans, partial(read, table=table), settings, groups)


def class_table(path: Path) -> NDArray[np.int32]:
    """The class of every category by its index, i32; -1: none. 0 is no category."""
    rows = [
        (int(float(index)), int(match[1]) if (match := NUMBER.fullmatch(number)) else 0)
        for index, number in read_table(path, "\t", ("index", "nyu40id"))
        if NUMBER.fullmatch(index)
    ]
    highest = max((index for index, _ in rows), default=0)
    if not 0 < highest < MOST_CATEGORIES:
        raise DataError(f"{one_line(path)}: categories are numbered up to {highest}")
    nyu40 = np.zeros(highest + 1, np.int64)
    for index, number in rows:
        nyu40[index] = number
    nyu40[0] = 0
    return classes_of(nyu40, NYU40_OF_21)


def _houses(source: Path) -> dict[str, Path]:
    """Folders of region segmentations by house; archives unpack to house/house/..., too."""
    bases = [b for b in (source, source / "scans", source / "v1" / "scans") if b.is_dir()]
    patterns = ("*/region_segmentations", "*/*/region_segmentations")
    found = (folder for b in bases for pattern in patterns for folder in b.glob(pattern))
    return {folder.parent.name: folder for folder in found}


def _regions(house: str, folder: Path) -> dict[str, Path]:
    matches = ((path, REGION.fullmatch(path.name)) for path in folder.iterdir())
    return {f"{house}_{int(match[1]):02d}": path for path, match in matches if match}


def _scan(name: str, mesh: Path) -> Scan:
    segments, objects = (mesh.with_suffix(f".{kind}.json") for kind in ("fsegs", "semseg"))
    return Scan(name, {"mesh": mesh, "segments": segments, "objects": objects})


def read(scan: Scan, table: NDArray[np.int32]) -> Cloud:
    """The vertices of a region with labels 0 ... 20.

    Raises:
        DataError: a file that cannot be used.
    """
    path = scan.files["mesh"]
    coord, faces = coordinates(path), read_triangles(path)
    there = faces.dtype.names or ()
    category = next((name for name in CATEGORY if name in there), None)
    corners = next((name for name in CORNERS if f"#{name}" in there), None)
    if category is None or corners is None:
        raise DataError(f"{one_line(path)}: its faces have no {CATEGORY[0]} or no {CORNERS[0]}")
    number, triangles = faces[category].astype(np.int64), faces[corners].astype(np.int64)
    problems = []
    if number.max(initial=0) >= len(table):
        problems.append(f"category {number.max()}, but the table ends at {len(table) - 1}")
    if triangles.min(initial=0) < 0 or triangles.max(initial=0) >= len(coord):
        problems.append(f"faces name vertices outside 0 ... {len(coord) - 1}")
    if problems:
        raise DataError(listing([f"{one_line(path)}: {problem}" for problem in problems]))
    of_face = table[number.clip(min=0)]  # -1 is no category, as 0
    segment = of_vertices(triangles, of_face, len(coord))
    return Cloud(coord, segment, _instance(scan, triangles, len(coord)))


def _instance(scan: Scan, triangles: Indices, vertices: int) -> NDArray[np.int32] | None:
    segments, objects = scan.file("segments"), scan.file("objects")
    if segments is None or objects is None:
        return None
    of_face = instances(read_segments(segments, len(triangles), "faces"), read_groups(objects))
    return of_vertices(triangles, of_face, vertices)


def of_vertices(triangles: Indices, of_face: Indices, vertices: int) -> NDArray[np.int32]:
    """The most frequent number of every vertex's faces, i32 [vertices]; ties go to the smallest.

    Args:
        triangles: [F, 3]. of_face: [F], -1 or above. A vertex without faces has -1.
    """
    values = int(of_face.max(initial=-1)) + 2
    pairs, count = np.unique(triangles * values + (of_face[:, None] + 1), return_counts=True)
    vertex, number = pairs // values, pairs % values - 1
    order = np.lexsort((number, -count, vertex))
    first = order[np.diff(vertex[order], prepend=-1) > 0]
    found = np.full(vertices, -1, np.int32)
    found[vertex[first]] = number[first]
    return found
