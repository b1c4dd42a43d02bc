"""`scenesplat-lora merge`: an adapter and its base become one checkpoint."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lora_core.config import option, parse
from lora_core.errors import ConfigError, listing
from lora_core.guards import unnamed

if TYPE_CHECKING:
    from scenesplat_lora.export import Network
    from scenesplat_lora.network.official import OfficialFile

TEXT = "Merge LoRA into its base model."


@dataclass
class Options:
    """Settings of `scenesplat-lora merge`."""

    checkpoint: str = option(MISSING, "The base that the adapter was trained on.", "input")
    adapter: str = option(MISSING, "LoRA: what save_lora_checkpoint wrote, or PEFT.", "input")
    output: str = option(
        MISSING, "Merged model: a .pth or .safetensors file with the official names.", "output"
    )
    network: str | None = option(
        None,
        "A .py file whose model.backbone describes the network, for a checkpoint of another shape "
        "that does not describe itself.",
        "input",
    )
    allow_partial: bool = option(
        False, "Use what fits of an adapter with missing or unexpected tensors.", "input"
    )
    dtype: Literal["fp32", "keep"] = option(
        "fp32",
        "fp32: exact. keep: the dtype of the base file; where that is half precision, rounding "
        "changes the outputs a little.",
        "output",
    )
    overwrite: bool = option(False, "Replace an existing output.", "output")

    def __post_init__(self) -> None:
        if problems := list(unnamed(self, ("checkpoint", "adapter", "output", "network"))):
            raise ConfigError(listing(problems))


def main(argv: Sequence[str] | None = None) -> int:
    """Run `scenesplat-lora merge` with these words; returns the exit code.

    Raises:
        UserError: anything that the user can put right.
    """
    options = parse(Options, argv or [], prog="scenesplat-lora merge", description=TEXT)
    ready(options)

    from lora_core.report import say
    from scenesplat_lora.adapter_read import read_facts
    from scenesplat_lora.export import TOLERANCE, export
    from scenesplat_lora.network.description import base_grid_size
    from scenesplat_lora.network.official import load_state, read_official

    base = read_official(options.checkpoint)
    net = plain(base, options)
    load_state(net, base)
    put_on(net, options)
    merged = export(
        net,
        base,
        options.output,
        grid_size=read_facts(options.adapter).grid_size or base_grid_size(base),
        dtype=options.dtype,
        overwrite=options.overwrite,
    )
    say(merged)
    if merged.difference > TOLERANCE:
        say("The difference comes from half precision; --dtype fp32 is exact.")
    return 0


def ready(options: Options) -> None:
    """Refuse what can be known before weights are read.

    Raises:
        ConfigError: an output that cannot be written, or prompt MLPs.
        CheckpointError: a base or adapter that is missing or does not fit.
    """
    import torch

    from lora_core.adapters import on_base
    from lora_core.preflight import check_all, writable
    from scenesplat_lora.export import refuse_output, refuse_prompts
    from scenesplat_lora.network.official import read_official

    output = Path(options.output)

    def fits() -> None:
        on_base.refuse_missing(options.adapter)
        base = read_official(options.checkpoint, "meta")
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they come again with the weights
            net = plain(base, options)
            put_on(net, options)
        refuse_prompts(net)

    check_all(
        lambda: writable(output.absolute().parent, "--output"),
        lambda: refuse_output(output, options.overwrite, options.checkpoint, options.adapter),
        fits,
    )


def plain(base: OfficialFile, options: Options) -> Network:
    """The network of a base, with the adapter's number of classes and with random weights.

    Raises:
        CheckpointError, ConfigError: a base or adapter that cannot be used.
    """
    from scenesplat_lora.adapter_read import read_facts
    from scenesplat_lora.model_options import network_of
    from scenesplat_lora.network.official import build_model

    classes = read_facts(options.adapter).classes
    return build_model(base, network_of(options.network), classes).eval()


def put_on(net: Network, options: Options) -> None:
    """Put the adapter on its base.

    Raises:
        CheckpointError: it does not fit.
    """
    from scenesplat_lora.adapter_file import load_lora_checkpoint

    load_lora_checkpoint(net, options.adapter, allow_partial=options.allow_partial)
