"""`midi3d-lora export`: an adapter in another form, for PEFT, for diffusers, or as one file.

No base model is needed. `merge` is what puts an adapter into the weights of its base.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_core.config import option, parse
from lora_core.errors import ConfigError, listing
from lora_core.guards import unnamed
from midi3d_lora.lora_choice import block_problems

if TYPE_CHECKING:
    from lora_core.adapters.file import AdapterFile
    from midi3d_lora.adapter_files import Adapter

TEXT = "Write an adapter in another form; its kind is told by the ending of --output."
PTH = (".pth", ".pt", ".torch")


@dataclass
class Options:
    """Settings of `midi3d-lora export`."""

    lora_path: str = option(
        MISSING, "Adapter: a file, a folder, or the output_dir of a training run.", "input"
    )
    output: str = option(
        MISSING,
        "A .pth file, a .safetensors file as diffusers has it (names begin with transformer.), or "
        "a folder as PEFT has it (a name without such an ending).",
        "output",
    )
    lora_alpha: float | None = option(
        None, "Of a file that does not say it (default there: 16); otherwise checked.", "input"
    )
    mi_attention_blocks: list[str] | None = option(
        None, "Of a file that does not say them; otherwise checked.", "input"
    )
    overwrite: bool = option(False, "Replace an existing output.", "output")

    def __post_init__(self) -> None:
        if problems := list(self.problems()):
            raise ConfigError(listing(problems))

    def problems(self) -> Iterator[str]:
        """Yield what cannot work, each as one line."""
        yield from unnamed(self, ("lora_path", "output"))
        yield from block_problems(self.mi_attention_blocks or ())
        if Path(self.output).suffix in (".bin", ".ckpt"):
            yield f"--output {self.output}: end it in .pth or .safetensors, or name a folder"


def main(argv: Sequence[str] | None = None) -> int:
    """Run `midi3d-lora export` with these words; returns the exit code.

    Raises:
        UserError: anything that the user can put right.
    """
    options = parse(Options, argv or [], prog="midi3d-lora export", description=TEXT)
    from lora_core.preflight import writable
    from lora_core.report import say
    from midi3d_lora.adapter_files import read_adapter, refuse_contradiction

    output = Path(options.output)
    writable(output.absolute().parent, "--output")
    adapter = read_adapter(options.lora_path, options.lora_alpha)
    refuse_output(output, options.overwrite, adapter.path)
    refuse_contradiction(adapter, None, options.lora_alpha, options.mi_attention_blocks)
    if adapter.multi_instance_blocks is None and options.mi_attention_blocks is not None:
        adapter = replace(adapter, multi_instance_blocks=tuple(options.mi_attention_blocks))
    convert(adapter, output)
    say(
        f"{output}: {len(adapter.file.tensors)} tensors, rank {adapter.rank}, "
        f"alpha {adapter.alpha:g}"
    )
    return 0


def refuse_output(output: Path, overwrite: bool, adapter: Path) -> None:
    """Never write over the adapter that is read, nor unasked over anything else.

    Raises:
        ConfigError: it would.
    """
    from lora_core.adapters.read import CONFIG, README, TENSORS

    if output.resolve() in (adapter.resolve(), adapter.parent.resolve()):
        raise ConfigError(f"--output {output} is the adapter itself: choose another one")
    if output.exists() and not overwrite:
        raise ConfigError(f"{output.absolute()} exists: choose another --output or add --overwrite")
    if not output.is_dir():
        return
    strange = sorted({path.name for path in output.iterdir()} - {CONFIG, README, TENSORS})
    if strange or output.suffix in (*PTH, ".safetensors"):
        what = f"holds {strange[0]!r}" if strange else "is a folder"
        raise ConfigError(f"{output.absolute()} {what}, which is not replaced: choose another one")


def convert(adapter: Adapter, output: str | Path) -> Path:
    """Write an adapter in the form that the ending of `output` says; its values keep their bits.

    Raises:
        CheckpointError: it cannot be written.
    """
    from lora_core.adapters.file import write_adapter

    output, file = Path(output), complete(adapter)
    if output.suffix == ".safetensors":
        return _write_diffusers(file, output)
    return write_adapter(file, output)


def complete(adapter: Adapter) -> AdapterFile:
    """The adapter with all that our files say, whoever wrote it."""
    from lora_core.adapters.match import split_key
    from lora_core.adapters.origin import versions
    from lora_core.module_names import first_match
    from midi3d_lora.adapter_files import BLOCKS, ranks_of

    file = adapter.file
    tensors = {}
    for name, tensor in file.tensors.items():
        split = split_key(name)
        tensors[".".join(split) if split else name] = tensor
    alphas = file.config.get("alpha_pattern") or {}
    layers = {
        name: {"r": rank, "alpha": first_match(alphas, name, adapter.file.config["lora_alpha"])}
        for name, rank in ranks_of(file).items()
    }
    extra = {
        "layers": layers,
        "lora_dropout": file.config.get("lora_dropout", 0.0),
        "freeze_A": False,
        "made": versions(),
    }
    facts = dict(file.metadata)
    if adapter.multi_instance_blocks is not None:
        facts[BLOCKS] = list(adapter.multi_instance_blocks)
    return replace(file, tensors=tensors, metadata=facts, extra=extra | file.extra)


def _write_diffusers(file: AdapterFile, output: Path) -> Path:
    """As diffusers writes it: `transformer.` before names, the settings as JSON in the metadata."""
    from lora_core.adapters.file import record_of
    from lora_core.adapters.read import OWN
    from lora_core.tensor_file import atomic_write, safetensors_bytes
    from midi3d_lora.adapter_files import DIFFUSERS_SETTINGS, PREFIX

    file = _with_alpha_of_rank(file)
    tensors = {f"{PREFIX}{name}": tensor for name, tensor in file.tensors.items()}
    settings: dict[str, Any] = {f"{PREFIX}{name}": v for name, v in file.config.items()}
    metadata = {
        "format": "pt",
        DIFFUSERS_SETTINGS: json.dumps(settings, indent=2, sort_keys=True),
        OWN: json.dumps(record_of(replace(file, tensors=tensors)), sort_keys=True),
    }
    with atomic_write(output) as opened:
        opened.write(safetensors_bytes(tensors, metadata))
    return output


def _with_alpha_of_rank(file: AdapterFile) -> AdapterFile:
    """The same effect with one alpha, the usual rank R: B of a layer times its alpha / R.

    diffusers reads the settings only where `weight_name` or `use_safetensors` is given, and takes
    alpha to be R otherwise, without a word.

    Raises:
        ConfigError: the scale of the adapter is another function of its rank.
    """
    if odd := [name for name in ("use_rslora", "use_dora") if file.config.get(name)]:
        raise ConfigError(
            f"{file.path} has {' and '.join(odd)}, which diffusers would not apply: export it as a "
            "folder for PEFT"
        )
    layers = file.extra["layers"]
    rank = Counter(said["r"] for said in layers.values()).most_common(1)[0][0]
    tensors = {
        name: tensor * (layers[name.rpartition(".lora_B.")[0]]["alpha"] / rank)
        if ".lora_B." in name
        else tensor
        for name, tensor in file.tensors.items()
    }
    config = file.config | {"lora_alpha": rank, "alpha_pattern": {}}
    one = {name: said | {"alpha": rank} for name, said in layers.items()}
    return replace(file, tensors=tensors, config=config, extra=file.extra | {"layers": one})
