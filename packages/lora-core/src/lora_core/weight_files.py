"""The weight files of a model folder: one file, or shards with their list; read as one state dict.

Which files a folder has, and under which names, a package knows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from lora_core import base_file
from lora_core.errors import CheckpointError
from lora_core.report import plural


@dataclass(frozen=True)
class WeightFiles:
    """Where a folder keeps its tensors.

    Attributes:
        files: one, or the shards.
        variant: part of the files' names, as "fp16"; None: they have none.
        index: of shards, tensor name -> file name.
    """

    files: tuple[Path, ...]
    variant: str | None = None
    index: Mapping[str, str] | None = None

    @property
    def safetensors(self) -> bool:
        """Whether they are safetensors files; otherwise `.bin` files of torch."""
        return self.files[0].suffix == ".safetensors"


def find_shards(index: Path, variant: str | None = None) -> WeightFiles:
    """The shards that a list names, as transformers and diffusers write it; none is opened.

    Args:
        index: the JSON file with the list, beside the shards.
        variant: see `WeightFiles`.

    Raises:
        CheckpointError: no list of shards, one that names files elsewhere, or shards are missing.
    """
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
    return WeightFiles(tuple(index.parent / name for name in names), variant, places)


def read_weights(found: WeightFiles, device: str = "cpu") -> dict[str, Tensor]:
    """The tensors of all files.

    Args:
        device: "cpu", or "meta": names, shapes and dtypes only, without reading the values.

    Raises:
        CheckpointError: a file is damaged or holds more than tensors; a tensor is in two shards, or
            in another than the list of shards says.
    """
    tensors: dict[str, Tensor] = {}
    places: dict[str, str] = {}
    for path in found.files:
        content, _ = base_file.read_tensors(path, device)
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
                f"{plural(len(wrong), 'tensor')}: {base_file.some(wrong)}"
            )
    return tensors
