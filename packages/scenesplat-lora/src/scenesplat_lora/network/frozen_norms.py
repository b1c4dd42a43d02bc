"""Frozen batch norms keep their running statistics, whatever mode the model is in.

Stem, poolings and unpoolings have batch norms. In training mode a frozen one would still move its
statistics, which are no part of an adapter: base and adapter together would differ from what was
trained.
"""

from __future__ import annotations

from typing import Any

from torch import nn


def freeze_statistics(model: nn.Module) -> None:
    """From now on every batch norm without a trained parameter computes as in evaluation."""
    for module in model.modules():
        if getattr(module, "running_mean", None) is not None and not _hooks(module):
            module.register_forward_pre_hook(stay_frozen)


def unfreeze_statistics(model: nn.Module) -> None:
    """Undo `freeze_statistics`. The mode of the layers becomes the model's own."""
    for module in model.modules():
        for handle in _hooks(module):
            del module._forward_pre_hooks[handle]
            module.train(model.training)


def stay_frozen(norm: nn.Module, inputs: Any) -> None:
    """Forward pre-hook of a batch norm, without state, so that copies of a model are their own."""
    if norm.training and not any(p.requires_grad for p in norm.parameters()):
        norm.eval()


def _hooks(module: nn.Module) -> list[int]:
    return [handle for handle, hook in module._forward_pre_hooks.items() if hook is stay_frozen]
