"""`isaac-lora prepare`: annotations of other tasks become the conversations that training reads.

prepare coco --source data --output conversations      boxes of COCO files
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

from lora_core.errors import ConfigError, near
from lora_core.report import say

STEPS = {"coco": "conversations that ask for the boxes of a COCO data set"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a step; returns the process exit code.

    Raises:
        UserError: anything that the user can put right.
    """
    words = list(argv or [])
    if not words or words[0] in {"-h", "--help"}:
        listed = "\n".join(f"  {name:<6} {what}" for name, what in STEPS.items())
        say(
            f"usage: isaac-lora prepare STEP [options]\n\n{listed}\n\n"
            "`isaac-lora prepare STEP --help` lists a step's options with their defaults."
        )
        return 0
    step = words.pop(0)
    if step not in STEPS:
        hint = near(step, STEPS) or f"the steps are {', '.join(STEPS)}"
        raise ConfigError(f"isaac-lora prepare has no step {step!r}; {hint}")
    status: int = import_module(f"isaac_lora.prepare_{step}").main(words)
    return status
