"""The loss of a model as one module, and its value under the run's precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lora_core.memory import AUTOCAST

# (model, batch) -> (scalar, its parts by name)
Loss = Callable[[nn.Module, Any], tuple[Tensor, dict[str, Any]]]


class LossModule(nn.Module):
    """The loss as a module, so that DDP and autocast see one forward.

    In training mode frozen layers with running statistics stay in eval mode: their statistics
    are part of the base.
    """

    def __init__(self, network: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.network = network
        self.loss = loss

    def forward(self, batch: Any) -> tuple[Tensor, dict[str, Any]]:
        return self.loss(self.network, batch)

    def train(self, mode: bool = True) -> LossModule:
        super().train(mode)
        for module in self.network.modules():
            has_statistics = getattr(module, "running_mean", None) is not None
            if has_statistics and not any(p.requires_grad for p in module.parameters()):
                module.eval()
        return self


def batch_loss(module: nn.Module, batch: Any, precision: str) -> Tensor:
    """Compute the loss of a CPU batch on the module's device, outside of a trainer.

    Args:
        module: a `LossModule`.
        precision: fp32, or bf16 or fp16 under autocast.
    """
    device, dtype = next(module.parameters()).device, AUTOCAST.get(precision)
    batch = tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, batch)
    with torch.autocast(device.type, dtype, enabled=dtype is not None):
        value: Tensor = module(batch)[0]
    return value
