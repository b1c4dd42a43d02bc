"""Merged models as files: the base's tensors with the adapters in them, verified before they count.

A merged file has exactly the tensors of its base file, video memory included; only the weights
that the adapters change differ. It gets its name after it was read back and gave the same masks as
the live adapted model.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from lora_core.base_file import SUFFIXES, WEIGHTS
from lora_core.errors import ConfigError, NumericError
from lora_core.merged_file import (
    check_written,
    exact,
    move,
    private_folder,
    refuse_changed,
    refuse_existing,
    same_bits,
    write_tensors,
)
from lora_core.merging import merged_state_dict
from lora_core.tensor_file import write_json
from sam2_lora.model import (
    base_fingerprint,
    decode,
    encode,
    from_file,
    image_size,
    set_image_size,
)
from sam2_lora.names import is_video, module_to_official, to_transformers
from sam2_lora.official import OfficialFile, read_official, write_official

if TYPE_CHECKING:
    from transformers import Sam2Model

TOLERANCE = 1e-4  # largest difference of a mask logit, in float32
PROBE = (128, 128)  # pixels: the weights are the same at every size, and this one is cheap


@dataclass(frozen=True)
class Merged:
    """A merged model on disk.

    Attributes:
        path: the file or folder.
        tensors, changed: how many it holds, and how many of them differ from the base's.
        difference: prompt kind -> largest difference of a mask logit between the file read back
            and the live adapted model, in float32.
    """

    path: Path
    tensors: int
    changed: int
    difference: dict[str, float]

    def __str__(self) -> str:
        kinds = ", ".join(f"{kind} {value:.1e}" for kind, value in self.difference.items())
        return (
            f"{self.path}: {self.tensors} tensors, {self.changed} of them changed; read back, its "
            f"mask logits differ from the adapted model by at most: {kinds}"
        )


def export(
    model: Sam2Model,
    output: str | Path,
    dtype: Literal["fp32", "keep"] = "fp32",
    overwrite: bool = False,
) -> Merged:
    """Write the base with the active adapters merged into it, and verify the file.

    The base is read again from its file, so that every tensor that no adapter changes keeps its
    bits, and the live model stays as it is.

    Args:
        model: the adapted network, from `model.build` or `model.load`.
        output: `.pt`, `.pth`, `.torch` (`{"model": ...}`), `.safetensors`, or a transformers
            folder.
        dtype: "fp32": the image part in float32, exact. "keep": the dtypes of the base file.
        overwrite: replace what is there.

    Raises:
        ConfigError: `output` exists, or is the base file.
        CheckpointError: the base file has changed, or cannot be read or written.
        NumericError: values that are not finite, or a file that gives other masks than the model.
    """
    output = Path(output)
    base = read_official(model.sam2_base.path)
    parts = _parts(output, base)
    for part in parts:
        refuse_existing(part, overwrite)
    if base.path.resolve() in {part.resolve() for part in parts}:
        raise ConfigError(f"{output} is the base itself: choose another --output")
    refuse_changed(base.path, base_fingerprint(base), model.sam2_base.fingerprint)
    merged = merged_file(model, base, dtype)
    if output.suffix not in SUFFIXES and base.format != "transformers":
        merged = replace(merged, tensors=merged.image)  # a new folder is a Sam2Model
    # Read back in another place: the real one is for verified files only.
    with private_folder(output) as folder:
        trial = folder / output.name
        _write(trial, merged, base)
        found = read_official(trial)
        changed = _check_tensors(found, merged, base)
        unrounded = _before_rounding(model, merged, base)
        difference = compare(model, from_file(found))
        _check_masks(difference if unrounded is merged else compare(model, from_file(unrounded)))
        move(_parts(trial, base), parts)
    return Merged(output, len(found.tensors), changed, difference)


def merged_file(
    model: Sam2Model, base: OfficialFile, dtype: Literal["fp32", "keep"] = "fp32"
) -> OfficialFile:
    """The base file with the active adapters merged into its tensors, in memory."""
    tensors = base.tensors
    if dtype == "fp32":
        tensors = {k: t if is_video(k) else t.float() for k, t in tensors.items()}
    return replace(base, tensors=merged_state_dict(model, tensors, rename=module_to_official))


# -- writing -------------------------------------------------------------------------------------


def _write(path: Path, merged: OfficialFile, base: OfficialFile) -> None:
    if path.suffix in SUFFIXES:
        write_official(path, merged.tensors)
        for config in _parts(path, base)[:-1]:
            write_json(config, base.variant.config)
        return
    write_tensors(path / WEIGHTS, to_transformers(merged.tensors))
    if base.format == "transformers":
        for config in sorted(base.path.glob("*.json")):
            shutil.copyfile(config, path / config.name)
        return
    from transformers import Sam2Config

    config = Sam2Config(**merged.variant.config, architectures=["Sam2Model"], dtype="float32")
    config.save_pretrained(path)


def _parts(path: Path, base: OfficialFile) -> list[Path]:
    """The files of an export in the order in which they may appear: the config, then the model."""
    custom = base.variant.name == "custom" and path.suffix in SUFFIXES
    return [path.with_suffix(".json"), path] if custom else [path]


# -- verifying -----------------------------------------------------------------------------------


def _check_tensors(found: OfficialFile, merged: OfficialFile, base: OfficialFile) -> int:
    """Compare the file read back with what was meant and with the base; count changed tensors."""
    check_written(found.path, found.tensors, merged.tensors)
    changed = 0
    for name, tensor in found.tensors.items():
        if is_video(name) and not same_bits(tensor, base.tensors[name]):
            raise NumericError(f"{found.path}: the adapter changed {name} of the video memory")
        changed += not torch.equal(tensor, base.tensors[name].to(tensor.dtype))
    return changed


def _before_rounding(model: Sam2Model, merged: OfficialFile, base: OfficialFile) -> OfficialFile:
    """The merged file in float32, whose masks must be the model's; half precision has others.

    Raises:
        NumericError: `merged` is something else than its rounding.
    """
    if not any(t.is_floating_point() and t.itemsize < 4 for t in merged.image.values()):
        return merged
    exact = merged_file(model, base)
    for name, tensor in merged.tensors.items():
        if not same_bits(tensor, exact.tensors[name].to(tensor.dtype)):
            raise NumericError(f"{merged.path}: {name} is not the merged value, rounded once")
    return exact


def _check_masks(difference: dict[str, float]) -> None:
    if not all(value <= TOLERANCE for value in difference.values()):  # NaN counts too
        raise NumericError(
            f"the merged file gives other masks than the adapted model: {difference}, allowed "
            f"{TOLERANCE}. It was not kept"
        )


def compare(model: Sam2Model, other: Sam2Model) -> dict[str, float]:
    """Largest difference of a mask logit between two networks, per kind of prompt.

    Both run in float32 and evaluation mode on the first one's device.
    """
    first, second = _probe(model), _probe(other.to(next(model.parameters()).device))
    return {kind: (first[kind] - second[kind]).abs().max().item() for kind in first}


def _probe(model: Sam2Model) -> dict[str, Tensor]:
    """Mask logits of a fixed picture for a click, a box, and clicks that correct a mask."""
    random = torch.Generator().manual_seed(0)
    device = next(model.parameters()).device
    height, width = PROBE
    coarse = torch.randn(1, 3, height // 8, width // 8, generator=random)
    picture = torch.nn.functional.interpolate(coarse, size=PROBE, mode="bicubic").to(device)
    image = torch.zeros(1, dtype=torch.long, device=device)
    clicks = torch.tensor([[[0.4, 0.6], [0.7, 0.2]]], device=device) * width
    box = torch.tensor([[0.2, 0.3, 0.8, 0.9]], device=device) * width
    labels = torch.tensor([[1, 0]], device=device)
    with _at_probe_size(model):
        features = encode(model, picture)
        click = decode(model, features, image, points=clicks[:, :1])
        boxed = decode(model, features, image, boxes=box, multimask=False)
        corrected = decode(
            model, features, image, clicks, labels, mask_input=boxed.masks, multimask=False
        )
    return {"point": click.masks, "box": boxed.masks, "correction": corrected.masks}


@contextmanager
def _at_probe_size(model: Sam2Model) -> Iterator[None]:
    """The probe's image size and exact arithmetic; all put back afterwards."""
    size = image_size(model)
    try:
        set_image_size(model, PROBE)
        with exact(model):
            yield
    finally:
        set_image_size(model, size)
