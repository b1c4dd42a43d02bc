"""The training loss of MIDI-3D: the velocity x_0 - ε at a random noise level per scene.

A row is one instance, a scene is one or more rows. With S scenes of R rows together:

    σ_s ~ density(scheme)             one per scene: at inference its instances share σ too
    σ_s ← time_shift(σ_s)
    x   = (1 - σ) x_0 + σ ε           ε ~ N(0, 1), independent per row
    L   = 1/R Σ_r w(σ_r) mean((v_r - (x_0 - ε)_r)²)

and with a probability of 0.1 per scene both picture embeddings of all its rows are zero, which
trains the unconditional branch that guidance subtracts (Ho and Salimans, arXiv 2207.12598).
Densities and weights are those of Esser et al., "Scaling Rectified Flow Transformers"
(arXiv 2403.03206), under the names of diffusers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_core.errors import ConfigError, DataError, near
from midi3d_lora.flow.rectified_flow import RectifiedFlowScheduler, interpolate

SCHEMES = ("logit_normal_dist", "logit_normal", "mode", "cosmap", "sigma_sqrt", "none")
MODE_SCALE = 1.29  # of the density "mode", in the paper and in the official configuration
SIGMA_FLOOR = 0.01  # of the weight σ^-2: the last σ of 100 steps; below it nothing is sampled
GUIDANCE_DROPOUT = 0.1  # share of scenes without conditioning, official configuration
SIGMA_GRID = (0.1, 0.3, 0.5, 0.7, 0.9)  # of the validation loss

Embeds = tuple[Tensor, Tensor]  # of encoder 1 [R, T1, C1] and encoder 2 [R, T2, C2]


# -- noise levels ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Weighting:
    """Which noise levels are trained, and how much each counts.

    Attributes:
        scheme: one of `SCHEMES`. The default draws σ from the logit-normal density with weight 1.
        logit_mean: of the normal distribution of log(σ / (1 - σ)).
        logit_std: its standard deviation.

    Raises:
        ConfigError: an unknown scheme, or a distribution that does not exist.
    """

    scheme: str = "logit_normal_dist"
    logit_mean: float = 0.0
    logit_std: float = 1.0

    def __post_init__(self) -> None:
        if self.scheme not in SCHEMES:
            hint = near(self.scheme, SCHEMES) or f"it is one of {', '.join(SCHEMES)}"
            raise ConfigError(f"weighting_scheme: {self.scheme!r}; {hint}")
        if not math.isfinite(self.logit_mean):
            raise ConfigError(f"logit_mean: {self.logit_mean}; it is a finite number")
        if not 0 < self.logit_std < math.inf:
            raise ConfigError(f"logit_std: {self.logit_std}; it is a positive number")

    def draw(self, scenes: int, generator: torch.Generator | None = None) -> Tensor:
        """σ before the shift, float32 [S] on the CPU.

        logit_normal, logit_normal_dist:  σ = sigmoid(N(mean, std²))
        mode:                             σ = 1 - u - 1.29 (cos²(π u / 2) - 1 + u)
        others:                           σ = u,  u uniform in [0, 1)

        Args:
            scenes: S.
            generator: a CPU generator; None: torch's own. Equal seeds give the official draws.
        """
        if self.scheme in ("logit_normal", "logit_normal_dist"):
            normal = torch.normal(self.logit_mean, self.logit_std, (scenes,), generator=generator)
            return torch.sigmoid(normal)
        u = torch.rand((scenes,), generator=generator)
        if self.scheme == "mode":
            return 1 - u - MODE_SCALE * (torch.cos(math.pi * u / 2) ** 2 - 1 + u)
        return u

    def weights(self, sigmas: Tensor) -> Tensor:
        """w(σ), after the shift, with the shape of `sigmas`.

        sigma_sqrt:  σ^-2, with σ not below `SIGMA_FLOOR` (it would be infinite at 0)
        cosmap:      2 / (π (1 - 2σ + 2σ²))
        others:      1
        """
        if self.scheme == "sigma_sqrt":
            return sigmas.clamp(min=SIGMA_FLOOR) ** -2
        if self.scheme == "cosmap":
            return 2 / (math.pi * (1 - 2 * sigmas + 2 * sigmas**2))
        return torch.ones_like(sigmas)


# -- what a step trains on -------------------------------------------------------------------------


@dataclass(frozen=True)
class NoisyRows:
    """The rows of one training step.

    Attributes:
        latents: x_0, float32 [R, N, C].
        noise: ε, the same.
        noisy_latents: x_σ, the same.
        sigmas: float32 [R], equal within a scene.
        timesteps: 1000 σ, float32 [R].
    """

    latents: Tensor
    noise: Tensor
    noisy_latents: Tensor
    sigmas: Tensor
    timesteps: Tensor

    @property
    def target(self) -> Tensor:
        """v = x_0 - ε: data minus noise, not the other way round as in most of diffusers."""
        return self.latents - self.noise


def add_noise(
    latents: Tensor,
    noise: Tensor,
    scene_sigmas: Tensor,
    scene_of_row: Tensor,
    scheduler: RectifiedFlowScheduler,
    mu: float | None = None,
) -> NoisyRows:
    """Mix latents with noise at the level of their scene.

    Args:
        latents: x_0 [R, N, C].
        noise: ε, the same shape.
        scene_sigmas: σ of every scene before the shift [S], see `Weighting.draw`.
        scene_of_row: int64 [R], values 0 ... S - 1.
        scheduler: whose shift is meant.
        mu: of its dynamic shifting.

    Raises:
        ConfigError: shapes that do not belong together.
    """
    _check_scenes(len(latents), scene_of_row, len(scene_sigmas))
    x0, noise = latents.float(), noise.to(latents.device).float()
    shifted = scheduler.time_shift(scene_sigmas.float(), mu)
    sigmas = shifted.to(x0.device)[scene_of_row.to(x0.device)]
    return NoisyRows(x0, noise, interpolate(x0, noise, sigmas), sigmas, len(scheduler) * sigmas)


def draw_dropped_scenes(
    scenes: int, probability: float = GUIDANCE_DROPOUT, generator: torch.Generator | None = None
) -> Tensor:
    """Which scenes lose their conditioning, bool [S] on the CPU.

    Raises:
        ConfigError: a probability outside 0 ... 1.
    """
    if not 0 <= probability <= 1:
        raise ConfigError(f"guidance dropout: {probability}; it is a probability, 0 to 1")
    return torch.rand((scenes,), generator=generator) < probability


def drop_conditioning(embeds: Embeds, dropped: Tensor, scene_of_row: Tensor) -> Embeds:
    """Both embeddings, zero in the rows of dropped scenes, which is the unconditional embedding.

    Args:
        embeds: [R, T, C] each.
        dropped: bool [S].
        scene_of_row: int64 [R].

    Raises:
        ConfigError: shapes that do not belong together.
    """
    first, second = embeds
    for embed in embeds:
        _check_scenes(len(embed), scene_of_row, len(dropped))
    rows = dropped.to(first.device)[scene_of_row.to(first.device)][:, None, None]
    return first.masked_fill(rows, 0), second.masked_fill(rows, 0)


def _check_scenes(rows: int, scene_of_row: Tensor, scenes: int) -> None:
    if scene_of_row.shape != (rows,):
        raise ConfigError(f"scene_of_row: {list(scene_of_row.shape)} for {rows} rows")
    if rows and not 0 <= int(scene_of_row.min()) <= int(scene_of_row.max()) < scenes:
        raise ConfigError(
            f"scene_of_row: {int(scene_of_row.min())} to {int(scene_of_row.max())} for {scenes} "
            f"scenes, which are 0 to {scenes - 1}"
        )


# -- the loss --------------------------------------------------------------------------------------


def velocity_loss(
    prediction: Tensor, rows: NoisyRows, weighting: Weighting, is_real_row: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The mean over rows of w(σ) mean((v - (x_0 - ε))²), in float32 whatever predicted v.

    Args:
        prediction: v [R, N, C], any float dtype.
        rows: what it was predicted for.
        weighting: gives w.
        is_real_row: bool [R]; rows that only fill a batch do not count. None: all are real.

    Returns:
        (loss [], loss per row [R]), float32; only the first has a gradient to `prediction`.

    Raises:
        ConfigError: shapes that do not belong together; broadcasting would hide it.
        DataError: no real row.
    """
    target = rows.target
    if prediction.shape != target.shape:
        raise ConfigError(
            f"prediction {list(prediction.shape)}, target {list(target.shape)}: must be equal"
        )
    errors = (prediction.float() - target).square().flatten(1).mean(1)
    per_row = weighting.weights(rows.sigmas) * errors
    if is_real_row is not None and is_real_row.shape != per_row.shape:
        raise ConfigError(f"is_real_row: {list(is_real_row.shape)} for {len(per_row)} rows")
    real = per_row if is_real_row is None else per_row[is_real_row]
    if not len(real):
        raise DataError("a batch without any row: every scene needs at least one instance")
    return real.mean(), per_row.detach()


@torch.no_grad()
def validation_losses(
    velocity: Callable[[Tensor, Tensor], Tensor],
    latents: Tensor,
    noise: Tensor,
    scheduler: RectifiedFlowScheduler,
    sigmas: Sequence[float] = SIGMA_GRID,
) -> Tensor:
    """Squared velocity error of the rows of a scene at fixed noise, on a grid of noise levels.

    Less noisy than the training loss, where σ and ε change from step to step.

    Args:
        velocity: (x_σ [R, N, C], t [R]) -> v, conditional.
        latents: x_0 [R, N, C]; the mean of the posterior, so that nothing is random.
        noise: ε, fixed for the scene, see `midi3d_lora.flow.sampling.initial_noise`.
        scheduler: whose timesteps the network knows.
        sigmas: the grid [G], after any shift.

    Returns:
        float32 [G, R], unweighted; its mean is the validation loss.
    """
    x0, noise = latents.float(), noise.to(latents.device).float()
    losses = []
    for sigma in sigmas:
        levels = torch.full((len(x0),), sigma, device=x0.device)
        rows = NoisyRows(x0, noise, interpolate(x0, noise, levels), levels, len(scheduler) * levels)
        prediction = velocity(rows.noisy_latents, rows.timesteps)
        losses.append(velocity_loss(prediction, rows, Weighting("none"))[1])
    return torch.stack(losses)
