"""What training midi3d-lora takes of a GPU's memory at the released size; no GPU is needed.

    python tools/bench/midi3d_memory.py

The step of the whole transformer runs on tensors without values (`lora_core.memory`): weights and
activations in bf16, LoRA of rank 16 with dropout 0.1 on the default layers, latents and picture
embeddings (2048 and 1297 tokens) from the cache. A row is an instance. On a GPU come on top the
CUDA context, workspaces of libraries and fragmentation, about 1 GB.

`lora_core.memory` follows the CPU's code paths. Two things are otherwise on a GPU, and are so here
too, unless `--cpu` is given: the RMS norm is one kernel that keeps its input instead of a copy in
fp32, and LayerNorm has its statistics in fp32, from which adapters make their input again.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from midi3d_methods import Case, adapted_skeleton, loss_of, random_batch
from results import Table, publish
from torch import Tensor, nn
from torch.nn import functional as F

from lora_core import remade
from lora_core.memory import Estimate, estimate

GB = 1e9


class FusedRMSNorm(torch.autograd.Function):
    """What the GPU's kernel takes and keeps, without values."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: Any, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return torch.empty_like(ctx.saved_tensors[0]), None, None, None


def layer_norm(node: Any, shape: torch.Size) -> remade.Recipe | None:
    """How an adapter makes the output of a LayerNorm again, without values."""
    if not remade._can_read(node, "input"):
        return None
    return lambda: torch.empty_like(node._saved_input)


@contextlib.contextmanager
def as_on_gpu() -> Iterator[None]:
    """See above."""
    with (
        patch.object(F, "rms_norm", FusedRMSNorm.apply),
        patch.dict(remade._OPERATIONS, {"NativeLayerNormBackward0": layer_norm}),
    ):
        yield


def estimated(case: Case) -> Estimate:
    """Bytes of each kind."""

    def loss(net: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        return loss_of(net, batch, case), {}

    return estimate(adapted_skeleton(case), loss, random_batch(case), "bf16")


def line(rows: int, rank: int, checkpointing: bool) -> list[object]:
    """A row of the table."""
    found = estimated(
        Case(
            layers=21, instances=rows, tokens=2048, picture_tokens=1297, rank=rank,
            precision="bf16", checkpointing=checkpointing,
        )
    )  # fmt: skip
    fixed = found.weights + found.adapters + found.gradients + found.moments
    parts = (fixed, found.activations, found.workspace, found.total)
    return ["yes" if checkpointing else "no", rows, *(f"{part / GB:.2f}" for part in parts)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--cpu", action="store_true", help="as the CPU computes it")
    parser.add_argument("--json", type=Path, help="write the tables to this file too")
    args = parser.parse_args()
    with contextlib.nullcontext() if args.cpu else as_on_gpu():
        lines = [line(n, args.rank, on) for on in (True, False) for n in args.rows]
    header = [
        "checkpointing", "rows", "weights, adapters, AdamW: GB", "kept", "workspace", "together",
    ]  # fmt: skip
    publish({"memory": Table(header, lines)}, args.json)


if __name__ == "__main__":
    main()
