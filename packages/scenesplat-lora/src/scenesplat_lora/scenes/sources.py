"""What people point to as scenes: scene folders, splits of them, and 3D Gaussian splat files."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import NamedTuple

from lora_core.errors import DataError, listing, one_line
from scenesplat_lora.scenes.files import read_scene
from scenesplat_lora.scenes.ply import read_gaussians
from scenesplat_lora.scenes.scene import Scene
from scenesplat_lora.scenes.values import LAYOUTS, Layout

# Names that programs give to every result alike: point_cloud/iteration_30000/point_cloud.ply.
NAMELESS = ("point_cloud", "splat", "scene", "ckpts", "ply")
NUMBERED = ("iteration", "point_cloud")  # ply/point_cloud_29999.ply


class Source(NamedTuple):
    """A scene on disk: a name for it, and its folder or .ply file."""

    name: str
    path: Path

    def read(self, layout: Layout = LAYOUTS["generic"], wanted: Collection[str] = ()) -> Scene:
        """The scene's Gaussians, and the labels that a folder may have.

        Scales are those that the network is trained with, clipped as the layout has them.

        Args:
            wanted: what a folder must hold besides, as for `read_scene`.

        Raises:
            DataError: everything that is wrong with it.
        """
        if self.path.suffix != ".ply":
            notes: list[str] = []
            scene = read_scene(self.path, layout, wanted, notes)
            for note in notes:
                warnings.warn(f"{one_line(self.name)}: {note}", stacklevel=2)
        else:
            if wanted:
                raise DataError(
                    f"{one_line(self.path)}: a .ply file of splats has no {', '.join(wanted)}, "
                    "which the network takes: make a scene folder with it"
                )
            scene = read_gaussians(self.path)
            scene["scale"] = (scene["scale"] / layout.unit).clip(*layout.scales)
        return scene | {"name": self.name}


def find_sources(paths: Iterable[str | Path], folders: bool = True) -> list[Source]:
    """The scenes at, or anywhere below, these paths, sorted by name.

    Args:
        folders: take scene folders (with a coord.npy) too, and not only .ply files.

    Raises:
        DataError: a path without scenes, or two scenes of one name; all together.
    """
    problems = []
    by_name: dict[str, set[Path]] = defaultdict(set)
    for path in map(Path, paths):
        found = _files(path, folders)
        if not found:
            what = "no scenes (folders with coord.npy, .ply files)" if folders else "no .ply files"
            there = what if path.exists() else "does not exist"
            problems.append(f"{one_line(path.absolute())}: {there}")
        for file in found:
            by_name[scene_name(file, path)].add(file)
    for name, files in by_name.items():
        if len(files) > 1:
            some = ", ".join(one_line(file) for file in sorted(files)[:3])
            problems.append(f"{len(files)} scenes would be called {one_line(name)}: {some}")
    if problems:
        raise DataError(listing(problems))
    return sorted(Source(name, files.pop()) for name, files in by_name.items())


def _files(path: Path, folders: bool) -> list[Path]:
    if path.is_file():
        return [path] if path.suffix == ".ply" else []
    found = [file for file in path.rglob("*.ply") if not _hidden(file, path)]
    if folders:
        found += [f.parent for f in path.rglob("coord.npy") if not _hidden(f, path)]
    return found


def _hidden(file: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(root).parts)


def scene_name(file: Path, root: Path) -> str:
    """A name for a scene: that of its folder, or of its file and the folders between it and root.

    Parts that say nothing are left out: office/point_cloud/iteration_30000/point_cloud.ply is
    "office".
    """
    if file.suffix != ".ply":
        return file.resolve().name
    inside = file.with_suffix("").relative_to(root).parts if file != root else ()
    words = [part for part in inside or (file.stem,) if not _nameless(part)]
    above = (part for part in reversed(file.resolve().parts[:-1]) if not _nameless(part))
    return "_".join(words) or next(above, file.stem)


def _nameless(part: str) -> bool:
    begin, _, number = part.rpartition("_")
    return part in NAMELESS or (begin in NUMBERED and number.isdecimal())
