"""`sam2-lora merge`: an adapter and its base become one checkpoint; see `sam2_lora.export`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lora_core.config import option, parse
from lora_core.errors import ConfigError, listing
from lora_core.guards import unnamed
from lora_core.preflight import writable
from lora_core.report import say

if TYPE_CHECKING:
    from transformers import Sam2Model

    from sam2_lora.export import Merged


@dataclass
class Options:
    """Settings of `sam2-lora merge`."""

    adapter: str = option(MISSING, "Adapter: PEFT directory or .torch file.", "input")
    output: str = option(
        MISSING,
        "Merged model: a .pt, .pth or .torch file for the official program, a .safetensors file "
        "with official names, or a folder for transformers (any name without such an ending).",
        "output",
    )
    checkpoint: str | None = option(
        None,
        "The base that the adapter was trained on; default: the file name in the adapter.",
        "input",
    )
    allow_partial: bool = option(
        False, "Use what fits of an adapter with missing or unexpected tensors.", "input"
    )
    dtype: Literal["fp32", "keep"] = option(
        "fp32",
        "fp32: exact. keep: the dtype of the base file; where that is half precision, rounding "
        "changes the masks a little. Official files are in fp32 anyway.",
        "output",
    )
    overwrite: bool = option(False, "Replace an existing output.", "output")

    def __post_init__(self) -> None:
        if empty := list(unnamed(self, ("adapter", "output", "checkpoint"))):
            raise ConfigError(listing(empty))


def main(argv: Sequence[str] | None = None) -> int:
    """Run `sam2-lora merge` with these words; returns the exit code.

    Raises:
        UserError: anything that the user can put right.
    """
    options = parse(
        Options,
        argv or [],
        prog="sam2-lora merge",
        description="Merge an adapter into its base model.",
    )
    writable(Path(options.output).absolute().parent, "--output")
    from lora_core.merged_file import find_base, refuse_existing
    from sam2_lora.export import export
    from sam2_lora.model import load
    from sam2_lora.official import find_checkpoint

    refuse_existing(Path(options.output), options.overwrite)
    base = options.checkpoint or find_base(options.adapter, find_checkpoint)
    model = load(base, None, options.adapter, options.allow_partial)
    merged = export(model, options.output, options.dtype, options.overwrite)
    say(merged)
    _mention_limits(model, merged)
    return 0


def _mention_limits(model: Sam2Model, merged: Merged) -> None:
    """Say what a user of the file must know and cannot see."""
    from sam2_lora.export import TOLERANCE
    from sam2_lora.model import image_size

    height, width = image_size(model)
    side = model.config.prompt_encoder_config.image_size
    if (height, width) != (side, side):
        say(
            f"Trained at {height}x{width} pixels, while the model is made for {side}x{side}: "
            f"use it with --image_size {height}x{width}"
        )
    if max(merged.difference.values()) > TOLERANCE:
        say("The difference comes from half precision; --dtype fp32 is exact.")
    if model.sam2_base.has_video:
        say("The video memory is the base's: it was not adapted to the new image features.")
    elif merged.path.is_file():
        say("The base has no video memory, so the official program will not load the file.")
