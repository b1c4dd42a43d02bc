"""The command `isaac-lora`, also `python -m isaac_lora`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from lora_core import verbs

COMMANDS = {
    "prepare": "conversations from the boxes of a COCO data set",
    "train": "train a LoRA on your conversations, with or without depth",
    "find-lr": "a learning rate for your conversations, from a hundred updates",
    "predict": "answers of base and adapter to questions about pictures, their tags drawn",
    "evaluate": "loss and scores of answers of base, adapter and merged model",
    "merge": "adapter and base as one model folder in the original layout",
    "demo": "the whole way on a tiny model: LoRA without depth, with depth, with the wrong depth",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console command; returns the process exit code."""
    return verbs.main("isaac-lora", COMMANDS, argv)


if __name__ == "__main__":
    sys.exit(main())
