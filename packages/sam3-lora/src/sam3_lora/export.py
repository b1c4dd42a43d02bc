"""Merged models as files: the base's tensors with the adapters in them, verified before they count.

The official form has the names of the published `sam3.pt`; what no adapter changes, the tracker and
all unused tensors among it, keeps its bits. A file gets its name after it was read back and gave
the same outputs as the live adapted model.
"""

from __future__ import annotations

import shutil
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
from sam3_lora import names, official
from sam3_lora.model import base_fingerprint, from_file
from sam3_lora.network import LAYER_NORM_EPS, forward
from sam3_lora.official import OfficialFile, read_official
from sam3_lora.prompts import PADDING
from sam3_lora.tokenizer import CONTEXT, OFFICIAL_FILE, SMALL_FILE

if TYPE_CHECKING:
    from transformers import Sam3Model

Format = Literal["auto", "official", "transformers"]
TOLERANCE = 1e-4  # largest difference of an output, as a share of the largest (at least 1)
PROBE = (112, 112)  # pixels: the weights are the same at every size, and this one is cheap
# What a model folder may hold of a tokenizer; `tokenizer.load_tokenizer` reads some of them.
VOCABULARY = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json",
    "merges.txt", OFFICIAL_FILE, SMALL_FILE,
)  # fmt: skip


@dataclass(frozen=True)
class Merged:
    """A merged model on disk.

    Attributes:
        path: the file or folder.
        format: "official" or "transformers".
        tensors, changed: how many it holds, and how many of them differ from the base's.
        difference: prompt kind -> largest difference of logits, boxes, presence and mask logits
            between the file read back and the live adapted model, as a share of the largest value.
        has_tracker: whether the video tracker is in it.
    """

    path: Path
    format: str
    tensors: int
    changed: int
    difference: dict[str, float]
    has_tracker: bool

    def __str__(self) -> str:
        kinds = ", ".join(f"{kind} {value:.1e}" for kind, value in self.difference.items())
        return (
            f"{self.path}: {self.tensors} tensors, {self.changed} of them changed; read back, its "
            f"outputs differ from the adapted model by at most: {kinds}"
        )


def format_of(output: Path, wanted: Format = "auto") -> str:
    """The form that an output gets: official files have an ending, transformers folders none.

    Raises:
        ConfigError: the wanted form and the name contradict each other.
    """
    by_name = "official" if output.suffix in SUFFIXES else "transformers"
    if wanted not in ("auto", by_name):
        right = (
            "a file: end it in .pt" if wanted == "official" else "a folder: leave out the ending"
        )
        raise ConfigError(f"--format {wanted}, but --output {output}: that form is {right}")
    return by_name


def export(
    model: Sam3Model,
    output: str | Path,
    format: Format = "auto",
    dtype: Literal["fp32", "keep"] = "fp32",
    overwrite: bool = False,
) -> Merged:
    """Write the base with the active adapters merged into it, and verify the file.

    The base is read again from its file, so that every tensor that no adapter changes keeps its
    bits, and the live model stays as it is.

    Args:
        model: the adapted network, from `model.build` or `model.load`.
        output: `.pt`, `.pth`, `.torch` or `.safetensors` with official names, or a folder for
            transformers.
        format: what `output` is meant to be; "auto": what its name says.
        dtype: "fp32": the detector in float32, exact. "keep": the dtypes of the base file.
        overwrite: replace what is there.

    Raises:
        ConfigError: `output` exists, is the base file, or contradicts `format`.
        CheckpointError: the base file has changed, or cannot be read or written.
        NumericError: values that are not finite, or a file with other outputs than the model.
    """
    output = Path(output)
    form = format_of(output, format)
    base = read_official(model.sam3_base.path)
    parts = _parts(output, base)
    for part in parts:
        refuse_existing(part, overwrite, VOCABULARY)
    _refuse_base(parts, base)
    _check_live(model, base)
    # Read back in another place: the real one is for verified files only.
    with private_folder(output) as folder:
        trial = folder / output.name
        count, changed, has_tracker = _write(trial, merged_file(model, base, dtype), base)
        difference = compare(model, from_file(read_official(trial)))
        exact_too = dtype == "fp32" or not _rounded(base)
        if exact_too and not all(value <= TOLERANCE for value in difference.values()):
            raise NumericError(
                f"the merged file gives other outputs than the adapted model: {difference}, "
                f"allowed {TOLERANCE}. It was not kept"
            )
        move(_parts(trial, base), parts)
    return Merged(output, form, count, changed, difference, has_tracker)


def _check_live(model: Sam3Model, base: OfficialFile) -> None:
    """Whether a network is whole, and its base file still what it was built from."""
    if not hasattr(model, "text_encoder"):
        raise ConfigError("the text encoder was dropped from this model: load it again to merge")
    refuse_changed(base.path, base_fingerprint(base), model.sam3_base.fingerprint)


def _rounded(base: OfficialFile) -> bool:
    return any(t.is_floating_point() and t.itemsize < 4 for t in base.state.values())


def _refuse_base(parts: list[Path], base: OfficialFile) -> None:
    """Never write over the base, whatever name it is given by."""
    source = base.path.resolve()
    own = {source, *(source / name for name in official.WEIGHTS)}
    own |= {base.config.resolve()} if base.config else set()
    for part in parts:
        if part.resolve() in own or part.resolve() in source.parents:
            raise ConfigError(
                f"{part} is the base itself, or belongs to it: choose another --output"
            )


def merged_file(
    model: Sam3Model, base: OfficialFile, dtype: Literal["fp32", "keep"] = "fp32"
) -> OfficialFile:
    """The base file with the active adapters merged into its tensors, in memory.

    q, k and v, which an official file has in one tensor, are merged into its thirds.
    """
    state = base.state
    if dtype == "fp32":
        state = {name: tensor.float() for name, tensor in state.items()}
    tensors = official.to_official(base, merged_state_dict(model, state))
    return replace(base, tensors=tensors)


# -- writing -------------------------------------------------------------------------------------


def _content(file: OfficialFile, form: str) -> dict[str, Tensor]:
    """The tensors of a file under the names of the form that is written."""
    if form == "official":
        return official.published_names(file)
    return file.tensors if _is_model_folder(file) else file.state


def _is_model_folder(file: OfficialFile) -> bool:
    """Whether a file is a folder of transformers, which may hold more than a `Sam3Model`."""
    return file.format == "folder" and file.scheme == "transformers"


def _write(path: Path, merged: OfficialFile, base: OfficialFile) -> tuple[int, int, bool]:
    """Write a merged file and its settings, and compare what is read back with what was meant.

    Returns:
        the number of its tensors, of those that differ from the base's, and whether it has the
        tracker.
    """
    form = format_of(path)
    tensors = _content(merged, form)
    if form == "transformers":
        write_tensors(path / WEIGHTS, tensors)
        _write_settings(path, base)
    else:
        write_tensors(path, tensors, wrapped=base.format == "pt")
        for config in _parts(path, base)[:-1]:
            write_json(config, base.settings)
    found = read_official(path)
    check_written(path, found.tensors, tensors)
    changed = _count_changed(found, _content(base, form))
    return len(found.tensors), changed, any(map(official.of_tracker, found.tensors))


def _write_settings(folder: Path, base: OfficialFile) -> None:
    """The model's configuration, and what the base has of a tokenizer."""
    beside = base.path if base.path.is_dir() else base.path.parent
    wanted = [beside / name for name in VOCABULARY]
    if _is_model_folder(base):
        strange = ("adapter", ".index.")  # belong to other weights
        wanted += [p for p in beside.glob("*.json") if not any(part in p.name for part in strange)]
    else:
        config = official.network_config(base)
        # The official model's, which the library's class then has as well.
        config.vision_config.backbone_config.layer_norm_eps = LAYER_NORM_EPS
        config.architectures, config.dtype = ["Sam3Model"], "float32"
        config.save_pretrained(folder)
    for path in wanted:
        if path.is_file():
            shutil.copyfile(path, folder / path.name)


def _parts(path: Path, base: OfficialFile) -> list[Path]:
    """The files of an export in the order in which they may appear: the config, then the model."""
    custom = path.suffix in SUFFIXES and not official.is_published(base)
    return [path.with_suffix(".json"), path] if custom else [path]


# -- verifying -----------------------------------------------------------------------------------


def _count_changed(found: OfficialFile, before: dict[str, Tensor]) -> int:
    """How many tensors differ from the base's; those that no adapter reaches must not."""
    changed = 0
    for name, tensor in found.tensors.items():
        unread = official.of_tracker(name) or names.is_unused(name.removeprefix(found.prefix))
        if unread and not same_bits(tensor, before[name]):
            raise NumericError(f"{found.path}: the adapter changed {name}, which it cannot reach")
        changed += not torch.equal(tensor, before[name].to(tensor.dtype))
    return changed


def compare(model: Sam3Model, other: Sam3Model) -> dict[str, float]:
    """Largest difference of an output between two networks, per kind of prompt.

    Both run in float32 and evaluation mode on the first one's device. A difference is given as a
    share of the largest value of that output, or of 1 where that is less.
    """
    first, second = probe(model), probe(other.to(next(model.parameters()).device))
    return {
        kind: torch.stack([_share(*pair) for pair in zip(outputs, second[kind], strict=True)])
        .max()  # NaN wins, as it does not with Python's own
        .item()
        for kind, outputs in first.items()
    }


def _share(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).abs().max() / a.abs().max().clamp_min(1)


def probe(model: Sam3Model) -> dict[str, tuple[Tensor, ...]]:
    """Logits, boxes, presence, masks and semantic map of a fixed picture.

    They are asked for by a phrase, by the same phrase with a box as example, and by another phrase.
    """
    random = torch.Generator().manual_seed(0)
    device = next(model.parameters()).device
    height, width = PROBE
    coarse = torch.randn(1, 3, height // 14, width // 14, generator=random)
    picture = torch.nn.functional.interpolate(coarse, size=PROBE, mode="bicubic")
    words = model.config.text_config.vocab_size
    ids = torch.randint(1, words, (2, CONTEXT), generator=random)
    mask = torch.arange(CONTEXT) < torch.tensor([[4], [7]])
    batch = {
        "pixel_values": picture,
        "input_ids": ids * mask,
        "attention_mask": mask.long(),
        "image_ids": torch.zeros(3, dtype=torch.long),
        "text_ids": torch.tensor([0, 0, 1]),
        "exemplars": torch.tensor([[[0.4, 0.5, 0.3, 0.2]]]).repeat(3, 1, 1),
        "exemplar_labels": torch.tensor([[PADDING], [1], [PADDING]]),
    }
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    with exact(model):
        out = forward(model, batch, masks=True, one_to_many=False)
    last, presence = out.one_to_one[-1], out.presence[-1]
    assert last.masks is not None
    assert out.semantic is not None
    outputs = (last.logits, last.boxes, presence, last.masks, out.semantic)
    kinds = ("phrase", "box", "other phrase")
    return {kind: tuple(output[k] for output in outputs) for k, kind in enumerate(kinds)}
