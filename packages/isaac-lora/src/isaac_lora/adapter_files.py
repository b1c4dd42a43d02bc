"""LoRA of Isaac as files: PEFT's folder, with the depth it was trained with in `depth.json`.

    adapter_model.safetensors, adapter_config.json   what `peft.PeftModel.from_pretrained` reads
    depth.json                                       where depth was used; PEFT does not look at it
    README.md                                        the model card, with the licences

Layers are named in full, as in `IsaacForConditionalGeneration`: PEFT takes the end of a name for
every layer that has it, and `q_proj` or `1` would mean others as well.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import distributed, nn

from isaac_lora.depth import settings as depth_settings
from isaac_lora.depth.settings import DepthSettings
from isaac_lora.json_words import in_json
from isaac_lora.lora import ADAPTER
from lora_core.adapters import file as core_file
from lora_core.adapters.file import AdapterFile
from lora_core.adapters.match import size_limit, split_key
from lora_core.adapters.read import TENSORS
from lora_core.adapters.read import read_adapter as read_file
from lora_core.base_file import SUFFIXES
from lora_core.errors import CheckpointError, ConfigError
from lora_core.merged_file import LARGEST_ADAPTER
from lora_core.module_names import unwrapped

if TYPE_CHECKING:
    from isaac_lora.network.isaac import IsaacForConditionalGeneration

TASK = "CAUSAL_LM"  # tells PEFT to take the wrapper that generates
IN_FOLDERS = (TENSORS, "adapter_model.bin")  # the second of older PEFT
DEEPER = "adapter"  # in the folder of a run
LICENCE = (
    "The weights of Isaac, without which this adapter does nothing, are under Perceptron's own "
    "non-production licence."
)
DEPTH_LICENCE = (
    "Of the weights of Depth Anything V2, Small are under Apache-2.0, Base and Large under "
    "CC-BY-NC-4.0."
)


@dataclass(frozen=True)
class Adapter:
    """What an adapter says of itself, before a model is there.

    Attributes:
        file: its tensors, under the module names of the model, and all its settings.
        r, alpha: the most frequent rank and the alpha; layers may have others.
        depth: that it was trained with; None: no depth.
    """

    file: AdapterFile
    r: int
    alpha: float
    depth: DepthSettings | None

    @property
    def path(self) -> Path:
        """Where it was read."""
        return self.file.path


# -- reading ---------------------------------------------------------------------------------------


def find_adapter(path: str | Path) -> Path:
    """The adapter that a path means: a folder with one, that of a run, or a file.

    Raises:
        CheckpointError: a folder without one.
    """
    path = Path(path)
    if not os.path.isdir(path):  # Path.is_dir may raise
        return path  # what is missing is reported with near names when it is read
    for folder in (path, path / DEEPER):
        if any((folder / name).is_file() for name in IN_FOLDERS):
            return folder
    raise CheckpointError(
        f"{path.absolute()} holds no adapter: looked for {' or '.join(IN_FOLDERS)}, there and in "
        f"{DEEPER}/"
    )


def read_adapter(path: str | Path, max_bytes: int = LARGEST_ADAPTER) -> Adapter:
    """Read an adapter without a model. Nothing in the file is executed.

    Args:
        max_bytes: refuse a larger file of tensors before it is read.

    Raises:
        CheckpointError: missing, damaged, or no adapter.
    """
    place = find_adapter(path)
    file = read_file(place, max_bytes)
    ranks = Counter(ranks_of(file))
    alpha = file.config.get("lora_alpha")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool):
        found = f" (it is {in_json(alpha)})" if "lora_alpha" in file.config else ""
        raise CheckpointError(
            f"{place.absolute()} does not say its lora_alpha{found}: a folder as "
            "PEFT writes it has it in adapter_config.json"
        )
    folder = place if place.is_dir() else place.parent
    depth = depth_settings.read_depth_settings(folder)
    return Adapter(file, ranks.most_common(1)[0][0], float(alpha), depth)


def ranks_of(file: AdapterFile) -> Iterator[int]:
    """Yield the rank of each layer, from the shape of its B [out, r].

    Raises:
        CheckpointError: no tensors of LoRA, or some that are no matrices.
    """
    found = 0
    for name, tensor in file.tensors.items():
        split = split_key(name)
        if split is None or split[1] not in ("lora_B.weight", "lora_embedding_B"):
            continue
        if tensor.dim() != 2:
            shape = tuple(tensor.shape)
            raise CheckpointError(f"{file.path}: {name} has shape {shape}, expected two axes")
        found += 1
        yield tensor.shape[1]
    if not found:
        some = ", ".join(list(file.tensors)[:3])
        raise CheckpointError(
            f"{file.path} is no LoRA adapter: expected tensors such as "
            f"`model.layers.0.self_attn.q_proj.lora_B.weight`, found {some}"
        )


# -- putting it on ---------------------------------------------------------------------------------


def load_adapter(
    model: IsaacForConditionalGeneration,
    adapter: Adapter | str | Path,
    *,
    depth: DepthSettings | None = None,
    trainable: bool = False,
    allow_partial: bool = False,
) -> Adapter:
    """Put an adapter on a model, in place.

    Args:
        adapter: file or folder, or what `read_adapter` read.
        depth: that images get, where it does not come from the model itself.
        trainable: to go on training it.
        allow_partial: use what fits of an adapter with missing or unexpected tensors.

    Raises:
        CheckpointError: it cannot be used, does not fit, or was trained with other depth. The
            model has no adapter then.

    Warns:
        UserWarning: it was trained with depth and is used without, or the other way round.
    """
    if not isinstance(adapter, Adapter):
        adapter = read_adapter(adapter, size_limit(model))
    folder = adapter.path if adapter.path.is_dir() else adapter.path.parent
    depth_settings.check_adapter(folder, depth or depth_of(model))
    core_file.load_adapter(
        model, adapter.file, ADAPTER, trainable=trainable, allow_partial=allow_partial
    )
    return adapter


def check_fit(
    empty: IsaacForConditionalGeneration, adapter: Adapter, allow_partial: bool = False
) -> None:
    """Put an adapter on a model without weights; what there is to warn of comes with the weights.

    Args:
        empty: on the meta device. allow_partial: see `load_adapter`.

    Raises:
        CheckpointError: it does not fit.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        load_adapter(
            empty, adapter, depth=adapter.depth, trainable=True, allow_partial=allow_partial
        )


def depth_of(model: IsaacForConditionalGeneration) -> DepthSettings | None:
    """The depth that a model gives to its images; None: it was loaded without."""
    if model.depth is None:
        return None
    return model.depth.settings(model.config.depth_alpha)


# -- writing ---------------------------------------------------------------------------------------


def save_adapter(
    model: nn.Module,
    folder: str | Path,
    metadata: Mapping[str, Any] | None = None,
    depth: DepthSettings | None = None,
) -> Path:
    """Write the adapter as PEFT has it; a crash at any moment leaves the old one or the new one.

    With sharded parameters all ranks must call this.

    Args:
        metadata: facts to keep with it, plain values.
        depth: that it was trained with, where it does not come from the model itself.

    Raises:
        ConfigError: no LoRA on the model, a name of a file, or metadata that is not plain.
        CheckpointError: it cannot be written.
    """
    folder, network = Path(folder), unwrapped(model)
    if folder.suffix in SUFFIXES:
        raise ConfigError(f"cannot save an adapter as {folder.name}: name a folder")
    depth = depth or depth_of(network)  # type: ignore[arg-type]
    if depth is not None and _is_first():  # before: it never lies here without its depth
        depth_settings.write_depth_settings(folder, depth)
    core_file.save_adapter(
        network, folder, ADAPTER, metadata, task_type=TASK, remarks=_remarks(depth)
    )
    if depth is None and _is_first():
        (folder / depth_settings.FILE).unlink(missing_ok=True)
    return folder


def _is_first() -> bool:
    return not distributed.is_initialized() or distributed.get_rank() == 0


def _remarks(depth: DepthSettings | None) -> list[str]:
    """What a user of the adapter must know, for its model card."""
    if depth is None:
        return [LICENCE]
    return [
        f"It was trained with depth from {depth.checkpoint} ({depth.model}). PEFT does not know "
        "this: load the base with `IsaacForConditionalGeneration.from_pretrained(folder, "
        f"use_depth=True, depth_checkpoint_path=..., depth_alpha={depth.alpha:g}, "
        f"depth_input_size={depth.input_size})`.",
        LICENCE,
        DEPTH_LICENCE,
    ]
