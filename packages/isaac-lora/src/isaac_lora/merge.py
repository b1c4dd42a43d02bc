"""`isaac-lora merge`: an adapter and its base become one model; see `isaac_lora.merged_model`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lora_core.config import option, parse
from lora_core.errors import ConfigError, listing, printable
from lora_core.guards import unnamed

if TYPE_CHECKING:
    from isaac_lora.adapter_files import Adapter

TEXT = "Merge LoRA into its base model."


@dataclass
class Options:
    """Settings of `isaac-lora merge`."""

    model_path: str = option(MISSING, "The model folder that the adapter was trained on.", "input")
    adapter: str = option(MISSING, "The adapter's folder, or the output_dir of a run.", "input")
    output: str = option(
        MISSING, "Folder of the merged model, in the layout of the base.", "output"
    )
    allow_partial: bool = option(
        False, "Use what fits of an adapter with missing or unexpected tensors.", "input"
    )
    dtype: Literal["keep", "fp32"] = option(
        "keep",
        "keep: that of each tensor in the base (Isaac-0.1: fp32, exact); where it is half "
        "precision, rounding changes the outputs a little. fp32: exact always.",
        "output",
    )
    overwrite: bool = option(False, "Replace an earlier output of merge.", "output")

    def __post_init__(self) -> None:
        if problems := list(unnamed(self, ("model_path", "adapter", "output"))):
            raise ConfigError(listing(problems))


def main(argv: Sequence[str] | None = None) -> int:
    """Run `isaac-lora merge` with these words; returns the exit code.

    Raises:
        UserError: anything that the user can put right.
    """
    options = parse(Options, argv or [], prog="isaac-lora merge", description=TEXT)
    adapter = ready(options)

    from isaac_lora.merged_model import export
    from lora_core.report import say

    merged = export(
        Path(options.model_path),
        adapter,
        options.output,
        dtype=options.dtype,
        allow_partial=options.allow_partial,
        overwrite=options.overwrite,
    )
    say(merged)
    if merged.left_out:
        say(f"left out, since they may be weights of the base: {', '.join(merged.left_out)}")
    if merged.rounded:
        say("The difference comes from half precision; --dtype fp32 is exact.")
    return 0


def ready(options: Options) -> Adapter:
    """Refuse what can be known before weights are read; returns the adapter.

    Raises:
        ConfigError: an output that cannot be written, too little space, or merged already.
        CheckpointError: a base or adapter that is missing or does not fit.
    """
    from isaac_lora import merged_folder, official
    from isaac_lora.adapter_files import check_fit, read_adapter
    from lora_core.disk import check_space
    from lora_core.preflight import check_all, writable

    found: list[Adapter] = []
    base, output = Path(options.model_path), Path(options.output)

    def fits() -> None:
        found.append(read_adapter(options.adapter))
        empty = official.check_folder(official.find_model(base))
        check_fit(empty, found[0], options.allow_partial)
        merged_folder.refuse_history(base, found[0])
        files = {"merged model": merged_folder.bytes_of(base, options.dtype)}
        check_space(files, output.absolute().parent)

    check_all(
        lambda: writable(output.absolute().parent, f"--output {printable(output)}: its folder"),
        lambda: merged_folder.refuse_output(output, options.overwrite, base, Path(options.adapter)),
        fits,
    )
    return found[0]
