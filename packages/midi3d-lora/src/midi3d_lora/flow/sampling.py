"""From noise to latents: Euler steps along the velocity, with classifier-free guidance.

    v = v_u + g (v_c - v_u)      u: both picture embeddings zero, c: those of the picture
    x ← x + (σ_i - σ_{i+1}) v

Guidance: Ho and Salimans, arXiv 2207.12598. The functions know no network: they are given the
velocity as a function, so that a transformer, an adapter or a formula are sampled alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lora_core.errors import ConfigError, NumericError
from midi3d_lora.flow.rectified_flow import RectifiedFlowScheduler
from midi3d_lora.transformer.groups import guidance_groups

# (x [R, N, C], t [R]) -> v [R, N, C]
Velocity = Callable[[Tensor, Tensor], Tensor]
# (x, t, embeds_1 [R, T1, C1], embeds_2 [R, T2, C2], groups [R]) -> v
ConditionalVelocity = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
# (steps done, latents [R, N, C])
OnStep = Callable[[int, Tensor], None]


def initial_noise(
    rows: int, num_tokens: int, channels: int, seed: int, device: str | torch.device | None = None
) -> Tensor:
    """N(0, 1), float32 [R, N, C], drawn on the CPU: one seed is one scene on every device.

    Args:
        rows: instances of the scene.
        num_tokens: N, 2048 in the released model. The official code takes the transformer's width
            for it, which happens to be the same number.
        channels: C of the latents.
        seed: of a generator of its own; nothing else changes the draw.
        device: where the result is to be.
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((rows, num_tokens, channels), generator=generator).to(device)


def guided_velocity(
    velocity: ConditionalVelocity,
    embeds_1: Tensor,
    embeds_2: Tensor,
    groups: Tensor,
    guidance_scale: float = 7.0,
    one_pass: bool = True,
) -> Velocity:
    """The velocity of fixed pictures, with guidance.

    Args:
        velocity: the network.
        embeds_1: of the first image encoder [R, T1, C1].
        embeds_2: of the second [R, T2, C2].
        groups: int64 [R], rows with equal numbers are instances of one scene.
        guidance_scale: g. At 1 or below the unconditional branch is not computed, as officially.
        one_pass: rows [unconditional; conditional] in one call, 2 R rows; False: two calls of R,
            half the memory. The two halves are groups of their own and never see each other.

    Raises:
        ConfigError: a guidance scale that is no number from 0, row counts that differ, or no row.
    """
    if not 0 <= guidance_scale < math.inf:
        raise ConfigError(f"guidance_scale: {guidance_scale}; it is a number from 0 (7 is usual)")
    if not len(embeds_1) == len(embeds_2) == len(groups) > 0:
        raise ConfigError(
            f"{len(embeds_1)} rows of embeds_1, {len(embeds_2)} of embeds_2, {len(groups)} groups"
        )
    if guidance_scale <= 1:
        return lambda x, t: velocity(x, t, embeds_1, embeds_2, groups)
    if not one_pass:
        return _in_two_passes(velocity, embeds_1, embeds_2, groups, guidance_scale)
    both_1 = torch.cat([torch.zeros_like(embeds_1), embeds_1])
    both_2 = torch.cat([torch.zeros_like(embeds_2), embeds_2])
    both_groups = guidance_groups(groups)

    def guided(x: Tensor, t: Tensor) -> Tensor:
        both = velocity(torch.cat([x, x]), torch.cat([t, t]), both_1, both_2, both_groups)
        unconditional, conditional = both.chunk(2)
        return _guide(unconditional, conditional, guidance_scale)

    return guided


def _in_two_passes(
    velocity: ConditionalVelocity,
    embeds_1: Tensor,
    embeds_2: Tensor,
    groups: Tensor,
    guidance_scale: float,
) -> Velocity:
    zeros_1, zeros_2 = torch.zeros_like(embeds_1), torch.zeros_like(embeds_2)

    def guided(x: Tensor, t: Tensor) -> Tensor:
        unconditional = velocity(x, t, zeros_1, zeros_2, groups)
        return _guide(unconditional, velocity(x, t, embeds_1, embeds_2, groups), guidance_scale)

    return guided


def _guide(unconditional: Tensor, conditional: Tensor, scale: float) -> Tensor:
    """v_u + g (v_c - v_u) in float32: g multiplies the rounding of half precision as well."""
    unconditional, conditional = unconditional.float(), conditional.float()
    return unconditional + scale * (conditional - unconditional)


@torch.no_grad()
def sample_latents(
    velocity: Velocity,
    noise: Tensor,
    scheduler: RectifiedFlowScheduler,
    num_inference_steps: int = 50,
    mu: float | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Follow the velocity from noise to data.

    The latents stay float32 between the steps, also where the network computes in half precision:
    fifty roundings of the sum itself would be larger than those of its terms.

    Args:
        velocity: see `guided_velocity`; it is given float32 and may answer in any float dtype.
        noise: x at σ = 1 [R, N, C].
        scheduler: its steps are set here.
        num_inference_steps: n, Euler steps.
        mu: of the scheduler's dynamic shifting.
        on_step: called after every step.

    Returns:
        Latents x_0, float32 [R, N, C].

    Raises:
        ConfigError: no step, or a velocity with another shape than x.
        NumericError: a NaN or an infinity, with the step at which it came.
    """
    scheduler.set_timesteps(num_inference_steps, noise.device, mu=mu)
    scheduler.set_begin_index(0)
    x = noise.float()
    for number, t in enumerate(scheduler.timesteps, start=1):
        v = velocity(x, t.expand(len(x)))
        if v.shape != x.shape:
            raise ConfigError(f"velocity {list(v.shape)} for latents {list(x.shape)}")
        x = scheduler.step(v.float(), t, x, return_dict=False)[0]
        if not torch.isfinite(x).all():
            raise NumericError(
                f"sampling: NaN or infinity at step {number} of {num_inference_steps} (t = "
                f"{float(t):.1f}). Use bf16 or fp32 instead of fp16, or check the adapter."
            )
        if on_step is not None:
            on_step(number, x)
    return x
