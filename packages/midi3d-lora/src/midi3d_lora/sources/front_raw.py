"""3D-FRONT and 3D-FUTURE as distributed: houses as JSON that say where models of furniture stand.

    v -> R(rot) (scale * v) + pos        rot a quaternion x, y, z, w; y is up, lengths in metres

Walls, floors and ceilings are left out: a scene is its furniture.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_core.data_file import read_json
from lora_core.errors import DataError, listing, one_line
from midi3d_lora.meshes.mesh_loading import Mesh, joined, moved, read_meshes
from midi3d_lora.prepare_run import Source
from midi3d_lora.sources.front_processed import scene_name
from midi3d_lora.sources.prepare_meshes import faced

HOUSES, MODELS, MODEL = "3D-FRONT", "3D-FUTURE-model", "raw_model.obj"


def rooms(root: Path, wanted: Collection[str] | None = None) -> list[str]:
    """Rooms with furniture, `house/room`, sorted; of the wanted houses only, or of all.

    Raises:
        DataError: houses that cannot be read, all together.
    """
    houses = None if wanted is None else {room.partition("/")[0] for room in wanted}
    found, problems = [], []
    for path in sorted((root / HOUSES).glob("*.json")):
        if houses is not None and path.stem not in houses:
            continue
        try:
            found += [f"{path.stem}/{room}" for room, placed in read_house(path).items() if placed]
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError(listing(problems))
    return sorted(found)


def mesh_sources(root: Path, wanted: Sequence[str]) -> list[Source]:
    """For each room the file of its house and those of its models."""
    found = []
    houses: dict[str, dict[str, list[tuple[str, Any]]]] = {}
    for name in wanted:
        house, _, room = name.partition("/")
        path = root / HOUSES / f"{house}.json"
        if house not in houses:
            houses[house] = read_house(path)
        models = sorted({jid for jid, _ in houses[house][room]})
        files = (root / MODELS / jid / MODEL for jid in models)
        there = tuple(file for file in files if file.exists())
        found.append(Source(scene_name(name), (path, *there), root, path / room))
    return found


def read_house(path: Path) -> dict[str, list[tuple[str, NDArray[np.float64]]]]:
    """Room -> its furniture: identity of the model, and the [4, 4] transform that places it.

    Raises:
        DataError: no JSON, or not that of a house.
    """
    held = read_json(path)
    try:
        models = {one["uid"]: _identity(one) for one in held.get("furniture", []) if "jid" in one}
        found: dict[str, list[tuple[str, NDArray[np.float64]]]] = {}
        for room in held["scene"]["room"]:
            placed = found.setdefault(_identity({"jid": room["instanceid"]}), [])
            for child in room.get("children", []):
                if (jid := models.get(child["ref"])) is not None:
                    placed.append((jid, _transform(child)))
        return found
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        reason = one_line(str(error).partition("\n")[0])[:120]
        raise DataError(f"{one_line(path)}: no house of 3D-FRONT: {reason}") from None


def _identity(one: dict[str, Any]) -> str:
    """A name that is taken for one of a folder or scene."""
    name = one["jid"]
    if not isinstance(name, str) or not name or name[0] == "." or "/" in name or "\\" in name:
        raise ValueError(f"{name!r} is no name of a model or room")
    return name


def _transform(child: dict[str, Any]) -> NDArray[np.float64]:
    """[4, 4] of pos, rot and scale."""
    x, y, z, w = (float(value) for value in child["rot"])
    length = math.sqrt(x * x + y * y + z * z + w * w)
    values = [*child["pos"], *child["scale"], length]
    if len(values) != 7 or not all(math.isfinite(float(value)) for value in values) or not length:
        raise ValueError(f"{child['ref']!r} has no place: pos, rot and scale of 3, 4 and 3 numbers")
    x, y, z, w = x / length, y / length, z / length, w / length
    rotation = np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    )
    placed = np.eye(4)
    placed[:3, :3] = rotation * np.array(child["scale"], np.float64)
    placed[:3, 3] = child["pos"]
    return placed


def read_room(source: Source, notes: list[str]) -> list[Mesh]:
    """The furniture of a room, each piece an instance; pieces without a model are left out.

    Raises:
        DataError: damaged models, or no piece has one.
    """
    house, *files = source.files
    models = {file.parent.name: file for file in files}
    meshes: list[Mesh] = []
    read: dict[str, Mesh] = {}
    problems = []
    for jid, transform in read_house(house)[source.place.name]:
        if jid not in models:
            notes.append(f"furniture left out whose model is missing: {one_line(jid)}")
            continue
        try:
            if jid not in read:
                read[jid] = joined(read_meshes(models[jid], notes), jid)
        except DataError as error:
            problems.append(str(error))
            continue
        whole = read[jid]
        name = f"{jid}_{len(meshes) + 1}"
        meshes.append(faced(moved(name, whole.vertices, whole.faces, transform), notes))
    if problems:
        raise DataError(listing(list(dict.fromkeys(problems))))
    if not meshes:
        raise DataError(f"none of its furniture has a model in {MODELS}")
    return meshes
