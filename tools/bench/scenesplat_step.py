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
import statistics
from dataclasses import dataclass, field, replace
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # it would write about every measured peak

import torch
from measure import markdown, peak_bytes, timed, with_saved_bytes
from scenesplat_methods import DEPTHS, Case, build, loss_of, random_batch

BOTH = ("enc", "dec")
CASES: dict[str, dict[str, Any]] = {
    "guide": {},
    "guide, dropout": {"dropout": 0.05},
    "with decoder": {"parts": BOTH},
    "with decoder, dropout": {"parts": BOTH, "dropout": 0.05},
}
METHODS = ("floor", "lora_core", "PEFT")
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

    def __init__(self, method: str, case: Case) -> None:
        self.device, self.batch = case.device, random_batch(case)
        self.model = build(method, case)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained or [torch.zeros(1, requires_grad=True)], 1e-4)
        with torch.no_grad():
            loss = loss_of(self.model.eval(), self.batch).item()
        self.model.train()
        self.cost = Cost(sum(p.numel() for p in trained), loss)

    def step(self) -> tuple[float, float, float]:
        """Seconds of forward, backward and update."""
        self.optimizer.zero_grad()
        first, loss = timed(lambda: loss_of(self.model, self.batch), self.device)
        second, _ = timed(loss.backward, self.device)
        third, _ = timed(self.optimizer.step, self.device)
        return first, second, third

    def measure_memory(self) -> None:
        """Two steps, which warm up as well."""
        known = [*self.model.state_dict().values(), *self.batch.values()]
        self.cost.kept, loss = with_saved_bytes(lambda: loss_of(self.model, self.batch), known)
        loss.backward()
        del loss
        self.optimizer.step()
        self.cost.peak = peak_bytes(self.step, self.device)


def measure(case: Case, methods: tuple[str, ...], rounds: int) -> dict[str, Cost]:
    """What the methods of one case cost."""
    contenders = {method: Contender(method, case) for method in methods}
    for one in contenders.values():
        one.measure_memory()
    order = list(contenders.values())
    for _ in range(rounds):
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
        floor, ours, theirs = (costs[name] for name in METHODS)
        kept = [(c.kept - floor.kept) / MB for c in (ours, theirs)]
        times = (ratio(ours, theirs), ratio(ours, floor), ratio(theirs, floor))
        shares.append([case, *times, *kept, kept[0] / kept[1]])
    second = ("case", "ours / PEFT", "ours / floor", "PEFT / floor", "ours - floor, kept MB")
    second += ("PEFT - floor, kept MB", "ratio")
    return f"{markdown((*header, 'peak MB', 'kept MB'), rows)}\n\n{markdown(second, shares)}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--voxels", type=int, default=2000)
    parser.add_argument("--depth", choices=DEPTHS, default="short")
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
        results[name] = measure(replace(usual, **CASES[name]), methods, args.rounds)
        gc.collect()
    print(tables(results))


if __name__ == "__main__":
    main()
