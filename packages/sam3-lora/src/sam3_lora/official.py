"""Checkpoints of SAM 3 in all their packings: finding, reading, checking, and naming tensors back.

The published `sam3.pt` holds the image detector under `detector.` and the video tracker under
`tracker.`; the official trainer saves the detector without prefix, or under `module.` from several
GPUs; transformers has names of its own. Only the detector is used, and all of it must be there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lora_core import base_file
from lora_core.errors import CheckpointError
from sam3_lora import names
from sam3_lora.network import build_network

if TYPE_CHECKING:
    from transformers import Sam3Config

WEIGHTS = (base_file.WEIGHTS, "sam3.pt")  # in a model folder, the first that is there
WHERE = "https://huggingface.co/facebook/sam3 (ask for access there)"
_PARTS = (
    "vision_config",
    "text_config",
    "geometry_encoder_config",
    "detr_encoder_config",
    "detr_decoder_config",
    "mask_decoder_config",
)
_DETECTOR = ("detector.", "detector_model.")  # official, and of transformers' video model
_TRACKER = ("tracker.", "tracker_model.", "tracker_neck.")


@dataclass(frozen=True)
class OfficialFile:
    """A base checkpoint as it lies on disk.

    Attributes:
        path: the file or folder.
        format: "pt" (`{"model": ...}`), "flat" (the bare state dict), "safetensors" or "folder".
        scheme: whose names the detector has, "official" or "transformers".
        prefix: what stands before each of its names, such as "detector." or "module.".
        tensors: everything in the file under its own names, with its own dtypes.
        settings: arguments of `Sam3Config`; empty for the published size.
        config: the file that they are from; None for the published size, known by its tensors.
    """

    path: Path
    format: str
    scheme: str
    prefix: str
    tensors: dict[str, Tensor] = field(repr=False)
    settings: dict[str, Any] = field(default_factory=dict, repr=False)
    config: Path | None = None

    @property
    def detector(self) -> dict[str, Tensor]:
        """The tensors of the image detector without prefix; unused ones included."""
        return {
            name.removeprefix(self.prefix): tensor
            for name, tensor in self.tensors.items()
            if name.startswith(self.prefix) and not of_tracker(name)
        }

    @property
    def state(self) -> dict[str, Tensor]:
        """The detector under the names of `Sam3Model`; parts of fused tensors are views."""
        tensors = self.detector
        return names.to_transformers(tensors) if self.scheme == "official" else tensors


# -- finding -------------------------------------------------------------------------------------


def find_checkpoint(name: str | Path) -> Path:
    """Resolve a path, or a hub id such as `facebook/sam3` (or with `@revision`).

    Raises:
        CheckpointError: nothing there; the message has the absolute path that was tried.
    """
    # With the tokenizer's files; the hub has the official file as well, with the same tensors.
    return find_local(name) or base_file.from_hub(str(name), ["*.json", "*.txt", WEIGHTS[0]])


def find_local(name: str | Path) -> Path | None:
    """As `find_checkpoint`; None for a hub id.

    Raises:
        CheckpointError: nothing there.
    """
    hint = f". Get it from {WHERE}" if Path(name).name == "sam3.pt" else ""
    return base_file.find_local(name, where_to_get=hint)


# -- reading -------------------------------------------------------------------------------------


def read_state(path: str | Path, device: str = "cpu") -> dict[str, Tensor]:
    """The detector of any packing under the names of `Sam3Model`, complete and of right shapes.

    Raises:
        CheckpointError: as `read_official` and `check_fit`.
    """
    file = read_official(path, device)
    check_fit(file, build_network(network_config(file), "meta").state_dict())
    return file.state


def read_official(path: str | Path, device: str = "cpu") -> OfficialFile:
    """Read `.pt` or `.safetensors` with official or transformers names, or a model folder.

    Another size than the published one needs its `Sam3Config` as `<stem>.json` beside the file, or
    as `config.json` in the folder. Nothing in the file is executed.

    Args:
        device: "cpu", or "meta": names, shapes and dtypes only, without reading the values.

    Raises:
        CheckpointError: missing, no checkpoint, damaged, holding more than tensors, or not SAM 3;
            the message says which.
    """
    path = Path(path)
    weights = _weights_in(path) if path.is_dir() else path
    tensors, kind = base_file.read_tensors(weights, device)
    prefix, scheme = _packing(weights, tensors)
    beside = path / "config.json" if path.is_dir() else path.with_suffix(".json")
    file = OfficialFile(path, "folder" if path.is_dir() else kind, scheme, prefix, tensors)
    if beside.is_file():
        return OfficialFile(
            path, file.format, scheme, prefix, tensors, _read_settings(beside), beside
        )
    if not is_published(file):
        raise CheckpointError(
            f"{path}: a SAM 3 of another size than the published one: put its Sam3Config beside "
            f"it as {beside.name}"
        )
    return file


def _weights_in(folder: Path) -> Path:
    for name in WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    raise base_file.no_model_folder(folder, " or ".join(WEIGHTS))


def _packing(path: Path, tensors: Mapping[str, Tensor]) -> tuple[str, str]:
    """Prefix and scheme of the detector's names.

    Raises:
        CheckpointError: no name is one of SAM 3, with the first names.
    """
    prefix = "module." if all(name.startswith("module.") for name in tensors) else ""
    for part in _DETECTOR:
        if any(name.startswith(prefix + part) for name in tensors):
            prefix += part
            break
    inside = [name.removeprefix(prefix) for name in tensors if name.startswith(prefix)]
    official = len(names.key_map(inside))
    other = sum(names.official_name(name) is not None for name in inside)
    if not official and not other:
        first = ", ".join(list(tensors)[:3]) or "nothing"
        raise CheckpointError(
            f"{path}: 0 of {len(tensors)} tensors matched the names of SAM 3 (it starts with "
            f"{first}). Other models cannot be used as the base. Get it from {WHERE}"
        )
    return prefix, "official" if official > other else "transformers"


def of_tracker(name: str) -> bool:
    """Whether a tensor, by its name in the file, belongs to the video tracker."""
    return name.removeprefix("module.").startswith(_TRACKER)


def is_published(file: OfficialFile) -> bool:
    """Whether the tensors are of the one published size."""
    state = file.state
    stem = state.get("vision_encoder.backbone.embeddings.patch_embeddings.projection.weight")
    blocks = {n.split(".")[3] for n in state if n.startswith("vision_encoder.backbone.layers.")}
    return stem is None or (stem.shape[0], len(blocks)) == (1024, 32)


def _read_settings(path: Path) -> dict[str, Any]:
    """The detector's part of a `Sam3Config` or `Sam3VideoConfig` in JSON."""
    content = base_file.read_settings(path)
    if isinstance(content.get("detector_config"), dict):
        content = content["detector_config"]
    if not isinstance(content.get("vision_config"), dict):
        raise CheckpointError(f"{path}: no Sam3Config (it has no vision_config)")
    return {part: content[part] for part in _PARTS if isinstance(content.get(part), dict)}


def network_config(file: OfficialFile) -> Sam3Config:
    """What to build for a file.

    Raises:
        CheckpointError: settings that the library refuses.
    """
    from transformers import Sam3Config

    try:
        return Sam3Config(**file.settings)
    except Exception as error:  # a wrong config fails anywhere in the library
        raise CheckpointError(f"{file.config}: not the config of a SAM 3: {error}") from error


# -- checking, writing back ----------------------------------------------------------------------


def check_fit(file: OfficialFile, expected: Mapping[str, Tensor]) -> None:
    """Compare a file with the tensors that its model must have; tracker and unused ones aside.

    Args:
        expected: state dict of the `Sam3Model` (meta tensors do).

    Raises:
        CheckpointError: counts and the first names, as the file has them, that are missing,
            unexpected or of another shape.
    """
    found = file.detector
    wanted = names.to_official(expected) if file.scheme == "official" else dict(expected)
    extra = [file.prefix + n for n in found if n not in wanted and not names.is_unused(n)]
    extra += [n for n in file.tensors if not n.startswith(file.prefix) and not of_tracker(n)]
    source = f"the model of {file.config}" if file.config else "the published SAM 3"
    base_file.refuse_misfit(
        file.path, source, found, wanted, extra, spelled=lambda name: file.prefix + name
    )


def to_official(file: OfficialFile, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The content of a base file with the detector's tensors replaced.

    Names, their order, the tracker and all unused tensors stay bit for bit, so that every program
    that reads the base file reads this one.

    Args:
        file: the base.
        state: of the `Sam3Model`, without adapters; its dtypes are kept.

    Raises:
        CheckpointError: a tensor of the state that the base has no place for.
    """
    official = file.scheme == "official"
    changed = names.to_official(state) if official else dict(state)
    placed = {file.prefix + name: tensor for name, tensor in changed.items()}
    strangers = [name for name in placed if name not in file.tensors]
    if strangers:
        raise CheckpointError(f"{file.path} has no tensors {base_file.some(strangers)}")
    unread = file.prefix + names.POSITIONS[0]
    if official and unread in placed:  # its entry 0 is nowhere in the network
        base, new = file.tensors[unread], placed[unread].clone()
        new[:, :1] = base[:, :1]
        placed[unread] = new
    return {name: placed.get(name, tensor) for name, tensor in file.tensors.items()}


def published_names(file: OfficialFile) -> dict[str, Tensor]:
    """The content of a file under the names of the published one, which official programs read.

    The detector is under `detector.` and the tracker under `tracker.`. Of a file with transformers'
    names the detector alone: the tracker's names differ there.
    """
    if file.scheme == "transformers":
        tensors = names.to_official(file.detector)
        return {_DETECTOR[0] + name: tensor for name, tensor in tensors.items()}
    return {
        name.removeprefix("module.")
        if of_tracker(name)
        else _DETECTOR[0] + name.removeprefix(file.prefix): tensor
        for name, tensor in file.tensors.items()
    }
