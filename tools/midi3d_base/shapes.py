"""Objects for the autoencoder: their surfaces, and the distances that its field should give."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from midi3d_base.networks import Networks, standardise_latents
from midi3d_lora.demo_base import scenes
from midi3d_lora.demo_base.solids import Solid
from midi3d_lora.sources.prepare_meshes import sample_mesh
from midi3d_lora.vae.autoencoder import TripoSGVAEModel
from midi3d_lora.vae.farthest_points import choose_query_points

REACH = 0.1  # units; farther from the surface the field is constant
STEEPNESS = 4.0  # of the probability of being inside: sigmoid(-4 field)
ANCHOR_WEIGHT = 0.3
ANCHOR_SCALE = torch.tensor([2.0, 2.0, 2.0, 1.7, 1.7, 1.7])  # to about unit variance
KL_WEIGHT = 1e-3  # of the mean over channels and tokens
THICK = replace(scenes.ALL, kinds=("blocks", "cabinet", "vase", "tree"), count=(1, 1))


def objects(seed: scenes.Seed, count: int, style: scenes.Style = scenes.ALL) -> list[Solid]:
    """Objects of random scenes, each in the frame of its scene."""
    rng = np.random.default_rng(seed)
    found: list[Solid] = []
    while len(found) < count:
        found += scenes.unchecked(rng, style).solids
    return found[:count]


def surfaces(solids: list[Solid], points: int, rng: np.random.Generator) -> Tensor:
    """Points with normals, f32 [B, points, 6], as `prepare` samples meshes."""
    return torch.from_numpy(np.stack([sample_mesh(s.mesh(), points, rng) for s in solids]))


def batch(
    seed: scenes.Seed, count: int, points: int, queries: int, style: scenes.Style = scenes.ALL
) -> tuple[Tensor, Tensor, Tensor]:
    """Surfaces [B, points, 6], places [B, queries, 3], and the field there [B, queries]."""
    solids = objects(seed, count, style)
    rng = np.random.default_rng(seed)
    surface = surfaces(solids, points, rng)
    pairs = [
        scenes.field_points(solid, surface[i].numpy(), queries, rng)
        for i, solid in enumerate(solids)
    ]
    places, distances = (torch.from_numpy(np.stack(part)) for part in zip(*pairs, strict=True))
    return surface, places, (distances / REACH).clamp(-1, 1)


def shape_loss(
    vae: TripoSGVAEModel, data: tuple[Tensor, Tensor, Tensor], seed: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean absolute error of the field, cross-entropy of its sides, KL term, places of tokens.

    Without the cross-entropy the field stayed an unsigned distance for long: most points of a thin
    part's surroundings are outside, and the error alone is content with that. Six channels of a
    latent are drawn to the point and the normal that its token started from: the same error after
    150 steps with 1.0 nats per channel instead of 2.4, and a set of points for the flow to learn.
    """
    surface, places, field = data
    latents = vae.encode(surface, scenes.NUM_TOKENS, seed).latent_dist
    anchors = choose_query_points(surface, scenes.NUM_TOKENS, seed) * ANCHOR_SCALE
    where = functional.mse_loss(latents.mean[..., : len(ANCHOR_SCALE)], anchors)
    found = vae.decode(latents.sample(), places).sample[..., 0]
    error = functional.l1_loss(found, field)
    kl = latents.kl().mean() / latents.mean[0].numel()
    inside = (field < 0).float()
    sides = functional.binary_cross_entropy_with_logits(-STEEPNESS * found, inside)
    loss = error + 0.5 * sides + KL_WEIGHT * kl + ANCHOR_WEIGHT * where
    return loss, {"field": error, "sides": sides, "kl": kl, "where": where}


@torch.no_grad()
def shape_figures(vae: TripoSGVAEModel, style: scenes.Style, count: int = 48) -> dict[str, float]:
    """Of objects that training has not shown: field error, and IoU of the inside in the box."""
    solids = objects((scenes.HELD_OUT_SEED, 0), count, style)
    rng = np.random.default_rng(scenes.HELD_OUT_SEED)
    surface = surfaces(solids, scenes.NUM_POINTS, rng)
    # Boxes around each object: of a table alone most of space is outside.
    low, high = surface[..., :3].amin(1) - 0.1, surface[..., :3].amax(1) + 0.1
    places = low[:, None] + (high - low)[:, None] * torch.from_numpy(
        rng.random((count, 2048, 3), dtype=np.float32)
    )
    truth = torch.stack(
        [
            torch.from_numpy(s.distance(p.double().numpy())).float()
            for s, p in zip(solids, places, strict=True)
        ]
    )
    latents = vae.encode(surface, scenes.NUM_TOKENS, seed=0).latent_dist.mode()
    found = vae.decode(latents, places).sample[..., 0]
    inside, wanted = found < 0, truth < 0
    iou = (inside & wanted).sum(1) / (inside | wanted).sum(1).clamp(min=1)
    error = (found - (truth / REACH).clamp(-1, 1)).abs().mean()
    return {"error": round(error.item(), 4), "iou": round(iou.mean().item(), 4)}


class Shapes:
    """The first stage: the autoencoder alone."""

    peak = 2e-3  # learning rate
    batch, points, queries = 8, 512, 384
    measured = 512  # objects that say what the variance of the latents is
    first = 500  # steps on single, thick objects, of which the inside is learned soon

    def __init__(self, networks: Networks, seed: int) -> None:
        self.vae, self.seed = networks.vae, seed

    def begin(self) -> None:
        """Nothing is needed."""

    def parameters(self) -> list[nn.Parameter]:
        return list(self.vae.parameters())

    def loss(self, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Of new objects."""
        style = THICK if step < self.first else scenes.ALL
        data = batch((self.seed, step), self.batch, self.points, self.queries, style)
        return shape_loss(self.vae, data, step)

    def figures(self) -> dict[str, dict[str, float]]:
        """Of objects of both styles that training does not show."""
        styles = {"indoors": scenes.INDOORS, "outdoors": scenes.OUTDOORS}
        return {name: shape_figures(self.vae, style) for name, style in styles.items()}

    @torch.no_grad()
    def finish(self) -> None:
        """Latents with the variance of the noise that the flow starts from."""
        solids = objects((self.seed, 2**31), self.measured)
        surface = surfaces(solids, scenes.NUM_POINTS // 2, np.random.default_rng(self.seed))
        means = [
            self.vae.encode(part, scenes.NUM_TOKENS, seed=i).latent_dist.mean
            for i, part in enumerate(surface.split(32))
        ]
        standardise_latents(self.vae, torch.cat(means))
