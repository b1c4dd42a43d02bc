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
import statistics
from dataclasses import dataclass, field
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # it would write about every measured peak

import torch
from measure import markdown, peak_bytes, timed, with_saved_bytes
from sam3_methods import build, loss_of, random_batch

CASES: dict[str, dict[str, Any]] = {
    "fp32": {"methods": ("floor", "lora_core", "PEFT", "full")},
    "fp32, no dropout": {"dropout": 0.0},
    "autocast": {"precision": "autocast"},
    "bf16 encoder": {"precision": "bf16"},
    "fp32, stock": {"stock": True},
    "autocast, stock": {"precision": "autocast", "stock": True},
}
USUAL = {"precision": "fp32", "stock": False, "methods": ("floor", "lora_core", "PEFT")}
MB = 1e6


@dataclass
class Cost:
    """Of one method's training steps.

    Attributes:
        trained: parameters. loss: before training. kept, peak: bytes.
        rounds: seconds of forward, backward and update of each step.
    """

    trained: int
    loss: float
    kept: int = 0
    peak: int = 0
    rounds: list[tuple[float, float, float]] = field(default_factory=list)

    @property
    def steps(self) -> list[float]:
        """Seconds of each whole step."""
        return [sum(parts) for parts in self.rounds]


class Contender:
    """A network in training by one method."""

    def __init__(self, method: str, args: argparse.Namespace) -> None:
        self.args, self.batch = args, random_batch(args)
        self.model, features = build(method, args, self.batch)
        if features is not None:
            self.batch["text_features"] = features
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained or [torch.zeros(1, requires_grad=True)], 1e-4)
        with torch.no_grad():
            loss = self.forward(self.model.eval()).item()
        self.model.train()
        self.cost = Cost(sum(p.numel() for p in trained), loss)

    def forward(self, model: Any) -> torch.Tensor:
        return loss_of(model, self.batch, self.args)

    def step(self) -> tuple[float, float, float]:
        """Seconds of forward, backward and update."""
        self.optimizer.zero_grad()
        first, loss = timed(lambda: self.forward(self.model), self.args.device)
        second, _ = timed(loss.backward, self.args.device)
        third, _ = timed(self.optimizer.step, self.args.device)
        return first, second, third

    def measure_memory(self) -> None:
        """Two steps, which warm up as well."""
        tensors = list(self.model.state_dict().values())
        self.cost.kept, loss = with_saved_bytes(lambda: self.forward(self.model), tensors)
        loss.backward()
        del loss
        self.optimizer.step()
        self.cost.peak = peak_bytes(self.step, self.args.device)


def measure(args: argparse.Namespace) -> dict[str, Cost]:
    """What the methods of one case cost."""
    contenders = {method: Contender(method, args) for method in args.methods}
    for one in contenders.values():
        one.measure_memory()
    order = list(contenders.values())
    for _ in range(args.rounds):
        for one in order:
            one.cost.rounds.append(one.step())
        order = [*order[1:], order[0]]
    return {method: one.cost for method, one in contenders.items()}


def ratio(one: Cost, other: Cost) -> float:
    """Median over the rounds."""
    return statistics.median(a / b for a, b in zip(one.steps, other.steps, strict=True))


def tables(results: dict[str, dict[str, Cost]]) -> str:
    """Figures of each method, and ours beside PEFT's."""
    header = ("case", "method", "trained", "loss", "forward s", "backward s", "update s")
    rows, shares = [], []
    for case, costs in results.items():
        for name, c in costs.items():
            seconds = (statistics.median(part) for part in zip(*c.rounds, strict=True))
            rows.append([case, name, f"{c.trained:,}", c.loss, *seconds, c.peak / MB, c.kept / MB])
        floor, ours, theirs = (costs[name] for name in USUAL["methods"])
        base = statistics.median(floor.steps)
        above = [statistics.median(c.steps) - base for c in (ours, theirs)]
        kept = [(c.kept - floor.kept) / MB for c in (ours, theirs)]
        times = (ratio(ours, theirs), ratio(ours, floor), ratio(theirs, floor))
        shares.append([case, *times, above[0] / above[1], *kept, kept[0] / kept[1]])
    second = (
        "case",
        "ours / PEFT",
        "ours / floor",
        "PEFT / floor",
        "(ours - floor) / (PEFT - floor)",
    )
    second += ("ours - floor, kept MB", "PEFT - floor, kept MB", "ratio")
    return f"{markdown((*header, 'peak MB', 'kept MB'), rows)}\n\n{markdown(second, shares)}"


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
        results[case] = measure(argparse.Namespace(**{**vars(args), **USUAL, **CASES[case]}))
        gc.collect()
    print(tables(results))


if __name__ == "__main__":
    main()
