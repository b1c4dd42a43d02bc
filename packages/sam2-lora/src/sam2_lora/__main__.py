"""The command `sam2-lora`, also `python -m sam2_lora`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from lora_core import verbs

COMMANDS = {
    "train": "train a LoRA on your pictures and masks",
    "find-lr": "a learning rate for your data, from a hundred updates",
    "evaluate": "IoU and Dice of a base model, an adapter or a merged model",
    "predict": "masks for pictures, from points, boxes, or by themselves",
    "merge": "adapter and base to an official checkpoint",
    "prepare": "bring a data set into the Severstal split layout",
    "demo": "the whole way on packaged pictures: base, LoRA, merged model",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console command; returns the process exit code."""
    return verbs.main("sam2-lora", COMMANDS, argv)


if __name__ == "__main__":
    sys.exit(main())
