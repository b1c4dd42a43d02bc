"""The loss and its parts between two rows of the log, and failures that a training survives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from lora_core.errors import UserError
from lora_core.report import say

COLUMNS = 100  # of a line on the terminal
NUMBER = 7  # columns of one, as `report.figure` writes it: 0.8123, 1649.6, 1.0e-05
IN_A_ROW = 3  # failures of the log or of the evaluation that end the training


class Means:
    """Sums since the last log row; the values of an update count once it is done.

    Values stay tensors on their device until they are asked for: no step waits for them.

    Attributes:
        update: of each micro-batch of the update now under way, the loss and its parts.
    """

    def __init__(self) -> None:
        self.update: list[dict[str, Any]] = []
        self.items: list[float] = []  # of each micro-batch
        self.sums: dict[str, list[Any]] = {}  # name -> [sum, count]

    def add(self, loss: Tensor, parts: Mapping[str, Any], items: float = 1.0) -> None:
        """Note the values of a micro-batch, which are means over so many items."""
        values = {**parts, "loss": loss}
        self.items.append(items)
        self.update.append(
            {name: v.detach() if isinstance(v, Tensor) else v for name, v in values.items()}
        )

    def accept(self) -> None:
        """The update is done: count its values."""
        for values, items in zip(self.update, self.items, strict=True):
            for name, value in values.items():
                entry = self.sums.setdefault(name, [0.0, 0.0])
                entry[0] = entry[0] + value * items
                entry[1] += items
        self.clear()

    def clear(self) -> None:
        """Forget the update under way."""
        self.update.clear()
        self.items.clear()

    def state(self) -> dict[str, list[Any]]:
        return {name: [float(total), float(count)] for name, (total, count) in self.sums.items()}

    def load(self, state: Mapping[str, Sequence[Any]]) -> None:
        self.sums = {name: list(entry) for name, entry in state.items()}

    def take(self, gather: Callable[[Any], list[Any]]) -> dict[str, float]:
        """Give the means over all processes, and begin anew."""
        windows = gather(self.state())
        self.sums.clear()
        totals: dict[str, tuple[float, int]] = {}
        for name, (total, count) in (item for window in windows for item in window.items()):
            before, counted = totals.get(name, (0.0, 0))
            totals[name] = (before + total, counted + count)
        return {name: total / count for name, (total, count) in totals.items() if count > 0}


def on_a_line(
    means: Mapping[str, float], others: Mapping[str, float], steps: int, columns: int = COLUMNS
) -> dict[str, float]:
    """The loss, `others`, and as many parts of the loss as fit beside them on a line.

    A loss names its parts with the most telling ones first. Which are shown depends on names and
    widths alone, so that it is the same in every line. `loss_bbox` and `presence_loss` are called
    bbox and presence there; the log has all parts under their whole names.

    Args:
        means: "loss" and its parts. steps: of the whole run.
    """

    def width(name: str) -> int:
        return len(f"  {name} ") + NUMBER

    taken = {"loss", *others}
    room = columns - len(f"step {steps}/{steps}  left 00:00:00") - sum(map(width, taken))
    shown = {name: value for name, value in means.items() if name == "loss"}
    for name, value in means.items():
        if name in taken:
            continue
        short = name.removeprefix("loss_").removesuffix("_loss")
        label = name if short in {"", *taken, *means, *shown} else short
        room -= width(label)
        if room < 0:
            break
        shown[label] = value
    return {**shown, **others}


class Setbacks:
    """Failures of what only accompanies a training: a warning each, and the third in a row ends it.

    A full disk under the log, a picture that cannot be drawn or a bug in an evaluation are no
    reason to lose a night of training, but a run that nobody can watch is none to go on either.
    """

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}

    def note(self, what: str, step: int, error: Exception) -> None:
        """Say that `what` has failed at a step.

        Raises:
            UserError: for the third time in a row.
        """
        count = self.counts[what] = self.counts.get(what, 0) + 1
        reason = f"{type(error).__name__}: {error}".removesuffix(": ")
        if isinstance(error, UserError):
            reason = str(error)
        if count >= IN_A_ROW:
            raise UserError(
                f"{what} failed {count} times in a row, at step {step} with: {reason}\n"
                "The run can be resumed once that is mended; --debug shows where it happened"
            ) from error
        say(
            f"warning: {what} at step {step} failed ({count} in a row, {IN_A_ROW} end the run), "
            f"the training goes on: {reason}"
        )

    @contextmanager
    def tolerated(self, what: str, step: int) -> Iterator[None]:
        """Let the block fail, twice in a row at most."""
        try:
            yield
        except Exception as error:
            self.note(what, step, error)
        else:
            self.counts.pop(what, None)
