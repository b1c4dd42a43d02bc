"""`scenesplat-lora prepare chunk`: large scenes become overlapping chunks, a split of their own."""

from __future__ import annotations

import math
import re
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lora_core.config import option, parse
from lora_core.errors import ConfigError, DataError, listing, one_line
from lora_core.preflight import writable
from scenesplat_lora.model_options import LayoutName
from scenesplat_lora.prepare import ShardOptions, tell
from scenesplat_lora.scenes.chunking import Chunks, chunk_folder, cut_scene
from scenesplat_lora.scenes.files import list_scenes, read_scene, write_scene
from scenesplat_lora.scenes.records import Job, Ledger, run_all, unfinished
from scenesplat_lora.scenes.values import LAYOUTS, Layout

TEXT = "Cut large scenes into overlapping chunks."
ALSO = ("normal", "lang_feat")  # arrays that are cut along where a scene has them


@dataclass(kw_only=True)
class Options(ShardOptions):
    """Settings of `scenesplat-lora prepare chunk`."""

    data_root: str = option("data", "Folder of the splits.", "data")
    split: str = option(MISSING, "Split that is cut.", "data")
    output: str | None = option(None, "Folder for the new split; default: --data_root.", "data")
    layout: LayoutName = option("generic", "Which data set's files a scene folder holds.", "data")
    grid_size: float = option(0.01, "Metres; one Gaussian per such cell is kept; 0: all.", "chunks")
    chunk_range: list[float] = option([6.0, 6.0], "Sides of a chunk, metres.", "chunks")
    chunk_stride: list[float] = option([3.0, 3.0], "Steps between chunks, metres.", "chunks")
    chunk_minimum_size: int = option(10_000, "Chunks with fewer Gaussians are left out.", "chunks")
    max_chunk_num: int | None = option(
        None, "At most so many chunks of a scene: those with the most Gaussians.", "chunks"
    )
    seed: int = option(0, "Another seed keeps other Gaussians of the cells.", "chunks")

    def __post_init__(self) -> None:
        problems = self.shard_problems()
        if not (math.isfinite(self.grid_size) and self.grid_size >= 0):
            problems.append(f"--grid_size is {self.grid_size}: it must be metres, or 0")
        if self.split in (".", ""):
            problems.append(f"--split is {self.split!r}: it must be a folder in --data_root")
        try:
            self.chunks()
        except ConfigError as error:
            problems.append(str(error))
        if problems:
            raise ConfigError(listing(problems))

    def chunks(self) -> Chunks:
        """How scenes are cut."""
        (width, depth), (right, up) = _pair(self.chunk_range), _pair(self.chunk_stride)
        return Chunks(
            (width, depth),
            (right, up),
            self.chunk_minimum_size,
            self.grid_size or None,
            self.max_chunk_num,
        )


def _pair(values: Sequence[float]) -> Sequence[float]:
    if len(values) != 2:
        raise ConfigError(f"--chunk_range and --chunk_stride are two lengths, not {values}")
    return values


def main(argv: Sequence[str] | None = None) -> int:
    """Run the step; returns the process exit code."""
    options = parse(Options, argv or [], prog="scenesplat-lora prepare chunk", description=TEXT)
    output = Path(options.output or options.data_root)
    writable(output, "--output")
    chunks = options.chunks()
    folder = output / chunks.split(options.split)
    settings = asdict(chunks) | {"layout": options.layout, "seed": options.seed}
    settings |= {name: list(settings[name]) for name in ("range", "stride")}  # as JSON has them
    jobs = [_job(scene, folder) for scene in list_scenes(options.data_root, options.split)]
    scenes = {job.name: job.files[0].parent for job in jobs}
    work = partial(_write, scenes=scenes, chunks=chunks, options=options)
    done = run_all(
        Ledger(folder, "chunk", settings), jobs, options.shard(), work, options.overwrite
    )
    tell("chunk", *done, folder.absolute())
    return 0


def _job(scene: Path, folder: Path) -> Job:
    name = rf"{re.escape(scene.name)}_\d+"
    files = tuple(sorted(scene.glob("*.npy"))) or (scene / "coord.npy",)
    return Job(scene.name, files, folder, re.compile(f"{name}|{unfinished(name)}"))


def as_written(layout: Layout) -> Layout:
    """A layout that leaves scales as they are on disk: they are clipped when chunks are read."""
    return replace(layout, scales=(0.0, math.inf), unit=1.0)


def _write(job: Job, scenes: dict[str, Path], chunks: Chunks, options: Options) -> dict[str, Any]:
    """Write the chunks of a scene; gives their Gaussians by name."""
    folder, layout = scenes[job.name], as_written(LAYOUTS[options.layout])
    wanted = [name for name in ALSO if (folder / f"{name}.npy").exists()]
    notes: list[str] = []
    scene = read_scene(folder, layout, wanted, notes)
    for note in notes:
        warnings.warn(f"{one_line(folder)}: {note}", stacklevel=1)
    rng = np.random.default_rng(
        [options.seed, zlib.crc32(job.name.encode("utf-8", "surrogateescape"))]
    )
    rows = {}
    try:
        for number, chunk in enumerate(cut_scene(scene, chunks, rng)):
            place = chunk_folder(job.place, job.name, number)
            write_scene(place, chunk, layout)
            rows[place.name] = len(chunk["coord"])
    except DataError as error:
        raise DataError(f"{one_line(folder)}: {error}") from None
    if not rows:
        raise DataError(
            f"{one_line(folder)}: no chunk has {chunks.minimum} Gaussians of its "
            f"{len(scene['coord'])}: give a lower --chunk_minimum_size, or leave the scene whole"
        )
    return {"chunks": rows}
