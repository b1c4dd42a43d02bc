"""Scenes that are generated while a model is trained: how far they are from the true ones.

The loss says how well the velocity is predicted; this, what comes out. A few validation scenes are
generated with fixed noise, and compared with their surfaces without any alignment.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lora_core.report import RunLog
from midi3d_lora import model
from midi3d_lora.config import Config
from midi3d_lora.encoder_cache import Encodings, Scene
from midi3d_lora.flow.sampling import guided_velocity, initial_noise, sample_latents
from midi3d_lora.meshes import mesh_loading, views
from midi3d_lora.meshes.extraction import ExtractionSettings, Mesh, extract_mesh
from midi3d_lora.meshes.metrics import compare
from midi3d_lora.official_model import load_component
from midi3d_lora.scenes.scene_folders import TrainingScene, read_scene
from midi3d_lora.sources.prepare_meshes import sample_mesh, sampling_rng
from midi3d_lora.vae.autoencoder import TripoSGVAEModel

if TYPE_CHECKING:
    from midi3d_lora.conditioning.pictures import Picture

POINTS = 4096  # on a generated mesh
PIXELS = 256  # of a panel
GUIDANCE = 7.0  # as in inference


class Previews:
    """Generates scenes with the model as it is.

    Args:
        scenes: that are generated; few.
        log: where their pictures go.
    """

    def __init__(
        self, cfg: Config, scenes: Sequence[Scene], encodings: Encodings, log: RunLog
    ) -> None:
        self.cfg, self.scenes, self.encodings, self.log = cfg, list(scenes), encodings, log
        self._sheets: dict[str, Picture] = {}  # of the latest measurement

    def measure(self, net: nn.Module) -> dict[str, float]:
        """Mean distance and agreement of the generated scenes: `chamfer`, `f_score` at 0.1."""
        vae = load_component(TripoSGVAEModel, model.folder_of(self.cfg), model.VAE)
        vae.to(self.encodings.encoders.device).requires_grad_(False)
        found = [self._scene(net, vae, scene) for scene in self.scenes]
        chamfer, f_score = np.mean(found, axis=0)
        return {"chamfer": float(chamfer), "f_score": float(f_score)}

    def draw(self, step: int) -> None:
        """Show pictures of the scenes that were measured last."""
        for name, sheet in self._sheets.items():
            self.log.picture(name, sheet, step)
        self._sheets.clear()

    def _scene(self, net: nn.Module, vae: TripoSGVAEModel, scene: Scene) -> tuple[float, float]:
        true = read_scene(scene.folder, self.encodings.plan.scene, np.random.default_rng(0))
        rows = min(scene.rows, self.cfg.max_instances)
        latents = self._latents(net, scene, rows)
        settings = ExtractionSettings(
            depth=self.cfg.preview_depth, coarse_depth=min(6, self.cfg.preview_depth)
        )
        with torch.autocast(latents.device.type, enabled=False):  # values near 0 decide
            meshes = [extract_mesh(field, settings) for field in vae.fields(latents)]
        if self.log.shows_pictures:
            self._sheets[scene.key] = self._sheet(true, meshes)
        points = np.concatenate([points_on(mesh, scene.key, k) for k, mesh in enumerate(meshes)])
        surface = np.concatenate([s.points for s in true.surfaces[:rows]])
        scores = compare(points, surface)
        return scores.chamfer, scores.f_score

    def _latents(self, net: nn.Module, scene: Scene, rows: int) -> Tensor:
        device = next(net.parameters()).device
        found = self.encodings.encoded(self.encodings.sample(scene, 0), device)
        tokens, channels = found.mean.shape[1:]
        noise = initial_noise(rows, tokens, channels, int(scene.content[:8], 16))
        velocity = guided_velocity(
            partial(_velocity, net),
            found.image_embeds_1[:rows],
            found.image_embeds_2[:rows],
            torch.zeros(rows, dtype=torch.long, device=device),
            GUIDANCE,
        )
        scheduler = model.scheduler_of(self.cfg)
        return sample_latents(velocity, noise.to(device), scheduler, self.cfg.preview_steps)

    def _sheet(self, true: TrainingScene, meshes: Sequence[Mesh | None]) -> Picture:
        whole = [*meshes, *[None] * (len(true) - len(meshes))]
        return views.scene_sheet(true.pictures, whole, PIXELS)


def _velocity(
    net: nn.Module, x: Tensor, t: Tensor, first: Tensor, second: Tensor, groups: Tensor
) -> Tensor:
    predicted: Tensor = net(x, t, first, second, instance_groups=groups, return_dict=False)[0]
    return predicted


def points_on(mesh: Mesh | None, scene: str, instance: int) -> NDArray[Any]:
    """Points of a generated surface, float32 [POINTS, 3]; [0, 3] without one."""
    if mesh is None:
        return np.zeros((0, 3), np.float32)
    named = mesh_loading.Mesh(
        str(instance), mesh.vertices.astype(np.float64), mesh.faces.astype(np.int64)
    )
    return sample_mesh(named, POINTS, sampling_rng(0, scene, instance))[:, :3]
