"""The command `scenesplat-lora`, also `python -m scenesplat_lora`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from lora_core import verbs

COMMANDS = {
    "train": "train a LoRA on your scenes of Gaussians",
    "evaluate": "zero-shot mIoU and mAcc of base and adapter on labelled scenes",
    "predict": "labels, a coloured .ply and a picture of a scene",
    "merge": "base and adapter as one checkpoint with the official names",
    "find-lr": "suggest a learning rate for your scenes",
    "view": "look at a scene, its labels and where any word is, in a browser",
    "prepare": "scenes from .ply files and data sets, text embeddings, language features, chunks",
    "demo": "the whole way on a tiny model and generated rooms: base, LoRA, merged model",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console command; returns the process exit code."""
    return verbs.main("scenesplat-lora", COMMANDS, argv)


if __name__ == "__main__":
    sys.exit(main())
