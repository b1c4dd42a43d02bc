"""Rooms of 3D-FRONT as sources of scenes, whichever of its parts are there."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lora_core.errors import DataError, listing, near, one_line
from lora_core.report import say
from midi3d_lora.prepare import refuse_many, require
from midi3d_lora.prepare_run import Source
from midi3d_lora.scenes.prepared_scene import PreparedScene, scene_of_meshes
from midi3d_lora.sources import front_processed, front_raw
from midi3d_lora.sources.prepare_meshes import place

if TYPE_CHECKING:
    from midi3d_lora.prepare_3d_front import Options

TEST_ROOMS = 1000  # at the end of midi_room_ids.json
EXPECTED = "3D-FRONT-SURFACE with 3D-FRONT-RENDER, 3D-FRONT-SCENE, or 3D-FRONT with 3D-FUTURE-model"


def find_sources(root: Path, parts: str, options: Options) -> list[Source]:
    """The wanted rooms; of surfaces, one for each view.

    Raises:
        DataError: rooms that are not there, or whose lists or pictures are missing.
    """
    rooms = wanted_rooms(root, parts, options)
    if parts == "surfaces":
        return front_processed.surface_sources(root, rooms, options.views, options.pictures)
    of = front_raw if parts == "raw" else front_processed
    return of.mesh_sources(root, rooms)


def parts_of(root: Path, options: Options) -> str:
    """What scenes are made of.

    Raises:
        DataError: it is not there.
    """
    there = {
        "surfaces": all((root / f"3D-FRONT-{part}").is_dir() for part in ("SURFACE", "RENDER")),
        "meshes": (root / "3D-FRONT-SCENE").is_dir(),
        "raw": (root / "3D-FRONT").is_dir() and (root / "3D-FUTURE-model").is_dir(),
    }
    found = [part for part, is_there in there.items() if is_there]
    wanted = options.parts
    if wanted != "auto" and wanted not in found:
        found = []
    require(found, f"--source: {one_line(root.absolute())}: expected {EXPECTED} in it")
    return found[0] if wanted == "auto" else wanted


def wanted_rooms(root: Path, parts: str, options: Options) -> list[str]:
    """Rooms, `house/room`, that are on the disk, in the order of the list.

    Raises:
        DataError: the list cannot be read, or names rooms that are not there.
    """
    listed = front_processed.read_list(Path(options.rooms)) if options.rooms else None
    if parts == "raw":
        there = front_raw.rooms(root, None if listed is None else set(listed))
    else:
        there = front_processed.rooms(root, parts)
        listed = front_processed.published_rooms(root) if listed is None else listed
    require(there, f"--source: {one_line(root.absolute())}: holds no such rooms")
    listed = there if listed is None else listed
    cut = max(0, len(listed) - TEST_ROOMS)
    subset = {"all": listed, "train": listed[:cut], "test": listed[cut:]}[options.subset]
    on_disk = set(there)
    missing = [room for room in subset if room not in on_disk]
    if missing and options.rooms:
        problems = [f"--rooms: no room {one_line(n)}; {near(n, there)}" for n in missing]
        raise DataError(listing(problems))
    chosen = [room for room in subset if room in on_disk]
    require(chosen, f"--subset {options.subset}: none of its {len(subset)} rooms is there")
    if missing:
        say(f"3d-front: {len(missing)} of {len(subset)} listed rooms are not on the disk")
    return chosen


def build(source: Source, parts: str, options: Options) -> PreparedScene:
    """The scene of a room.

    Raises:
        DataError: everything that is wrong with it.
    """
    where = one_line(source.place)
    notes: list[str] = []
    try:
        if parts == "surfaces":
            return front_processed.surface_scene(source, options, notes)
        read = front_raw.read_room if parts == "raw" else front_processed.read_room
        meshes = read(source, notes)
        refuse_many(meshes, options.max_instances)
        placed, frame = place(meshes, "y", options.yaw, options.normalize)
        return scene_of_meshes(source.name, placed, frame, None, options.drawing(), notes)
    except DataError as error:
        text = str(error)
        raise DataError(text if text.startswith(where) else f"{where}: {text}") from None
