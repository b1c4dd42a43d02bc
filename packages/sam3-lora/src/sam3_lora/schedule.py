"""The learning rate of the official fine-tuning: inverse square root, with warm-up and cool-down.

transformers' `inverse_sqrt` has no cool-down and scales time differently.
"""

from __future__ import annotations

import math


def inverse_sqrt_factor(
    update: int, total: int, warmup: int, timescale: int, cooldown: int
) -> float:
    """Share of the base learning rate in update s = 0 ... total - 1 of T = `total`.

    min(1, s / w) * min(1, (T - s) / c) * (1 if s <= w else 1 / sqrt((s - w + tau) / tau))

    with w = `warmup`, tau = `timescale` and c = `cooldown`; w or c of 0 leaves its factor out. As
    in the official schedule the first update of a warm-up has a rate of 0 and changes nothing.

    Args:
        update: updates done so far.
        total: updates of the whole run; beyond it the factor is 0 (with c > 0).
        timescale: at least 1; w + 3 tau is where the rate has halved.
    """
    rise = min(1.0, update / warmup) if warmup else 1.0
    fall = min(1.0, max(total - update, 0) / cooldown) if cooldown else 1.0
    decay = 1 / math.sqrt((update - warmup + timescale) / timescale) if update > warmup else 1.0
    return rise * fall * decay
