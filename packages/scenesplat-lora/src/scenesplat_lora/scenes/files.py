"""Scenes on disk: `<data_root>/<split>/<scene>/*.npy`, read strictly and written atomically.

    scene = read_scene("data/train/room_1", LAYOUTS["scannet"], wanted=("lang_feat",))

coord.npy, color.npy, opacity.npy, scale.npy and quat.npy make a scene that can be looked at and
labelled; `lang_feat` and `valid_feat_mask` make one that can be learned from. Whatever is wrong
with a scene comes in one DataError. What is repaired by rule (quaternions of another length or with
w < 0, colours in 0..1, coordinates of maps) is said in `notes`, each as "what: how much".
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from lora_core.errors import DataError, listing, near, one_line
from lora_core.npy_file import read_array
from scenesplat_lora.scenes.scene import GAUSSIAN, Scene
from scenesplat_lora.scenes.values import LAYOUTS, MEANING, Array, Layout, recentred

WANTED = ("normal", "lang_feat", "segment", "pc")  # what a reader may insist on


def list_scenes(
    data_root: str | Path, split: str | Sequence[str], filtered_scene: Collection[str] = ()
) -> list[Path]:
    """The scene folders of one or several splits, sorted by name inside each split.

    Args:
        filtered_scene: scenes whose name before the first `_` is among these are left out.

    Raises:
        DataError: a split that is named twice, without a folder in `data_root` or without scenes;
            all such splits together.
    """
    scenes: list[Path] = []
    problems = []
    names = (split,) if isinstance(split, str) else tuple(split)
    for name, count in Counter(names).items():
        folder = Path(data_root) / name
        if Path(name).is_absolute() or ".." in Path(name).parts or not name:
            problems.append(f"split {one_line(name)!r}: it must be a folder inside {data_root}")
            continue
        if count > 1:
            problems.append(f"split {one_line(name)!r} is named {count} times")
        if not folder.is_dir():
            known = [entry.name for entry in _folders(Path(data_root))]
            hint = near(name, known) or f"folders there: {', '.join(known) or 'none'}"
            problems.append(f"{one_line(folder.absolute())}: no such split; {hint}")
            continue
        found = [s for s in _folders(folder) if s.name.split("_")[0] not in filtered_scene]
        if not found:
            problems.append(f"{one_line(folder.absolute())}: no folders of scenes are left in it")
        scenes += found
    if problems:
        raise DataError(listing(problems))
    return scenes


def _folders(root: Path) -> list[Path]:
    try:
        entries = list(root.iterdir()) if root.is_dir() else []
    except OSError as error:
        raise DataError(f"{one_line(root)}: cannot be read: {error.strerror}") from None
    # A point begins what a writer has not finished, and what systems hide.
    return sorted(e for e in entries if e.is_dir() and not e.name.startswith("."))


# -- reading ---------------------------------------------------------------------------------------


def read_scene(
    folder: str | Path,
    layout: Layout = LAYOUTS["generic"],
    wanted: Collection[str] = (),
    notes: list[str] | None = None,
) -> Scene:
    """A scene with its Gaussians, its labels (-1 without a file), and what is `wanted` besides.

    Args:
        wanted: of "normal", "lang_feat" (with its mask), "segment", "pc": must be there. Labels
            are read in any case, `valid_feat_mask` if it has a file, the others only if wanted.
        notes: takes what was repaired by rule.

    Returns:
        Arrays as in `scenesplat_lora.scenes.scene`, and `name`. `lang_feat` stays on disk until
        rows of it are taken.

    Raises:
        DataError: everything that is wrong with this scene.
    """
    folder = Path(folder)
    unknown = sorted(set(wanted) - set(WANTED))
    if unknown:
        raise DataError(f"wanted {', '.join(unknown)}: expected some of {', '.join(WANTED)}")
    problems: list[str] = []
    arrays = _read_arrays(folder, layout, wanted, problems)
    _check_lengths(arrays, problems)
    if not problems:  # only now memory is taken, and later changes of the files do not matter
        arrays = {n: a if n == "lang_feat" else np.array(a) for n, a in arrays.items()}
    notes = [] if notes is None else notes
    scene: Scene = {"name": folder.name}
    if not problems:
        for name, array in recentred(arrays, notes).items():
            try:
                scene[name] = MEANING[name](array, layout, notes)
            except DataError as error:
                problems.append(f"{name}: {error}")
    if problems:
        raise DataError(listing([f"{one_line(folder)}: {problem}" for problem in problems]))
    return _completed(scene)


def _read_arrays(
    folder: Path, layout: Layout, wanted: Collection[str], problems: list[str]
) -> dict[str, Array]:
    files = {name: name for name in GAUSSIAN} | {"segment": layout.segment, "instance": "instance"}
    files["valid_feat_mask"] = "valid_feat_mask"
    needed = [*GAUSSIAN, *(name for name in ("normal", "lang_feat", "segment") if name in wanted)]
    if "pc" in wanted:
        files |= {"pc_coord": "pc_coord", "pc_segment": f"pc_{layout.segment}"}
        needed += ["pc_coord", "pc_segment"]
    files |= {name: name for name in ("normal", "lang_feat") if name in wanted}
    arrays: dict[str, Array] = {}
    missing = []
    for name, stem in files.items():
        path = folder / f"{stem}.npy"
        if not path.exists():
            if name in needed:
                missing.append(path.name)
            continue
        try:
            arrays[name] = read_array(path, mapped=True)
        except DataError as error:
            problems.append(str(error).removeprefix(f"{one_line(folder)}{os.sep}"))
        except OSError as error:
            problems.append(f"{path.name}: cannot be read: {error.strerror}")
    if missing:
        there = "" if folder.is_dir() else " (no such folder)"
        problems.insert(0, f"misses {', '.join(missing)}{there}")
    return arrays


def _check_lengths(arrays: dict[str, Array], problems: list[str]) -> None:
    for prefix in (False, True):
        group = {name: a for name, a in arrays.items() if name.startswith("pc_") == prefix}
        lengths = {len(array) if array.ndim else 0 for array in group.values()}
        if len(lengths) > 1:
            each = ", ".join(f"{name} {list(array.shape)}" for name, array in group.items())
            problems.append(f"all files must have as many rows: {each}")
        elif lengths == {0}:
            problems.append("holds no points")


def _completed(scene: Scene) -> Scene:
    rows = len(scene["coord"])
    for name in ("segment", "instance"):
        scene.setdefault(name, np.full(rows, -1, dtype=np.int32))
    if "lang_feat" in scene and "valid_feat_mask" not in scene:
        scene["valid_feat_mask"] = (scene["lang_feat"] != 0).any(axis=1)
    return scene


# -- writing ---------------------------------------------------------------------------------------

ON_DISK = {
    "coord": np.float32,
    "color": np.uint8,
    "opacity": np.float32,
    "scale": np.float32,
    "quat": np.float32,
    "normal": np.float32,
    "segment": np.int32,
    "instance": np.int32,
    "lang_feat": np.float16,
    "valid_feat_mask": np.bool_,
    "pc_coord": np.float32,
    "pc_segment": np.int32,
}


def write_scene(folder: str | Path, scene: Scene, layout: Layout = LAYOUTS["generic"]) -> None:
    """Write a scene's arrays as .npy files; the folder appears when all of them are there.

    Labels and instances that are all -1 get no file.

    Raises:
        DataError: the folder exists.
    """
    folder = Path(folder)
    if folder.exists():
        raise DataError(f"{one_line(folder)}: exists already; delete it to write it anew")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    partial.mkdir()
    try:
        for name, dtype in ON_DISK.items():
            if name in scene and not (name in ("segment", "instance") and _all_none(scene[name])):
                stem = name.replace("segment", layout.segment)
                values = np.round(scene[name]) if name == "color" else scene[name]
                np.save(partial / f"{stem}.npy", np.asarray(values).astype(dtype, copy=False))
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _all_none(labels: Array) -> bool:
    return bool((labels == -1).all())
