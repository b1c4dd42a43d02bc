"""A look at a whole scene before training: what is wrong with it, and what is in it."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_core.errors import DataError, listing, one_line
from scenesplat_lora.scenes.files import read_scene
from scenesplat_lora.scenes.scene import Scene
from scenesplat_lora.scenes.values import LAYOUTS, Array, Layout
from scenesplat_lora.transforms.pipeline import Spec
from scenesplat_lora.transforms.room import room_problems

AT_ONCE = 65_536  # rows of language features in memory
LARGEST = 1e4  # of a feature's values, which has a length of about 1; float16 ends at 65504
FEW = 4  # voxels along the longest side: fewer are hardly a scene in metres


def scene_facts(
    folder: str | Path,
    layout: Layout = LAYOUTS["generic"],
    wanted: Collection[str] = (),
    classes: int | None = None,
    width: int | None = None,
    specs: Sequence[Spec] = (),
    also: Collection[str] = (),
) -> dict[str, Any]:
    """Read a scene wholly, its language features too.

    Args:
        wanted: what it must have besides its Gaussians; `also`: what is read where it has it.
        classes: labels must be below it. width: of the language features.
        specs: transforms that the scene will go through, as files write them.

    Returns:
        Plain facts: `rows`, `extent` (metres along x, y, z), `labelled` (of the labelled
        cloud where it is wanted) and `valid` rows, `empty`
        (rows marked valid with a feature of norm 0, which are left out), `same` (a digest of the
        positions), and `notes`, each as "what: how much".

    Raises:
        DataError: everything that is wrong with this scene.
    """
    notes: list[str] = []
    there = [name for name in also if (Path(folder) / f"{name}.npy").exists()]
    scene = read_scene(folder, layout, [*wanted, *there], notes)
    extent = np.ptp(scene["coord"].astype(np.float64), axis=0).tolist()
    problems = _label_problems(scene, classes) + room_problems(extent, specs)
    valid = empty = 0
    if "lang_feat" in scene and width not in (None, scene["lang_feat"].shape[1]):
        problems.append(f"lang_feat: width {scene['lang_feat'].shape[1]}, expected {width}")
    elif "lang_feat" in scene:
        valid, empty, wrong = _feature_facts(scene["lang_feat"], scene["valid_feat_mask"])
        if wrong:
            problems.append(
                f"lang_feat: {wrong} rows marked valid hold NaN, infinity or more than {LARGEST:g}"
            )
        if empty:
            notes.append(
                f"features of norm 0 are not learned: {empty} of {valid + empty} rows marked valid"
            )
    if problems:
        raise DataError(listing([f"{one_line(folder)}: {problem}" for problem in problems]))
    return {
        "rows": len(scene["coord"]),
        "extent": [round(side, 3) for side in extent],
        "labelled": int(np.count_nonzero(scene.get("pc_segment", scene["segment"]) != -1)),
        "valid": valid,
        "empty": empty,
        "same": hashlib.blake2b(scene["coord"].tobytes(), digest_size=16).hexdigest(),
        "notes": notes + _size_notes(extent, specs) + _place_notes(scene),
    }


def _label_problems(scene: Scene, classes: int | None) -> list[str]:
    found = []
    for name in ("segment", "pc_segment"):
        highest = int(scene[name].max()) if name in scene else -1
        if classes is not None and highest >= classes:
            found.append(f"{name}: label {highest}, but there are {classes} classes (0 is first)")
    return found


def _size_notes(extent: Sequence[float], specs: Sequence[Spec]) -> list[str]:
    sizes = [spec.get("grid_size", 0.02) for spec in specs if spec["type"] == "GridSample"]
    if not sizes or max(extent) >= FEW * min(sizes):
        return []
    return [
        f"hardly larger than a voxel of {min(sizes):g} m, are its coordinates metres?: "
        f"{max(extent):.3g} m"
    ]


def _place_notes(scene: Scene) -> list[str]:
    if "pc_coord" not in scene:
        return []
    one, other = scene["coord"], scene["pc_coord"]
    gap = np.maximum(one.min(axis=0) - other.max(axis=0), other.min(axis=0) - one.max(axis=0)).max()
    if gap <= 0:
        return []
    return [f"the labelled cloud lies elsewhere than the Gaussians, in another frame?: {gap:.3g} m"]


def _feature_facts(features: Array, mask: NDArray[np.bool_]) -> tuple[int, int, int]:
    """Usable rows, rows of norm 0, and rows of impossible values, of those marked valid."""
    empty = wrong = 0
    for begin in range(0, len(features), AT_ONCE):  # the file may be larger than memory
        part = features[begin : begin + AT_ONCE][mask[begin : begin + AT_ONCE]]
        empty += int((~(part != 0).any(axis=1)).sum())
        wrong += int((~(np.abs(part) <= LARGEST)).any(axis=1).sum())  # NaN neither
    return int(mask.sum()) - empty, empty, wrong
