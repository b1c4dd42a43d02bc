"""What training isaac-lora takes of memory at the released size; no weights and no GPU are needed.

    python tools/bench/isaac_memory.py --logits
    python tools/bench/isaac_memory.py --rank 128 --tokens 1024 4096

Everything runs on tensors without values (`lora_core.memory`), so that bytes are exact for the
CPU's code paths; on a GPU come on top the CUDA context, workspaces of libraries and fragmentation.

With `--logits` it is the loss of one sequence alone: the head of 151,936 words on hidden states in
bf16, prompts of several lengths, and a fixed number of labels behind them. `labelled places` is
what isaac-lora computes, `all places` the loss of transformers (`ForCausalLMLoss`) on all logits.
`kept` is saved for the backward pass, `peak` the most that exists at once, gradients included.

Without it, it is the step of the whole Isaac-0.1 in bf16, adapters in fp32: one sequence of so many
tokens, of which a picture takes 256 and the labels 64, for the floor, lora_core and PEFT (see
`step.py`).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import peft
import torch
from isaac_methods import RELEASED, Case, adapted, loss_of, random_batch, skeleton
from results import Table, publish
from torch import Tensor, nn
from training_step import METHODS
from transformers.loss.loss_utils import ForCausalLMLoss

from isaac_lora.conversations.samples import IGNORED
from isaac_lora.network.token_loss import token_loss
from lora_core.memory import estimate, simulate

GB = 1e9
WIDTH, WORDS = 2048, RELEASED["vocabulary"]


# -- the loss alone --------------------------------------------------------------------------------


def labelled_places(head: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of isaac-lora."""
    return token_loss(batch["states"], batch["labels"], head, WORDS), {}


def all_places(head: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of transformers."""
    return ForCausalLMLoss(head(batch["states"]), batch["labels"], WORDS), {}


def states_and_labels(prompt: int, labels: int) -> dict[str, Tensor]:
    """One sequence: hidden states [1, prompt + labels, C] that want gradients, and its labels."""
    states = torch.zeros(1, prompt + labels, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    numbers = torch.zeros(1, prompt + labels, dtype=torch.int64)
    numbers[:, :prompt] = IGNORED
    return {"states": states, "labels": numbers}


def logits_table(prompts: list[int], labels: int) -> Table:
    """GB of both losses by the length of the prompt."""
    rows = []
    for prompt in prompts:
        row: list[object] = [prompt, labels]
        for loss in (labelled_places, all_places):
            head = nn.Linear(WIDTH, WORDS, bias=False, device="meta", dtype=torch.bfloat16)
            step = simulate(head.requires_grad_(False), loss, states_and_labels(prompt, labels))
            row += [f"{step.saved / GB:.3f}", f"{step.peak / GB:.3f}"]
        rows.append(row)
    header = [
        "prompt", "labels", "labelled places: kept GB", "peak", "all places: kept GB", "peak",
    ]  # fmt: skip
    return Table(header, rows)


# -- the whole model -------------------------------------------------------------------------------


def step_row(method: str, case: Case) -> list[object]:
    """A row of the table of whole steps."""

    def loss(model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        inner = model.get_base_model() if isinstance(model, peft.PeftModel) else model
        return loss_of(inner, batch, case), {}

    model = adapted(method, skeleton(case), case)
    found = estimate(model, loss, random_batch(case), "bf16")
    fixed = found.weights + found.adapters + found.gradients + found.moments
    parts = (fixed, found.activations, found.workspace, found.total)
    checkpointing = "yes" if case.checkpointing else "no"
    return [case.tokens, checkpointing, method, *(f"{part / GB:.2f}" for part in parts)]


def steps_table(args: argparse.Namespace) -> Table:
    """GB of a step by tokens, checkpointing and method."""
    sizes = {**RELEASED, **({"layers": args.layers} if args.layers else {})}
    cases = [
        Case(
            **sizes, tokens=tokens, labels=args.labels, side=32, rank=args.rank,
            precision="bf16", checkpointing=checkpointing,
        )
        for tokens in args.tokens
        for checkpointing in (False, True)
    ]  # fmt: skip
    header = [
        "tokens", "checkpointing", "method", "weights, adapters, AdamW: GB", "kept", "workspace",
        "together",
    ]  # fmt: skip
    return Table(header, [step_row(method, case) for case in cases for method in METHODS])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--logits", action="store_true", help="the loss alone")
    parser.add_argument("--prompts", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096])
    parser.add_argument("--labels", type=int, default=64)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--layers", type=int, help="of the decoder, in place of all 28")
    parser.add_argument("--json", type=Path, help="write the tables to this file too")
    args = parser.parse_args()
    if args.logits:
        publish({"logits": logits_table(args.prompts, args.labels)}, args.json)
    else:
        publish({"memory": steps_table(args)}, args.json)


if __name__ == "__main__":
    main()
