"""Merged models as files: the base's tensors with LoRA in them, verified before they count.

The file has the official names in the form of the base, so that the official programs and
`load_official` read it; what LoRA does not change keeps its bits. It gets its name only after it
was read back and gave the same features or logits as the live adapted model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from lora_core import merged_state_dict
from lora_core.base_file import SUFFIXES
from lora_core.errors import ConfigError, NumericError
from lora_core.merged_file import check_written, exact, move, private_folder, refuse_existing
from scenesplat_lora.network import prompt_mlp
from scenesplat_lora.network.description import Description
from scenesplat_lora.network.models import DefaultSegmentorV2, LangPretrainer
from scenesplat_lora.network.official import (
    OfficialFile,
    load_official,
    official_name,
    read_official,
    to_official,
    write_official,
)
from scenesplat_lora.network.point_batch import PointBatch

Network = LangPretrainer | DefaultSegmentorV2
Dtype = Literal["fp32", "keep"]
TOLERANCE = 1e-4  # largest difference of an output, as a share of the largest (at least 1)
PROBE = (600, 24)  # voxels, and the side of the cube that they lie in: pooling finds neighbours


@dataclass(frozen=True)
class Merged:
    """A merged model on disk.

    Attributes:
        path: the file.
        tensors, changed: how many it holds, and how many of them differ from the base's.
        difference: the largest one of an output of the file read back and of the live adapted
            model, as a share of the largest output (at least 1).
    """

    path: Path
    tensors: int
    changed: int
    difference: float

    def __str__(self) -> str:
        return (
            f"{self.path}: {self.tensors} tensors, {self.changed} of them changed; read back, its "
            f"outputs differ from the adapted model by at most {self.difference:.1e}"
        )


def export(
    net: Network,
    base: OfficialFile,
    output: str | Path,
    *,
    grid_size: float | None = None,
    dtype: Dtype = "fp32",
    epoch: int | None = None,
    overwrite: bool = False,
) -> Merged:
    """Write a base with the adapter on `net` merged into it, and verify the file.

    The live network stays as it is.

    Args:
        net: the adapted network, whose weights came from `base`.
        output: `.safetensors`, or a file of `torch.save` as the official trainer has it.
        grid_size: metres, of the voxels that the network was trained with; the file says it.
        dtype: "fp32": exact. "keep": the dtypes of the base file.
        epoch: that the file names; None: the base's.
        overwrite: replace what is there.

    Raises:
        ConfigError: prompt MLPs, or an `output` that exists, is the base, or has no such ending.
        CheckpointError: it cannot be written.
        NumericError: values that are not finite, or a file with other outputs than the network.
    """
    output = Path(output)
    refuse_prompts(net)
    refuse_output(output, overwrite, base.path)
    tensors = merged_tensors(net, base, dtype)
    with private_folder(output) as folder:
        trial = folder / output.name
        said = _description(net, grid_size)
        write_official(trial, tensors, base.epoch if epoch is None else epoch, said)
        found = read_official(trial).tensors
        check_written(trial, found, {official_name(n): t for n, t in tensors.items()})
        difference = compare(net, load_official(trial))
        if not difference <= TOLERANCE and (dtype == "fp32" or not _is_rounded(base)):
            raise NumericError(
                f"the merged file gives other outputs than the adapted model: {difference:.1e}, "
                f"allowed {TOLERANCE}. It was not kept"
            )
        move([trial], [output])
    return Merged(output, len(found), _changed(found, base.tensors), difference)


def merged_tensors(net: Network, base: OfficialFile, dtype: Dtype) -> dict[str, Tensor]:
    """The content of the merged file, with the names and the order of the base's."""
    state = {official_name(name): tensor for name, tensor in merged_state_dict(net).items()}
    if dtype == "keep":
        state = {
            name: tensor.to(base.tensors[name].dtype) if name in base.tensors else tensor
            for name, tensor in state.items()
        }
    return to_official(base, state)


def refuse_prompts(net: nn.Module) -> None:
    """Raise ConfigError for prompt MLPs, which are no linear function of a layer's input."""
    if prompts := prompt_mlp.with_prompt(net):
        raise ConfigError(
            f"{len(prompts)} layers have prompt MLPs, which cannot be merged into weights: keep "
            "the adapter beside the base, or train without them (--lora.enable_prompt false)"
        )


def refuse_output(output: Path, overwrite: bool, *inputs: str | Path) -> None:
    """Never write over what is read, whatever name it is given by, nor unasked over another file.

    Raises:
        ConfigError: it would, or the name has no ending of a checkpoint.
    """
    if output.suffix not in SUFFIXES:
        raise ConfigError(
            f"--output {output}: name a file that ends in {', '.join(sorted(SUFFIXES))}"
        )
    for path in map(Path, inputs):
        if output.resolve() == path.resolve() or path.resolve() in output.resolve().parents:
            raise ConfigError(f"--output {output} is {path} itself, or in it: choose another one")
    refuse_existing(output, overwrite)


def _description(net: Network, grid_size: float | None) -> Description:
    names = net.class_names if isinstance(net, DefaultSegmentorV2) else None
    return Description(net.backbone.config, grid_size, names)


def _is_rounded(base: OfficialFile) -> bool:
    return any(t.is_floating_point() and t.itemsize < 4 for t in base.tensors.values())


def _changed(found: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> int:
    """How many tensors have other values than the base's, or are new."""
    return sum(
        name not in before
        or tensor.shape != before[name].shape
        or not torch.equal(tensor, before[name].to(tensor.dtype))
        for name, tensor in found.items()
    )


# -- verifying -----------------------------------------------------------------------------------


def compare(net: Network, other: nn.Module) -> float:
    """Largest difference of an output of two networks, as a share of the largest (at least 1).

    Both run in float32 and evaluation mode on the first one's device.
    """
    batch = probe(net.backbone.config.in_channels)
    device = next(net.parameters()).device
    first, second = (_outputs(model, batch) for model in (net, other.to(device)))
    return float((first - second).abs().max() / first.abs().max().clamp_min(1))


def _outputs(model: nn.Module, batch: PointBatch) -> Tensor:
    with exact(model):
        out: Tensor = model(batch.to(next(model.parameters()).device))
    return out


def probe(channels: int) -> PointBatch:
    """A fixed cloud of random voxels with features [N, channels]."""
    rows, side = PROBE
    random = torch.Generator().manual_seed(0)
    places = torch.randperm(side**3, generator=random)[:rows]
    grid = torch.stack([places // side**2, places // side % side, places % side], dim=1)
    feat = torch.randn(rows, channels, generator=random)
    return PointBatch(feat, grid, torch.tensor([rows]))
