"""What the base generates from pictures that it has not seen, against the true surfaces."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from midi3d_lora.demo_base import scenes
from midi3d_lora.meshes.extraction import ExtractionSettings, Mesh
from midi3d_lora.meshes.mesh_loading import Mesh as Surface
from midi3d_lora.meshes.metrics import mean_scores, score_scene
from midi3d_lora.meshes.render import Camera, render
from midi3d_lora.pipeline import MIDIPipeline
from midi3d_lora.scenes.scene_frame import turn
from midi3d_lora.sources.prepare_meshes import sample_mesh

STEPS = 20
GUIDANCE = 2.0  # 7 is for the released model; such a small one goes too far with it
# 33 points along each axis of every object's own box; smoothing would eat table legs.
EXTRACTION = ExtractionSettings(depth=5, coarse_depth=4, smooth=False)
POINTS = 4000  # of each object


def generate(
    pipe: MIDIPipeline, scene: scenes.Scene, seed: int = 0, guidance: float = GUIDANCE
) -> list[Mesh | None]:
    """Meshes of a scene's objects, from its picture alone."""
    picture = scene.picture()
    found = pipe(
        picture.rgb,
        picture.instances,
        num_inference_steps=STEPS,
        guidance_scale=guidance,
        seed=seed,
        extraction=EXTRACTION,
    )
    return found.meshes


@torch.no_grad()
def rebuild(pipe: MIDIPipeline, scene: scenes.Scene) -> list[Mesh | None]:
    """The objects as the autoencoder gives them back: what the flow cannot surpass."""
    rng = np.random.default_rng(0)
    points = [sample_mesh(mesh, scenes.NUM_POINTS, rng) for mesh in scene.meshes()]
    posterior = pipe.vae.encode(torch.from_numpy(np.stack(points)), scenes.NUM_TOKENS, 0)
    return pipe.extract(posterior.latent_dist.mode(), EXTRACTION)


def scores(scene: scenes.Scene, found: Iterable[Mesh | None]) -> dict[str, float]:
    """Chamfer distances and F-scores, as `midi3d_lora.meshes.metrics.score_scene` gives them."""
    rng = np.random.default_rng(1)
    true = [sample_mesh(mesh, POINTS, rng)[:, :3] for mesh in scene.meshes()]
    return score_scene([sampled(mesh, rng) for mesh in found], true)


def sampled(mesh: Mesh | None, rng: np.random.Generator) -> NDArray[np.float32]:
    """Points on a generated surface."""
    if mesh is None or not len(mesh.faces):
        return np.zeros((0, 3), np.float32)
    return sample_mesh(as_surface(mesh), POINTS, rng)[:, :3]


def table_of(pipe: MIDIPipeline, count: int) -> dict[str, dict[str, float]]:
    """Mean scores over unseen scenes of both styles, generated and only rebuilt."""
    columns = ("scene_chamfer", "scene_f_score", "object_f_score", "box_iou", "empty_objects")
    table = {}
    for name, style in (("indoors", scenes.INDOORS), ("outdoors", scenes.OUTDOORS)):
        for way, make in (("generated", generate), ("rebuilt", rebuild)):
            found = [scores(scene, make(pipe, scene)) for scene in scenes.held_out(count, style)]
            means = mean_scores(found)
            table[f"{name}, {way}"] = {key: round(means[key], 4) for key in columns}
    return table


def draw(pipe: MIDIPipeline, file: Path, count: int, size: int = 160) -> None:
    """A picture with a row for each unseen scene: the truth and what was generated, from two sides.

    The second side shows what the picture hides: depth, and backs.
    """
    rows = []
    for style in (scenes.INDOORS, scenes.OUTDOORS):
        for scene in scenes.held_out(count, style):
            found = [as_surface(mesh) for mesh in generate(pipe, scene) if mesh is not None]
            views = [(meshes, yaw) for yaw in (0.0, 60.0) for meshes in (scene.meshes(), found)]
            rows.append(np.concatenate([view(*one, size) for one in views], axis=1))
    Image.fromarray(np.concatenate(rows)).save(file)


def view(meshes: Sequence[Surface], yaw: float, size: int) -> NDArray[np.uint8]:
    """Meshes turned by degrees around y, uint8 [size, size, 3]; white without any."""
    if not meshes:
        return np.full((size, size, 3), 255, np.uint8)
    rotation = turn("y", yaw)
    turned = [replace(mesh, vertices=mesh.vertices @ rotation.T) for mesh in meshes]
    return render(turned, size, Camera(distance=4.2)).rgb


def as_surface(mesh: Mesh) -> Surface:
    """A generated mesh as one that was read from a file."""
    return Surface("", mesh.vertices.astype(np.float64), mesh.faces.astype(np.int64))
