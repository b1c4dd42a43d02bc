"""Official SAM 2 checkpoints: which variant a file holds, reading, checking and writing it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from lora_core import base_file
from lora_core.errors import CheckpointError
from lora_core.merged_file import write_tensors
from lora_core.report import say
from sam2_lora.names import is_video, key_map, to_official

# -- variants ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trunk:
    """What distinguishes the four published sizes; everything else is the same in all."""

    width: int
    heads: int
    blocks: tuple[int, ...]
    global_blocks: tuple[int, ...]
    windows: tuple[int, ...]
    grid: int  # side of the position embedding


SIZES = {
    "tiny": Trunk(96, 1, (1, 2, 7, 2), (5, 7, 9), (8, 4, 14, 7), 7),
    "small": Trunk(96, 1, (1, 2, 11, 2), (7, 10, 13), (8, 4, 14, 7), 7),
    "base_plus": Trunk(112, 2, (2, 3, 16, 3), (12, 16, 20), (8, 4, 14, 7), 14),
    "large": Trunk(144, 2, (2, 6, 36, 4), (23, 33, 43), (8, 4, 16, 8), 7),
}
VARIANTS = tuple(f"{family}_hiera_{size}" for family in ("sam2", "sam2.1") for size in SIZES)
_DOWNLOAD = "https://dl.fbaipublicfiles.com/segment_anything_2/"


@dataclass(frozen=True)
class Variant:
    """Which model a file holds: a published name or "custom", and its `Sam2Config` arguments."""

    name: str
    config: dict[str, Any] = field(hash=False)


def published(name: str) -> Variant:
    """The variant with a published name such as `sam2.1_hiera_large`, 1024 px."""
    trunk = SIZES[name.rpartition("hiera_")[2]]
    widths = [trunk.width * 2**k for k in range(4)]
    backbone = {
        "model_type": "sam2_hiera_det_model",
        "hidden_size": trunk.width,
        "num_attention_heads": trunk.heads,
        "blocks_per_stage": list(trunk.blocks),
        "embed_dim_per_stage": widths,
        "num_attention_heads_per_stage": [trunk.heads * 2**k for k in range(4)],
        "window_size_per_stage": list(trunk.windows),
        "global_attention_blocks": list(trunk.global_blocks),
        "window_positional_embedding_background_size": [trunk.grid, trunk.grid],
    }
    vision = {"backbone_config": backbone, "backbone_channel_list": widths[::-1]}
    return Variant(name, {"vision_config": vision})


def recognise(tensors: Mapping[str, Tensor]) -> str | None:
    """Published name of the variant that official tensors belong to; None for another size.

    The image part is the same in 2.0 and 2.1: without video tensors it is just `hiera_large`.
    """
    stem = tensors.get("image_encoder.trunk.patch_embed.proj.weight")
    if stem is None:
        return None
    blocks = {n.split(".")[3] for n in tensors if n.startswith("image_encoder.trunk.blocks.")}
    family = "sam2.1_" if "no_obj_embed_spatial" in tensors else "sam2_"
    if not any(map(is_video, tensors)):
        family = ""
    for size, trunk in SIZES.items():
        if (trunk.width, sum(trunk.blocks)) == (stem.shape[0], len(blocks)):
            return f"{family}hiera_{size}"
    return None


# -- files ---------------------------------------------------------------------------------------


SEARCH = (Path("checkpoints"), Path("libs/sam2base/checkpoints"))


@dataclass(frozen=True)
class OfficialFile:
    """A base checkpoint as it lies on disk.

    Attributes:
        path: the file or folder.
        format: "pt" (`{"model": ...}`), "flat" (the bare state dict), "safetensors" or
            "transformers" (a folder).
        tensors: official name -> tensor with the dtype of the file; video tensors included.
        variant: which model it is.
        config: the file that describes it; None for a published size, known by its tensors.
    """

    path: Path
    format: str
    tensors: dict[str, Tensor]
    variant: Variant
    config: Path | None = None

    @property
    def image(self) -> dict[str, Tensor]:
        """Everything but the video memory."""
        return {name: tensor for name, tensor in self.tensors.items() if not is_video(name)}


def find_checkpoint(name: str | Path) -> Path:
    """Resolve `--checkpoint`: a path, a bare file name in the usual folders, or a hub id.

    Only a name like `facebook/sam2.1-hiera-tiny` (or with `@revision`) that is no local path is
    looked up on the hub.

    Raises:
        CheckpointError: nothing there; lists the places tried.
    """
    return find_local(name) or base_file.from_hub(str(name), ["*.json", base_file.WEIGHTS])


def find_local(name: str | Path) -> Path | None:
    """As `find_checkpoint`; None for a hub id.

    Raises:
        CheckpointError: nothing there; lists the places tried.
    """
    return base_file.find_local(name, SEARCH, where_to_get(Path(name)))


def read_official(path: str | Path, device: str = "cpu") -> OfficialFile:
    """Read an official `.pt`, a `.safetensors` with official names, or a transformers folder.

    A `.safetensors` file of another size than the published ones needs its `Sam2Config` as
    `<stem>.json` beside it. Nothing in the file is executed.

    Args:
        device: "cpu", or "meta": names, shapes and dtypes only, without reading the values.

    Raises:
        CheckpointError: missing, not a checkpoint, damaged, holding more than tensors, or not
            SAM 2; the message says which.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path, device)
    tensors, kind = _read_tensors(path, device)
    if not key_map(tensors):
        raise CheckpointError(_not_sam2(path, tensors))
    name = recognise(tensors)
    if name is not None:
        return OfficialFile(path, kind, tensors, published(name))
    beside = path.with_suffix(".json")
    if not beside.is_file():
        raise CheckpointError(
            f"{path}: a SAM 2 of none of the published sizes ({', '.join(SIZES)}). "
            f"Put its Sam2Config beside it as {beside.name}."
        )
    return OfficialFile(path, kind, tensors, Variant("custom", _read_config(beside)), beside)


def _read_tensors(path: Path, device: str) -> tuple[dict[str, Tensor], str]:
    if not path.exists():
        raise CheckpointError(f"no checkpoint at {path.absolute()}{where_to_get(path)}")
    tensors, kind = base_file.read_tensors(path, device)
    if kind == "flat":
        say(f'{path} is a bare state dict without the "model" entry of the official files.')
    return tensors, kind


def where_to_get(path: Path) -> str:
    """End of a message: the address of a published file; nothing for other names."""
    if path.stem not in VARIANTS:
        return ""
    date = "092824" if path.stem.startswith("sam2.1") else "072824"
    return f". Download it: {_DOWNLOAD}{date}/{path.stem}.pt"


def _read_config(path: Path) -> dict[str, Any]:
    """The image part of a `Sam2Config` or `Sam2VideoConfig` in JSON."""
    content = base_file.read_settings(path)
    if not isinstance(content.get("vision_config"), dict):
        raise CheckpointError(f"{path}: no Sam2Config (it has no vision_config)")
    parts = ("vision_config", "prompt_encoder_config", "mask_decoder_config")
    config = {part: dict(content[part]) for part in parts if isinstance(content.get(part), dict)}
    for part in parts[1:]:  # a video model's parts call themselves sam2_video_...
        config.get(part, {}).pop("model_type", None)
    return config


def _read_folder(folder: Path, device: str) -> OfficialFile:
    config_path, weights_path = folder / "config.json", folder / "model.safetensors"
    if not config_path.is_file() or not weights_path.is_file():
        raise base_file.no_model_folder(folder, "config.json and model.safetensors")
    config = _read_config(config_path)
    tensors, _ = _read_tensors(weights_path, device)
    official = to_official(tensors)
    if not key_map(official):
        raise CheckpointError(_not_sam2(weights_path, tensors))
    variant = Variant(recognise(official) or "custom", config)
    return OfficialFile(folder, "transformers", official, variant, config_path)


def _not_sam2(path: Path, tensors: Mapping[str, Tensor]) -> str:
    first = ", ".join(list(tensors)[:3]) or "nothing"
    return (
        f"{path}: 0 of {len(tensors)} tensors matched the names of SAM 2 (it starts with {first}). "
        "SAM 1 and other models cannot be used as the base."
    )


def check_fit(file: OfficialFile, expected: Mapping[str, Tensor]) -> None:
    """Compare a file with the tensors that its variant must have, video memory aside.

    Args:
        file: what was read.
        expected: official name -> tensor (meta ones do) of the image model.

    Raises:
        CheckpointError: counts and the first names that are missing, unexpected or of another
            shape, and the published variant that the tensors do fit.
    """
    fits = recognise(file.tensors)
    base_file.refuse_misfit(
        file.path,
        f"the model of {file.config}" if file.config else file.variant.name,
        file.image,
        expected,
        [name for name in file.image if name not in expected],
        hint=f"  the tensors look like {fits}, whose config would fit"
        if fits and file.config
        else "",
    )


def write_official(path: str | Path, tensors: Mapping[str, Tensor]) -> Path:
    """Write official tensors: `{"model": state dict}`, or flat for a `.safetensors` name.

    The file appears under its name only when it is complete. A `.safetensors` file of no published
    size needs its config beside it: see `read_official`.
    """
    path = Path(path)
    write_tensors(path, tensors, wrapped=True)
    return path
