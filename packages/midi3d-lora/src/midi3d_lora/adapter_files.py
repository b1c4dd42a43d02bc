"""LoRA of the transformer as files: what they say, and putting them on a model.

Three forms are written and read, all with rank, alpha and the multi-instance blocks in them:
- `lora_weights.pth`, the guide's name: one file of tensors and plain values,
- a folder as PEFT has it: `adapter_model.safetensors`, `adapter_config.json`,
- `pytorch_lora_weights.safetensors`, as diffusers has it: names begin with `transformer.`.
Files of other programs are read too: bare dictionaries of tensors, as scripts for this model wrote
them, with `transformer.`, `base_model.model.` or `module.` before a name and `.default.` in it.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from lora_core.adapters import file as core_file
from lora_core.adapters.file import AdapterFile
from lora_core.adapters.layout import number
from lora_core.adapters.match import split_key
from lora_core.adapters.read import TENSORS
from lora_core.adapters.read import read_adapter as read_file
from lora_core.errors import CheckpointError, ConfigError, listing
from lora_core.merged_file import LARGEST_ADAPTER
from lora_core.module_names import exactly, unwrapped
from lora_core.report import plural, say
from lora_core.tensor_file import read_safetensors
from midi3d_lora.lora import ADAPTER, freeze_without_effect
from midi3d_lora.lora_choice import block_problems
from midi3d_lora.transformer.dit import TripoSGDiTModel

PREFIX = "transformer."  # of names, in a file that may hold adapters of several models
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
DIFFUSERS_SETTINGS = "lora_adapter_metadata"  # entry of that file's metadata
BLOCKS = "multi_instance_blocks"  # entry of our metadata
DEFAULT_ALPHA = 16.0  # of the guide's scripts, whose files do not say it
# What a folder that is named in place of a file may hold, best first.
IN_FOLDERS = ("lora_weights.pth", TENSORS, "adapter_model.bin", DIFFUSERS_FILE)
DEEPER = ("lora-final", "adapter")


@dataclass(frozen=True)
class Adapter:
    """What an adapter says of itself, before a model is there.

    Attributes:
        file: its tensors, under the module names of the transformer, and all its settings.
        rank, alpha: the most frequent ones; layers may have others.
        multi_instance_blocks: that it was trained with; None: it does not say.
    """

    file: AdapterFile
    rank: int
    alpha: float
    multi_instance_blocks: tuple[str, ...] | None

    @property
    def path(self) -> Path:
        """Where it was read."""
        return self.file.path


# -- reading ---------------------------------------------------------------------------------------


def find_adapter(path: str | Path) -> Path:
    """The adapter that a file or folder means: itself, or what a training run wrote into it.

    Raises:
        CheckpointError: none there; lists what was looked for.
    """
    path = Path(path)
    if not os.path.isdir(path):  # Path.is_dir may raise
        return path  # what is missing is reported with near names when it is read
    for folder in (path, *(path / name for name in DEEPER)):
        for name in IN_FOLDERS:
            if (folder / name).is_file():
                # A PEFT folder is more than its tensors.
                return folder if name.startswith("adapter_model") else folder / name
    others = sorted(str(found.relative_to(path)) for found in path.glob(f"*/{IN_FOLDERS[0]}"))
    hint = f"; there is {', '.join(others[:5])}" if others else ""
    raise CheckpointError(
        f"{path.absolute()} holds no adapter: looked for {', '.join(IN_FOLDERS)}, there and in "
        f"{' and '.join(DEEPER)}{hint}"
    )


def read_adapter(path: str | Path, alpha: float | None = None) -> Adapter:
    """Read an adapter without a model. Nothing in the file is executed.

    Args:
        path: file or folder, see `find_adapter`.
        alpha: for a file that does not say it, as the guide's old scripts wrote them; None: 16.

    Raises:
        CheckpointError: missing, damaged, or no adapter.
    """
    place = find_adapter(path)
    file = _with_diffusers_settings(read_file(place, LARGEST_ADAPTER))
    file = _without_prefix(file)
    ranks = ranks_of(file)
    if not file.config:
        file = replace(
            file, config=_guessed_config(ranks, DEFAULT_ALPHA if alpha is None else alpha)
        )
        if alpha is None:
            say(
                f"{place} holds tensors only: its lora_alpha is taken to be {DEFAULT_ALPHA:g}, the "
                "guide's default. Trained with another one: --lora_alpha"
            )
    return Adapter(file, _usual(ranks), _alpha(file), _blocks(file))


def _with_diffusers_settings(file: AdapterFile) -> AdapterFile:
    """The settings that diffusers keeps in a safetensors file's metadata, where there are others.

    A PEFT configuration that lies beside such a file is another adapter's.
    """
    if file.path.suffix != ".safetensors" or file.extra:
        return file
    _, metadata = read_safetensors(file.path, LARGEST_ADAPTER, device="meta")
    if DIFFUSERS_SETTINGS not in metadata:
        return file if file.path.name == TENSORS else replace(file, config={})
    try:
        settings = json.loads(metadata[DIFFUSERS_SETTINGS])
    except (ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict) or not settings:
        raise CheckpointError(f"{file.path}: its {DIFFUSERS_SETTINGS} are no readable settings")
    own = {name.removeprefix(PREFIX): value for name, value in settings.items()}
    return replace(file, config={"peft_type": "LORA", **own})


def _without_prefix(file: AdapterFile) -> AdapterFile:
    """The same with the names that the transformer itself has."""
    wrapped = all(name.startswith("module.") for name in file.tensors)  # saved from DDP
    tensors = {}
    for name, tensor in file.tensors.items():
        own = (name.removeprefix("module.") if wrapped else name).removeprefix(PREFIX)
        if own in tensors:
            raise CheckpointError(f"{file.path} holds {own} twice, once as {PREFIX}{own}")
        tensors[own] = tensor
    layers = file.extra.get("layers", {})
    extra = {"layers": {name.removeprefix(PREFIX): said for name, said in layers.items()}}
    config = dict(file.config)
    for name in ("rank_pattern", "alpha_pattern"):
        if isinstance(config.get(name), dict):
            config[name] = {_unprefixed(key): value for key, value in config[name].items()}
    for name in ("target_modules", "modules_to_save", "exclude_modules"):
        if isinstance(config.get(name), list):
            config[name] = [_unprefixed(str(entry)) for entry in config[name]]
    return replace(
        file, tensors=tensors, config=config, extra=file.extra | extra if layers else file.extra
    )


def _unprefixed(pattern: str) -> str:
    return re.sub(r"^(\^?)transformer\\?\.", r"\1", pattern)


def ranks_of(file: AdapterFile) -> dict[str, int]:
    """Layer -> rank, by the shapes of its A [rank, in] or B [out, rank].

    Raises:
        CheckpointError: no tensors of LoRA, or some that are no matrices.
    """
    ranks = {}
    for name, tensor in file.tensors.items():
        split = split_key(name)
        if split is None or split[1] not in ("lora_A.weight", "lora_B.weight"):
            continue
        if tensor.dim() != 2:
            raise CheckpointError(
                f"{file.path}: {name} has shape {tuple(tensor.shape)}, expected two axes"
            )
        if split[1] == "lora_B.weight" or split[0] not in ranks:
            ranks[split[0]] = tensor.shape[split[1] == "lora_B.weight"]
    if not ranks:
        some = ", ".join(list(file.tensors)[:3])
        raise CheckpointError(
            f"{file.path} is no LoRA adapter: expected tensors `blocks.0.attn1.to_q.lora_A.weight` "
            f"and so on, found {some}"
        )
    return ranks


def _guessed_config(ranks: Mapping[str, int], alpha: float) -> dict[str, Any]:
    """PEFT's settings of a file of tensors alone."""
    usual = _usual(ranks)
    return {
        "peft_type": "LORA",
        "r": usual,
        "lora_alpha": number(alpha),
        "rank_pattern": {exactly(name): r for name, r in sorted(ranks.items()) if r != usual},
        "target_modules": sorted(ranks),
    }


def _usual(ranks: Mapping[str, int]) -> int:
    return Counter(ranks.values()).most_common(1)[0][0]


def _alpha(file: AdapterFile) -> float:
    alpha = file.config.get("lora_alpha")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool):
        raise CheckpointError(f"{file.path}: its lora_alpha is {alpha!r:.80}, expected a number")
    return float(alpha)


def _blocks(file: AdapterFile) -> tuple[str, ...] | None:
    blocks = file.metadata.get(BLOCKS)
    if blocks is None:
        return None
    if not isinstance(blocks, list) or any(block_problems(blocks)):
        raise CheckpointError(
            f"{file.path}: its {BLOCKS} are {blocks!r:.80}, expected blocks.8 and so on"
        )
    return tuple(blocks)


# -- putting it on ---------------------------------------------------------------------------------


def load_adapter(
    transformer: TripoSGDiTModel,
    adapter: Adapter | str | Path,
    *,
    rank: int | None = None,
    alpha: float | None = None,
    multi_instance_blocks: Iterable[str] | None = None,
    trainable: bool = False,
    allow_partial: bool = False,
) -> Adapter:
    """Put an adapter on a transformer, in place, and choose the blocks it was trained with.

    Args:
        adapter: file or folder, or what `read_adapter` read.
        rank, alpha, multi_instance_blocks: what the user says they are, which is checked; alpha and
            the blocks count where the adapter does not say them. No blocks from either: those of
            the transformer stay.
        trainable: to go on training it; adapters without effect stay frozen.
        allow_partial: use what fits of an adapter with missing or unexpected tensors.

    Raises:
        ConfigError: the user says otherwise than the file.
        CheckpointError: it cannot be used, or does not fit. The transformer has no adapter then.
    """
    if not isinstance(adapter, Adapter):
        adapter = read_adapter(adapter, alpha)
    said = None if multi_instance_blocks is None else tuple(multi_instance_blocks)
    refuse_contradiction(adapter, rank, alpha, said)
    blocks = said if adapter.multi_instance_blocks is None else adapter.multi_instance_blocks
    if blocks is not None:
        transformer.set_multi_instance_blocks(blocks)
    core_file.load_adapter(
        transformer, adapter.file, ADAPTER, trainable=trainable, allow_partial=allow_partial
    )
    without_effect = freeze_without_effect(transformer) if trainable else []
    if without_effect:
        say(
            f"{plural(len(without_effect), 'layer')} of {adapter.path} without effect: no output "
            f"depends on {without_effect[0]} and its like"
        )
    return adapter


def refuse_contradiction(
    adapter: Adapter,
    rank: int | None = None,
    alpha: float | None = None,
    multi_instance_blocks: Sequence[str] | None = None,
) -> None:
    """Raise ConfigError for all that a user says otherwise than an adapter; None: not said."""
    pairs: list[tuple[str, Any, Any]] = [
        ("lora_rank", rank, adapter.rank),
        ("lora_alpha", alpha, adapter.alpha),
    ]
    blocks = adapter.multi_instance_blocks
    if blocks is not None and multi_instance_blocks is not None:
        pairs.append(("mi_attention_blocks", _in_order(multi_instance_blocks), _in_order(blocks)))
    problems = [
        f"--{name} {_shown(said)}: {adapter.path} was trained with {_shown(own)}. Leave --{name} "
        "out: the adapter's own is used"
        for name, said, own in pairs
        if said is not None and said != own
    ]
    if problems:
        raise ConfigError(listing(problems))


def _in_order(blocks: Sequence[str]) -> list[str]:
    return sorted(blocks, key=lambda name: (len(name), name))


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(value) or "none"
    return f"{value:g}"


# -- writing ---------------------------------------------------------------------------------------


def save_adapter(
    transformer: nn.Module, path: str | Path, metadata: Mapping[str, Any] | None = None
) -> Path:
    """Write the adapter; a crash at any moment leaves the old file or the new one.

    Args:
        path: ending in .pth, .pt or .torch: one file; else a folder as PEFT has it. The form of
            diffusers is made from these: see `export`.
        metadata: facts to keep with it, plain values; the multi-instance blocks are added.

    Raises:
        ConfigError: no LoRA on the transformer, or metadata that is not plain.
        CheckpointError: it cannot be written.
    """
    path, model = Path(path), unwrapped(transformer)
    assert isinstance(model, TripoSGDiTModel)
    facts = {**(metadata or {}), BLOCKS: list(model.multi_instance_blocks)}
    return core_file.save_adapter(transformer, path, ADAPTER, facts)
