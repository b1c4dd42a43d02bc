"""What the manifests beside prepared scenes say, compared with what a run expects of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_core.data_file import read_json
from lora_core.errors import DataError, one_line
from scenesplat_lora.config import Config
from scenesplat_lora.scenes.values import LAYOUTS

STEPS = ("ply", "chunk")


def manifest_notes(cfg: Config) -> list[str]:
    """What to be careful of: scenes prepared for other voxels, another layout or another unit."""
    data = cfg.data
    places = [Path(data.train.data_root) / split for split in data.train.split]
    places += [Path(data.val_root) / split for split in data.val.split]
    found = {
        (folder, step): list(_settings(folder / f"manifest_{step}.json"))
        for folder in dict.fromkeys(places)
        for step in STEPS
    }
    notes = []
    for (folder, step), settings in found.items():
        here = one_line(folder)
        if step == "chunk":
            notes += [f"{here}: {note}" for note in _chunk_notes(settings, cfg)]
        elif settings and LAYOUTS[data.layout].unit != 1:
            notes.append(
                f"{here}: prepared from .ply in metres, but layout {data.layout} divides scales by "
                f"{LAYOUTS[data.layout].unit:g}: use --data.layout generic"
            )
    return notes


def _chunk_notes(settings: list[dict[str, Any]], cfg: Config) -> Iterator[str]:
    cells = [one["grid_size"] for one in settings if _length(one.get("grid_size"))]
    if cells and max(cells) > cfg.data.voxels:
        yield (
            f"its chunks hold one Gaussian per {max(cells):g} m cell, coarser than the voxels of "
            f"{cfg.data.voxels:g} m: cut them with a smaller --grid_size, or take larger voxels"
        )
    layouts = sorted({str(one.get("layout")) for one in settings} - {cfg.data.layout})
    if layouts:
        yield (
            f"its chunks were cut with --layout {', '.join(map(one_line, layouts))}, this run "
            f"reads --data.layout {cfg.data.layout}: other files of labels and units of scales"
        )


def _length(value: object) -> bool:
    return isinstance(value, (int, float)) and value > 0


def _settings(file: Path) -> Iterator[dict[str, Any]]:
    """Settings of every scene of a manifest; of none where there is none, or it is no manifest."""
    try:
        content = read_json(file) if file.exists() else {}
    except DataError:
        return  # it only tells how scenes were made: nothing depends on it
    scenes = content.get("scenes") if isinstance(content, dict) else None
    for scene in scenes.values() if isinstance(scenes, dict) else ():
        if isinstance(scene, dict) and isinstance(scene.get("settings"), dict):
            yield scene["settings"]
