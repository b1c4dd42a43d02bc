"""The model folder of Isaac as it is published: found, compared with its configuration, and read.

Nothing in it is executed: neither the Python files that it holds, nor pickled weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from isaac_lora.network.configuration import IsaacConfig
from isaac_lora.network.isaac import ITS_DEPTH
from lora_core import base_file
from lora_core.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from isaac_lora.network.isaac import IsaacForConditionalGeneration

SETTINGS = "config.json"
SINGLE = base_file.WEIGHTS
INDEX = f"{SINGLE}.index.json"
HEAD = "lm_head.weight"  # not in files of models whose head is the embedding
_LATER_PORT = "model.language_model."  # of the model that is part of later transformers
_WHERE_TO_GET = (
    ". Download the model, for example with `hf download PerceptronAI/Isaac-0.1 --local-dir "
    "isaac_model`, and pass that folder"
)


@dataclass(frozen=True)
class WeightFiles:
    """Where a model folder keeps its tensors.

    Attributes:
        files: one safetensors file, or the shards.
        index: of shards, tensor name -> file name.
    """

    files: tuple[Path, ...]
    index: Mapping[str, str] | None = None


# -- the folder ------------------------------------------------------------------------------------


def find_model(path: str | Path) -> Path:
    """The model folder, with its settings and weight files in it; no tensor is read.

    Raises:
        CheckpointError: no such folder, or what it lacks.
    """
    folder = base_file.find_local(path, where_to_get=_WHERE_TO_GET)
    if folder is None:
        raise CheckpointError(
            f"no folder {Path(path).absolute()}, and nothing is downloaded here{_WHERE_TO_GET}"
        )
    if not folder.is_dir():
        raise CheckpointError(f"{folder.absolute()} is a file: pass the folder that it lies in")
    if not (folder / SETTINGS).is_file():
        raise base_file.no_model_folder(folder, f"{SETTINGS} and {SINGLE}")
    find_weights(folder)
    return folder


def find_weights(folder: Path) -> WeightFiles:
    """The weight files of a folder: one file before shards, as transformers takes them.

    Raises:
        CheckpointError: none, or shards that are missing.
    """
    if (folder / SINGLE).is_file():
        return WeightFiles((folder / SINGLE,))
    if (folder / INDEX).is_file():
        return _shards(folder / INDEX)
    raise base_file.no_model_folder(folder, f"{SINGLE}, or {INDEX} with its shards")


def _shards(index: Path) -> WeightFiles:
    places = base_file.read_settings(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{index} has no weight_map: copy or download it again")
    names = sorted({str(name) for name in places.values()})
    outside = [name for name in names if Path(name).name != name or "\\" in name]
    if outside:
        raise CheckpointError(f"{index} names files of other folders: {base_file.some(outside)}")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{index.parent}: {len(missing)} of {len(names)} shards are missing: "
            f"{base_file.some(missing)}"
        )
    return WeightFiles(tuple(index.parent / name for name in names), places)


def read_config(folder: Path) -> IsaacConfig:
    """The configuration of a model folder.

    Raises:
        CheckpointError: no settings of an Isaac, or some that contradict each other.
    """
    path = folder / SETTINGS
    content = base_file.read_settings(path)
    if content.get("model_type") != IsaacConfig.model_type:
        raise CheckpointError(
            f"{path}: model_type is {content.get('model_type')!r:.80}, expected "
            f"{IsaacConfig.model_type!r}{_WHERE_TO_GET}"
        )
    try:
        return IsaacConfig(**content)
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from None
    # The strict dataclasses of transformers have errors of their own for wrong types.
    except Exception as error:
        raise CheckpointError(f"{path} makes no Isaac: {error}") from error


# -- its tensors -----------------------------------------------------------------------------------


def headers_of(found: WeightFiles) -> dict[str, Tensor]:
    """Names, shapes and dtypes of all tensors, without reading their values.

    Raises:
        CheckpointError: a file is damaged; a tensor is in two shards, or in another than the list
            of shards says.
    """
    tensors: dict[str, Tensor] = {}
    places: dict[str, str] = {}
    for path in found.files:
        content, _ = base_file.read_tensors(path, device="meta")
        if twice := [name for name in content if name in tensors]:
            raise CheckpointError(
                f"{path} and {places[twice[0]]} both have {base_file.some(twice)}"
            )
        tensors |= content
        places |= dict.fromkeys(content, path.name)
    if found.index is not None:
        listed = {str(name): str(place) for name, place in found.index.items()}
        wrong = sorted({name for name, _ in listed.items() ^ places.items()})
        if wrong:
            raise CheckpointError(
                f"{found.files[0].parent}: the list of shards and the shards differ in "
                f"{len(wrong)} tensors: {base_file.some(wrong)}"
            )
    return tensors


def empty_model(folder: Path) -> IsaacForConditionalGeneration:
    """The model of a folder on the meta device: only its settings are read.

    Raises:
        CheckpointError: settings that make no model.
    """
    from isaac_lora.network.isaac import IsaacForConditionalGeneration

    config = read_config(folder)
    try:
        with torch.device("meta"):
            return IsaacForConditionalGeneration(config)
    # Sizes that fit nowhere fail anywhere in torch.
    except (RuntimeError, ValueError, TypeError) as error:
        raise CheckpointError(f"{folder / SETTINGS} makes no Isaac: {error}") from error


def check_folder(folder: Path) -> IsaacForConditionalGeneration:
    """Compare the tensors of a folder with its settings, without reading any values.

    Returns:
        the model of the folder on the meta device.

    Raises:
        CheckpointError: tensors that are missing, left over, or of another shape or kind.
    """
    model, found = empty_model(folder), find_weights(folder)
    tensors = headers_of(found)
    wanted = dict(model.state_dict())
    if model.config.tie_word_embeddings and HEAD not in tensors:
        del wanted[HEAD]
    left = [name for name in tensors if name not in wanted and not name.startswith(ITS_DEPTH)]
    hint = ""
    if any(name.startswith(_LATER_PORT) for name in left):
        hint = "  these are the names of a later port of the model; use Isaac-0.1 as published"
    place = found.files[0] if found.index is None else folder
    base_file.refuse_misfit(place, f"the Isaac of {SETTINGS}", tensors, wanted, left, hint=hint)
    if whole := [name for name in wanted if not tensors[name].is_floating_point()]:
        raise CheckpointError(
            f"{place}: {base_file.some(whole)} are {tensors[whole[0]].dtype}: load the model in "
            "full or half precision, adapters do not train on quantised weights"
        )
    return model


def load_model(
    folder: str | Path, dtype: torch.dtype = torch.float32
) -> IsaacForConditionalGeneration:
    """The model of a folder, checked before it is read: evaluation mode, on the CPU, no depth.

    Args:
        dtype: of all weights, whatever the files have.

    Raises:
        CheckpointError: missing, damaged, of another model, or values that are not finite.
    """
    from isaac_lora.network.isaac import IsaacForConditionalGeneration

    folder = find_model(folder)
    check_folder(folder)
    model: IsaacForConditionalGeneration = IsaacForConditionalGeneration.from_pretrained(
        str(folder), dtype=dtype, use_depth=False, local_files_only=True, use_safetensors=True
    )
    base_file.refuse_nan(folder, model.state_dict())
    return model.eval()
