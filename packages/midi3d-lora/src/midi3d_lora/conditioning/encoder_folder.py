"""An image encoder of transformers in its sub-folder of a model directory, read strictly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_core.base_file import no_model_folder, read_settings, refuse_nan, some
from lora_core.errors import CheckpointError, one_line
from lora_core.preflight import torchvision
from lora_core.quiet import quiet_loading

IMAGES_AT_ONCE = 8  # of 512 x 512; more is not faster and takes memory from the transformer


def encoder_settings(folder: Path, model_type: str, what: str) -> dict[str, Any]:
    """What config.json says.

    Args:
        what: of which model it is expected to be, for the message.

    Raises:
        CheckpointError: no such folder, no config.json, or another model.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder.absolute()}: no such folder: expected {what}")
    if not (folder / "config.json").is_file():
        raise no_model_folder(folder, "config.json")
    settings = read_settings(folder / "config.json")
    if settings.get("model_type") != model_type:
        raise CheckpointError(
            f"{folder / 'config.json'}: model_type is {settings.get('model_type')!r}, expected "
            f"{model_type!r}: {what}"
        )
    return settings


def build_encoder(
    name: str,
    config_name: str,
    folder: Path,
    settings: dict[str, Any],
    tensors: dict[str, torch.Tensor],
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """The model with its weights, in evaluation mode, without gradients.

    `from_pretrained` puts the tensors in: it knows the names that files had before version 5.

    Args:
        name, config_name: transformers' classes.
        tensors: as the file names them; the old buffer `position_ids` may be among them.
        dtype: of the weights; None: as they are in the file.

    Raises:
        CheckpointError: impossible settings; tensors that are missing, unexpected, of another shape
            or not finite.
        ConfigError: a torchvision that does not work, over which transformers would stumble.
    """
    torchvision()
    import transformers

    state = {n: tensor for n, tensor in tensors.items() if not n.endswith(".position_ids")}
    refuse_nan(folder, state)
    try:
        config = getattr(transformers, config_name)(**settings)
    except Exception as error:  # transformers has no class of its own for bad settings
        raise _refused(folder / "config.json", error) from None
    dtype = dtype or next(iter(state.values()), torch.zeros(0)).dtype
    with quiet_loading():
        try:
            model, report = getattr(transformers, name).from_pretrained(
                None,
                config=config,
                state_dict=state,
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # we name them below, with all the others
            )
        except (ValueError, RuntimeError, TypeError, ZeroDivisionError, KeyError) as error:
            raise _refused(folder / "config.json", error) from None
    _refuse_report(folder, len(model.state_dict()), report)
    return model.eval().requires_grad_(False)


def _refused(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{path}: no possible settings: {one_line(str(error))[:200]}")


def _refuse_report(folder: Path, total: int, report: dict[str, Any]) -> None:
    missing, unexpected = (sorted(report[f"{name}_keys"]) for name in ("missing", "unexpected"))
    shapes = [
        f"{name} {list(found)} instead of {list(wanted)}"
        for name, found, wanted in sorted(report["mismatched_keys"], key=lambda entry: entry[0])
    ]
    if not (missing or unexpected or shapes):
        return
    matched = total - len(missing) - len(shapes)
    lines = [f"{folder}: {matched} of {total} tensors matched config.json"]
    for what, names in (("missing", missing), ("unexpected", unexpected), ("other shape", shapes)):
        if names:
            lines.append(f"  {len(names)} {what}: {some(names)}")
    raise CheckpointError("\n".join(lines))
