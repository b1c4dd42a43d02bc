"""What one training step of isaac-lora costs: seconds, peak memory, bytes kept for the backward.

    OMP_NUM_THREADS=1 python tools/bench/isaac_step.py
    OMP_NUM_THREADS=1 python tools/bench/isaac_step.py --cases fp32 --full --tokens 512

All widths are Isaac-0.1's (decoder 2048 and 6144, 16 heads for queries and 8 for keys, vision tower
1152, projector 4608 to 18432), with 2 of 28 layers of the decoder, 2 of 27 of the tower, and 4096
of 151,936 words; random weights. One conversation of 256 tokens: a picture of 16 x 16 patches,
which takes 64 of them, and 32 labels. Default layers of `isaac-lora train`, its loss, and AdamW.
Four methods:

    floor      nothing is trained: the frozen network, where the gradient graph begins at the
               outputs of the same target Linears (the earliest ones; behind them it exists anyway).
               It keeps what any method needs that sends gradients to these layers.
    lora_core  the adapters of `isaac-lora train`
    PEFT       `peft.get_peft_model` on the same network with the same targets, rank and dropout
    full       full fine-tuning of all but the tower (`--full`)

The methods take turns in one process: a round is one step of each. Seconds are medians over the
rounds, ratios medians of each round's ratio; on the CPU they are the process' own time. `kept`
counts the storages saved for the backward pass at the end of the forward pass, each once,
parameters excluded. `peak` is the most that a step's tensors take beyond weights and AdamW's state.
`loss` is that of the untrained network in evaluation mode: equal where the same is computed.
"""

from __future__ import annotations

import argparse
import gc
import os
from dataclasses import fields
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # it would write about every measured peak

import torch
from isaac_methods import Case, build, loss_of, random_batch, random_weights
from torch import Tensor, nn
from training_step import METHODS, Contender, measure, tables

BF16 = {"precision": "bf16"}
CASES: dict[str, dict[str, Any]] = {
    "fp32": {},
    "fp32, no dropout": {"dropout": 0.0},
    "fp32, rank 16": {"rank": 16},
    "fp32, checkpointing": {"checkpointing": True},
    "bf16 base": BF16,
    "bf16 base, no dropout": BF16 | {"dropout": 0.0},
    "bf16 base, rank 16": BF16 | {"rank": 16},
    "bf16 base, checkpointing": BF16 | {"checkpointing": True},
}


def contender(method: str, case: Case, weights: dict[str, Tensor]) -> Contender:
    """The model in training by one method."""
    batch = random_batch(case)

    def forward(model: nn.Module) -> Tensor:
        return loss_of(model, batch, case)

    return Contender(build(method, case, weights), forward, case.device, batch.values())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    for size in fields(Case):
        if type(size.default) is int:
            parser.add_argument(f"--{size.name}", type=int, default=argparse.SUPPRESS)
    parser.add_argument("--cached", action="store_true", help="as with --cache_vision")
    parser.add_argument("--full", action="store_true", help="full fine-tuning as well")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    given = {size.name: getattr(args, size.name) for size in fields(Case) if size.name in args}
    results = {}
    for name in args.cases:
        case = Case(**(CASES[name] | given))
        weights = random_weights(case)
        methods = (*METHODS, "full") if args.full else METHODS
        results[name] = measure({m: contender(m, case, weights) for m in methods}, args.rounds)
        gc.collect()
    print(tables(results))


if __name__ == "__main__":
    main()
