"""What one training step of midi3d-lora costs: seconds, peak memory, bytes kept for the backward.

    OMP_NUM_THREADS=1 python tools/bench/midi3d_step.py
    OMP_NUM_THREADS=1 python tools/bench/midi3d_step.py --cases fp32 --width 1024 --layers 5

The transformer has the released width, 3 of 21 blocks (the middle one joins the instances of a
scene, the last one has a skip) and a sixteenth of the tokens; random weights; one scene of two
instances whose latents and picture embeddings come from the cache; the default layers of
`midi3d-lora train`, its loss and AdamW. Four methods:

    floor      nothing is trained: the frozen network, where the gradient graph begins at the
               outputs of the same target Linears (the earliest ones; behind them it exists anyway).
               It keeps what any method needs that sends gradients to these layers.
    lora_core  the adapters of `midi3d-lora train`
    PEFT       `peft.get_peft_model` on the same network with the same targets, rank and dropout
    full       full fine-tuning (`--full`)

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
from dataclasses import fields, replace
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # it would write about every measured peak

import torch
from midi3d_methods import Case, base, build, loss_of, random_batch
from torch import Tensor, nn
from training_step import METHODS, Contender, measure, tables

CASES: dict[str, dict[str, Any]] = {
    "fp32": {},
    "fp32, no dropout": {"dropout": 0.0},
    "autocast": {"precision": "autocast"},
    "autocast, no dropout": {"precision": "autocast", "dropout": 0.0},
    "bf16 base": {"precision": "bf16"},
    "bf16 base, no dropout": {"precision": "bf16", "dropout": 0.0},
    "fp32, checkpointing": {"checkpointing": True},
}


def contender(method: str, case: Case, weights: dict[str, Tensor]) -> Contender:
    """The transformer in training by one method."""
    batch = random_batch(case)

    def forward(model: nn.Module) -> Tensor:
        return loss_of(model, batch, case)

    return Contender(build(method, case, weights), forward, case.device, batch.tensors())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    for size in fields(Case):
        if type(size.default) is int:
            parser.add_argument(f"--{size.name}", type=int, default=size.default)
    parser.add_argument("--full", action="store_true", help="full fine-tuning as well")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    given = {size.name: getattr(args, size.name) for size in fields(Case) if size.name in args}
    results = {}
    for name in args.cases:
        case = replace(Case(**given), **CASES[name])
        weights = base(case).to(case.device).state_dict()
        methods = (*METHODS, "full") if args.full else METHODS
        results[name] = measure({m: contender(m, case, weights) for m in methods}, args.rounds)
        gc.collect()
    print(tables(results))


if __name__ == "__main__":
    main()
