"""Find a learning rate: raise it exponentially over a short training and look at the loss.

After Smith, "Cyclical Learning Rates for Training Neural Networks" (2017), with one addition: a
batch's loss is divided by what the same batch gave before the first update. The noise between easy
and hard batches, far larger than what a hundred updates gain, cancels in that ratio; so does that
of dropout, since both are computed with the same seed.

    q(k) = loss of step k / loss of the same batch at the start        1 where nothing was learned
    s(k) = exp of the mean of ln q over the steps around k, Gaussian weights of width `WIDTH`

The suggestion is the rate at which ln s has come half the way down to its lowest point. That is
where the curve is steep; the steepest point itself would hang on single batches.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset

from lora_core.errors import ConfigError, NumericError
from lora_core.injection import parameter_groups
from lora_core.ramp import Ramp
from lora_core.report import Progress, say
from lora_core.tensor_file import atomic_write
from lora_core.training.checks import check_trainable, undone
from lora_core.training.loss import Loss, LossModule, batch_loss
from lora_core.training.out_of_memory import Advice, explained
from lora_core.training.schedule import EpochSampler

if TYPE_CHECKING:
    from PIL import Image

WIDTH = 5.0  # steps
RECENT = 8  # steps whose mean says whether the loss has diverged
DIVERGED = 1.5  # times the lowest such mean: the ramp ends
LEARNED = 0.98  # a smoothed ratio above it is noise


@dataclass(frozen=True)
class Updates:
    """How a training updates its weights, whatever a package calls these settings.

    Attributes:
        batch_size: samples. accumulation: batches of an update.
        max_grad_norm: gradients are clipped to it; infinity: they are not.
        seed: fixes the order of the samples and dropout.
        precision: fp32, or bf16 or fp16 under autocast.
        num_workers: processes that load samples.
    """

    batch_size: int
    accumulation: int = 1
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    seed: int = 42
    precision: str = "fp32"
    num_workers: int = 0


@dataclass(frozen=True)
class Curve:
    """What a ramp gave, one entry per update.

    Attributes:
        rates: learning rates, rising.
        ratios: loss over the loss of the same batch at the start.
        smooth: the ratios smoothed.
        diverged: the loss did, before all steps were done.
    """

    rates: tuple[float, ...]
    ratios: tuple[float, ...]
    smooth: tuple[float, ...]
    diverged: bool = False

    @property
    def end(self) -> str:
        """Why the ramp ended, for people."""
        if self.diverged:
            return f"ended after {len(self.rates)} steps: the loss diverged"
        return f"all {len(self.rates)} steps done"

    @property
    def learned(self) -> bool:
        """Whether the loss fell by more than noise."""
        return min(self.smooth, default=1.0) < LEARNED

    @property
    def suggestion(self) -> float:
        """The rate half the way down.

        Raises:
            NumericError: the loss never fell by more than noise.
        """
        if not self.learned:
            raise NumericError(
                f"no learning rate from {self.rates[0]:.0e} to {self.rates[-1]:.0e} made the loss "
                "fall: take more steps or larger batches, and look whether the adapted layers can "
                "matter"
            )
        half = math.sqrt(min(self.smooth))  # of the way, in logarithms
        return next(r for r, s in zip(self.rates, self.smooth, strict=True) if s <= half)


def smoothed(ratios: Sequence[float]) -> list[float]:
    """s of the module's formulas."""
    logs = np.log(np.maximum(ratios, 1e-12))
    steps = np.arange(len(logs))
    weights = np.exp(-0.5 * ((steps[:, None] - steps) / WIDTH) ** 2)
    return np.exp(weights @ logs / weights.sum(1)).tolist() if ratios else []


def has_diverged(ratios: Sequence[float]) -> bool:
    """Whether the mean of the last steps lies far above the lowest such mean."""
    if len(ratios) < RECENT:
        return False
    logs = np.log(np.maximum(ratios, 1e-12))
    means = np.convolve(logs, np.full(RECENT, 1 / RECENT), "valid")
    return bool(means[-1] > means.min() + math.log(DIVERGED))


def rounded(rate: float) -> float:
    """A learning rate with one significant digit."""
    return float(f"{rate:.0e}")


def suggest(
    network: nn.Module,
    loss: Loss,
    train_set: Dataset[Any],
    collate: Callable[[list[Any]], Any],
    updates: Updates,
    options: Ramp,
    *,
    flag: str,
    advice: Advice | None = None,
) -> None:
    """Run the ramp of `find-lr`, write its curve, and say how it ended and which rate is good.

    Args:
        options: how far the rate rises, and where the curve is written.
        flag: how a package calls the learning rate, such as `--learning_rate`.
        advice: what to do when memory runs out.

    Raises:
        ConfigError: memory runs out.
        CheckpointError: the curve cannot be written.
        NumericError: see `ramp` and `Curve.suggestion`; the latter when the curve is written.
    """
    steps, low, high = options.ramp_steps, options.ramp_from, options.ramp_to
    with explained(network, lambda: "the ramp", advice):
        curve = ramp(network, loss, train_set, collate, updates, steps=steps, low=low, high=high)
    numbers, picture = write(curve, options.ramp_dir)
    say(f"\n{picture}\n{numbers}")
    say(f"{curve.end}, at learning rate {curve.rates[-1]:.1e}")
    say(f"suggestion: {flag} {rounded(curve.suggestion):.0e}")


def ramp(
    network: nn.Module,
    loss: Loss,
    train_set: Dataset[Any],
    collate: Callable[[list[Any]], Any],
    updates: Updates,
    *,
    steps: int,
    low: float,
    high: float,
) -> Curve:
    """Train `steps` updates with AdamW while the rate rises from `low` to `high`.

    Afterwards the adapters, modes and random generators are as before, bit for bit. Deterministic
    on the CPU.

    Raises:
        ConfigError: rates that do not rise, or too few steps.
        NumericError: the loss is not finite before any update.
    """
    if not 0 < low < high or steps < 10:
        raise ConfigError(f"a ramp of {steps} steps from {low:g} to {high:g}: at least 10, rising")
    check_trainable(network)
    order = list(EpochSampler(len(train_set), updates.seed))  # type: ignore[arg-type]
    order = order[: steps * updates.accumulation * updates.batch_size]
    loader = DataLoader(
        Subset(train_set, order),
        updates.batch_size,
        collate_fn=collate,
        num_workers=updates.num_workers,
    )
    rates = [low * (high / low) ** (k / (steps - 1)) for k in range(steps)]
    with undone(network):
        module = LossModule(network, loss).train()
        optimizer = torch.optim.AdamW(parameter_groups(network, low, updates.weight_decay), lr=low)
        started = _before(module, loader, updates)
        batches = _again_and_again(started, loader)
        windows = zip(*[batches] * updates.accumulation, strict=False)  # of as many batches each
        return _climb(module, optimizer, windows, rates, updates)


def _before(module: nn.Module, loader: Iterable[Any], updates: Updates) -> list[tuple[int, float]]:
    """For every batch a seed, and its loss with that seed before the first update."""
    found = []
    with torch.no_grad():
        for seed, batch in enumerate(loader, start=updates.seed):
            torch.manual_seed(seed)
            found.append((seed, float(batch_loss(module, batch, updates.precision))))
    if not all(math.isfinite(value) and value > 0 for _, value in found):
        raise NumericError("the loss is not finite and positive before any update: check the data")
    return found


def _climb(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    windows: Iterable[Sequence[tuple[tuple[int, float], Any]]],
    rates: Sequence[float],
    updates: Updates,
) -> Curve:
    """Update by update, until the loss has diverged; a loss that is not finite does not count."""
    ratios: list[float] = []
    diverged = False
    trained = [p for p in module.parameters() if p.requires_grad]
    with Progress(len(rates)) as progress:
        for rate, window in zip(rates, windows, strict=False):
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad()
            now = 0.0
            for (seed, _), batch in window:
                torch.manual_seed(seed)  # dropout as before: what changes is the weights
                value = batch_loss(module, batch, updates.precision)
                (value / len(window)).backward()
                now += float(value.detach())
            ratio = now / sum(started for (_, started), _ in window)
            diverged = not math.isfinite(ratio) or has_diverged([*ratios, ratio])
            if diverged:
                break
            ratios.append(ratio)
            if torch.isfinite(torch.nn.utils.clip_grad_norm_(trained, updates.max_grad_norm)):
                optimizer.step()
            progress.update(len(ratios))
    return Curve(tuple(rates[: len(ratios)]), tuple(ratios), tuple(smoothed(ratios)), diverged)


def _again_and_again(
    started: Sequence[tuple[int, float]], loader: Iterable[Any]
) -> Iterator[tuple[tuple[int, float], Any]]:
    """Batches with their losses at the start; a small data set comes several times."""
    while True:
        yield from zip(started, loader, strict=True)


# -- files -----------------------------------------------------------------------------------------

SIZE, LEFT, TOP, RIGHT, BOTTOM = (900, 520), 70, 50, 20, 50  # of the picture and its margins
INK, FAINT, LINE, MARK, ABOVE = "#222222", "#c8d2dc", "#1f77b4", "#d62728", "#e08214"


def write(curve: Curve, folder: str | Path) -> tuple[Path, Path]:
    """Write `find_lr.csv` and `find_lr.png` into a folder, which is made.

    Raises:
        CheckpointError: they cannot be written.
    """
    folder = Path(folder)
    numbers, picture = folder / "find_lr.csv", folder / "find_lr.png"
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(["step", "learning_rate", "loss_ratio", "smoothed"])
    for step, row in enumerate(zip(curve.rates, curve.ratios, curve.smooth, strict=True), start=1):
        writer.writerow([step, *(f"{value:.6g}" for value in row)])
    with atomic_write(numbers) as file:
        file.write(text.getvalue().encode())
    with atomic_write(picture) as file:
        draw(curve).save(file, "PNG")
    return numbers, picture


def draw(curve: Curve) -> Image.Image:
    """The curve over a logarithmic axis: ratios as dots, smoothed line, suggestion.

    A ratio above the picture is a triangle at its upper border.
    """
    from PIL import Image, ImageDraw, ImageFont

    width, height = SIZE
    image = Image.new("RGB", (2 * width, 2 * height), "white")  # twice as large: smooth lines
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(2 * 14)
    x_of, y_of, top = _axes(curve)
    for value in _ticks(top):
        y = y_of(value)
        pen.line([(2 * LEFT, y), (2 * (width - RIGHT), y)], FAINT, 2)
        pen.text((2 * LEFT - 12, y), f"{value:g}", INK, font, anchor="rm")
    first, last = math.log10(curve.rates[0]), math.log10(curve.rates[-1])
    for power in range(math.ceil(first - 1e-9), math.floor(last + 1e-9) + 1):
        x = x_of(10**power)
        pen.line([(x, 2 * TOP), (x, 2 * (height - BOTTOM))], FAINT, 2)
        pen.text((x, 2 * (height - BOTTOM) + 10), f"1e{power}", INK, font, anchor="ma")
    for rate, ratio in zip(curve.rates, curve.ratios, strict=True):
        x, y = x_of(rate), y_of(min(ratio, top))
        if ratio > top:
            pen.polygon([(x - 8, y), (x + 8, y), (x, y - 14)], ABOVE)
        else:
            pen.ellipse([x - 5, y - 5, x + 5, y + 5], "#9db8cc")
    points = [(x_of(r), y_of(min(s, top))) for r, s in zip(curve.rates, curve.smooth, strict=True)]
    pen.line(points, LINE, 6, joint="curve")
    title = "loss over the same batch's loss at the start"
    if curve.learned:
        x = x_of(curve.suggestion)
        pen.line([(x, 2 * TOP), (x, 2 * (height - BOTTOM))], MARK, 4)
        title += f"; suggested learning rate {rounded(curve.suggestion):.0e}"
    pen.text((2 * LEFT, 2 * 16), title, INK, font)
    below = f"learning rate ({curve.end})"
    if max(curve.ratios) > top:
        below += f"; triangles: above {top:g}"
    pen.text((width, 2 * height - 12), below, INK, font, anchor="ms")
    return image.reduce(2)


def _axes(curve: Curve) -> tuple[Callable[[float], float], Callable[[float], float], float]:
    """Learning rate -> x and ratio -> y in the double-sized picture, and the highest y shown."""
    width, height = SIZE
    low, high = math.log10(curve.rates[0]), math.log10(curve.rates[-1])
    top = min(max(1.2, 1.1 * max(curve.ratios)), 2.0)
    across, up = 2 * (width - LEFT - RIGHT), 2 * (height - TOP - BOTTOM)
    return (
        lambda rate: 2 * LEFT + across * (math.log10(rate) - low) / max(high - low, 1e-9),
        lambda ratio: 2 * (height - BOTTOM) - up * ratio / top,
        top,
    )


def _ticks(top: float) -> list[float]:
    return [round(0.2 * k, 1) for k in range(int(top / 0.2 + 1e-9) + 1)]
