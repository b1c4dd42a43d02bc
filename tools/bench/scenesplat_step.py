"""What one training step of scenesplat-lora costs: seconds, peak memory, bytes kept for backward.

    OMP_NUM_THREADS=1 python tools/bench/scenesplat_step.py
    OMP_NUM_THREADS=1 python tools/bench/scenesplat_step.py --cases guide --depth whole

The network is the released language model with its own widths and one block per stage, with random
weights, one room, language features, loss and AdamW. LoRA is on qkv and proj, rank 8, of the
encoder, as the guide has it, or of encoder and decoder. Four methods:

    floor      nothing is trained: the frozen network, where the gradient graph begins at the
               outputs of the same target Linears (the earliest ones; behind them it exists anyway).
               It keeps what any method needs that sends gradients to these layers.
    lora_core  the adapters of `scenesplat-lora train`
    PEFT       `peft.get_peft_model` on the same network with the same targets, rank and dropout
    full       full fine-tuning (case guide only)

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
from dataclasses import replace
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # it would write about every measured peak

import torch
from scenesplat_methods import DEPTHS, Case, build, loss_of, random_batch
from training_step import METHODS, Contender, measure, tables

BOTH = ("enc", "dec")
CASES: dict[str, dict[str, Any]] = {
    "guide": {},
    "guide, dropout": {"dropout": 0.05},
    "with decoder": {"parts": BOTH},
    "with decoder, dropout": {"parts": BOTH, "dropout": 0.05},
}


def contender(method: str, case: Case) -> Contender:
    """The network in training by one method."""
    batch = random_batch(case)
    return Contender(
        build(method, case), lambda model: loss_of(model, batch), case.device, batch.values()
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--voxels", type=int, default=2000)
    parser.add_argument("--depth", choices=DEPTHS, default="whole")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    usual = Case(args.voxels, args.depth, rank=args.rank, device=args.device)
    results = {}
    for name in args.cases:
        methods = (*METHODS, "full") if name == "guide" else METHODS
        case = replace(usual, **CASES[name])
        results[name] = measure({m: contender(m, case) for m in methods}, args.rounds)
        gc.collect()
    print(tables(results))


if __name__ == "__main__":
    main()
