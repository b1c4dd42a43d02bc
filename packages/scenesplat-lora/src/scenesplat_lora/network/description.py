"""What a checkpoint says about its own network: heads, patch sizes, curves, voxels.

These leave no trace in tensors. The description is a plain dict under `scenesplat`, as JSON in the
metadata of safetensors and beside `state_dict` in files of `torch.save`, where the official
programs do not look:

    {"backbone": {"in_channels": 11, "order": ["z", ...], ...}, "grid_size": 0.02,
     "classes": ["wall", ...]}
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_core.errors import CheckpointError, ConfigError
from scenesplat_lora.network.ptv3_config import LANGUAGE, SEGMENTATION, PTv3Config

if TYPE_CHECKING:
    from torch import Tensor

    from scenesplat_lora.network.official import OfficialFile

KEY = "scenesplat"
RELEASED_GRID = 0.02  # metres, voxels of the released models, whose files say nothing
RELEASED = {"language model": LANGUAGE, "segmentation model": SEGMENTATION}


@dataclass(frozen=True)
class Description:
    """A network and the voxels that it was made for.

    Attributes:
        backbone: every field of it.
        grid_size: side of a voxel in metres; None: not known.
        classes: names of a segmentation model's classes; None: not known, or no such model.
    """

    backbone: PTv3Config
    grid_size: float | None = None
    classes: tuple[str, ...] | None = None

    def entry(self) -> dict[str, Any]:
        """As plain values that JSON gives back equal."""
        fields = json.loads(json.dumps(asdict(self.backbone)))
        entry = {"backbone": fields, "grid_size": self.grid_size}
        return entry if self.classes is None else entry | {"classes": list(self.classes)}


def described(path: Path, content: Mapping[Any, Any]) -> Description | None:
    """The description in metadata of safetensors or the dict of `torch.save`; None: there is none.

    Raises:
        CheckpointError: one that cannot be read, or of a later program.
    """
    entry = content.get(KEY)
    if entry is None:
        return None
    try:
        entry = json.loads(entry) if isinstance(entry, str) else entry
        backbone, grid_size = entry["backbone"], entry.get("grid_size")
        classes = entry.get("classes")
        if not (isinstance(backbone, dict) and _is_size(grid_size) and _are_names(classes)):
            raise TypeError(f"backbone {backbone!r:.60}, grid_size {grid_size!r:.60}")
        names = None if classes is None else tuple(classes)
        return Description(PTv3Config.from_dict(backbone), grid_size, names)
    except (ConfigError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: what it says about its network ({KEY!r}) is unreadable: {error}. Update "
            "scenesplat-lora, or give the network's settings yourself and leave this entry out"
        ) from None


def _is_size(value: object) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value is None or (number and 0 < value < 1e6)  # type: ignore[operator]


def _are_names(value: object) -> bool:
    names = value if isinstance(value, (list, tuple)) else [value]
    return value is None or (bool(names) and all(isinstance(name, str) for name in names))


# -- the network of a file -------------------------------------------------------------------------


def network_config(file: OfficialFile) -> PTv3Config:
    """The settings that a file describes, else those of the released model of its widths.

    Raises:
        CheckpointError: it does neither.
    """
    return released_config(file) if file.description is None else file.description.backbone


def base_grid_size(file: OfficialFile) -> float:
    """Side in metres of the voxels that a file's network was made for."""
    said = None if file.description is None else file.description.grid_size
    return RELEASED_GRID if said is None else said


def released_config(file: OfficialFile) -> PTv3Config:
    """The settings of the released model with the widths and depths of a file.

    Raises:
        CheckpointError: neither shape, with what the file has.
    """
    found = _widths(file.tensors)
    for config in RELEASED.values():
        if found == {name: getattr(config, name) for name in found}:
            stem = file.tensors["backbone.embedding.stem.conv.weight"]
            return replace(config, in_channels=stem.shape[-1])
    shape = ", ".join(f"{name} {value}" for name, value in found.items())
    raise CheckpointError(
        f"{file.path}: a Point Transformer V3 of neither released shape ({shape}), and it "
        "does not describe itself: give its settings, the section model.backbone of its config file"
    )


def _widths(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Depths and widths of the stages, as far as the names are there."""
    stages: dict[str, dict[int, dict[int, int]]] = {"enc": {}, "dec": {}}
    for name, tensor in tensors.items():
        place = re.fullmatch(r"backbone\.(enc|dec)\.\1(\d+)\.block(\d+)\.norm1\.0\.weight", name)
        if place and tensor.ndim == 1:
            side, stage, block = place[1], int(place[2]), int(place[3])
            stages[side].setdefault(stage, {})[block] = len(tensor)
    found: dict[str, tuple[int, ...]] = {}
    for side, blocks in stages.items():
        ordered = [blocks[stage] for stage in sorted(blocks)]
        found[f"{side}_depths"] = tuple(map(len, ordered))
        found[f"{side}_channels"] = tuple(max(widths.values()) for widths in ordered)
    return found
