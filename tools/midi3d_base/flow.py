"""The second stage: the transformer and the 7-channel encoder, together, on scenes of furniture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from midi3d_base.networks import Networks, picture_settings
from midi3d_base.shapes import surfaces
from midi3d_lora.conditioning.clip import clip_embeds, clip_pixels
from midi3d_lora.conditioning.pictures import ScenePictures, split
from midi3d_lora.conditioning.seg_maps import SegMap, seg_map
from midi3d_lora.demo_base import scenes
from midi3d_lora.flow.losses import (
    SIGMA_GRID,
    NoisyRows,
    Weighting,
    add_noise,
    draw_dropped_scenes,
    drop_conditioning,
    velocity_loss,
)
from midi3d_lora.flow.rectified_flow import RectifiedFlowScheduler, interpolate
from midi3d_lora.transformer.groups import scene_groups

DRAWS = 2  # of the points that an object's tokens start from
POINTS = 1024  # of an object's surface
HELD_OUT = 64  # scenes of the validation loss


# -- scenes ----------------------------------------------------------------------------------------


@dataclass
class Pool:
    """Scenes as the flow needs them: S scenes of R objects together.

    Attributes:
        rgb: uint8 [S, H, W, 3].
        instances: uint8 [S, H, W], k + 1 where the k-th object of the scene is.
        counts: int64 [S] objects of a scene.
        first: int64 [S] row of a scene's first object.
        clip: f32 [R, 1, C].
        mean, std: f32 [R, DRAWS, N, C] of the latents' posteriors.
    """

    rgb: Tensor
    instances: Tensor
    counts: Tensor
    clip: Tensor
    mean: Tensor
    std: Tensor

    @property
    def first(self) -> Tensor:
        return self.counts.cumsum(0) - self.counts

    def rows(self, chosen: Tensor) -> Tensor:
        """Rows of the objects of scenes, int64."""
        spans = zip(self.first[chosen].tolist(), self.counts[chosen].tolist(), strict=True)
        return torch.cat([torch.arange(begin, begin + count) for begin, count in spans])


def make_pool(networks: Networks, seeds: Sequence[scenes.Seed], style: scenes.Style) -> Pool:
    """Draw the scenes of seeds and encode their objects."""
    rng = np.random.default_rng(0)
    made, pictures = zip(*[scenes.scene_and_picture(seed, style) for seed in seeds], strict=True)
    clip = [clip_of(networks, picture.rgb, picture.instances) for picture in pictures]
    means, stds = [], []
    for begin in range(0, len(made), 16):
        solids = [solid for scene in made[begin : begin + 16] for solid in scene.solids]
        points = surfaces(solids, POINTS, rng)
        drawn = [draw_latents(networks, points, DRAWS * begin + draw) for draw in range(DRAWS)]
        means.append(torch.stack([mean for mean, _ in drawn], dim=1))
        stds.append(torch.stack([std for _, std in drawn], dim=1))
    return Pool(
        rgb=torch.from_numpy(np.stack([picture.rgb for picture in pictures])),
        instances=torch.from_numpy(np.stack([picture.instances for picture in pictures])),
        counts=torch.tensor([len(scene) for scene in made]),
        clip=torch.cat(clip),
        mean=torch.cat(means),
        std=torch.cat(stds),
    )


@torch.no_grad()
def draw_latents(networks: Networks, points: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [B, N, C] of the latents' posteriors."""
    posterior = networks.vae.encode(points, scenes.NUM_TOKENS, seed).latent_dist
    return posterior.mean, posterior.std


def pictures_of(rgb: np.ndarray, instances: np.ndarray) -> ScenePictures:
    """A render as `predict` sees it."""
    found: SegMap = seg_map(instances, smallest_share=0.0)
    return split(rgb, found)


def clip_of(networks: Networks, rgb: np.ndarray, instances: np.ndarray) -> Tensor:
    """[K, 1, C]."""
    pixels = clip_pixels(pictures_of(rgb, instances), picture_settings()[0])
    return clip_embeds(networks.clip, pixels)


def dino_input(rgb: Tensor, instances: Tensor, counts: Tensor) -> Tensor:
    """The 7 channels of all objects of scenes, as `conditioning.dino.dino_pixels` makes them.

    Args:
        rgb: uint8 [S, H, W, 3]. instances: uint8 [S, H, W]. counts: int64 [S].

    Returns:
        f32 [R, 7, H, W].
    """
    settings = picture_settings()[1]
    mean, std = (
        torch.tensor(values)[:, None, None] for values in (settings.image_mean, settings.image_std)
    )
    scene = torch.repeat_interleave(torch.arange(len(counts)), counts)
    label = torch.cat([torch.arange(1, count + 1) for count in counts.tolist()])
    mask = (instances[scene] == label[:, None, None])[:, None]
    whole = rgb.permute(0, 3, 1, 2).float()[scene] / 255
    alone = torch.where(mask, whole, 1.0)
    return torch.cat([(alone - mean) / std, (whole - mean) / std, mask.float()], dim=1)


# -- the stage -------------------------------------------------------------------------------------


class Flow:
    """The second stage; the autoencoder and CLIP's tower stay as they are."""

    peak = 1.5e-3  # learning rate
    batch = 16  # scenes

    def __init__(self, networks: Networks, seed: int, count: int, file: Path) -> None:
        """`count` scenes are made once, and kept in `file`."""
        self.networks, self.seed, self.count, self.file = networks, seed, count, file
        self.scheduler = RectifiedFlowScheduler()
        self.weighting = Weighting()

    def begin(self) -> None:
        """Make the scenes, or read those of the run that goes on."""
        if not self.file.exists():
            seeds = [(self.seed, number) for number in range(self.count)]
            save_file(vars(make_pool(self.networks, seeds, scenes.INDOORS)), self.file)
        self.pool = Pool(**load_file(self.file))
        held_out = [(scenes.HELD_OUT_SEED, number) for number in range(HELD_OUT)]
        self.unseen = {
            name: make_pool(self.networks, held_out, style)
            for name, style in (("indoors", scenes.INDOORS), ("outdoors", scenes.OUTDOORS))
        }

    def parameters(self) -> list[nn.Parameter]:
        trained = (self.networks.transformer, self.networks.dino)
        return [weight for module in trained for weight in module.parameters()]

    def loss(self, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The training loss of MIDI-3D on random scenes of the pool."""
        pool, draw = self.pool, torch.Generator().manual_seed(self.seed + step)
        chosen = torch.randint(len(pool.counts), (self.batch,), generator=draw)
        rows, counts = pool.rows(chosen), pool.counts[chosen]
        which = torch.randint(DRAWS, (len(rows),), generator=draw)
        mean, std = pool.mean[rows, which], pool.std[rows, which]
        latents = mean + std * torch.randn(mean.shape, generator=draw)
        noise = torch.randn(mean.shape, generator=draw)
        groups = scene_groups(counts.tolist())
        sigmas = self.weighting.draw(self.batch, draw)
        noisy = add_noise(latents, noise, sigmas, groups, self.scheduler)
        embeds = pool.clip[rows], self.seen(pool, chosen)
        dropped = draw_dropped_scenes(self.batch, generator=draw)
        prediction = self.velocity(noisy, drop_conditioning(embeds, dropped, groups), groups)
        return velocity_loss(prediction, noisy, self.weighting)[0], {}

    def seen(self, pool: Pool, chosen: Tensor) -> Tensor:
        """Tokens [R, 1 + P, C] of the encoder."""
        pixels = dino_input(pool.rgb[chosen], pool.instances[chosen], pool.counts[chosen])
        tokens: Tensor = self.networks.dino(pixels).last_hidden_state
        return tokens

    def velocity(self, noisy: NoisyRows, embeds: tuple[Tensor, Tensor], groups: Tensor) -> Tensor:
        """What the transformer predicts."""
        predicted = self.networks.transformer(
            noisy.noisy_latents, noisy.timesteps, *embeds, instance_groups=groups, return_dict=False
        )
        found: Tensor = predicted[0]
        return found

    def figures(self) -> dict[str, list[float]]:
        """Validation losses at the noise levels of the grid, of both styles."""
        return {
            name: [round(value, 4) for value in self.losses(pool).tolist()]
            for name, pool in self.unseen.items()
        }

    @torch.no_grad()
    def losses(self, pool: Pool) -> Tensor:
        """Mean over the rows of a pool at fixed noise, [len(SIGMA_GRID)]."""
        everything = torch.arange(len(pool.counts))
        groups = scene_groups(pool.counts.tolist())
        embeds = pool.clip, self.seen(pool, everything)
        x0 = pool.mean[:, 0]
        noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
        found = []
        for sigma in SIGMA_GRID:
            levels = torch.full((len(x0),), sigma)
            noisy = NoisyRows(x0, noise, interpolate(x0, noise, levels), levels, 1000 * levels)
            prediction = self.velocity(noisy, embeds, groups)
            found.append(velocity_loss(prediction, noisy, Weighting("none"))[0])
        return torch.stack(found)

    def finish(self) -> None:
        """Nothing is left to do."""
