"""`sam3-lora merge`: an adapter and its base become one checkpoint; see `sam3_lora.export`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lora_core.config import option, parse
from lora_core.preflight import writable
from lora_core.report import say

if TYPE_CHECKING:
    from transformers import Sam3Model

    from sam3_lora.export import Merged


@dataclass
class Options:
    """Settings of `sam3-lora merge`."""

    adapter: str = option(MISSING, "Adapter: best.pt, epoch_N.pt or a PEFT directory.", "input")
    output: str = option(
        MISSING,
        "Merged model: a .pt, .pth, .torch or .safetensors file with the official names, or a "
        "folder for transformers (any name without such an ending).",
        "output",
    )
    checkpoint: str | None = option(
        None,
        "The base that the adapter was trained on; default: the name in the adapter.",
        "input",
    )
    allow_partial: bool = option(
        False, "Use what fits of an adapter with missing or unexpected tensors.", "input"
    )
    format: Literal["auto", "official", "transformers"] = option(
        "auto", "The form that --output must have; auto: what its name says.", "output"
    )
    dtype: Literal["fp32", "keep"] = option(
        "fp32",
        "fp32: exact. keep: the dtype of the base file; where that is half precision, rounding "
        "changes the outputs a little.",
        "output",
    )
    overwrite: bool = option(False, "Replace an existing output.", "output")


def main(argv: Sequence[str] | None = None) -> int:
    """Run `sam3-lora merge` with these words; returns the exit code.

    Raises:
        UserError: anything that the user can put right.
    """
    options = parse(
        Options,
        argv or [],
        prog="sam3-lora merge",
        description="Merge an adapter into its base model.",
    )
    output = Path(options.output)
    writable(output.absolute().parent, "--output")
    from lora_core.merged_file import find_base, refuse_existing
    from sam3_lora.export import VOCABULARY, export, format_of
    from sam3_lora.model import load
    from sam3_lora.official import find_checkpoint

    format_of(output, options.format)
    refuse_existing(output, options.overwrite, VOCABULARY)
    base = options.checkpoint or find_base(options.adapter, find_checkpoint)
    model = load(base, None, options.adapter, options.allow_partial)
    merged = export(model, output, options.format, options.dtype, options.overwrite)
    say(merged)
    _mention_limits(model, merged)
    return 0


def _mention_limits(model: Sam3Model, merged: Merged) -> None:
    """Say what a user of the file must know and cannot see."""
    from sam3_lora.export import TOLERANCE
    from sam3_lora.model import image_size

    height, width = image_size(model)
    side = model.config.vision_config.backbone_config.image_size
    if (height, width) != (side, side):
        say(
            f"Trained at {height}x{width} pixels, while the model is made for {side}x{side}: "
            "use it at the size of its training"
        )
    if max(merged.difference.values()) > TOLERANCE:
        say("The difference comes from half precision; --dtype fp32 is exact.")
    if merged.has_tracker:
        say("The video tracker is the base's: it was not adapted to the new image features.")
    elif model.sam3_base.has_tracker:
        say("The video tracker is left out: this form has no place for it.")
    elif merged.format == "official":
        say("The base has no video tracker: official image programs load the file, others do not.")
