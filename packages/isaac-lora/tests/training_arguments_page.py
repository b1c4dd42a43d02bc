"""The page about TrainingArguments, made from the tables; run this file to write it anew."""

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from isaac_lora.config import Config
from isaac_lora.training_flags import ALIASES, EARLIER, REFUSED, SET_BY_US, Fixed

PAGE = Path(__file__).parents[1] / "TRAINING_ARGUMENTS.md"
INTRODUCTION = """\
# TrainingArguments in isaac-lora

`isaac-lora train` and `src/train_lora.py` take the settings of transformers' `TrainingArguments` by
their names, as flags or in the configuration file, with the defaults that they have there; only
without both `fp16` and `bf16` the precision is what the device does best. This page says which; a
test compares it with the installed transformers.
"""


def page(known: set[str]) -> str:
    """The whole page.

    Args:
        known: the fields of TrainingArguments.
    """
    return "\n".join([INTRODUCTION, *_supported(known), *_fixed(), *_names()]) + "\n"


def _supported(known: set[str]) -> Iterator[str]:
    yield "## Supported\n\n| name | default | |\n|---|---|---|"
    for item in fields(Config):
        if item.name in known:
            yield f"| `{item.name}` | {_shown(item.default)} | {_cell(item.metadata['help'])} |"


def _fixed() -> Iterator[str]:
    yield "\n## Set by this program\n\nThe value that holds is taken, any other is an error.\n"
    yield "| name | holds | reason |\n|---|---|---|"
    yield from (f"| `{name}` | {_shown(f.holds[-1])} | {f.why} |" for name, f in SET_BY_US.items())
    yield "\n## Refused\n\nThe value that asks for nothing is taken, any other is an error.\n"
    yield "| name | reason |\n|---|---|"
    yield from _reasons(REFUSED)


def _names() -> Iterator[str]:
    yield "\n## Other names, and those of earlier releases\n\n| name | |\n|---|---|"
    yield from (f"| `{name}` | the same as `{own}` |" for name, own in ALIASES.items())
    yield "| `warmup_ratio` | supported: `warmup_steps` as a share of all updates |"
    yield "| `group_by_length` | supported: `train_sampling_strategy group_by_length` |"
    yield from _reasons(EARLIER)


def _reasons(table: dict[str, Fixed]) -> Iterator[str]:
    return (f"| `{name}` | {fixed.why} |" for name, fixed in table.items())


def _shown(value: Any) -> str:
    return "" if value in (None, "") else f"`{value}`".replace("|", "\\|")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<image>", "`<image>`")


if __name__ == "__main__":
    from transformers import TrainingArguments

    PAGE.write_text(page({item.name for item in fields(TrainingArguments)}), "utf-8")
