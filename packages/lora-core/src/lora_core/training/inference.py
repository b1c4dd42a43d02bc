"""Running a network for its outputs alone: without gradients, in the precision of the device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import nn

from lora_core.training.arguments import choose_precision


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """Mixed precision for a setting: auto is bf16 or fp16 on a GPU, and fp32 on the CPU.

    Raises:
        ConfigError: this device cannot compute in that precision.
    """
    chosen = choose_precision(precision, device)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[chosen]
    return torch.autocast(device.type, dtype=dtype, enabled=chosen != "fp32")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients inside; every module's own mode comes back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
