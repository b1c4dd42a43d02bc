"""`scenesplat-lora prepare ply`: 3D Gaussian splat files become scene folders."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lora_core.config import option, parse
from lora_core.errors import ConfigError, DataError, listing, one_line
from lora_core.preflight import writable
from scenesplat_lora.prepare import ShardOptions, tell
from scenesplat_lora.scenes.files import write_scene
from scenesplat_lora.scenes.ply import read_gaussians
from scenesplat_lora.scenes.records import Job, Ledger, run_all, unfinished
from scenesplat_lora.scenes.scene import Scene
from scenesplat_lora.scenes.sources import Source, find_sources
from scenesplat_lora.transforms.geometry import Axis, rotate

TEXT = "Turn 3D Gaussian splat files (.ply) into scene folders."

# Axis that points up, or down -> turn that makes z point up.
TURNS: dict[str, tuple[Axis, float]] = {
    "y": ("x", math.pi / 2),
    "y_down": ("x", -math.pi / 2),
    "x": ("y", -math.pi / 2),
    "x_down": ("y", math.pi / 2),
    "z_down": ("x", math.pi),
}


@dataclass(kw_only=True)
class Options(ShardOptions):
    """Settings of `scenesplat-lora prepare ply`."""

    source: list[str] = option(MISSING, "Files, or folders that hold some.", "data")
    output: str = option("data", "Folder of the splits.", "data")
    split: str = option("train", "Folder in it for these scenes.", "data")
    up: Literal["z", "z_down", "y", "y_down", "x", "x_down"] = option(
        "z", "Axis of the files that points up or down; often y_down after COLMAP.", "data"
    )
    unit: float = option(
        1.0, "Metres per unit of the files: voxels of 2 cm need true lengths.", "data"
    )

    def __post_init__(self) -> None:
        problems = self.shard_problems()
        if not (math.isfinite(self.unit) and self.unit > 0):
            problems.append(f"--unit is {self.unit}: it must be metres above 0")
        if Path(self.split).name != self.split or self.split.startswith("."):
            problems.append(f"--split is {self.split!r}: it must be the name of one folder")
        if problems:
            raise ConfigError(listing(problems))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the step; returns the process exit code."""
    options = parse(Options, argv or [], prog="scenesplat-lora prepare ply", description=TEXT)
    writable(options.output, "--output")
    folder = Path(options.output) / options.split
    sources = {source.name: source for source in find_sources(options.source, folders=False)}
    ledger = Ledger(folder, "ply", {"up": options.up, "unit": options.unit})
    jobs = [_job(source, folder) for source in sources.values()]
    work = partial(_write, sources=sources, options=options)
    tell("ply", *run_all(ledger, jobs, options.shard(), work, options.overwrite), folder.absolute())
    return 0


def _job(source: Source, folder: Path) -> Job:
    name = re.escape(source.name)
    return Job(source.name, (source.path,), folder, re.compile(f"{name}|{unfinished(name)}"))


def _write(job: Job, sources: dict[str, Source], options: Options) -> dict[str, Any]:
    """Write a scene; gives its Gaussians and its extent in metres."""
    scene = placed(read_gaussians(sources[job.name].path), options.up, options.unit)
    extent = np.ptp(scene["coord"], axis=0)
    if extent.max() > 10_000:
        raise DataError(
            f"{one_line(sources[job.name].path)}: {extent.max():.4g} m large: give --unit, the "
            "metres per unit of the file"
        )
    write_scene(job.place / job.name, scene)
    return {"rows": len(scene["coord"]), "extent": [round(float(side), 3) for side in extent]}


def placed(scene: Scene, up: str = "z", unit: float = 1.0) -> Scene:
    """A scene in metres with z up; quaternions have w >= 0."""
    if up != "z":
        axis, radians = TURNS[up]
        scene = rotate(scene, radians, axis, (0, 0, 0))
    quat = scene["quat"]
    return scene | {
        "coord": (scene["coord"] * np.float64(unit)).astype(np.float32),
        "scale": (scene["scale"] * np.float64(unit)).astype(np.float32),
        "quat": np.where(quat[:, :1] < 0, -quat, quat),
    }
