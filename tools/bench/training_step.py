"""What training steps of several methods cost, side by side: seconds, peak memory, kept bytes."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from measure import markdown, peak_bytes, timed
from torch import Tensor, nn

from lora_core.memory import saved_bytes

METHODS = ("floor", "lora_core", "PEFT")
MB = 1e6
FIGURES = (
    "case", "method", "trained", "loss", "forward s", "backward s", "update s", "peak MB",
    "kept MB",
)  # fmt: skip
SHARES = (
    "case", "ours / PEFT", "ours / floor", "PEFT / floor", "(ours - floor) / (PEFT - floor)",
    "ours - floor, kept MB", "PEFT - floor, kept MB", "ratio",
)  # fmt: skip


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
    """A network in training by one method.

    Args:
        model: some of its parameters train, or none.
        forward: a model -> its loss.
        batch: tensors that are there anyway, as the model's own: they do not count as kept.
    """

    def __init__(
        self,
        model: nn.Module,
        forward: Callable[[nn.Module], Tensor],
        device: str,
        batch: Iterable[Tensor] = (),
    ) -> None:
        self.model, self.forward, self.device, self.batch = model, forward, device, list(batch)
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained or [torch.zeros(1, requires_grad=True)], 1e-4)
        with torch.no_grad():
            loss = forward(model.eval()).item()
        model.train()
        self.cost = Cost(sum(p.numel() for p in trained), loss)

    def step(self) -> tuple[float, float, float]:
        """Seconds of forward, backward and update."""
        self.optimizer.zero_grad()
        first, loss = timed(lambda: self.forward(self.model), self.device)
        second, _ = timed(loss.backward, self.device)
        third, _ = timed(self.optimizer.step, self.device)
        return first, second, third

    def measure_memory(self) -> None:
        """Two steps, which warm up as well."""
        known = [*self.model.state_dict().values(), *self.batch]
        self.cost.kept, loss = saved_bytes(lambda: self.forward(self.model), known)
        loss.backward()
        del loss
        self.optimizer.step()
        self.cost.peak = peak_bytes(self.step, self.device)


def measure(contenders: Mapping[str, Contender], rounds: int) -> dict[str, Cost]:
    """What the methods of one case cost; in every round each takes a step, in another order."""
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


def tables(results: Mapping[str, Mapping[str, Cost]]) -> str:
    """Figures of each method, and ours beside PEFT's."""
    rows, shares = [], []
    for case, costs in results.items():
        for name, c in costs.items():
            seconds = (statistics.median(part) for part in zip(*c.rounds, strict=True))
            rows.append([case, name, f"{c.trained:,}", c.loss, *seconds, c.peak / MB, c.kept / MB])
        floor, ours, theirs = (costs[name] for name in METHODS)
        base = statistics.median(floor.steps)
        above = [statistics.median(c.steps) - base for c in (ours, theirs)]
        kept = [(c.kept - floor.kept) / MB for c in (ours, theirs)]
        times = (ratio(ours, theirs), ratio(ours, floor), ratio(theirs, floor))
        shares.append([case, *times, above[0] / above[1], *kept, kept[0] / kept[1]])
    return f"{markdown(FIGURES, rows)}\n\n{markdown(SHARES, shares)}"
