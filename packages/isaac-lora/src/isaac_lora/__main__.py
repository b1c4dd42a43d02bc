"""The command `isaac-lora`, also `python -m isaac_lora`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from lora_core import verbs

COMMANDS = {
    "prepare": "conversations from the boxes of a COCO data set",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console command; returns the process exit code."""
    return verbs.main("isaac-lora", COMMANDS, argv)


if __name__ == "__main__":
    sys.exit(main())
