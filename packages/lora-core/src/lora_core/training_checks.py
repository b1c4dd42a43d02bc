"""Guards around training: nothing runs for hours in vain, nothing is spoiled in silence."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lora_core import checkpoint
from lora_core.errors import ConfigError, DataError, NumericError
from lora_core.report import say

if TYPE_CHECKING:
    from transformers import TrainingArguments


def check_samples(train_set: Any, args: TrainingArguments) -> None:
    needed = args.per_device_train_batch_size * args.world_size if args.dataloader_drop_last else 1
    if len(train_set) < needed:
        raise DataError(
            f"{len(train_set)} training samples make no batch: at least {needed} are needed"
        )


def check_trainable(model: nn.Module) -> None:
    """Insist on something to train, in fp32: half precision would lose the small updates."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trainable:
        raise ConfigError("nothing to train: no parameter of the model requires a gradient")
    for parameter in trainable:
        if parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()


def check_finite(model: nn.Module, window: dict[str, list[Any]], step: int) -> None:
    """Stop before a NaN reaches the weights and the moments; DDP has it on all ranks alike."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    if not grads or torch.isfinite(torch.nn.utils.get_total_norm(grads)):
        return
    parts = [name for name, (total, _) in window.items() if not math.isfinite(float(total))]
    raise NumericError(
        f"step {step}: the gradient is not finite, so no weight was changed. "
        f"Not finite in the loss: {', '.join(parts) or 'nothing, only its gradient'}. "
        "Lower the learning rate, use fp32 or bf16, or look for a bad sample"
    )


def check_moved(model: nn.Module, before: dict[str, Tensor]) -> None:
    """After the first update every B that saw a gradient has left its initial value."""
    now = dict(model.named_parameters())
    still = [name for name, value in before.items() if torch.equal(now[name], value)]
    if len(still) == len(before):
        raise NumericError(
            "no adapter moved in the first update: no gradient reaches any lora_B. "
            "Part of the model runs under no_grad, or in reentrant checkpointing"
        )
    if still:
        say(f"{len(still)} of {len(before)} adapters did not move in the first update:")
        say("  " + ", ".join(still[:3]) + (", ..." if len(still) > 3 else ""))


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Evaluate inside: eval mode; modes and all random generators are put back after it."""
    modes = {module: module.training for module in model.modules()}
    randoms = checkpoint.random_state()
    model.eval()
    try:
        yield
    finally:
        checkpoint.set_random_state(randoms)
        for module, mode in modes.items():
            module.training = mode
