"""What a run tells people: lines and a progress bar on the terminal, rows in a CSV, TensorBoard.

Only the process of rank 0 prints and writes.
"""

from __future__ import annotations

import csv
import glob
import html
import math
import os
import shutil
import sys
import time
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from lora_core.errors import ConfigError, one_line, printable

_bar: Progress | None = None  # the bar that is on the screen, if any
_copy: IO[str] | None = None  # a file that gets every line, too


def is_first_rank() -> bool:
    """Tell whether this process speaks for the run: it is alone, or the first one of torchrun."""
    return os.environ.get("RANK", "0") == "0"


def say(text: object = "") -> None:
    """Print a line for people: from rank 0 only, at once, and without harm to a progress bar.

    What is named in it may come from strangers: control characters are escaped, but line ends.
    """
    if not is_first_rank():
        return
    text = printable(text)
    if _bar is not None:
        _put("\r\x1b[K")
    _put(f"{text}\n")
    if _copy is not None:
        with suppress(OSError):  # a full disk ends no run for its log
            _copy.write(f"{text}\n")
            _copy.flush()
    if _bar is not None:
        _bar.draw()


def _put(text: str) -> None:
    """Write to stdout. A reader that has left, as `head` does, must not end a training run."""
    if sys.stdout is None:  # started with stdout closed
        return
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except UnicodeEncodeError:  # a terminal without the letter
        encoding = sys.stdout.encoding or "ascii"
        sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
    except (OSError, ValueError):  # also a log file on a full disk
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - until the end


@contextmanager
def copied_to(path: str | Path) -> Iterator[None]:
    """Append every line that is said inside to a file, too; its folder is made. On rank 0 only.

    Raises:
        ConfigError: it cannot be written.
    """
    global _copy
    if not is_first_rank():
        yield
        return
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a", encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise ConfigError(f"cannot write {path.absolute()}: {error.strerror}") from error
    before, _copy = _copy, file
    try:
        yield
    finally:
        _copy = before
        with suppress(OSError):
            file.close()


def figure(value: object) -> str:
    """Write a number as short as people read it: 0.8123, 12.5, 3.0e-05, 1,473,152."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if value == 0 or 1e-3 <= abs(value) < 10:
        return f"{value:.4f}"
    return f"{value:.1f}" if 10 <= abs(value) < 1e5 else f"{value:.1e}"


def duration(seconds: float) -> str:
    """Write a span of time as 0:42, 12:03, 3:07:55."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def plural(count: int, noun: str) -> str:
    """Write `1 file`, `2 files`."""
    return f"{count} {noun}{'s' * (count != 1)}"


def _width(text: str) -> int:
    """How many columns of a terminal a text takes: two for 東, none for a mark above a letter."""
    return sum(
        0 if unicodedata.combining(letter) else 1 + (unicodedata.east_asian_width(letter) in "FW")
        for letter in text
    )


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Set `rows` in columns under `header`; columns of numbers are aligned to the right."""
    rows = [list(row) for row in rows]
    texts = [[one_line(figure(value)) for value in row] for row in rows]
    widths = [max(map(_width, column)) for column in zip(header, *texts, strict=True)]
    numeric = [
        bool(rows) and all(isinstance(row[i], (int, float)) for row in rows)
        for i in range(len(header))
    ]

    def line(cells: Sequence[str]) -> str:
        padded = []
        for cell, width, right in zip(cells, widths, numeric, strict=True):
            space = " " * (width - _width(cell))
            padded.append(space + cell if right else cell + space)
        return "  ".join(padded).rstrip()

    return "\n".join([line(header), line(["-" * width for width in widths]), *map(line, texts)])


class Progress:
    """How far a run is: a bar on a terminal, plain lines where there is none (files, pipes, CI).

    Args:
        total: steps of the whole run.
        start: step at which this process begins, above 0 after a resume.
    """

    def __init__(self, total: int, start: int = 0) -> None:
        global _bar
        self.total, self.start, self.step = total, start, start
        self.figures: dict[str, object] = {}
        self.began = time.monotonic()
        self.drawn = 0.0
        self.live = is_first_rank() and _is_terminal()
        if self.live:
            _bar = self

    def update(self, step: int) -> None:
        """Note that `step` is done; the bar is redrawn at most ten times a second."""
        self.step = step
        if self.live and time.monotonic() - self.drawn > 0.1:
            self.draw()

    def report(self, step: int, **figures: object) -> None:
        """Show the latest figures: in the bar, or as a line of their own without a terminal."""
        self.step, self.figures = step, figures
        if self.live:
            self.draw()
        else:
            say(f"step {step}/{self.total}  {self._figures()}  left {self._left()}")

    def draw(self) -> None:
        """Redraw the bar, shortened to the width of the terminal."""
        self.drawn = time.monotonic()
        columns = shutil.get_terminal_size().columns - 1
        count = f"{self.step}/{self.total}"
        tail = f" {count}  {self._figures()}  left {self._left()}"
        width = min(30, columns - len(tail) - 2)
        filled = width * self.step // max(self.total, 1)
        bar = f"[{'#' * filled}{'.' * (width - filled)}]" if width >= 5 else ""
        _put("\r\x1b[K" + f"{bar}{tail}".strip()[:columns])

    def close(self) -> None:
        """Leave the bar's last state on the screen."""
        global _bar
        if self.live:
            self.draw()
            _put("\n")
            self.live = False
            _bar = None

    def _figures(self) -> str:
        return "  ".join(f"{name} {figure(value)}" for name, value in self.figures.items())

    def _left(self) -> str:
        done = self.step - self.start
        if done < 1:
            return "?"
        return duration((time.monotonic() - self.began) / done * (self.total - self.step))

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()


def _is_terminal() -> bool:
    try:
        return sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
    except (ValueError, AttributeError):  # stdout is closed, or was from the start
        return False


class RunLog:
    """The numbers of a run: a CSV that is complete after every row, and TensorBoard.

    Args:
        events: folder of TensorBoard's files.
        csv_path: the CSV; an existing one with the same columns is continued.
        columns: the CSV's columns, with `step` and `split` among them.
        tensorboard: False: none; None: if it is installed; True: say so if it is not.

    Raises:
        ConfigError: `csv_path` exists and has other columns.
    """

    def __init__(
        self,
        events: str | Path,
        csv_path: str | Path,
        columns: Sequence[str],
        tensorboard: bool | None = None,
    ) -> None:
        self.events, self.csv_path, self.columns = Path(events), Path(csv_path), list(columns)
        self.written: set[tuple[str, str]] = set()
        self._pending: list[dict[str, str]] = []  # rows that could not be written yet
        self._torn = False  # the last write may have left a part of a row
        self._writer: Any = None
        self._tensorboard = is_first_rank() and tensorboard is not False
        if not is_first_rank():
            return
        rows = self._read_rows()
        self._remove_partial()
        self.written = {(row["step"], row["split"]) for row in rows}
        if not self._is_whole():
            self._write_rows(rows)
        if tensorboard and _writer_class() is None:
            say("TensorBoard is not installed: pip install tensorboard. The CSV has all numbers.")

    def write(self, step: int, split: str, **values: object) -> None:
        """Append a row; a second one for the same step and split is left out.

        Values whose name is not a column go to TensorBoard only, values without a number to the
        CSV only.

        Raises:
            OSError: the disk is full, for example. The next call writes this row as well.
        """
        if not is_first_rank() or (str(step), split) in self.written:
            return
        self.written.add((str(step), split))
        row = {"step": step, "split": split, **values}
        self._pending.append({name: str(_cell(row.get(name, ""))) for name in self.columns})
        try:
            self._append_pending()
        finally:
            self._show_scalars(step, split, values)

    def _append_pending(self) -> None:
        """Append to the CSV what is not in it yet, and first mend what a full disk has cut off."""
        if self._torn:
            keys = {(row["step"], row["split"]) for row in self._pending}
            rows = self._read_rows()
            self._write_rows([row for row in rows if (row["step"], row["split"]) not in keys])
        self._torn = True
        with self.csv_path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerows([row[name] for name in self.columns] for row in self._pending)
        self._torn = False
        self._pending.clear()

    def _show_scalars(self, step: int, split: str, values: Mapping[str, object]) -> None:
        writer = self._summary_writer()
        if writer is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)) and math.isfinite(value):
                    writer.add_scalar(f"{split}/{name}", value, step)
            writer.flush()

    @property
    def shows_pictures(self) -> bool:
        """Whether `picture` leads anywhere: drawing can be spared otherwise."""
        return self._summary_writer() is not None

    def picture(self, tag: str, rgb: Any, step: int) -> None:
        """Show `rgb` (uint8 [H, W, 3], array or tensor) in TensorBoard."""
        writer = self._summary_writer()
        if writer is not None:
            writer.add_image(html.escape(tag), rgb, step, dataformats="HWC")
            writer.flush()

    def rewind(self, step: int) -> None:
        """Take out what was logged after `step`, which a resumed run will log again."""
        if not is_first_rank():
            return
        rows = [row for row in self._read_rows() if int(row["step"]) <= step]
        self.written = {(row["step"], row["split"]) for row in rows}
        self._write_rows(rows)
        self.close()
        self._summary_writer(purge_step=step + 1)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _read_rows(self) -> list[dict[str, str]]:
        """Read the complete rows; the last one may have been cut off by a crash."""
        if not self.csv_path.is_file() or self.csv_path.stat().st_size == 0:
            return []
        with self.csv_path.open(newline="", encoding="utf-8") as file:
            header, *rows = list(csv.reader(file))
        if header != self.columns:
            raise ConfigError(
                f"{self.csv_path.absolute()} has other columns ({', '.join(header)}): "
                "move it away, or choose another folder for the log"
            )
        complete = [row for row in rows if len(row) == len(header)]
        return [dict(zip(header, row, strict=True)) for row in complete]

    def _is_whole(self) -> bool:
        """Whether the CSV has its header and ends with a row, so that one more can follow."""
        return self.csv_path.is_file() and self.csv_path.read_bytes().endswith(b"\n")

    def _remove_partial(self) -> None:
        """Remove what a killed process had begun to write in place of the CSV."""
        for path in self.csv_path.parent.glob(f".{glob.escape(self.csv_path.name)}.*"):
            if path.suffix[1:].isdigit():
                with suppress(OSError):
                    path.unlink()

    def _write_rows(self, rows: Sequence[Mapping[str, str]]) -> None:
        self.csv_path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.csv_path.with_name(f".{self.csv_path.name}.{os.getpid()}")
        with partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(self.columns)
            writer.writerows([row[name] for name in self.columns] for row in rows)
        os.replace(partial, self.csv_path)

    def _summary_writer(self, purge_step: int | None = None) -> Any:
        """Give TensorBoard's writer, made on first use; None where it is not installed."""
        if self._writer is None and self._tensorboard:
            cls = _writer_class()
            if cls is None:
                self._tensorboard = False
                return None
            self._writer = cls(str(self.events), purge_step=purge_step)
        return self._writer


def _writer_class() -> Any:
    """TensorBoard's class for writing, or None where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter


def _cell(value: object) -> object:
    """Write numbers plainly: up to eight digits, no type names, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.8g}"
    return value
