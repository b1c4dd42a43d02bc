"""3D-FRONT as processed for MIDI-3D: surfaces with pictures, or meshes, of every object of a room.

All objects of a room stand in one frame, with y up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_core.data_file import open_regular, read_json
from lora_core.errors import DataError, listing, one_line
from lora_core.pictures.files import read_image
from midi3d_lora.conditioning.seg_maps import read_seg_map
from midi3d_lora.meshes.mesh_loading import Mesh
from midi3d_lora.prepare import SceneOptions
from midi3d_lora.prepare_run import Source
from midi3d_lora.scenes.array_pickle import read_surface_dict
from midi3d_lora.scenes.prepared_scene import PreparedScene
from midi3d_lora.scenes.scene_folders import square_pictures
from midi3d_lora.scenes.scene_frame import turn
from midi3d_lora.scenes.surfaces import Part, check_parts, draw_surface
from midi3d_lora.sources.prepare_meshes import mesh_files, read_instances

FOLDERS = {"surfaces": "3D-FRONT-SURFACE", "meshes": "3D-FRONT-SCENE"}
LISTS = ("midi", "valid")  # beginnings of the published lists; the first that is there counts
PICTURES = (".webp", ".png", ".jpg")


# -- rooms -----------------------------------------------------------------------------------------


def rooms(root: Path, parts: str) -> list[str]:
    """The rooms on the disk, `house/room`, sorted."""
    folder = root / FOLDERS[parts]
    found = (path for path in folder.glob("*/*") if path.is_dir() and path.name[0] != ".")
    return sorted(path.relative_to(folder).as_posix() for path in found)


def published_rooms(root: Path) -> list[str] | None:
    """The rooms of the published list, in its order; None: there is no list."""
    for begin in LISTS:
        path = root / f"{begin}_room_ids.json"
        if path.exists():
            return read_list(path)
    return None


def read_list(path: Path) -> list[str]:
    """The rooms of a list: a JSON file with a list of texts, or a text file with a line each.

    Raises:
        DataError: it cannot be read, is empty, or holds something else.
    """
    if path.suffix == ".json":
        held = read_json(path)
    else:
        try:
            with open_regular(path) as file:
                lines = file.read(2**26).decode("utf-8-sig").splitlines()
            held = [line.strip() for line in lines if line.strip()]
        except (OSError, UnicodeDecodeError):
            raise DataError(f"{one_line(path)}: cannot be read as lines of text") from None
    if not isinstance(held, list) or not held or not all(isinstance(one, str) for one in held):
        raise DataError(f"{one_line(path)}: expected a list of rooms, house/room")
    return [one.strip("/") for one in held]


def published_objects(root: Path) -> dict[str, list[str]]:
    """Room -> names of its objects; the i-th one has the value i in the room's maps.

    Raises:
        DataError: no list, or not one for each room.
    """
    for begin in LISTS:
        path = root / f"{begin}_furniture_ids.json"
        if not path.exists():
            continue
        held, listed = read_json(path), read_list(root / f"{begin}_room_ids.json")
        if not isinstance(held, list) or len(held) != len(listed):
            raise DataError(f"{one_line(path)}: expected one list for each of {len(listed)} rooms")
        return {room: _names(path, names) for room, names in zip(listed, held, strict=True)}
    raise DataError(
        f"{one_line(root.absolute())}: misses midi_furniture_ids.json, by whose order the maps "
        "number the objects: download it from the data set's page"
    )


def _names(path: Path, names: Any) -> list[str]:
    """Names of files without folders and suffixes, as the list may have them."""
    if not isinstance(names, list) or not all(isinstance(one, str) for one in names):
        raise DataError(f"{one_line(path)}: expected lists of texts")
    plain = [one.rpartition("/")[2].removesuffix(".npy").removesuffix(".glb") for one in names]
    if any(one in ("", ".", "..") or "\\" in one for one in plain):
        raise DataError(f"{one_line(path)}: {one_line(names[0])!r}: expected names of files")
    return plain


def scene_name(room: str, view: str = "") -> str:
    """The scene of `house/room`, a name without folders."""
    return "_".join([*room.split("/"), *([view] if view else [])])


# -- meshes ----------------------------------------------------------------------------------------


def mesh_sources(root: Path, wanted: Sequence[str]) -> list[Source]:
    """The rooms' meshes, each an instance."""
    found = []
    for room in wanted:
        folder = root / FOLDERS["meshes"] / room
        found.append(Source(scene_name(room), tuple(mesh_files(folder)), folder, folder))
    return found


def read_room(source: Source, notes: list[str]) -> list[Mesh]:
    """The instances of a room.

    Raises:
        DataError: everything that is wrong with them.
    """
    if not source.files:
        raise DataError("no meshes, expected a .glb file for each object")
    return read_instances(source.files, notes)


# -- surfaces --------------------------------------------------------------------------------------


def surface_sources(
    root: Path, wanted: Sequence[str], views: Sequence[str], pictures: str
) -> list[Source]:
    """For each room and view its objects' surfaces in the order of the map, picture, and map.

    Raises:
        DataError: rooms without a list of objects, or without a picture; all together.
    """
    objects = published_objects(root)
    found, problems = [], []
    for room in wanted:
        if room not in objects:
            problems.append(f"{one_line(room)}: in no list of objects")
            continue
        surfaces = [root / FOLDERS["surfaces"] / room / f"{name}.npy" for name in objects[room]]
        folder = root / "3D-FRONT-RENDER" / room
        for view in views:
            names = [folder / f"{pictures}_{view}{suffix}" for suffix in PICTURES]
            picture = next((path for path in names if path.exists()), None)
            if picture is None:
                problems.append(f"{one_line(names[0])}: no such picture")
                continue
            files = (*surfaces, picture, folder / f"semantic_{view}.png")
            found.append(Source(scene_name(room, view), files, root, picture))
    if problems:
        raise DataError(listing(problems))
    return found


def surface_scene(source: Source, options: SceneOptions, notes: list[str]) -> PreparedScene:
    """The scene of one view of a room: those of its objects that can be seen.

    Raises:
        DataError: everything that is wrong with its files.
    """
    *surfaces, picture, semantic = source.files
    seg = read_seg_map(semantic, options.max_instances, 0.0)
    beyond = [label for label in seg.labels if label > len(surfaces)]
    if seg.colours or beyond:
        values = ", ".join(seg.names[:10])
        raise DataError(
            f"{one_line(semantic)}: holds {values}, expected 1 to {len(surfaces)}, one for each "
            "object of the room's list"
        )
    rgb = read_image(picture)
    pictures = square_pictures(rgb, seg, rgb, options.image_size)
    index = pictures.seg.index
    labels = [int(label) for label in np.unique(index) if label]
    if not labels:
        raise DataError(f"{one_line(semantic)}: no instance is left at {options.image_size} pixels")
    files = [surfaces[seg.labels[label - 1] - 1] for label in labels]
    parts = _parts(files, turn("y", options.yaw))
    frame = check_parts(parts, options.normalize, notes)
    drawing, points = options.drawing(), []
    for label, part in zip(labels, parts, strict=True):
        rng = drawing.rng(source.name, seg.labels[label - 1])
        points.append(draw_surface(part, frame, drawing.num_samples, rng).joined())
    return PreparedScene(
        pictures.picture,
        pictures.scene,
        index.astype(np.uint8 if len(seg) < 256 else np.uint16),
        tuple(labels),
        tuple(file.stem for file in files),
        np.stack(points),
        {"frame": None if frame is None else asdict(frame)},
        None,
        tuple(notes),
    )


def _parts(files: Sequence[Path], rotation: NDArray[np.float64]) -> list[Part]:
    parts, problems = [], []
    for number, file in enumerate(files):
        try:
            values = read_surface_dict(file) @ np.kron(np.eye(2), rotation).T
            parts.append(Part((number,), values, None, one_line(file)))
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError(listing(problems))
    return parts
