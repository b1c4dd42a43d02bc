"""Errors that a user can fix: one class per cause, a message for people, an exit status.

Exit statuses of every command: 0 done, 2 something the user can fix, 1 a fault of ours (with its
traceback), 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from difflib import SequenceMatcher, get_close_matches


class UserError(ValueError):
    """Something the user can fix. The message says what, where, what was expected, what to do."""

    exit_code = 2


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


last_status: int | None = None  # of the command that `run` ended last


def run(main: Callable[[list[str]], int | None], argv: Sequence[str] | None = None) -> int:
    """Call `main(argv)` as a command and give its exit status.

    A `UserError` becomes its message on stderr and status 2; `--debug`, which is taken out of
    `argv`, keeps the traceback. Other exceptions are faults of ours and pass through.
    """
    global last_status
    last_status = None
    last_status = _status(main, list(sys.argv[1:] if argv is None else argv))
    return last_status


def _status(main: Callable[[list[str]], int | None], words: list[str]) -> int:
    try:
        status = main([word for word in words if word != "--debug"]) or 0
        sys.stdout.flush()  # a closed pipe shows here, not in the interpreter's last breath
    except UserError as error:
        if "--debug" in words:
            traceback.print_exc()
        rank = os.environ.get("RANK", "0")
        who = "" if rank == "0" else f"[rank {rank}] "
        sys.stderr.write(f"{who}error: {printable(error)}\n")
        return error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("\nstopped by Ctrl-C\n")
        return 130
    except BrokenPipeError:  # the reader of stdout left, as `head` does: nobody to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except SystemExit as stop:  # argparse's way to end `--help`
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return status
