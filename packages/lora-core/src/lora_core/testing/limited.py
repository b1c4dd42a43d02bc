"""Run what may crash, hang or eat memory in a child of its own: for tests of hostile files.

outcome = run(lambda: read(bomb), seconds=5, memory=2**28)
assert "million pixels" in outcome.problem
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lora_core import shielded


def run(function: Callable[[], Any], seconds: float = 5.0, memory: int = 2**29) -> shielded.Outcome:
    """Call `function` in a child with a limit of time and of memory in bytes.

    Returns:
        Its value (plain, as JSON has it), or as `problem` the message of the `UserError` that it
        raised, or how the child ended: crashed, killed, too slow, too large.

    Raises:
        RuntimeError: it raised anything else; holds the traceback.
    """
    limits = shielded.Limits(seconds, memory)
    ((_, outcome),) = shielded.each(lambda _: function(), 1, limits=limits, workers=1)
    return outcome
