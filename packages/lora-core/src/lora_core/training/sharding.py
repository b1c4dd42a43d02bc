"""The frozen base divided among the processes of a run (FSDP2); adapters stay whole everywhere.

A base takes far more memory than its adapters. Each process keeps a part of every block and
fetches the rest while that block computes, forward and backward. Adapters are trained by DDP as
without this, so checkpoints, optimizer state and a resume on other numbers of processes are the
same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from lora_core.distributed import world_size
from lora_core.report import say


def shard(blocks: Sequence[nn.Module], device: torch.device) -> list[nn.Module]:
    """Divide the frozen parameters of each block among the processes; gives what was divided.

    Args:
        blocks: modules that are called equally often in every process, such as the layers of an
            image encoder: a process that leaves one out would keep the others waiting.
        device: where they compute.
    """
    if world_size() == 1:
        if blocks:
            say("--shard_base has no effect on a single process: start with torchrun")
        return []
    mesh = init_device_mesh(device.type, (world_size(),))
    divided = []
    for block in blocks:
        trained = {parameter for parameter in block.parameters() if parameter.requires_grad}
        if any(parameter not in trained for parameter in block.parameters()):
            fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=trained)
            divided.append(block)
    return divided


def gather(blocks: Sequence[Any]) -> None:
    """Make the blocks whole in every process until `scatter`; all processes call it."""
    for block in blocks:
        block.set_reshard_after_forward(False)
        block.unshard()
        for module in block.modules():
            _let_state_dict_be(module)


def _let_state_dict_be(module: nn.Module) -> None:
    """FSDP divides a block that `state_dict` is called on, in this process alone."""
    hooks = module._state_dict_pre_hooks
    for key, hook in list(hooks.items()):
        if getattr(hook, "__name__", "") == "to_sharded_hook":
            del hooks[key]


def scatter(blocks: Sequence[Any]) -> None:
    """Keep only this process's part of the blocks; needs no other process."""
    for block in blocks:
        block.reshard()
        block.set_reshard_after_forward(True)


@contextmanager
def whole(blocks: Sequence[Any]) -> Iterator[None]:
    """Within the block single processes may call the model; all processes enter it."""
    gather(blocks)
    yield  # after an exception in one process nothing is left to put back
    scatter(blocks)


def data_parallel(module: nn.Module, device: torch.device, **settings: Any) -> nn.Module:
    """DDP around a module with divided blocks, whose parameters it leaves to them.

    Args:
        module: on `device`.
        settings: further ones of DistributedDataParallel.
    """
    left_out = [name for name, p in module.named_parameters() if hasattr(p, "full_tensor")]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, left_out)
    devices = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(module, device_ids=devices, **settings)
