"""Folders of meshes, with or without pictures, as sources of scenes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lora_core.errors import DataError, one_line
from lora_core.pictures.files import SUFFIXES as PICTURE_SUFFIXES
from lora_core.pictures.files import read_image
from midi3d_lora.conditioning.pictures import ScenePictures
from midi3d_lora.conditioning.seg_maps import SegMap, read_seg_map
from midi3d_lora.meshes.mesh_loading import SUFFIXES, Mesh, joined
from midi3d_lora.prepare import refuse_many, require
from midi3d_lora.prepare_run import Source
from midi3d_lora.scenes.prepared_scene import PreparedScene, scene_of_meshes
from midi3d_lora.scenes.scene_folders import square_pictures
from midi3d_lora.sources.prepare_meshes import mesh_files, place, read_instances

if TYPE_CHECKING:
    from midi3d_lora.prepare_folders import Options

OTHERS = (".fbx", ".blend", ".dae", ".3mf", ".usd", ".usda", ".usdc", ".usdz", ".x3d", ".max")
STATED = (".glb", ".gltf")  # formats in which y is up by definition
ROLES = {  # names of a scene's pictures, the first that is there counts
    "rgb": ("rgb", "image", "render", "color"),
    "seg": ("seg", "mask", "segmentation"),
    "scene_rgb": ("scene_rgb",),
}


# -- which scenes ----------------------------------------------------------------------------------


def find_sources(root: Path) -> list[Source]:
    """The scenes below a folder, sorted by name.

    Raises:
        DataError: no such folder, or no scenes.
    """
    place = one_line(root.absolute())
    try:
        found = [one for entry in sorted(root.iterdir()) if (one := _source(entry, root))]
    except OSError as error:
        where = one_line(error.filename or place)
        raise DataError(f"--input_dir: {where}: {error.strerror}") from None
    if mesh_files(root) and (pictures := _pictures(root)):
        raise DataError(
            f"--input_dir: {place} holds {pictures[min(pictures)].name}, so it looks like one "
            f"scene itself: give its parent, {one_line(root.absolute().parent)}"
        )
    require(found, f"--input_dir: {place}: no scenes, expected folders with {_formats()} files")
    return found


def _source(entry: Path, root: Path) -> Source | None:
    """The scene that a folder or a mesh file is, or None."""
    if entry.name.startswith("."):
        return None
    if entry.is_dir():
        pictures = list(_pictures(entry).values())
        meshes = mesh_files(entry)
        if not meshes and not pictures and not _others(entry):
            return None
        parts = sorted(entry.glob("*.bin"))  # of glTF
        return Source(entry.name, (*meshes, *parts, *pictures), entry, entry)
    if entry.suffix.lower() in SUFFIXES or (_others(entry) and not _exported(entry)):
        return Source(entry.stem, (entry,), root, entry)
    return None


def _exported(entry: Path) -> bool:
    """Whether a file, such as a.blend, has a mesh of its name beside it, such as a.glb."""
    return any(entry.with_suffix(suffix).exists() for suffix in SUFFIXES)


def _pictures(folder: Path) -> dict[str, Path]:
    """Role -> file. A picture's role is its name, never its folder's."""
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in PICTURE_SUFFIXES)
    by_stem = {path.stem.lower(): path for path in reversed(files)}
    found = {}
    for role, stems in ROLES.items():
        path = next((by_stem[stem] for stem in stems if stem in by_stem), None)
        if path is not None:
            found[role] = path
    return found


def _others(place: Path) -> list[str]:
    """Names of files in formats of meshes that are not read: of a folder, or itself."""
    files = place.iterdir() if place.is_dir() else [place]
    return sorted(path.name for path in files if path.suffix.lower() in OTHERS)


def _formats() -> str:
    return ", ".join(SUFFIXES)


def axes(sources: Sequence[Source], up: str) -> str:
    """Which axis points up, in words."""
    kinds = {file.suffix.lower() for source in sources for file in source.files} & set(SUFFIXES)
    free, stated = sorted(kinds - set(STATED)), sorted(kinds & set(STATED))
    parts = [f"{up} in {' '.join(free)}"] if free else []
    parts += [f"y in {' '.join(stated)}"] if stated else []
    return ", ".join(parts) or up


# -- one scene -------------------------------------------------------------------------------------


def build(source: Source, options: Options) -> PreparedScene:
    """The scene of a source.

    Raises:
        DataError: everything that is wrong with it.
    """
    where = one_line(source.place)
    notes: list[str] = []
    paths = [path for path in source.files if path.suffix.lower() in SUFFIXES]
    if not paths:
        others = _others(source.place)
        hint = f"; convert {one_line(others[0])}" if others else ""
        raise DataError(f"{where}: no mesh, expected {_formats()} files{hint}")
    meshes = read_instances(paths, notes)
    if options.instances == "scene":
        meshes = [joined(meshes, source.name)]
    try:
        refuse_many(meshes, options.max_instances)
        pictures = None
        if source.place.is_dir() and not options.render:
            pictures = given_pictures(source.place, meshes, options)
        up = _up(paths, options.up)
        placed, frame = place(meshes, up, options.yaw, options.normalize)
        scene = scene_of_meshes(source.name, placed, frame, pictures, options.drawing(), notes)
    except DataError as error:
        text = str(error)
        raise DataError(text if text.startswith(where) else f"{where}: {text}") from None
    return replace(scene, facts={**scene.facts, "up": up})


def _up(paths: Sequence[Path], up: str) -> str:
    """The axis that is up in all of the files.

    Raises:
        DataError: it differs between them.
    """
    stated = {path.suffix.lower() in STATED for path in paths}
    if up == "z" and stated == {True, False}:
        raise DataError("holds glTF, where y is up, and other formats with --up z: convert one")
    return "y" if stated == {True} else up


def given_pictures(folder: Path, meshes: Sequence[Mesh], options: Options) -> ScenePictures | None:
    """The pictures beside the meshes, with one instance for each mesh; None: there are none.

    Raises:
        DataError: one is missing or damaged, or the instances are not as many as the meshes.
    """
    found = _pictures(folder)
    where = one_line(folder)
    if not found:
        return None
    if "rgb" not in found:
        there = found[min(found)].name
        raise DataError(f"{where}: has {there} but misses rgb.png; --render draws the pictures")
    rgb = read_image(found["rgb"])
    scene = read_image(found["scene_rgb"]) if "scene_rgb" in found else rgb
    if "seg" in found:
        seg = read_seg_map(found["seg"], options.max_instances, 0.0)
    elif options.full_mask:
        seg = SegMap(np.ones(rgb.shape[:2], np.int32), (1,))
    else:
        raise DataError(
            f"{where}: has {found['rgb'].name} but misses seg.png, the map of instances; "
            "--full_mask takes the picture as one instance, --render draws pictures"
        )
    if options.instances == "scene":
        seg = SegMap((seg.index > 0).astype(np.int32), (1,))
    if len(seg) != len(meshes):
        raise DataError(f"{where}: {_mismatch(meshes, seg)}")
    for name, size in (("seg.png", seg.size), ("scene_rgb.png", scene.shape[:2])):
        if size[0] * rgb.shape[1] != size[1] * rgb.shape[0]:
            raise DataError(
                f"{where}: {name} has {size[1]} x {size[0]} pixels, the picture {rgb.shape[1]} x "
                f"{rgb.shape[0]}, of other proportions: they must show the same"
            )
    return square_pictures(rgb, seg, scene, options.image_size)


def _mismatch(meshes: Sequence[Mesh], seg: SegMap) -> str:
    names = [one_line(mesh.name) for mesh in meshes]
    more = f", ... ({len(names)})" if len(names) > 10 else ""
    labels = f"{', '.join(seg.names[:10])}{', ...' if len(seg) > 10 else ''}"
    return (
        f"{len(names)} instances in the meshes ({', '.join(names[:10])}{more}), but {len(seg)} in "
        f"seg.png ({labels}): each needs its label, in sorted order; --instances scene makes one "
        "instance of all"
    )
