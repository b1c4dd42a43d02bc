"""Depth settings that an adapter was trained with: `depth.json` beside its weights.

Stock PEFT does not look at this file. `check_adapter` compares it with how the adapter is used.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isaac_lora.depth.variants import NATIVE_SIZE, PATCH
from isaac_lora.json_words import in_json
from lora_core.errors import CheckpointError, ConfigError, listing, near, one_line

FILE = "depth.json"
FORMAT = 1
ALPHA = 100.0  # the original model's scale of depth
LARGEST_ALPHA = 1e6  # above, float32 does not know the phases of the sinusoids to 0.1
INPUT_SIZE = NATIVE_SIZE
LARGEST_INPUT = 14 * 370  # pixels; ten times the native size, at which no GPU's memory suffices
_KEYS: dict[str, tuple[type, ...]] = {
    "format": (int,),
    "depth_model": (str,),
    "depth_checkpoint": (str,),
    "depth_checkpoint_sha256": (str,),
    "depth_alpha": (int, float),
    "depth_input_size": (int,),
}
_WORDS = {(int,): "a whole number", (str,): "text", (int, float): "a number"}


@dataclass(frozen=True)
class DepthSettings:
    """What the depth of a picture depends on, and how it reaches the decoder.

    Attributes:
        model: published size of the depth model, "vits", "vitb" or "vitl", or "custom".
        checkpoint: name of its file or folder, without the folders above.
        fingerprint: SHA-256 of its weights, see `lora_core.cache.fingerprint`.
        alpha: the normalised depth, 0..1, is multiplied by it before the sinusoids.
        input_size: side of the square that the depth model sees, pixels.

    Raises:
        ConfigError: an impossible alpha or input size.
    """

    model: str
    checkpoint: str
    fingerprint: str
    alpha: float = ALPHA
    input_size: int = INPUT_SIZE

    def __post_init__(self) -> None:
        if problems := setting_problems(self.alpha, self.input_size):
            raise ConfigError(listing(problems))


def setting_problems(alpha: float, input_size: int, patch: int = PATCH) -> list[str]:
    """What is wrong with `--depth_alpha` and `--depth_input_size`; empty: nothing.

    Args:
        patch: side of the depth model's patches, pixels.
    """
    problems = []
    if not 0 < alpha <= LARGEST_ALPHA:  # NaN is not either
        problems.append(
            f"depth_alpha {alpha}: expected a number above 0 and at most {LARGEST_ALPHA:g} (the "
            f"original's is {ALPHA:g}); to train without depth, leave out --use_depth"
        )
    if not 0 < input_size <= LARGEST_INPUT or input_size % patch:
        patches = min(max((input_size + patch // 2) // patch, 1), LARGEST_INPUT // patch)
        problems.append(
            f"depth_input_size {input_size}: expected a multiple of {patch}, the depth model's "
            f"patch, such as {patches * patch} (the original's is {INPUT_SIZE})"
        )
    return problems


# -- the file --------------------------------------------------------------------------------------


def write_depth_settings(folder: Path, settings: DepthSettings | None) -> Path:
    """Write `depth.json` into an adapter's folder, whole or not at all.

    Args:
        settings: None: no depth; a file of what lay there before is deleted.

    Raises:
        CheckpointError: it cannot be written.
    """
    from lora_core.tensor_file import write_json  # imports torch

    if settings is None:
        (folder / FILE).unlink(missing_ok=True)
        return folder / FILE

    content = {
        "format": FORMAT,
        "depth_model": settings.model,
        "depth_checkpoint": settings.checkpoint,
        "depth_checkpoint_sha256": settings.fingerprint,
        "depth_alpha": settings.alpha,
        "depth_input_size": settings.input_size,
    }
    write_json(folder / FILE, content)
    return folder / FILE


def read_depth_settings(folder: Path) -> DepthSettings | None:
    """What `depth.json` in an adapter's folder says; None: there is none, no depth was used.

    Raises:
        CheckpointError: damaged, of a newer version, or with impossible values; all of them.
    """
    from lora_core.base_file import read_settings  # imports torch

    path = folder / FILE
    if not os.path.lexists(path):  # a broken link is an error, not "no depth"
        return None
    content = read_settings(path)
    version = content.get("format")
    if type(version) is int and version > FORMAT:
        raise CheckpointError(
            f"{path}: format {version} is newer than this isaac-lora knows ({FORMAT}): update it"
        )
    if problems := _problems(content):
        raise CheckpointError(f"{path}:\n{listing(problems)}")
    return DepthSettings(
        content["depth_model"],
        content["depth_checkpoint"],
        content["depth_checkpoint_sha256"],
        float(content["depth_alpha"]),
        content["depth_input_size"],
    )


def _problems(content: Mapping[str, Any]) -> list[str]:
    problems = [f"{name} is missing" for name in _KEYS if name not in content]
    for name, value in content.items():
        if name not in _KEYS:
            hint = near(name, _KEYS)
            problems.append(f"unknown entry {one_line(name)!r}{hint and '; ' + hint}")
        elif type(value) not in _KEYS[name]:  # a bool is no number here
            wanted = _WORDS[_KEYS[name]]
            problems.append(f"{name}: expected {wanted}, found {in_json(value)}")
    if problems:
        return problems
    if content["format"] != FORMAT:
        problems.append(f"format {content['format']}: expected {FORMAT}")
    if not re.fullmatch("[0-9a-f]{64}", content["depth_checkpoint_sha256"]):
        problems.append("depth_checkpoint_sha256: expected 64 hexadecimal digits")
    # A multiple of which patch is for the depth model to say, when it is there.
    return problems + setting_problems(content["depth_alpha"], content["depth_input_size"], 1)


# -- the check -------------------------------------------------------------------------------------


def check_adapter(adapter: Path, here: DepthSettings | None) -> DepthSettings | None:
    """Compare the depth that an adapter was trained with with the depth that is used now.

    Args:
        adapter: its folder. here: what is used now; None: no depth.

    Returns:
        what it was trained with; None: no depth.

    Raises:
        CheckpointError: both use depth, but differently; all differences.

    Warns:
        UserWarning: one uses depth and the other does not.
    """
    trained = read_depth_settings(adapter)
    if trained and here and (different := differences(trained, here)):
        raise CheckpointError(
            f"{adapter} was trained with other depth than is used now:\n{listing(different)}"
        )
    if trained and not here:
        warnings.warn(
            f"{adapter} was trained with depth ({trained.checkpoint}) and is used without: its "
            f"answers will be worse. Pass --use_depth True --depth_checkpoint_path "
            f"{trained.checkpoint} --depth_alpha {trained.alpha:g} --depth_input_size "
            f"{trained.input_size}",
            stacklevel=2,
        )
    elif here and not trained:
        warnings.warn(
            f"{adapter} was trained without depth ({FILE} is not in it) and is used with depth, "
            "which changes its answers: leave out --use_depth",
            stacklevel=2,
        )
    return trained


def differences(trained: DepthSettings, here: DepthSettings) -> list[str]:
    """In what two settings give other encodings; where the same weights lie does not matter."""
    found = []
    if trained.fingerprint != here.fingerprint:
        found.append(
            f"depth_checkpoint_path: trained with {trained.checkpoint} ({trained.model}, SHA-256 "
            f"of its weights {trained.fingerprint[:12]}), used with {here.checkpoint} "
            f"({here.model}, {here.fingerprint[:12]})"
        )
    if trained.alpha != here.alpha:
        found.append(f"depth_alpha: trained with {trained.alpha:g}, used with {here.alpha:g}")
    if trained.input_size != here.input_size:
        found.append(
            f"depth_input_size: trained with {trained.input_size}, used with {here.input_size}"
        )
    return found
