"""What is trained: the cross entropy of the answers' tokens, and the learning rate."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from isaac_lora.config import Config
from isaac_lora.frozen_features import FrozenFeatures
from lora_core.errors import ConfigError

if TYPE_CHECKING:
    from lora_core.training.loss import Loss

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def loss_of(cfg: Config, features: FrozenFeatures) -> Loss:
    """(model, batch of `data.collate`) -> (loss, {}): the mean over the batch's label tokens.

    `LoraTrainer(count=data.num_label_tokens)` makes it the mean over those of all batches and
    processes of an update.
    """

    def loss(net: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        return net(**features.inputs(batch), use_cache=False).loss, {}

    return loss


def precision(cfg: Config) -> str:
    """The precision that settings ask for, as `choose_precision` takes it; a CPU has fp32."""
    return "fp32" if cfg.precision == "auto" and cfg.device == "cpu" else cfg.precision


def check_precision(cfg: Config) -> None:
    """Refuse `--fp16` and `--bf16` on a CPU, in these words; a dry run may be for another machine.

    Raises:
        ConfigError: see above; there is no such device.
    """
    from lora_core.training.arguments import choose_device

    given = precision(cfg)
    if given not in ("fp16", "bf16") or (cfg.dry_run and cfg.device != "cpu"):
        return
    if choose_device(cfg.device).type == "cpu":
        raise ConfigError(f"--{given} True needs a GPU, and this run is on the CPU: leave it out")


def schedule(cfg: Config) -> Callable[[int, int], float]:
    """(update, updates) -> share of the peak learning rate, as `lr_scheduler_type` has it.

    These are transformers' own schedules: with a warm-up the first update is at 0.

    Raises:
        ConfigError: `lr_scheduler_kwargs` that the schedule does not know; from the function.
    """

    @cache
    def of_length(updates: int) -> Callable[[int], float]:
        from transformers import get_scheduler

        from lora_core.training.optimizer import settings_of

        # Some schedules look at the peak, which they find in an optimizer.
        probe = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=cfg.learning_rate)
        with settings_of("lr_scheduler_type and lr_scheduler_kwargs"):
            made: Any = get_scheduler(
                cfg.lr_scheduler_type,
                probe,
                cfg.warmup_updates(updates),
                updates,
                cfg.lr_scheduler_kwargs,
            )
        factor: Callable[[int], float] = made.lr_lambdas[0]
        return factor

    return lambda update, updates: float(of_length(updates)(update))


def total_updates(cfg: Config, per_epoch: int) -> int:
    """Optimizer updates of the whole run.

    Args:
        per_epoch: see `data.updates_per_epoch`.
    """
    import math

    if cfg.max_steps > 0:
        return cfg.max_steps
    return max(1, math.ceil(cfg.num_train_epochs * per_epoch))
