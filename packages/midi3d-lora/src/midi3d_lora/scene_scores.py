"""Scores of generated scenes, kept when a scene is done, so that a stopped evaluation goes on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lora_core.errors import NumericError, one_line
from lora_core.kept_results import KeptResults, stamps
from lora_core.report import Progress
from midi3d_lora.generation import make_latents, make_meshes
from midi3d_lora.lora import remove
from midi3d_lora.meshes import mesh_loading
from midi3d_lora.meshes.extraction import Mesh
from midi3d_lora.meshes.mesh_files import write_scene
from midi3d_lora.meshes.metrics import score_scene
from midi3d_lora.scenes.scene_folders import read_scene, scene_files
from midi3d_lora.sources.prepare_meshes import sample_mesh, sampling_rng

if TYPE_CHECKING:
    from midi3d_lora.evaluate import Options
    from midi3d_lora.pipeline import MIDIPipeline

FOLDER = "scores"  # of what is done
# Settings that change no number.
WITHOUT_EFFECT = (
    "output", "overwrite", "save_meshes", "compare_base", "merged_model", "max_scenes",
)  # fmt: skip
ORDER = ("model", "base", "LoRA", "merged")

Scores = dict[str, dict[str, float]]  # scene -> name -> value


# -- measuring -------------------------------------------------------------------------------------


def score_models(folders: Sequence[Path], options: Options) -> dict[str, Scores]:
    """The scores of every model, by its name."""
    found: dict[str, Scores] = {}
    pipeline: MIDIPipeline | None = None
    for name in options.models:
        if any(remembered(options, name, folder) is None for folder in folders):
            if name == "base" and pipeline is not None:
                remove(pipeline.transformer)
            else:
                pipeline = None  # before there is another one in memory
                other = options.merged_model if name == "merged" else None
                pipeline = options.load(other, adapter=name == "LoRA")
        found[name] = score_all(pipeline, name, folders, options)
    return {name: found[name] for name in ORDER if name in found}


def score_all(
    pipeline: MIDIPipeline | None, name: str, folders: Sequence[Path], options: Options
) -> Scores:
    """The scores of every scene by its name, see `metrics.score_scene`.

    Args:
        pipeline: the model of this name; None: all scenes are remembered.
    """
    scores: Scores = {}
    with Progress(len(folders)) as progress:
        progress.figures = {"scoring": name}
        for number, folder in enumerate(folders, start=1):
            found = remembered(options, name, folder)
            if found is None:
                assert pipeline is not None
                found = score_folder(pipeline, name, folder, options)
                remember(options, name, folder, found)
            scores[folder.name] = found
            progress.update(number)
    return scores


def score_folder(
    pipeline: MIDIPipeline, name: str, folder: Path, options: Options
) -> dict[str, float]:
    """Generate a scene and compare it with its surfaces.

    Raises:
        NumericError: NaN on the way, with the name of the scene.
    """
    scene = read_scene(folder, options.reading(), sampling_rng(options.seed, folder.name, 0))
    try:
        latents = make_latents(pipeline, scene.pictures, options, scene_seed(options, folder.name))
        meshes = make_meshes(pipeline, scene.pictures, latents, options)
    except NumericError as error:
        raise NumericError(f"{one_line(folder.name)} by {name}: {error}") from error
    if options.save_meshes:
        keep(Path(options.output) / name / f"{folder.name}.glb", meshes)
    predicted = surface_points(list(meshes.values()), folder.name, options)
    return score_scene(predicted, [surface.points for surface in scene.surfaces], options.tau)


def scene_seed(options: Options, scene: str) -> int:
    """Of a scene's noise: its own, and the same for all models and whatever else is evaluated."""
    text = f"{options.seed}\0{scene}".encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(text, digest_size=7).digest(), "little")


def surface_points(
    meshes: Sequence[Mesh | None], scene: str, options: Options
) -> list[NDArray[Any]]:
    """Points of generated surfaces, float32 [num_points, 3] each; [0, 3] without one."""
    points = []
    for k, mesh in enumerate(meshes):
        if mesh is None:
            points.append(np.zeros((0, 3), np.float32))
            continue
        named = mesh_loading.Mesh(
            str(k), mesh.vertices.astype(np.float64), mesh.faces.astype(np.int64)
        )
        rng = sampling_rng(options.seed, scene, k)
        points.append(sample_mesh(named, options.num_points, rng)[:, :3])
    return points


def keep(path: Path, meshes: Mapping[str, Mesh | None]) -> None:
    """Write a scene, unless all of its instances are empty."""
    if any(mesh is not None for mesh in meshes.values()):
        write_scene(path, dict(meshes))


# -- what is done already --------------------------------------------------------------------------


def _kept(options: Options) -> KeptResults:
    return KeptResults(Path(options.output) / FOLDER)


def _follows_from(options: Options, name: str, folder: Path) -> list[Any]:
    """What a scene's scores follow from: settings, model, adapter and data."""
    chosen = {key: value for key, value in asdict(options).items() if key not in WITHOUT_EFFECT}
    model = Path((name == "merged" and options.merged_model) or options.pretrained_model)
    files = [path for path in model.glob("*/*") if path.is_file()]
    if name == "LoRA" and options.adapter is not None:
        files.append(options.adapter.path)
    else:
        for key in ("lora_path", "lora_rank", "lora_alpha"):
            chosen.pop(key)
    chosen["blocks"] = options.blocks
    return [chosen, stamps([*files, *scene_files(folder)])]


def remembered(options: Options, name: str, folder: Path) -> dict[str, float] | None:
    """The scores of a scene from an evaluation that was stopped; None: it is to be done."""
    follows_from = _follows_from(options, name, folder)
    scores = _kept(options).find(f"{name}/{folder.name}", follows_from)
    if scores is None:
        return None
    return {key: float("nan") if value is None else value for key, value in scores.items()}


def remember(options: Options, name: str, folder: Path, scores: Mapping[str, float]) -> None:
    """Keep the scores of a scene."""
    follows_from = _follows_from(options, name, folder)
    _kept(options).keep(f"{name}/{folder.name}", follows_from, plain(scores))


def plain(scores: Mapping[str, float]) -> dict[str, float | None]:
    """For JSON, which has no NaN: null is a distance that there is not."""
    return {key: None if value != value else value for key, value in scores.items()}
