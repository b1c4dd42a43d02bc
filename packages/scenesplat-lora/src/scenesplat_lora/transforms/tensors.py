"""The end of the way: tensors of a scene, and those that the network is given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_core.errors import DataError, near
from scenesplat_lora.scenes.scene import DeferredRows, Scene, place

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

GAUSSIAN_FEATURES = ("color", "opacity", "quat", "scale")  # 11 channels, in this order


def copy_keys(
    scene: Scene,
    rng: np.random.Generator,
    *,
    keys_dict: Mapping[str, str] = {"coord": "origin_coord", "segment": "origin_segment"},
) -> Scene:
    """Keep arrays as they are now under another name: {name: copy's name}."""
    return scene | {copy: np.array(_entry(scene, name, "Copy")) for name, copy in keys_dict.items()}


def to_tensor(scene: Scene, rng: np.random.Generator) -> Scene:
    """Arrays as tensors: whole numbers int64, others float32, truth values as they are.

    `lang_feat` stays in half precision where its file has it: it is almost all of a sample, and the
    loss takes it to float32 on its device. Rows that are deferred stay so, until `collate` copies
    them into the batch. Features of norm 0 have no direction to learn: their rows of
    `valid_feat_mask` become false.
    """
    tensors = {name: _tensor(value, name == "lang_feat") for name, value in scene.items()}
    if "lang_feat" in tensors and "valid_feat_mask" in tensors:
        features = tensors["lang_feat"]
        if isinstance(features, DeferredRows):
            some = some_value(features.source)[features.index]
        else:
            some = some_value(features)
        tensors["valid_feat_mask"] = tensors["valid_feat_mask"].bool() & some
    return tensors


def some_value(rows: Tensor | NDArray[np.float16], first: int = 8) -> Tensor:
    """Which rows [N, D] are not all zero, bool [N].

    Most rows show it in their first values: comparing all takes 50 times as long.
    """
    some: Tensor = (_tensor(rows[:, :first], half=True) != 0).any(dim=1)
    rest = (~some).nonzero()[:, 0].numpy()
    some[rest] = (_tensor(rows[rest], half=True) != 0).any(dim=1)
    return some


def _tensor(value: Any, half: bool = False) -> Any:
    """`value` as a tensor if it is an array or a number.

    Args:
        half: leave half precision as it is.
    """
    import torch

    if not isinstance(value, (np.ndarray, np.generic, int, float)):
        return value
    array = np.asarray(value)
    if array.dtype.kind in "iu":  # torch has no unsigned types to convert
        return torch.from_numpy(array.astype(np.int64))
    native = array.dtype.newbyteorder("=")
    if not (array.flags.writeable and array.flags.c_contiguous and array.dtype == native):
        array = np.array(array, dtype=native, order="C")  # of a mapped file, for example
    # torch turns half precision to float32 faster than numpy.
    tensor = torch.from_numpy(array)
    if half and tensor.dtype == torch.float16:
        return tensor
    return tensor.float() if tensor.is_floating_point() else tensor


def collect(
    scene: Scene,
    rng: np.random.Generator,
    *,
    keys: Sequence[str] = ("coord", "grid_coord"),
    feat_keys: Sequence[str] = GAUSSIAN_FEATURES,
    offset_keys_dict: Mapping[str, str] = {"offset": "coord"},
) -> Scene:
    """What the network is given of a scene of tensors.

    Returns:
        `keys` as they are; for each entry of `offset_keys_dict` the row count i64 [1] of its
        tensor; `feat` f32 [N, C]: `feat_keys` side by side. Also the scene's `name`, if it has one.
    """
    import torch

    keys, feat_keys = _words(keys), _words(feat_keys)
    batch = {name: scene[name] for name in ("name",) if name in scene}
    batch |= {name: _entry(scene, name, "Collect") for name in keys}
    for name, source in offset_keys_dict.items():
        batch[name] = torch.tensor([len(_entry(scene, source, "Collect"))])
    if feat_keys:
        parts = [_tensor(_entry(scene, name, "Collect feat_keys")).float() for name in feat_keys]
        batch["feat"] = torch.cat(parts, dim=1)
    return batch


def _words(value: Sequence[str]) -> Sequence[str]:
    return (value,) if isinstance(value, str) else value


def _entry(scene: Scene, name: str, who: str) -> Any:
    if name not in scene:
        hint = near(name, scene)
        raise DataError(
            f"{place(scene)}: {who} asks for {name!r}, which this scene has not "
            f"(it has {', '.join(sorted(scene))}){hint and '; ' + hint}"
        )
    return scene[name]
