"""Merged models as folders: the base with LoRA in the transformer's weights, verified before use.

The folder has the official layout and names, so the official programs and `from_pretrained` read
it; what LoRA does not change keeps its bits. It gets its name only after the transformer was read
back and gave the same outputs as the live adapted one. `lora_merge.json` in it says what it is.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lora_core import base_file
from lora_core.adapters.origin import versions
from lora_core.errors import CheckpointError, ConfigError, NumericError, one_line
from lora_core.injection import lora_layers
from lora_core.merged_file import (
    check_written,
    exact,
    move,
    private_folder,
    refuse_inputs,
    write_tensors,
)
from lora_core.merging import merged_state_dict
from lora_core.state_keys import own_state
from lora_core.tensor_file import write_json
from lora_core.weight_files import read_weights
from midi3d_lora import official
from midi3d_lora.adapter_files import BLOCKS
from midi3d_lora.lora_choice import block_problems
from midi3d_lora.transformer.dit import TripoSGDiTModel

Dtype = Literal["fp32", "keep"]
TOLERANCE = 1e-4  # largest difference of an output, as a share of the largest (at least 1)
MARK = "lora_merge.json"
INDEX = "model_index.json"
TRANSFORMER = "transformer"


@dataclass(frozen=True)
class Merged:
    """A merged model on disk.

    Attributes:
        path: its folder.
        tensors, changed: of the transformer: how many, and how many differ from the base's.
        difference: the largest one of an output of the transformer read back and of the live
            adapted one, as a share of the largest output (at least 1).
    """

    path: Path
    tensors: int
    changed: int
    difference: float

    def __str__(self) -> str:
        return (
            f"{self.path}: {self.tensors} tensors in the transformer, {self.changed} of them "
            f"changed; read back, its outputs differ from the adapted model by at most "
            f"{self.difference:.1e}"
        )


@dataclass(frozen=True)
class Source:
    """The base on disk: its folder, and the variant of the transformer's weight files."""

    folder: Path
    variant: str | None = None

    @property
    def transformer(self) -> Path:
        """The sub-folder with the transformer."""
        return self.folder / TRANSFORMER


def export(
    transformer: TripoSGDiTModel,
    base: Source,
    output: str | Path,
    *,
    facts: Mapping[str, Any] | None = None,
    dtype: Dtype = "fp32",
    transformer_only: bool = False,
    overwrite: bool = False,
) -> Merged:
    """Write a base with the adapter on `transformer` merged into it, and verify what was written.

    The live transformer stays as it is.

    Args:
        transformer: adapted, in float32, with the weights of `base`.
        output: folder of the merged model, or with `transformer_only` of the transformer alone.
        facts: about the adapter, plain values, for `lora_merge.json`.
        dtype: "fp32": exact. "keep": the dtypes of the base's file.
        overwrite: replace what an earlier merge wrote there.

    Raises:
        ConfigError: no LoRA, another precision, or an `output` that may not be written.
        CheckpointError: the base cannot be read, or the output not be written.
        NumericError: values that are not finite, or a file with other outputs than the model.
    """
    output = Path(output)
    refuse_output(output, overwrite, base.folder)
    tensors, changed, rounded = _content(transformer, base, dtype)
    said = {BLOCKS: list(transformer.multi_instance_blocks), "made": versions(), **(facts or {})}
    with private_folder(output) as folder:
        trial = folder / output.name
        inside = trial if transformer_only else trial / TRANSFORMER
        _write(inside, tensors, base)
        difference = _verified(inside, tensors, transformer, rounded)
        if not transformer_only:
            _copy_others(base.folder, trial)
        write_json(trial / MARK, said)
        move([trial], [output])
    return Merged(output, len(tensors), changed, difference)


def recorded_blocks(model_dir: str | Path) -> tuple[str, ...] | None:
    """The multi-instance blocks of a merged model; None: it is no merged one.

    Raises:
        CheckpointError: its `lora_merge.json` is unreadable.
    """
    mark = Path(model_dir) / MARK
    if not mark.is_file():
        return None
    blocks = base_file.read_settings(mark).get(BLOCKS)
    if not isinstance(blocks, list) or any(block_problems(blocks)):
        raise CheckpointError(f"{mark}: {BLOCKS} is {blocks!r:.80}: merge again")
    return tuple(blocks)


# -- checking --------------------------------------------------------------------------------------


def refuse_output(output: Path, overwrite: bool, base: Path, adapter: Path | None = None) -> None:
    """Never write over what is read, nor over anything but an earlier merge, and that only asked.

    Raises:
        ConfigError: it would.
    """
    refuse_inputs(output, overwrite, base, *([adapter] if adapter else []))
    if not os.path.lexists(output):
        return
    if not (output / MARK).is_file():
        raise ConfigError(
            f"{output.absolute()} was not written by merge (no {MARK} in it) and is not replaced: "
            "choose another --output, or remove it first"
        )
    strange = sorted(path.name for path in output.iterdir() if not _is_own(path))
    if strange:
        raise ConfigError(
            f"{output.absolute()} holds {one_line(strange[0])!r}, which is not replaced: choose "
            "another --output, or remove it first"
        )


def _is_own(path: Path) -> bool:
    """Whether a merge may have written it."""
    if path.is_dir():
        return path.name in official.SETTINGS and not path.is_symlink()
    return path.suffix in (".json", ".safetensors")


def _refuse_unfit(transformer: TripoSGDiTModel) -> None:
    if not lora_layers(transformer):
        raise ConfigError("the transformer has no LoRA to merge")
    others = {p.dtype for p in transformer.parameters()} - {torch.float32}
    if others:
        raise ConfigError(
            f"the transformer is in {', '.join(map(str, others))}: load it in float32 to merge"
        )


# -- writing ---------------------------------------------------------------------------------------


def _content(
    transformer: TripoSGDiTModel, base: Source, dtype: Dtype
) -> tuple[dict[str, Tensor], int, bool]:
    """(what the file gets, how many tensors differ from the base's, whether they are rounded)."""
    _refuse_unfit(transformer)
    before, merged = own_state(transformer), merged_state_dict(transformer)
    if dtype == "keep":
        weights = official.find_weights(base.transformer, base.variant)
        held = read_weights(weights, device="meta")
        merged = {name: tensor.to(held[name].dtype) for name, tensor in merged.items()}
    changed = sum(not torch.equal(t, before[name].to(t.dtype)) for name, t in merged.items())
    return merged, changed, any(t.itemsize < 4 for t in merged.values())


def _write(folder: Path, tensors: Mapping[str, Tensor], base: Source) -> None:
    """The transformer's folder: the base's settings, and the weights in one file."""
    stem = official.MODELS[TRANSFORMER]
    write_tensors(folder / f"{stem}.safetensors", tensors)
    settings = official.SETTINGS[TRANSFORMER]
    shutil.copyfile(base.transformer / settings, folder / settings)


def _copy_others(base: Path, trial: Path) -> None:
    """The other parts of the base as they are; links are followed, as a hub's cache has them."""
    if (base / INDEX).is_file():
        shutil.copyfile(base / INDEX, trial / INDEX)
    for name in official.SETTINGS:
        if name == TRANSFORMER:
            continue
        (trial / name).mkdir()
        for path in (base / name).iterdir():
            if path.is_file() and not path.name.startswith("."):
                shutil.copyfile(path, trial / name / path.name)


# -- verifying -------------------------------------------------------------------------------------


def _verified(
    folder: Path, tensors: Mapping[str, Tensor], transformer: TripoSGDiTModel, rounded: bool
) -> float:
    """Read the transformer back; returns the largest difference of an output.

    Raises:
        NumericError: other values than were meant, or other outputs than the live one's.
    """
    weights = official.find_weights(folder)
    dtypes = {name: t.dtype for name, t in read_weights(weights, device="meta").items()}
    if dtypes != {name: tensor.dtype for name, tensor in tensors.items()}:
        raise NumericError(f"{folder}: read back with other dtypes than were written")
    other = TripoSGDiTModel.from_pretrained(folder)  # in float32, which holds every half exactly
    check_written(folder, other.state_dict(), {name: t.float() for name, t in tensors.items()})
    difference = compare(transformer, other)
    if not difference <= TOLERANCE and not rounded:
        raise NumericError(
            f"the merged file gives other outputs than the adapted model: {difference:.1e}, "
            f"allowed {TOLERANCE}. It was not kept"
        )
    return difference


def compare(transformer: TripoSGDiTModel, other: TripoSGDiTModel) -> float:
    """Largest difference of an output of two transformers, as a share of the largest (at least 1).

    Both run in float32 and evaluation mode on the first one's device.
    """
    device = next(transformer.parameters()).device
    first, second = probe(transformer), probe(other.to(device))
    return float((first - second).abs().max() / first.abs().max().clamp_min(1))


def probe(transformer: TripoSGDiTModel) -> Tensor:
    """The output [2, 16, C] for fixed random inputs of two rows."""
    random, config = torch.Generator().manual_seed(0), transformer.config
    shapes = {
        "hidden_states": (2, 16, config.in_channels),
        "encoder_hidden_states": (2, 1, config.cross_attention_dim),
        "encoder_hidden_states_2": (2, 5, config.cross_attention_2_dim),
    }
    inputs = {name: torch.randn(shape, generator=random) for name, shape in shapes.items()}
    inputs["timestep"] = torch.tensor([900.0, 200.0])
    device = next(transformer.parameters()).device
    with exact(transformer):
        out: Tensor = transformer(**{name: t.to(device) for name, t in inputs.items()}).sample
    return out
