"""The command `scenesplat-lora`, also `python -m scenesplat_lora`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from lora_core import verbs

COMMANDS = {
    "train": "train a LoRA on your scenes of Gaussians",
    "evaluate": "zero-shot mIoU and mAcc of base and adapter on labelled scenes",
    "predict": "labels, a coloured .ply and a picture of a scene",
    "prepare": "scenes from .ply files, language features from labels, chunks",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console command; returns the process exit code."""
    return verbs.main("scenesplat-lora", COMMANDS, argv)


if __name__ == "__main__":
    sys.exit(main())
