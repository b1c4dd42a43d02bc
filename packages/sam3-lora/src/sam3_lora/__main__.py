"""The command `sam3-lora`, also `python -m sam3_lora`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from lora_core import verbs

COMMANDS = {
    "train": "train a LoRA on your pictures and phrases",
    "find-lr": "a learning rate for your data, from a hundred updates",
    "predict": "objects of phrases in your pictures: overlays and COCO results",
    "evaluate": "scores of base and adapter on COCO annotations, best threshold",
    "prepare": "a YOLO, VOC, LVIS, COCO or mask data set to the folder that training reads",
    "demo": "train, evaluate and merge a packaged tiny model on generated pictures",
    "merge": "adapter and base to an official checkpoint, or a transformers folder",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console command; returns the process exit code."""
    return verbs.main("sam3-lora", COMMANDS, argv)


if __name__ == "__main__":
    sys.exit(main())
