"""Parameter groups of the optimizer, and learning rates and betas as functions of the update.

Official pretraining: AdamW and the one-cycle schedule (Smith, arXiv 1803.09820) with a second,
slower group for the transformer blocks. LoRA: warm-up and one cosine. An update is one step of the
optimizer, counted from 0. Everything is a function of the update alone, so that a run that is taken
up again goes on exactly.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_core.errors import ConfigError, listing

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

# -- groups ----------------------------------------------------------------------------------------


def keyword_groups(
    named: Iterable[tuple[str, nn.Parameter]], lr: float, param_dicts: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Groups for an optimizer, as `param_dicts` of the official configuration files has them.

    A parameter belongs to the first entry whose `keyword` is part of its name, or to the first
    group. Frozen parameters and empty groups are left out.

    Args:
        named: (name, parameter), as `named_parameters` gives them.
        param_dicts: for example [{"keyword": "block", "lr": 0.0006}]; other entries of a
            dictionary (weight_decay, ...) are settings of its group.

    Returns:
        Dictionaries with "name", "params", "lr".

    Raises:
        ConfigError: an entry without keyword, or one that no parameter matches.
    """
    unnamed = [str(entry) for entry in param_dicts if not entry.get("keyword")]
    if unnamed:
        raise ConfigError(f"param_dicts: an entry has no keyword: {', '.join(unnamed)}")
    groups: list[dict[str, Any]] = [{"name": "default", "params": [], "lr": lr}]
    groups += [
        {"name": entry["keyword"], "params": [], "lr": lr}
        | {key: value for key, value in entry.items() if key != "keyword"}
        for entry in param_dicts
    ]
    for name, parameter in named:
        if parameter.requires_grad:
            hits = (group for group in groups[1:] if group["name"] in name)
            next(hits, groups[0])["params"].append(parameter)
    idle = [repr(group["name"]) for group in groups[1:] if not group["params"]]
    if idle:
        raise ConfigError(
            f"param_dicts: no trained parameter has {', '.join(idle)} in its name and none before "
            "it took them: correct the keyword or remove the entry"
        )
    return [group for group in groups if group["params"]]


# -- one cycle -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OneCycle:
    """The one-cycle schedule with cosines, as torch's `OneCycleLR` computes it.

    Up from max / div_factor to max in the first `pct_start` of the updates, then down to
    max / (div_factor * final_div_factor) in the last one. Adam's first beta goes the other way.

    Attributes:
        total: updates of the whole run.
        max_beta1, min_beta1: Adam's first beta at the ends and at the peak.

    Raises:
        ConfigError: values that cannot work, all of them.
    """

    total: int
    pct_start: float = 0.05
    div_factor: float = 10.0
    final_div_factor: float = 1000.0
    max_beta1: float = 0.95
    min_beta1: float = 0.85

    def __post_init__(self) -> None:
        problems = []
        if self.total < 1:
            problems.append(f"one cycle: {self.total} updates: there must be at least 1")
        if not 0 <= self.pct_start <= 1:
            problems.append(f"one cycle: pct_start is {self.pct_start}: it must be from 0 to 1")
        for name in ("div_factor", "final_div_factor"):
            if not 0 < getattr(self, name) < float("inf"):
                problems.append(f"one cycle: {name} is {getattr(self, name)}: it must be above 0")
        if not 0 <= self.min_beta1 <= self.max_beta1 < 1:
            problems.append(
                f"one cycle: betas {self.min_beta1} and {self.max_beta1}: they must be in order, "
                "from 0 to below 1"
            )
        if problems:
            raise ConfigError(listing(problems))

    def lr_factor(self, update: int) -> float:
        """Share of the group's largest learning rate in update 0 ... total - 1."""
        rising, t = self._phase(update)
        start = 1 / self.div_factor
        return _cosine(start, 1.0, t) if rising else _cosine(1.0, start / self.final_div_factor, t)

    def beta1(self, update: int) -> float:
        """Adam's first beta in update 0 ... total - 1."""
        rising, t = self._phase(update)
        low, high = self.min_beta1, self.max_beta1
        return _cosine(high, low, t) if rising else _cosine(low, high, t)

    def _phase(self, update: int) -> tuple[bool, float]:
        """Whether the learning rate rises, and the share 0 ... 1 of that phase that is over."""
        peak, last = self.pct_start * self.total - 1, self.total - 1
        update = min(update, last)
        if update <= peak:
            return True, update / peak if peak > 0 else 1.0
        # A peak below 0 (no rise at all) counts as one at -1, as in torch.
        return False, (update - peak) / (last - peak)


def set_one_cycle(
    optimizer: Optimizer, schedule: OneCycle, update: int, max_lr: Sequence[float]
) -> None:
    """Give every group its learning rate and first beta for one update.

    Args:
        max_lr: largest learning rate of each group.
    """
    factor, beta1 = schedule.lr_factor(update), schedule.beta1(update)
    for group, peak in zip(optimizer.param_groups, max_lr, strict=True):
        group["lr"] = peak * factor
        if "betas" in group:
            group["betas"] = (beta1, *group["betas"][1:])


def _cosine(start: float, end: float, t: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * t))


# -- warm-up and cosine ----------------------------------------------------------------------------


def warmup_cosine(
    update: int, total: int, warmup: int, lr: float, warmup_lr: float, min_lr: float
) -> float:
    """Learning rate of a LoRA run in update 0 ... total - 1.

    A line from `warmup_lr` in update 0 to `lr` in update `warmup`, then half a cosine to `min_lr`
    in the last update.
    """
    if update < warmup:
        return warmup_lr + (lr - warmup_lr) * update / warmup
    t = (update - warmup) / max(total - 1 - warmup, 1)
    return _cosine(lr, min_lr, min(t, 1.0))
