"""The floor of a comparison of training methods: a frozen network whose gradients go as far."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


def begin_graph_at(model: nn.Module, paths: Iterable[str]) -> None:
    """Let the outputs of these layers need a gradient, although nothing is trained."""
    for path in paths:
        model.get_submodule(path).register_forward_hook(_begin)


def _begin(layer: nn.Module, inputs: Any, output: Tensor) -> None:
    if torch.is_grad_enabled() and not output.requires_grad:
        output.requires_grad_().register_post_accumulate_grad_hook(_forget)


def _forget(output: Tensor) -> None:
    output.grad = None  # no adapted layer would keep it either
