"""What is trained and measured: the flow-matching loss of a batch, and of the validation scenes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from lora_core.errors import NumericError
from midi3d_lora.config import Config
from midi3d_lora.encoder_cache import Encodings, Scene
from midi3d_lora.flow.losses import (
    SIGMA_GRID,
    Weighting,
    add_noise,
    drop_conditioning,
    validation_losses,
    velocity_loss,
)
from midi3d_lora.flow.rectified_flow import RectifiedFlowScheduler

if TYPE_CHECKING:
    Loss = Callable[[nn.Module, dict[str, Any]], tuple[Tensor, dict[str, Tensor]]]

PRECISIONS = {"auto": "auto", "no": "fp32", "fp16": "fp16", "bf16": "bf16"}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
WARMUP_SHARE = 10  # the warm-up takes at most a tenth of a run


# -- the loss --------------------------------------------------------------------------------------


def loss_of(cfg: Config, encodings: Encodings, scheduler: RectifiedFlowScheduler) -> Loss:
    """(transformer, batch of `data.collate`) -> (loss, {}): the mean over the rows."""
    weighting = Weighting(cfg.weighting_scheme, cfg.logit_mean, cfg.logit_std)

    def loss(net: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        scene_of_row = batch["scene_of_row"]
        latents, embeds = _rows(batch, encodings)
        rows = add_noise(latents, batch["noise"], batch["sigmas"], scene_of_row, scheduler)
        embeds = drop_conditioning(embeds, batch["dropped"], scene_of_row)
        predicted = net(
            rows.noisy_latents, rows.timesteps, *embeds,
            instance_groups=batch["instance_groups"], return_dict=False,
        )[0]  # fmt: skip
        return velocity_loss(predicted, rows, weighting)[0], {}

    return loss


def _rows(batch: Mapping[str, Any], encodings: Encodings) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Latents x_0 = mean + std ε [R, N, C], and both picture embeddings, of all rows."""
    device = batch["noise"].device
    found = [encodings.encoded(sample, device) for sample in batch["encodings"]]
    chosen = [index.to(device) for index in batch["chosen"]]

    def together(name: str) -> Tensor:
        return torch.cat(
            [getattr(one, name)[rows] for one, rows in zip(found, chosen, strict=True)]
        )

    std = torch.exp(0.5 * together("logvar"))
    latents = together("mean") + std * batch["posterior_noise"]
    return latents, (together("image_embeds_1"), together("image_embeds_2"))


# -- validation ------------------------------------------------------------------------------------


def evaluation(
    cfg: Config,
    scenes: Sequence[Scene],
    encodings: Encodings,
    scheduler: RectifiedFlowScheduler,
    extra: Callable[[nn.Module], dict[str, float]] = lambda net: {},
) -> Callable[[nn.Module], dict[str, float]] | None:
    """transformer -> figures, the one that best follows first; None without validation scenes.

    The squared error of the velocity at fixed noise, on a grid of noise levels: less noisy than the
    loss of training, since nothing is drawn.

    Args:
        extra: gives further figures.
    """
    if not scenes:
        return None

    def evaluate(net: nn.Module) -> dict[str, float]:
        parts = [
            scene_losses(net, scene, encodings, scheduler, cfg.max_instances) for scene in scenes
        ]
        per_level = torch.cat(parts, dim=1).mean(dim=1)
        loss = float(per_level.mean())
        if not math.isfinite(loss):
            raise NumericError("the validation loss is not finite: use bf16 or fp32, not fp16")
        levels = {level_name(s): float(v) for s, v in zip(SIGMA_GRID, per_level, strict=True)}
        return {"minus_loss": -loss, "loss": loss, **levels, **extra(net)}

    return evaluate


def level_name(sigma: float) -> str:
    """Name of the figure at one noise level."""
    return f"loss_at_{sigma:g}"


def scene_losses(
    net: nn.Module,
    scene: Scene,
    encodings: Encodings,
    scheduler: RectifiedFlowScheduler,
    max_instances: int,
) -> Tensor:
    """Squared errors of a scene's first rows, float32 [levels, R], on the CPU."""
    device = next(net.parameters()).device
    found = encodings.encoded(encodings.sample(scene, 0), device)
    latents = found.mean[:max_instances]
    first, second = found.image_embeds_1[: len(latents)], found.image_embeds_2[: len(latents)]
    draw = torch.Generator().manual_seed(int(scene.content[:15], 16))
    noise = torch.randn(latents.shape, generator=draw)
    groups = [0] * len(latents)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        predicted: Tensor = net(x, t, first, second, instance_groups=groups, return_dict=False)[0]
        return predicted

    return validation_losses(velocity, latents, noise, scheduler).cpu()


# -- learning rate and precision -------------------------------------------------------------------


def schedule(cfg: Config) -> Callable[[int, int], float]:
    """(update, updates) -> share of the peak learning rate, see `lr_factor`."""

    def factor(update: int, updates: int) -> float:
        warmup = min(cfg.lr_warmup_steps, updates // WARMUP_SHARE)
        return lr_factor(cfg.lr_scheduler, update, updates, warmup)

    return factor


def lr_factor(kind: str, update: int, updates: int, warmup: int) -> float:
    """Share of the peak learning rate in update 0 ... updates - 1.

    All but constant rise as (update + 1) / warmup. Then, with t from 0 at the peak to 1 after the
    last update,

        linear  1 - t        cosine  (1 + cos(π t)) / 2        constant, constant_with_warmup  1

    as diffusers has them, shifted by one update, so that the first one is not at 0.
    """
    if kind == "constant":
        return 1.0
    if update + 1 < warmup:
        return (update + 1) / warmup
    if kind == "constant_with_warmup":
        return 1.0
    peak = max(warmup - 1, 0)
    t = min((update - peak) / max(updates - peak, 1), 1.0)
    return 1 - t if kind == "linear" else (1 + math.cos(math.pi * t)) / 2


def precision(cfg: Config) -> str:
    """The precision that settings ask for, as `choose_precision` has them; a CPU has fp32."""
    if cfg.mixed_precision == "auto" and cfg.device == "cpu":
        return "fp32"
    return PRECISIONS[cfg.mixed_precision]


class SaveEpochs(TrainerCallback):
    """Asks for a training checkpoint at the end of every epoch that gets an adapter file."""

    def __init__(self, every: int) -> None:
        """`every`: updates from one such epoch to the next."""
        self.every = every

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """See the class."""
        if state.global_step % self.every == 0:
            control.should_save = True
