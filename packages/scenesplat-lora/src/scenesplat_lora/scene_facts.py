"""A look at a whole scene before training: what is wrong with it, and what is in it."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_core.errors import DataError, listing, one_line
from scenesplat_lora.scene_files import read_scene
from scenesplat_lora.scene_values import LAYOUTS, Array, Layout

AT_ONCE = 65_536  # rows of language features in memory


def scene_facts(
    folder: str | Path,
    layout: Layout = LAYOUTS["generic"],
    wanted: Collection[str] = (),
    classes: int | None = None,
    width: int | None = None,
) -> dict[str, Any]:
    """Read a scene wholly, its language features too.

    Args:
        classes: labels must be below it. width: of the language features.

    Returns:
        Plain facts: `rows`, `extent` (metres along x, y, z), `labelled` and `valid` rows, `empty`
        (rows marked valid with a feature of norm 0, which are left out), and `notes`.

    Raises:
        DataError: everything that is wrong with this scene.
    """
    notes: list[str] = []
    scene = read_scene(folder, layout, wanted, notes)
    problems = []
    for name in ("segment", "pc_segment"):
        highest = int(scene[name].max()) if name in scene else -1
        if classes is not None and highest >= classes:
            problems.append(
                f"{name}: label {highest}, but there are {classes} classes (0 is first)"
            )
    valid, empty = 0, 0
    if "lang_feat" in scene:
        valid, empty, wrong = _feature_facts(scene["lang_feat"], scene["valid_feat_mask"])
        if wrong:
            problems.append(f"lang_feat: {wrong} rows marked valid hold NaN or infinity")
        if width is not None and scene["lang_feat"].shape[1] != width:
            problems.append(f"lang_feat: width {scene['lang_feat'].shape[1]}, expected {width}")
    if problems:
        raise DataError(listing([f"{one_line(folder)}: {problem}" for problem in problems]))
    return {
        "rows": len(scene["coord"]),
        "extent": [round(float(side), 3) for side in np.ptp(scene["coord"], axis=0)],
        "labelled": int((scene["segment"] != -1).sum()),
        "valid": valid,
        "empty": empty,
        "notes": notes,
    }


def _feature_facts(features: Array, mask: NDArray[np.bool_]) -> tuple[int, int, int]:
    """Usable rows, rows of norm 0, and rows that are not finite, of those marked valid."""
    empty = wrong = 0
    for begin in range(0, len(features), AT_ONCE):  # the file may be larger than memory
        part = features[begin : begin + AT_ONCE][mask[begin : begin + AT_ONCE]]
        empty += int((~(part != 0).any(axis=1)).sum())
        wrong += int((~np.isfinite(part)).any(axis=1).sum())
    return int(mask.sum()) - empty, empty, wrong
