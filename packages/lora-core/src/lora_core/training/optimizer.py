"""The optimizer of the adapters and its schedule, from transformers' arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import Trainer, TrainingArguments, get_scheduler

from lora_core.errors import ConfigError
from lora_core.injection import parameter_groups
from lora_core.training.schedule import lr_factor


@contextmanager
def settings_of(names: str) -> Iterator[None]:
    """What torch refuses of fields of TrainingArguments, as a fault of the settings."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{names} do not go together: {error}") from error


def optimizer_of(args: TrainingArguments) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """Class and settings of the field `optim`.

    Raises:
        ConfigError: it is not installed, settings that it does not know, or one that is not made
            of parameter groups.
    """
    try:
        with settings_of("optim, optim_args and adam_..."):
            cls, settings = Trainer.get_optimizer_cls_and_kwargs(args)
    except ImportError as error:
        raise ConfigError(f"optim {args.optim}: {error}") from error
    if not (isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)) or (
        settings.keys() & {"params", "model", "optimizer_dict"}
    ):
        raise ConfigError(f"optim {args.optim} does not train adapters only")
    return cls, settings


def create_optimizer(
    network: nn.Module, args: TrainingArguments, b_lr_ratio: float = 1.0
) -> torch.optim.Optimizer:
    """AdamW, or what the field `optim` names, on the parameter groups of the adapters.

    Raises:
        ConfigError: see `optimizer_of`.
    """
    cls, settings = optimizer_of(args)
    groups = parameter_groups(network, args.learning_rate, args.weight_decay, b_lr_ratio)
    with settings_of("optim, optim_args and adam_..."):
        return cls(groups, **settings)


def create_schedule(
    optimizer: Any,
    args: TrainingArguments,
    updates: int,
    factor: Callable[[int, int], float] | None = None,
) -> LRScheduler:
    """Plain `cosine` is a warm-up from peak / w and one cosine to 1 % of the peak.

    transformers' own starts with an update at learning rate 0 and ends at 0.

    Args:
        factor: (update, updates) -> share of the peak, in place of that cosine.

    Raises:
        ConfigError: settings that the schedule does not know.
    """
    warmup = args.get_warmup_steps(updates)
    if args.lr_scheduler_type == "cosine" and not args.lr_scheduler_kwargs:
        if factor is not None:
            return LambdaLR(optimizer, lambda update: factor(update, updates))
        return LambdaLR(optimizer, lambda update: lr_factor(update, warmup, updates))
    with settings_of("lr_scheduler_type and lr_scheduler_kwargs"):
        schedule: LRScheduler = get_scheduler(
            args.lr_scheduler_type, optimizer, warmup, updates, args.lr_scheduler_kwargs
        )
    return schedule
