"""The command `sam2-lora`, also `python -m sam2_lora`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from lora_core.errors import ConfigError, near, run
from lora_core.report import say

COMMANDS = {
    "train": "train a LoRA on your pictures and masks",
    "find-lr": "a learning rate for your data, from a hundred updates",
    "evaluate": "IoU and Dice of a base model, an adapter or a merged model",
    "predict": "masks for pictures, from points, boxes, or by themselves",
    "merge": "adapter and base to an official checkpoint",
    "prepare": "bring a data set into the Severstal split layout",
    "demo": "the whole way on packaged pictures: base, LoRA, merged model",
}


def usage() -> str:
    """The page that `sam2-lora --help` prints."""
    verbs = "\n".join(f"  {name:<9} {what}" for name, what in COMMANDS.items())
    return (
        f"usage: sam2-lora COMMAND [options]\n\n{verbs}\n\n"
        "`sam2-lora COMMAND --help` lists a command's options with their defaults."
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
        say(f"sam2-lora {import_module('sam2_lora').__version__}")
        return 0
    command, *rest = argv
    if command not in COMMANDS:
        raise ConfigError(f"sam2-lora has no command {command!r}; {near(command, COMMANDS)}")
    module = {"demo": "demo_run", "find-lr": "find_lr"}.get(command, command)
    return import_module(f"sam2_lora.{module}").main(rest)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console command; returns the process exit code."""
    return run(dispatch, argv)


if __name__ == "__main__":
    sys.exit(main())
