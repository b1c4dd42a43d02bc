"""`midi3d-lora merge`: an adapter and its base become one model; see `midi3d_lora.merged_model`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lora_core.config import option, parse
from lora_core.errors import ConfigError, listing
from lora_core.guards import unnamed
from midi3d_lora.lora_choice import block_problems
from midi3d_lora.model_options import PRETRAINED

if TYPE_CHECKING:
    from midi3d_lora.adapter_files import Adapter
    from midi3d_lora.transformer.dit import TripoSGDiTModel

TEXT = "Merge LoRA into its base model."


@dataclass
class Options:
    """Settings of `midi3d-lora merge`."""

    lora_path: str = option(
        MISSING, "Adapter: a file, a folder, or the output_dir of a training run.", "input"
    )
    output: str = option(
        MISSING, "Folder of the merged model, in the layout of the base.", "output"
    )
    pretrained_model: str = option(
        PRETRAINED, "The model folder that the adapter was trained on.", "input"
    )
    variant: str | None = option(
        None, "Of the base's transformer, as fp16; its encoders and VAE are copied as they are.",
        "input",
    )  # fmt: skip
    lora_rank: int | None = option(None, "Checked: the adapter's own is used.", "input")
    lora_alpha: float | None = option(
        None, "Of an adapter that does not say it (default there: 16); otherwise checked.", "input"
    )
    mi_attention_blocks: list[str] | None = option(
        None, "Of an adapter that does not say them; otherwise checked.", "input"
    )
    allow_partial: bool = option(
        False, "Use what fits of an adapter with missing or unexpected tensors.", "input"
    )
    transformer_only: bool = option(
        False, "Write the transformer's folder alone, without the other parts of the base.",
        "output",
    )  # fmt: skip
    dtype: Literal["fp32", "keep"] = option(
        "fp32",
        "fp32: exact. keep: the dtype of the base file; where that is half precision, rounding "
        "changes the outputs a little.",
        "output",
    )
    overwrite: bool = option(False, "Replace an earlier output of merge.", "output")

    def __post_init__(self) -> None:
        if problems := list(self.problems()):
            raise ConfigError(listing(problems))

    def problems(self) -> Iterator[str]:
        """Yield what cannot work, each as one line."""
        yield from unnamed(self, ("lora_path", "output", "pretrained_model", "variant"))
        yield from block_problems(self.mi_attention_blocks or ())


def main(argv: Sequence[str] | None = None) -> int:
    """Run `midi3d-lora merge` with these words; returns the exit code.

    Raises:
        UserError: anything that the user can put right.
    """
    options = parse(Options, argv or [], prog="midi3d-lora merge", description=TEXT)
    adapter = ready(options)

    from lora_core.report import say
    from midi3d_lora.merged_model import TOLERANCE, Source, export
    from midi3d_lora.official_model import load_component
    from midi3d_lora.transformer.dit import TripoSGDiTModel

    base = Source(Path(options.pretrained_model), options.variant)
    transformer = load_component(TripoSGDiTModel, base.folder, "transformer", base.variant)
    put_on(transformer, adapter, options)
    merged = export(
        transformer,
        base,
        options.output,
        facts={"adapter": adapter.path.name, "trained": adapter.file.metadata},
        dtype=options.dtype,
        transformer_only=options.transformer_only,
        overwrite=options.overwrite,
    )
    say(merged)
    if merged.difference > TOLERANCE:
        say("The difference comes from half precision; --dtype fp32 is exact.")
    return 0


def ready(options: Options) -> Adapter:
    """Refuse what can be known before weights are read; returns the adapter.

    Raises:
        ConfigError: an output that cannot be written, or settings that contradict the adapter.
        CheckpointError: a base or adapter that is missing or does not fit.
    """
    import torch

    from lora_core.preflight import check_all, writable
    from midi3d_lora import official
    from midi3d_lora.adapter_files import read_adapter
    from midi3d_lora.merged_model import Source, refuse_output
    from midi3d_lora.official_model import check_folder
    from midi3d_lora.transformer.dit import TripoSGDiTModel

    found: list[Adapter] = []
    output, base = Path(options.output), Source(Path(options.pretrained_model), options.variant)

    def others() -> None:  # in any variant: they are copied
        if not options.transformer_only:
            names = [name for name in official.SETTINGS if name != "transformer"]
            official.find_model(base.folder, names)

    def fits() -> None:
        folder = official.find_model(base.folder, ["transformer"], base.variant) / "transformer"
        check_folder(TripoSGDiTModel, folder, base.variant)
        settings = official.read_config(folder, official.arguments_of(TripoSGDiTModel))
        found.append(read_adapter(options.lora_path, options.lora_alpha))
        with torch.device("meta"):
            put_on(TripoSGDiTModel(**settings), found[0], options)

    check_all(
        lambda: writable(output.absolute().parent, "--output"),
        lambda: refuse_output(output, options.overwrite, base.folder, Path(options.lora_path)),
        others,
        fits,
    )
    return found[0]


def put_on(transformer: TripoSGDiTModel, adapter: Adapter, options: Options) -> None:
    """Put the adapter on its base.

    Raises:
        ConfigError: flags that contradict it. CheckpointError: it does not fit.
    """
    from midi3d_lora.adapter_files import load_adapter

    load_adapter(
        transformer,
        adapter,
        rank=options.lora_rank,
        alpha=options.lora_alpha,
        multi_instance_blocks=options.mi_attention_blocks,
        allow_partial=options.allow_partial,
    )
