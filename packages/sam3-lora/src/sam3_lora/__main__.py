"""The command `sam3-lora`, also `python -m sam3_lora`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from lora_core.errors import ConfigError, near, run
from lora_core.report import say

COMMANDS = {
    "train": "train a LoRA on your pictures and phrases",
    "find-lr": "a learning rate for your data, from a hundred updates",
    "predict": "objects of phrases in your pictures: overlays and COCO results",
    "evaluate": "scores of base and adapter on COCO annotations, best threshold",
    "prepare": "a YOLO, VOC, LVIS, COCO or mask data set to the folder that training reads",
    "merge": "adapter and base to an official checkpoint, or a transformers folder",
}


def usage() -> str:
    """The page that `sam3-lora --help` prints."""
    verbs = "\n".join(f"  {name:<9} {what}" for name, what in COMMANDS.items())
    return (
        f"usage: sam3-lora COMMAND [options]\n\n{verbs}\n\n"
        "`sam3-lora COMMAND --help` lists a command's options with their defaults."
    )


def dispatch(argv: Sequence[str]) -> int:
    """Run one command and return its exit code.

    Raises:
        ConfigError: for a command that does not exist.
    """
    if not argv or argv[0] in {"-h", "--help"}:
        say(usage())
        return 0
    if argv[0] == "--version":
        say(f"sam3-lora {import_module('sam3_lora').__version__}")
        return 0
    command, *rest = argv
    if command not in COMMANDS:
        raise ConfigError(f"sam3-lora has no command {command!r}; {near(command, COMMANDS)}")
    return import_module(f"sam3_lora.{command.replace('-', '_')}").main(rest)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console command; returns the process exit code."""
    return run(dispatch, argv)


if __name__ == "__main__":
    sys.exit(main())
