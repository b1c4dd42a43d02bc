"""A package's console command: one verb after the package's name, each in a module of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from importlib import import_module

from lora_core.errors import ConfigError, near, run
from lora_core.report import say


def main(program: str, verbs: Mapping[str, str], argv: Sequence[str] | None) -> int:
    """Run a console command; returns the process exit code.

    Args:
        program: `sam2-lora`; the modules of its verbs are in `sam2_lora`, each with a `main(argv)`.
        verbs: name -> what it does, for the page that `--help` prints.
        argv: the words behind the command; None: those of this process.
    """
    return run(partial(_dispatch, program, verbs), argv)


def _dispatch(program: str, verbs: Mapping[str, str], argv: Sequence[str]) -> int:
    package = program.replace("-", "_")
    if not argv or argv[0] in {"-h", "--help"}:
        say(_usage(program, verbs))
        return 0
    if argv[0] == "--version":
        say(f"{program} {import_module(package).__version__}")
        return 0
    verb, *rest = argv
    if verb not in verbs:
        hint = near(verb, verbs) or f"see {program} --help"
        raise ConfigError(f"{program} has no command {verb!r}; {hint}")
    # `demo` holds the data, which imports nothing of the package.
    module = "demo_run" if verb == "demo" else verb.replace("-", "_")
    status: int = import_module(f"{package}.{module}").main(rest)
    return status


def _usage(program: str, verbs: Mapping[str, str]) -> str:
    listed = "\n".join(f"  {name:<9} {what}" for name, what in verbs.items())
    return (
        f"usage: {program} COMMAND [options]\n\n{listed}\n\n"
        f"`{program} COMMAND --help` lists a command's options with their defaults."
    )
