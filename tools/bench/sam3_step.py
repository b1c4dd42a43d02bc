"""What one training step of sam3-lora costs: seconds, peak memory, bytes kept for the backward.

    OMP_NUM_THREADS=1 python tools/bench/sam3_step.py
    OMP_NUM_THREADS=1 python tools/bench/sam3_step.py --cases fp32 --image_size 672

The network has the published widths and an eighth of the depth, random weights, pictures, phrases
and targets, the default layers of `sam3-lora train`, the official loss and AdamW. Four methods:

    floor      nothing is trained: the frozen network, where the gradient graph begins at the
               outputs of the same target Linears (the earliest ones; behind them it exists anyway).
               It keeps what any method needs that sends gradients to these layers.
    lora_core  the adapters of `sam3-lora train`
    PEFT       `peft.get_peft_model` on the same network with the same targets, rank and dropout
    full       full fine-tuning of all but the text encoder (case fp32 only)

All of them run `sam3_lora.network` with text features that were computed once, so that only the
adapters differ. In the cases "stock" PEFT's network runs `Sam3Model.forward` instead, text encoder
included, as its users have it. That gives the last decoder layer only, without one-to-many half,
and always masks: there all methods have the loss of just that, masks included.

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
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # it would write about every measured peak

import torch
from sam3_methods import build, loss_of, random_batch
from torch import Tensor, nn
from training_step import METHODS, Contender, measure, tables

CASES: dict[str, dict[str, Any]] = {
    "fp32": {"methods": (*METHODS, "full")},
    "fp32, no dropout": {"dropout": 0.0},
    "autocast": {"precision": "autocast"},
    "bf16 encoder": {"precision": "bf16"},
    "fp32, stock": {"stock": True},
    "autocast, stock": {"precision": "autocast", "stock": True},
}
USUAL = {"precision": "fp32", "stock": False, "methods": METHODS}


def contender(method: str, args: argparse.Namespace) -> Contender:
    """The network in training by one method."""
    batch = random_batch(args)
    model, features = build(method, args, batch)
    if features is not None:
        batch["text_features"] = features

    def forward(model: nn.Module) -> Tensor:
        return loss_of(model, batch, args)

    return Contender(model, forward, args.device)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--image_size", type=int, default=336)
    parser.add_argument("--vision_layers", type=int, default=4, help="every fourth one global")
    parser.add_argument("--text_layers", type=int, default=3)
    parser.add_argument("--detr_layers", type=int, default=1, help="of encoder and decoder each")
    parser.add_argument("--images", type=int, default=1)
    parser.add_argument("--phrases", type=int, default=2, help="asked of each image")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = {}
    for case in args.cases:
        given = argparse.Namespace(**{**vars(args), **USUAL, **CASES[case]})
        results[case] = measure({m: contender(m, given) for m in given.methods}, args.rounds)
        gc.collect()
    print(tables(results))


if __name__ == "__main__":
    main()
