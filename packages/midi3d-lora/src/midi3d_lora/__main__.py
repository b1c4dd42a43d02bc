"""The command `midi3d-lora`, also `python -m midi3d_lora`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from lora_core import verbs

COMMANDS = {
    "prepare": "scenes from meshes, from 3D-FRONT, from Objaverse",
    "train": "train a LoRA on your scenes",
    "find-lr": "a learning rate for your scenes, from a hundred updates",
    "predict": "a .glb of separate meshes from one picture and the map of its instances",
    "evaluate": "chamfer distance and F-score of base, adapter and merged model on your scenes",
    "merge": "adapter and base as one model folder with the official names",
    "export": "an adapter in another form: one file, PEFT's folder, diffusers' file",
    "demo": "the whole way on a tiny model and generated scenes: base, LoRA, merged model",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console command; returns the process exit code."""
    return verbs.main("midi3d-lora", COMMANDS, argv)


if __name__ == "__main__":
    sys.exit(main())
