"""`scenesplat-lora prepare lang-feat --images`: what the step does with posed images."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lora_core.errors import DataError, one_line
from lora_core.npy_file import read_array
from scenesplat_lora.posed.back_projection import Labelled, Sight, collect_votes, unit_rows
from scenesplat_lora.posed.cameras import camera_file
from scenesplat_lora.posed.captures import Capture, Shot, read_captures
from scenesplat_lora.posed.lang_feat_files import OUTPUTS, write_features
from scenesplat_lora.prepare_chunk import as_written
from scenesplat_lora.prepare_ply import TURNS
from scenesplat_lora.scenes.files import list_scenes, read_scene
from scenesplat_lora.scenes.records import Job, Ledger, run_all
from scenesplat_lora.scenes.values import LAYOUTS
from scenesplat_lora.transforms.geometry import rotation_matrix

if TYPE_CHECKING:
    import torch

    from scenesplat_lora.language.siglip_images import VisionTower
    from scenesplat_lora.prepare_lang_feat import Options


@dataclass(frozen=True)
class CaptureJob(Job):
    """A scene to prepare from its images, of which there may be thousands.

    Attributes:
        capture: the folder of its images.
    """

    capture: Path

    def sizes(self) -> dict[str, int]:
        """Bytes of the scene's files and the cameras, and of each folder of the capture."""
        folders = {
            name: sum(f.stat().st_size for f in (self.capture / name).rglob("*") if f.is_file())
            for name in ("confidence", "features", "images", "masks")
        }
        return super().sizes() | folders


@dataclass(frozen=True)
class Work:
    """All that a scene's features come from, besides its files.

    Attributes:
        table: unit features of classes, float32 [C, D], where masks are classes; else None.
        tower: makes features of masks; None: they are given.
    """

    options: Options
    captures: Mapping[str, Capture]
    table: NDArray[np.float32] | None
    tower: VisionTower | None
    device: torch.device


def run_images(options: Options, table: NDArray[np.float16] | None) -> tuple[int, int]:
    """Prepare one shard of the scenes; gives scenes done, and done before.

    Args:
        table: unit features of classes [C, D] where masks are classes.

    Raises:
        DataError, CheckpointError: what cannot be used, before work begins.
    """
    from lora_core.training.arguments import choose_device

    assert options.images is not None
    device = choose_device(options.device)
    folder = Path(options.data_root) / options.split
    scenes = list_scenes(options.data_root, options.split)
    jobs = [_job(scene, Path(options.images) / scene.name, options) for scene in scenes]
    ledger = Ledger(folder, "lang-feat", _settings(options, table))
    mine = options.shard().of(jobs)
    still = [
        job for job in ledger.open_jobs(mine, options.overwrite) if isinstance(job, CaptureJob)
    ]
    captures = read_captures(
        [job.capture for job in still],
        options.source(),
        options.every,
        0 if table is None else len(table),
        options.follow_links,
    )
    tower = _tower(options, device) if still else None
    rows = None if table is None else table.astype(np.float32)
    work = partial(_write, work=Work(options, captures, rows, tower, device))
    return run_all(ledger, jobs, options.shard(), work, options.overwrite)


def _tower(options: Options, device: torch.device) -> VisionTower | None:
    if options.model is None:
        return None
    from scenesplat_lora.language.siglip_images import open_vision_tower

    return open_vision_tower(options.model, device)


def _settings(options: Options, table: NDArray[np.float16] | None) -> dict[str, Any]:
    names = ["layout", "up", "unit", "every", "depth_side", "depth_tolerance", "min_views"]
    found = {"from": options.source()} | {name: getattr(options, name) for name in names}
    if options.model is not None:
        found |= {"crop": options.crop, "model": _model_digest(Path(options.model))}
    if table is not None:
        found["features"] = hashlib.blake2b(table.tobytes(), digest_size=16).hexdigest()
    return found


def _model_digest(folder: Path) -> str:
    """Digest of what a SigLIP folder makes of pictures.

    Raises:
        CheckpointError: no such folder.
    """
    from lora_core.base_file import WEIGHTS, no_model_folder
    from scenesplat_lora.language.siglip import model_settings

    model_settings(folder)
    found = hashlib.sha256()
    for name in ("config.json", "preprocessor_config.json", WEIGHTS):
        if not (folder / name).is_file():
            raise no_model_folder(folder, name)
        with open(folder / name, "rb") as file:
            found.update(hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()[:32]


def _job(scene: Path, capture: Path, options: Options) -> CaptureJob:
    names = ("coord", "opacity", "scale", "quat")
    files = [file for name in names if (file := scene / f"{name}.npy").exists()]
    with suppress(DataError):  # told with all else that is wrong with the capture
        files.append(camera_file(capture))
    return CaptureJob(scene.name, tuple(files), scene, OUTPUTS, capture)


def _write(job: Job, work: Work) -> dict[str, Any]:
    """Write the features of a scene; gives its Gaussians, and those with a feature."""
    options, capture = work.options, work.captures[job.name]
    scene = read_scene(job.place, as_written(LAYOUTS[options.layout]))
    sight = Sight(options.depth_side, options.depth_tolerance)
    votes = collect_votes(scene, _labelled(capture, work), sight, work.device)
    if not (votes.seen() >= options.min_views).any():
        raise DataError(
            f"{one_line(job.place)}: no Gaussian is in a mask of the {len(capture.shots)} images "
            f"of {one_line(capture.folder)}: cameras and Gaussians must have the same coordinates; "
            "give --up and --unit as for `prepare ply`"
        )
    shape = votes.count, votes.table[0].shape[1]
    valid = write_features(job.place, votes.features(options.min_views), shape)
    return {"rows": votes.count, "valid": valid, "images": len(capture.shots), "masks": votes.used}


def _labelled(capture: Capture, work: Work) -> Iterator[Labelled]:
    options = work.options
    axis, radians = TURNS.get(options.up, ("z", 0.0))
    turn = rotation_matrix(axis, radians)
    for shot in capture.shots:
        if shot.highest:
            labels = shot.labels()
            view = shot.view.placed(turn, options.unit)
            yield Labelled(view, labels, shot.weighted(_features(shot, labels, work)))


def _features(shot: Shot, labels: NDArray[np.integer], work: Work) -> NDArray[np.float32]:
    if work.table is not None:
        return work.table
    if work.tower is None:
        assert shot.features is not None
        return unit_rows(read_array(shot.features))
    from lora_core.pictures.files import read_image
    from scenesplat_lora.posed.mask_crops import mask_features

    return mask_features(work.tower, read_image(shot.view.image), labels, work.options.crop)
