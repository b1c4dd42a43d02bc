"""The model folder of Isaac as it is published: found, compared with its configuration, and read.

Nothing in it is executed: neither the Python files that it holds, nor pickled weights.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from isaac_lora.json_words import in_json
from isaac_lora.network.configuration import IsaacConfig
from isaac_lora.network.isaac import ITS_DEPTH
from lora_core import base_file
from lora_core.errors import CheckpointError, ConfigError
from lora_core.quiet import quiet_loading
from lora_core.weight_files import WeightFiles, find_shards, read_weights

if TYPE_CHECKING:
    from isaac_lora.network.isaac import IsaacForConditionalGeneration

SETTINGS = "config.json"
SINGLE = base_file.WEIGHTS
INDEX = f"{SINGLE}.index.json"
_WEIGHTS = f"{SINGLE}, or {INDEX} with its shards"
ADAPTER = "adapter_config.json"
HEAD = "lm_head.weight"  # not in files of models whose head is the embedding
_LATER_PORT = "model.language_model."  # of the model that is part of later transformers
_WHERE_TO_GET = (
    ". Download the model, for example with `hf download PerceptronAI/Isaac-0.1 --local-dir "
    "isaac_model`, and pass that folder"
)


# -- the folder ------------------------------------------------------------------------------------


def find_model(path: str | Path) -> Path:
    """The model folder, with its settings and weight files in it; no tensor is read.

    Raises:
        CheckpointError: no such folder, what it lacks, or an adapter beside the model.
    """
    folder = base_file.find_local(path, where_to_get=_WHERE_TO_GET)
    if folder is None:
        raise CheckpointError(
            f"no folder {Path(path).absolute()}, and nothing is downloaded here{_WHERE_TO_GET}"
        )
    try:
        os.listdir(folder)
    except NotADirectoryError:
        reason = "is a file: pass the folder that it lies in"
        raise CheckpointError(f"{folder.absolute()} {reason}") from None
    except OSError as error:
        raise CheckpointError(f"{folder.absolute()} cannot be read: {error.strerror}") from None
    if not (folder / SETTINGS).is_file():
        raise base_file.no_model_folder(folder, f"{SETTINGS} and {_WEIGHTS}")
    find_weights(folder)
    if (folder / ADAPTER).exists():  # transformers would put it into the model
        raise CheckpointError(
            f"{folder.absolute()} holds a LoRA adapter ({ADAPTER}) beside the model: move it into "
            "a folder of its own; the base is --model_path, and the adapter --adapter"
        )
    return folder


def find_weights(folder: Path) -> WeightFiles:
    """The weight files of a folder: one file before shards, as transformers takes them.

    Raises:
        CheckpointError: none, or shards that are missing.
    """
    if (folder / SINGLE).is_file():
        return WeightFiles((folder / SINGLE,))
    if (folder / INDEX).is_file():
        return find_shards(folder / INDEX)
    raise base_file.no_model_folder(folder, _WEIGHTS)


def read_config(folder: Path) -> IsaacConfig:
    """The configuration of a model folder.

    Raises:
        CheckpointError: no settings of an Isaac, or some that contradict each other.
    """
    path = folder / SETTINGS
    content = base_file.read_settings(path)
    if content.get("model_type") != IsaacConfig.model_type:
        raise CheckpointError(
            f"{path}: model_type is {in_json(content.get('model_type'))}, expected "
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
    tensors = read_weights(found, device="meta")
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

    Nothing is said where the model was trained with depth: see `depth.settings.check_adapter`.

    Args:
        dtype: of all weights, whatever the files have.

    Raises:
        CheckpointError: missing, damaged, of another model, or values that are not finite.
    """
    from isaac_lora.network.isaac import IsaacForConditionalGeneration

    folder = find_model(folder)
    check_folder(folder)
    with quiet_loading(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* was trained with depth", UserWarning)
        model: IsaacForConditionalGeneration = IsaacForConditionalGeneration.from_pretrained(
            str(folder), dtype=dtype, use_depth=False, local_files_only=True, use_safetensors=True
        )
    base_file.refuse_nan(folder, model.state_dict())
    return model.eval()
