"""Transforms tried on a small made scene: what cannot work is said before data is read."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lora_core.errors import ConfigError, UserError
from scenesplat_lora.scenes.scene import Scene
from scenesplat_lora.transforms.pipeline import Spec, build_transform

ROWS = 64
CERTAIN = {"p": 1.0, "dropout_application_ratio": 1.0}  # chances, set to happen


def try_out(specs: Sequence[Spec], place: str, wanted: Sequence[str]) -> Scene:
    """What a list makes of a made scene; everything random is applied.

    Args:
        place: of the list, for messages. wanted: what scenes hold besides Gaussians and labels.

    Raises:
        ConfigError: a transform that fails, with its place.
    """
    scene = _made_scene(wanted)
    rng = np.random.default_rng(0)
    for number, spec in enumerate(specs):
        certain = {name: CERTAIN[name] for name in spec.keys() & CERTAIN.keys()}
        try:
            with np.errstate(all="ignore"):
                build_transform(spec)(scene, rng)
                scene = build_transform({**spec, **certain})(scene, rng)
        except UserError as error:
            raise ConfigError(f"{place}[{number}]: {error}") from None
        except Exception as error:  # whatever arguments of a wrong type or size lead to
            reason = str(error).partition("\n")[0][:120]
            raise ConfigError(
                f"{place}[{number}]: {spec['type']} fails with these arguments ({reason}): {spec}"
            ) from error
    return scene


def _made_scene(wanted: Sequence[str]) -> Scene:
    """Gaussians in a box of a metre, each in a class."""
    rng = np.random.default_rng(0)
    scene: Scene = {"name": "a scene"}
    widths = {"coord": 3, "color": 3, "opacity": 1, "scale": 3, "quat": 4, "normal": 3}
    for name, width in widths.items():
        if name != "normal" or name in wanted:
            scene[name] = rng.random((ROWS, width), dtype=np.float32)
    scene["color"] *= 255
    scene["segment"] = scene["instance"] = np.zeros(ROWS, np.int32)
    if "lang_feat" in wanted:
        scene["lang_feat"] = np.ones((ROWS, 2), np.float16)
        scene["valid_feat_mask"] = np.ones(ROWS, bool)
    return scene
