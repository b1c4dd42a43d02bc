"""The official model directory, as diffusers lays it out, read sub-folder by sub-folder.

`model_index.json` names classes of the `midi` package; it is not followed and nothing of it is
imported. What a sub-folder holds is told by its settings and its tensors alone.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from lora_core import base_file
from lora_core.errors import CheckpointError, ConfigError, listing, near
from lora_core.weight_files import WeightFiles, find_shards

MODELS = {"transformer": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}
ENCODERS = {"image_encoder_1": "model", "image_encoder_2": "model"}
SETTINGS = {
    "feature_extractor_1": "preprocessor_config.json",
    "feature_extractor_2": "preprocessor_config.json",
    "image_encoder_1": "config.json",
    "image_encoder_2": "config.json",
    "scheduler": "scheduler_config.json",
    "transformer": "config.json",
    "vae": "config.json",
}
TRIPOSG = "this is a TripoSG model with one picture encoder, not MIDI-3D, which has two"
_TRIPOSG_FOLDERS = ("image_encoder_dinov2", "feature_extractor_dinov2")
_PICKLED = {"model": "pytorch_model"}  # transformers' name of `.bin` files
_WHERE_TO_GET = (
    ". Download the model repository VAST-AI/MIDI-3D, for example with `hf download "
    "VAST-AI/MIDI-3D --local-dir pretrained_weights/MIDI-3D`, or pass the folder that holds it"
)


# -- the directory -------------------------------------------------------------------------------


def find_model(
    path: str | Path, components: Iterable[str] = tuple(SETTINGS), variant: str | None = None
) -> Path:
    """The model directory, with the settings and weight files of these components in it.

    Nothing is opened except lists of shards.

    Args:
        components: names of sub-folders.
        variant: of the transformer's and the VAE's weight files.

    Raises:
        CheckpointError: no such folder, or what it lacks, all of it.
    """
    folder = base_file.find_local(path, where_to_get=_WHERE_TO_GET)
    if folder is None:
        raise CheckpointError(f"no folder {path}{_WHERE_TO_GET}")
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is a file: expected the model's folder{_WHERE_TO_GET}")
    problems = []
    for name in components:
        if not (folder / name / SETTINGS[name]).is_file():
            problems.append(f"{folder / name / SETTINGS[name]} is missing")
        elif stem := (MODELS | ENCODERS).get(name):
            try:
                find_weights(folder / name, variant if name in MODELS else None, stem)
            except CheckpointError as error:
                problems.append(str(error))
    if problems and any((folder / name).is_dir() for name in _TRIPOSG_FOLDERS):
        problems.append(TRIPOSG)
    if problems:
        raise CheckpointError(f"{folder} is no MIDI-3D model:\n{listing(problems)}")
    return folder


# -- one sub-folder ------------------------------------------------------------------------------


def find_weights(
    folder: Path, variant: str | None = None, stem: str = "diffusion_pytorch_model"
) -> WeightFiles:
    """The weight files of a sub-folder: safetensors before `.bin`, shards before one file.

    Args:
        variant: of the files to take, as "fp16". None: those without a variant, or where there are
            none, the only variant.
        stem: how their names begin, "model" for transformers' encoders.

    Raises:
        CheckpointError: none, or a choice of variants; shards that are missing.
    """
    if found := _with_variant(folder, variant, stem):
        return found
    there = _variants(folder, stem)
    if variant is None and len(there) == 1 and (found := _with_variant(folder, there[0], stem)):
        return found
    wanted = f"of the variant {variant!r} " if variant else ""
    others = f"; there are the variants {', '.join(there)}" if there else ""
    raise CheckpointError(f"{folder}: no weights {wanted}named {stem}.safetensors{others}")


def _with_variant(folder: Path, variant: str | None, stem: str) -> WeightFiles | None:
    dotted = f".{variant}" if variant else ""
    for suffix in (".safetensors", ".bin"):
        name = stem if suffix == ".safetensors" else _PICKLED.get(stem, stem)
        # diffusers wrote the second form before 2025.
        for middle in (f"{suffix}.index{dotted}", f"{suffix}{dotted}.index"):
            if (index := folder / f"{name}{middle}.json").is_file():
                return find_shards(index, variant)
        if (single := folder / f"{name}{dotted}{suffix}").is_file():
            return WeightFiles((single,), variant)
    return None


def _variants(folder: Path, stem: str) -> list[str]:
    word = r"(\w+)"
    names = f"{re.escape(stem)}|{re.escape(_PICKLED.get(stem, stem))}"
    forms = (
        rf"(?:{names})\.{word}\.(?:safetensors|bin)",
        rf"(?:{names})\.(?:safetensors|bin)\.index\.{word}\.json",
        rf"(?:{names})\.(?:safetensors|bin)\.{word}\.index\.json",
    )
    entries = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    return sorted({m[1] for name in entries for form in forms if (m := re.fullmatch(form, name))})


def read_config(
    folder: Path, known: Collection[str], file_name: str = "config.json"
) -> dict[str, Any]:
    """The settings of a sub-folder; what begins with `_` is left out.

    Args:
        known: names that may occur; the rest take their defaults.

    Raises:
        CheckpointError: missing, no JSON, or other settings, which would change the model.
    """
    path = folder / file_name
    content = base_file.read_settings(path)
    try:
        refuse_unknown(content, known)
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from None
    return {name: value for name, value in content.items() if not name.startswith("_")}


def refuse_unknown(settings: Iterable[str], known: Collection[str]) -> None:
    """Raise ConfigError for settings that a class does not know, except those with a `_`."""
    unknown = [name for name in settings if name not in known and not name.startswith("_")]
    if unknown:
        hint = near(unknown[0], known)
        raise ConfigError(
            f"unknown settings {', '.join(map(repr, unknown[:5]))}, which would make another "
            f"model: expected {', '.join(sorted(known))}{hint and '; ' + hint}"
        )


def arguments_of(model_class: type) -> list[str]:
    """The settings that a class takes: the arguments of its constructor."""
    return [name for name in inspect.signature(model_class).parameters if name != "kwargs"]
