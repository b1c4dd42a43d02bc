"""Lists of transforms: the official ones, and those that configuration files write.

steps = compose([dict(type="CenterShift", apply_z=True), dict(type="ToTensor")])
sample = steps(scene, numpy.random.default_rng(0))
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, cast

import numpy as np

from lora_core.errors import ConfigError, listing, near
from scenesplat_lora.scenes.grid_sample import fragments, grid_sample, sample_labelled_cloud
from scenesplat_lora.scenes.scene import Scene
from scenesplat_lora.transforms.color import (
    chromatic_auto_contrast,
    chromatic_jitter,
    chromatic_translation,
    normalize_color,
)
from scenesplat_lora.transforms.geometry import (
    center_shift,
    elastic_distortion,
    normalize_coord,
    positive_shift,
    random_flip,
    random_jitter,
    random_rotate,
    random_rotate_target_angle,
    random_scale,
)
from scenesplat_lora.transforms.sampling import random_dropout, sphere_crop
from scenesplat_lora.transforms.tensors import collect, copy_keys, to_tensor

Transform = Callable[[Scene, np.random.Generator], Scene]
Spec = Mapping[str, Any]  # a transform as files write it: its type and its arguments

# Functions by the names that configuration files use.
NAMED: dict[str, Callable[..., Scene]] = {
    "CenterShift": center_shift,
    "PositiveShift": positive_shift,
    "NormalizeCoord": normalize_coord,
    "RandomDropout": random_dropout,
    "RandomRotate": random_rotate,
    "RandomRotateTargetAngle": random_rotate_target_angle,
    "RandomScale": random_scale,
    "RandomFlip": random_flip,
    "RandomJitter": random_jitter,
    "ElasticDistortion": elastic_distortion,
    "ChromaticAutoContrast": chromatic_auto_contrast,
    "ChromaticTranslation": chromatic_translation,
    "ChromaticJitter": chromatic_jitter,
    "NormalizeColor": normalize_color,
    "GridSample": grid_sample,
    "LabelledCloudSample": sample_labelled_cloud,
    "SphereCrop": sphere_crop,
    "Copy": copy_keys,
    "ToTensor": to_tensor,
    "Collect": collect,
}
LANGUAGE_KEYS = ("coord", "grid_coord", "segment", "lang_feat", "valid_feat_mask")


def build_transform(spec: Spec, place: str = "transform") -> Transform:
    """The transform that a file describes as dict(type=..., argument=...).

    Raises:
        ConfigError: an unknown type or argument, with `place` and the nearest name.
    """
    if not isinstance(spec, Mapping) or not isinstance(spec.get("type"), str):
        raise ConfigError(f"{place}: expected dict(type='CenterShift', ...), not {spec!r:.80}")
    given = {name: value for name, value in spec.items() if name != "type"}
    kind = spec["type"]
    if kind not in NAMED:
        hint = near(kind, NAMED)
        known = f"the types are {', '.join(sorted(NAMED))}"
        raise ConfigError(f"{place}: there is no transform {kind!r}; {hint or known}")
    if kind == "GridSample" and given.pop("mode", "train") != "train":
        raise ConfigError(
            f"{place}: GridSample in a list has mode 'train'; the fragments of mode 'test' come "
            f"after the list, see evaluation_fragments"
        )
    known_arguments = list(inspect.signature(NAMED[kind]).parameters)[2:]
    unknown = [name for name in given if name not in known_arguments]
    if unknown:
        hint = near(unknown[0], known_arguments)
        arguments = ", ".join(known_arguments) or "no arguments"
        raise ConfigError(
            f"{place}: {kind} has no argument {unknown[0]!r}; {hint or 'it takes ' + arguments}"
        )
    return cast(Transform, partial(NAMED[kind], **given))


def compose(specs: Sequence[Spec], place: str = "transform") -> Transform:
    """The transforms of a list, one after the other.

    Raises:
        ConfigError: as `build_transform`, all entries together.
    """
    steps, problems = [], []
    for number, spec in enumerate(specs):
        try:
            steps.append(build_transform(spec, f"{place}[{number}]"))
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError(listing(problems))
    return partial(_run, tuple(steps))


def _run(steps: Sequence[Transform], scene: Scene, rng: np.random.Generator) -> Scene:
    for step in steps:
        scene = step(scene, rng)
    return scene


# -- the official lists ----------------------------------------------------------------------------


def training_transforms(
    keys: Sequence[str] = LANGUAGE_KEYS, grid_size: float = 0.02, point_max: int = 192_000
) -> list[dict[str, Any]]:
    """The official augmentation for training, as configuration files write it."""
    tilt = {"type": "RandomRotate", "angle": [-1 / 64, 1 / 64], "p": 0.5}
    return [
        {"type": "CenterShift", "apply_z": True},
        {"type": "RandomDropout", "dropout_ratio": 0.2, "dropout_application_ratio": 0.2},
        {"type": "RandomRotate", "angle": [-1, 1], "axis": "z", "center": [0, 0, 0], "p": 0.5},
        tilt | {"axis": "x"},
        tilt | {"axis": "y"},
        {"type": "RandomScale", "scale": [0.9, 1.1]},
        {"type": "RandomFlip", "p": 0.5},
        {"type": "RandomJitter", "sigma": 0.005, "clip": 0.01},
        {"type": "ElasticDistortion", "distortion_params": [[0.2, 0.4], [0.8, 1.6]]},
        {"type": "ChromaticAutoContrast", "p": 0.2, "blend_factor": None},
        {"type": "ChromaticTranslation", "p": 0.95, "ratio": 0.05},
        {"type": "ChromaticJitter", "p": 0.95, "std": 0.05},
        {"type": "GridSample", "grid_size": grid_size, "mode": "train", "return_grid_coord": True},
        {"type": "SphereCrop", "point_max": point_max, "mode": "random"},
        *_ending(keys),
    ]


def validation_transforms(
    keys: Sequence[str] = LANGUAGE_KEYS, grid_size: float = 0.02
) -> list[dict[str, Any]]:
    """The official list for validation: the training list without anything random but the voxels.

    A labelled cloud is thinned on its own to one point per cell.
    """
    return [
        {"type": "CenterShift", "apply_z": True},
        {"type": "GridSample", "grid_size": grid_size, "mode": "train", "return_grid_coord": True},
        {"type": "LabelledCloudSample", "grid_size": grid_size},
        *_ending(keys),
    ]


def _ending(keys: Sequence[str]) -> list[dict[str, Any]]:
    return [
        {"type": "CenterShift", "apply_z": False},
        {"type": "NormalizeColor"},
        {"type": "ToTensor"},
        {"type": "Collect", "keys": list(keys), "feat_keys": ["color", "opacity", "quat", "scale"]},
    ]


COPIES = {
    "segment": "origin_segment",
    "coord": "origin_coord",
    "valid_feat_mask": "origin_feat_mask",
}


def evaluation_transforms(
    grid_size: float = 0.01, copied: Sequence[str] = tuple(COPIES)
) -> list[dict[str, Any]]:
    """What a whole scene goes through before it is cut into `evaluation_fragments`.

    Its `inverse` says for each original Gaussian which of the remaining ones stands for it. The
    arrays `copied` are kept as they are on disk; a scene without language features has fewer.
    """
    return [
        {"type": "CenterShift", "apply_z": True},
        {"type": "NormalizeColor"},
        {"type": "Copy", "keys_dict": {name: COPIES[name] for name in copied}},
        # Its cells are no voxels of the network: nothing limits how many there are.
        {
            "type": "GridSample",
            "grid_size": grid_size,
            "mode": "train",
            "return_inverse": True,
            "return_grid_coord": False,
        },
    ]


def evaluation_fragments(
    scene: Scene,
    rng: np.random.Generator,
    grid_size: float = 0.02,
    keys: Sequence[str] = ("coord", "grid_coord", "index"),
    feat_keys: Sequence[str] = ("color", "opacity", "quat", "scale"),
) -> Iterator[Scene]:
    """What the network is given of a scene after `evaluation_transforms`: each row at least once.

    Each fragment has `index` i64 [V], its rows of `scene`.
    """
    finish = compose(
        [
            {"type": "CenterShift", "apply_z": False},
            {"type": "ToTensor"},
            {"type": "Collect", "keys": list(keys), "feat_keys": list(feat_keys)},
        ]
    )
    for fragment in fragments(scene, grid_size=grid_size):
        yield finish(fragment, rng)
