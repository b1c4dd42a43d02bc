"""Errors that a user can fix: one class per cause, a message for people, an exit status.

Exit statuses of every command: 0 done, 2 something the user can fix, 1 a fault of ours (with its
traceback), 130 stopped by Ctrl-C, 143 stopped by SIGTERM, SIGHUP or SIGUSR1.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import gc
import os
import select
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Sequence
from difflib import SequenceMatcher, get_close_matches
from typing import TextIO

from lora_core.training.signals import Stopped, stops_command


class UserError(ValueError):
    """Something the user can fix. The message says what, where, what was expected, what to do."""

    exit_code = 2
    told = False  # another process of the run says it


class ConfigError(UserError):
    """A setting, a flag, or a combination of them that cannot work."""


class DataError(UserError):
    """A data set, or a record of it, that cannot be used."""


class CheckpointError(UserError):
    """A base, adapter or training checkpoint that is missing, damaged, or does not fit."""


class NumericError(UserError):
    """A NaN, an infinity, or a tensor that did not move although it had to."""


def near(name: object, candidates: Iterable[object], n: int = 3) -> str:
    """Say which of `candidates` look like `name`: "did you mean 'lora_rank'?", or ""."""
    word = str(name).lower()
    spelling: dict[str, str] = {}
    for candidate in candidates:
        spelling.setdefault(str(candidate).lower(), str(candidate))
    close = get_close_matches(word, spelling, n=n, cutoff=0.6)
    if not close:
        return ""
    # A far second guess distracts from a good first one.
    likeness = [SequenceMatcher(None, match, word).ratio() for match in close]
    close = [
        match for match, ratio in zip(close, likeness, strict=True) if ratio > likeness[0] - 0.1
    ]
    *others, last = (repr(spelling[match]) for match in close)
    return f"did you mean {', '.join(others)}{' or ' if others else ''}{last}?"


def listing(problems: Sequence[str], limit: int = 20) -> str:
    """Join the problems of one pass to one message: the first `limit` of them, and the total."""
    if len(problems) <= limit:
        return "\n".join(problems)
    return "\n".join([*problems[:limit], f"... and {len(problems) - limit} more"])


def printable(text: object) -> str:
    """Escape control characters, so that a file name cannot steer the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in str(text))


def one_line(text: object) -> str:
    """As `printable`, line ends too: the name of a file in a data set could forge a line."""
    return printable(text).replace("\n", "\\n")


last_status: int | None = None  # of the command that `run` ended last
_warned: set[str] = set()  # what the present command has told already


def run(main: Callable[[list[str]], int | None], argv: Sequence[str] | None = None) -> int:
    """Call `main(argv)` as a command and give its exit status.

    A `UserError` becomes its message on stderr and status 2; `--debug`, which is taken out of
    `argv`, keeps the traceback. Other exceptions are faults of ours and pass through.
    """
    global last_status
    last_status = None
    if "RANK" in os.environ:  # torch's remarks on connections are stack traces; it reads this once
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    _warned.clear()
    # Python would search all that torch has made for cycles before it ends: a second, or three
    # where others work too. The memory goes with the process.
    atexit.unregister(gc.freeze)
    atexit.register(gc.freeze)
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        last_status = _status(main, list(sys.argv[1:] if argv is None else argv))
    return last_status


def _status(main: Callable[[list[str]], int | None], words: list[str]) -> int:
    try:
        with stops_command():
            status = main([word for word in words if word != "--debug"]) or 0
        if sys.stdout is not None:  # None: started with stdout closed
            sys.stdout.flush()  # a closed pipe shows here, not in the interpreter's last breath
    except UserError as error:
        if "--debug" in words:
            traceback.print_exc()
        rank = os.environ.get("RANK", "0")
        who = "" if rank == "0" else f"[rank {rank}] "
        if not error.told:
            _tell(f"{who}error: {printable(error)}\n")
        return error.exit_code
    except Stopped as signal:
        if os.environ.get("RANK", "0") == "0":
            _tell(f"{printable(signal)}\n")
        return signal.status
    except KeyboardInterrupt:
        _tell("\nstopped by Ctrl-C\n")
        return 130
    except BrokenPipeError:
        if not _reader_left():
            raise  # it was another pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        _tell(f"error: no possible name of a file: {printable(str(error.filename)[:200])}...\n")
        return 2
    except SystemExit as stop:  # argparse's way to end `--help`
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return status


def _reader_left() -> bool:
    """Whether the reader of stdout is gone, as `head` is when it has seen enough."""
    if not hasattr(select, "poll"):
        return True
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return bool(poll.poll(0))


def _tell(text: str) -> None:
    """Write to stderr; where nobody reads it, the exit status still says enough."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(text)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Show what a user should know as one line, and from one process of a run."""
    if not issubclass(category, UserWarning):
        _tell(warnings.formatwarning(message, category, filename, lineno, line))
    elif os.environ.get("RANK", "0") == "0" and str(message) not in _warned:
        _warned.add(str(message))
        _tell(f"warning: {printable(message)}\n")
