"""dataset_info.json: what all scenes of a folder are, gathered from the record that each has."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_core.data_file import read_json
from lora_core.errors import DataError
from midi3d_lora.scenes.prepared_scene import RECORD, record_of
from midi3d_lora.scenes.scene_frame import HALF_EXTENT

INFO = "dataset_info.json"
FAILED = ".failed"  # folder of a file for each scene that could not be prepared


def remember_failures(output: Path, problems: Mapping[str, str], names: Sequence[str]) -> None:
    """Keep the reasons of failures where other shards find them; drop those of these names else."""
    from lora_core.tensor_file import write_json

    folder = output / FAILED
    for name in names:
        if name in problems:
            write_json(folder / f"{name}.json", {"scene": name, "problem": problems[name]})
        else:
            (folder / f"{name}.json").unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # others hold some
        folder.rmdir()


def write_info(output: Path, made: Collection[str]) -> dict[str, Any]:
    """Describe all scenes of a folder in its dataset_info.json, and draw the first of them.

    Other shards may be doing the same: the one that ends last has seen all scenes, and who is
    overtaken while writing looks again.

    Args:
        made: scenes that are new; where none of them would be drawn the picture stays.

    Returns:
        What the file says.
    """
    from lora_core.tensor_file import remove_partial, write_json
    from midi3d_lora.scenes.dataset_preview import PREVIEW, SCENES, write_preview

    draw = not (output / PREVIEW).exists()
    while True:
        found = _found(output)
        info = _info(output, *found)
        write_json(output / INFO, info)
        drawn = found[0][:SCENES]
        if draw or set(drawn) & set(made):
            with contextlib.suppress(DataError):  # changed by hand, of which training will tell
                write_preview(output, drawn)
        if _found(output) == found:
            remove_partial(output)
            return info
        draw = True


def _found(output: Path) -> tuple[list[str], list[str]]:
    """Names of the scenes with a record, and of those that failed."""
    scenes = [e.name for e in output.iterdir() if (e / RECORD).is_file() and e.name[0] != "."]
    failed = [path.stem for path in (output / FAILED).glob("*.json") if path.name[0] != "."]
    return sorted(scenes), sorted(set(failed) - set(scenes))


def _info(output: Path, scenes: Sequence[str], failed: Sequence[str]) -> dict[str, Any]:
    records = {name: record for name in scenes if (record := record_of(output / name))}
    settings = {json.dumps(one["settings"], sort_keys=True) for one in records.values()}
    return {
        "counts": {
            "scenes": len(records),
            "instances": sum(len(one["instances"]) for one in records.values()),
            "failures": len(failed),
        },
        "settings": [json.loads(text) for text in sorted(settings)],
        "scenes": {
            name: {
                "instances": len(one["instances"]),
                "points": one["points"],
                "frame": one.get("frame"),
                "notes": one["notes"],
            }
            for name, one in records.items()
        },
        "failures": {name: _reason(output / FAILED / f"{name}.json") for name in failed},
    }


def extents(info: Mapping[str, Any]) -> Iterator[str]:
    """How large the scenes were: a unit or an axis that was taken for another shows here."""
    frames = [one["frame"] for one in info["scenes"].values() if one["frame"]]
    sides = sorted(2 * HALF_EXTENT / frame["scale"] for frame in frames)
    if sides:
        yield (
            f"longest sides of the scenes in their own units: {sides[0]:.3g} to {sides[-1]:.3g}, "
            f"half of them up to {sides[len(sides) // 2]:.3g}"
        )


def _reason(path: Path) -> str:
    try:
        held = read_json(path)
    except DataError:
        return ""
    return str(held.get("problem", "")) if isinstance(held, dict) else ""
