"""What training steps of several methods cost, side by side: seconds, peak memory, kept bytes.

A package's module, such as `sam2_methods`, says what is trained:

    CASES           name -> case, a frozen dataclass; the first one has the guide's settings
    VARIANTS        further methods of ours -> fields of the case that they change
    random_weights  case -> state dict of the frozen network, shared by all methods
    build           method, case, weights -> the network, in training
    step_batch      case, weights -> a batch, shared by all methods
    loss_of         network, batch, case -> the loss of one forward pass

All methods compute the same loss before training, but for those in a case's `other_loss`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import partial
from typing import Any

import torch
from floor import begin_graph_at
from measure import peak_bytes, ratio, timed
from results import Table
from torch import Tensor, nn

from lora_core.config import LoraConfig
from lora_core.injection import inject
from lora_core.memory import saved_bytes
from lora_core.module_names import only
from lora_core.targets import resolve

METHODS = ("floor", "lora_core", "PEFT")
MB = 1e6
NONE: Any = "–"
STEPS = (
    "case", "method", "trained", "forward s", "backward s", "update s", "peak MB", "kept MB",
)  # fmt: skip
RATIOS = (
    "case", "method", "time / floor", "time / PEFT", "kept above the floor MB", "/ PEFT's",
)  # fmt: skip
TOLERANCE = {"fp32": 1e-5}  # of losses, relative; adapters that have not learned yet add 0
HALF_TOLERANCE = 1e-2


# -- methods ---------------------------------------------------------------------------------------


def methods_of(package: Any) -> tuple[str, ...]:
    """All methods that a package's step is compared in."""
    return (*METHODS, "full", *package.VARIANTS)


def train_by(
    method: str, model: nn.Module, config: LoraConfig, never: Iterable[str] = ()
) -> nn.Module:
    """Let a frozen network train by one method, in place; gives it in training mode.

    Args:
        method: "floor": nothing trains, but the graph begins at the targets. "lora_core", "PEFT":
            adapters on the targets. "full": all parameters, which become copies.
        config: rank, alpha, dropout and targets.
        never: paths of modules that stay frozen in full fine-tuning too.
    """
    if method == "floor":
        begin_graph_at(model, resolve(model, config))
    elif method == "lora_core":
        inject(model, config)
    elif method == "PEFT":
        with_peft(model, config)
    elif method == "full":
        unfreeze(model, never)
    else:
        raise ValueError(f"unknown method {method!r}")
    return model.train()


def with_peft(model: nn.Module, config: LoraConfig) -> None:
    """PEFT's adapters, in place, on the layers that lora_core would take."""
    import peft

    settings = peft.LoraConfig(
        r=config.r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=only(resolve(model, config)),
    )
    peft.get_peft_model(model, settings)


def unfreeze(model: nn.Module, never: Iterable[str]) -> None:
    """Train copies of the parameters: other networks may share the originals."""
    frozen = {id(p) for path in never for p in model.get_submodule(path).parameters()}
    for parameter in model.parameters():
        if id(parameter) not in frozen:
            parameter.data = parameter.data.clone()
            parameter.requires_grad_(True)


def last_quarter(blocks: int) -> int:
    """How many of the blocks are adapted where only the last ones are."""
    return math.ceil(blocks / 4)


# -- measuring -------------------------------------------------------------------------------------


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


def contenders(package: Any, case: Any, methods: Sequence[str]) -> dict[str, Contender]:
    """The network of a case in training by each of the methods.

    Raises:
        ValueError: two methods that should compute the same loss do not.
    """
    weights = package.random_weights(case)
    batch = package.step_batch(case, weights)
    found = {}
    for method in methods:
        changes = package.VARIANTS.get(method)
        changed = replace(case, **(changes or {}))
        model = package.build(method if changes is None else "lora_core", changed, weights)
        forward = partial(package.loss_of, batch=batch, case=changed)
        found[method] = Contender(model, forward, case.device, tensors_in(batch))
    other = getattr(case, "other_loss", ())
    check_losses({m: one.cost.loss for m, one in found.items() if m not in other}, case.precision)
    return found


def check_losses(losses: Mapping[str, float], precision: str) -> None:
    """Raise ValueError where losses differ."""
    if not losses:
        return
    first, tolerance = next(iter(losses.values())), TOLERANCE.get(precision, HALF_TOLERANCE)
    if not all(math.isclose(loss, first, rel_tol=tolerance) for loss in losses.values()):
        raise ValueError(f"the methods compute different losses: {losses}")


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in nested containers and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from tensors_in(list(value.values()))
    elif isinstance(value, list | tuple):
        for one in value:
            yield from tensors_in(one)
    elif is_dataclass(value):
        yield from tensors_in([getattr(value, part.name) for part in fields(value)])


def measure(compared: Mapping[str, Contender], rounds: int) -> dict[str, Cost]:
    """What the methods of one case cost; in every round each takes a step, in another order."""
    for one in compared.values():
        one.measure_memory()
    order = list(compared.values())
    for _ in range(rounds):
        for one in order:
            one.cost.rounds.append(one.step())
        order = [*order[1:], order[0]]
    return {method: one.cost for method, one in compared.items()}


# -- tables ----------------------------------------------------------------------------------------


def step_table(results: Mapping[str, Mapping[str, Cost]]) -> Table:
    """Figures of each method by case: medians over the rounds."""
    rows = []
    for case, costs in results.items():
        for method, c in costs.items():
            seconds = [statistics.median(part) for part in zip(*c.rounds, strict=True)]
            rows.append([case, method, f"{c.trained:,}", *seconds, c.peak / MB, c.kept / MB])
    return Table(STEPS, rows)


def ratio_table(results: Mapping[str, Mapping[str, Cost]]) -> Table:
    """Each method beside the floor and PEFT; a dash where one of these was not measured."""
    rows = []
    for case, costs in results.items():
        floor, theirs = costs.get("floor"), costs.get("PEFT")
        for method, one in costs.items():
            times = [NONE if o is None else ratio(one.steps, o.steps) for o in (floor, theirs)]
            above = share = NONE
            if floor is not None:
                above = (one.kept - floor.kept) / MB
                if theirs is not None and theirs.kept > floor.kept:
                    share = (one.kept - floor.kept) / (theirs.kept - floor.kept)
            rows.append([case, method, *times, above, share])
    return Table(RATIOS, rows)
