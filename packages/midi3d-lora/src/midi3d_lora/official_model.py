"""A diffusers model that is loaded strictly: no tensor too many or too few, no unknown setting."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin

from lora_core import base_file, injection
from lora_core.errors import CheckpointError, ConfigError
from lora_core.weight_files import WeightFiles, read_weights
from midi3d_lora import official


class OfficialModel(ModelMixin, ConfigMixin):
    """What diffusers' loading leaves to a warning is an error here."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Self:
        """As diffusers does it, strictly; a folder of this machine is checked before it is read.

        Raises:
            CheckpointError: settings or tensors that are not those of this model; NaN.
        """
        with_report = kwargs.pop("output_loading_info", False)
        path = Path(pretrained_model_name_or_path)
        if path.is_dir():
            found = check_folder(cls, path / (kwargs.get("subfolder") or ""), kwargs.get("variant"))
            kwargs |= {"variant": found.variant, "use_safetensors": found.safetensors}
        model, report = super().from_pretrained(
            str(pretrained_model_name_or_path), output_loading_info=True, **kwargs
        )
        _refuse_report(path, report)
        base_file.refuse_nan(path, model.state_dict())
        result: Any = (model, report) if with_report else model
        return result

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """As diffusers does it.

        Raises:
            ConfigError: LoRA is on the model: its tensors would be among the base's, where nothing
                reads them.
        """
        if injection.lora_layers(self):
            raise ConfigError(
                "the model has LoRA: save that by itself (save_adapter), or merge it into the "
                "weights (midi3d-lora merge)"
            )
        super().save_pretrained(save_directory, *args, **kwargs)

    @classmethod
    def extract_init_dict(cls, config_dict: Mapping[str, Any], **kwargs: Any) -> Any:
        """As diffusers does it; unknown settings are a ConfigError instead of a warning."""
        official.refuse_unknown(config_dict, official.arguments_of(cls))
        return super().extract_init_dict(config_dict, **kwargs)

    @classmethod
    def explain_misfit(cls, names: Iterable[str]) -> str:
        """A line about tensors that are not those of this model, or ""."""
        return ""


AnyModel = TypeVar("AnyModel", bound=OfficialModel)


def load_component(
    model_class: type[AnyModel],
    model_dir: str | Path,
    name: str,
    variant: str | None = None,
    dtype: torch.dtype | None = None,
) -> AnyModel:
    """One model of a model directory, in evaluation mode. No network.

    Args:
        name: of the sub-folder, "transformer" or "vae".
        variant: of the weight files, as "fp16"; None: see `official.find_weights`.
        dtype: of the model; None: float32, as diffusers does it.

    Raises:
        CheckpointError: the folder or its weights are missing, damaged or of another model.
    """
    folder = official.find_model(model_dir, [name], variant)
    return model_class.from_pretrained(
        folder, subfolder=name, variant=variant, torch_dtype=dtype
    ).eval()


def check_folder(
    model_class: type[OfficialModel], folder: Path, variant: str | None = None
) -> WeightFiles:
    """Compare the settings and tensors of a sub-folder with a class, without reading any values.

    Raises:
        CheckpointError: unknown settings, or sizes that make no model; tensors that are missing,
            unexpected or of another shape.
    """
    settings = official.read_config(folder, official.arguments_of(model_class))
    try:
        with torch.device("meta"):
            wanted = model_class(**settings).state_dict()
    except ConfigError as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from None
    found = official.find_weights(folder, variant)
    tensors = read_weights(found, device="meta")
    base_file.refuse_misfit(
        found.files[0] if found.index is None else folder,
        f"the {model_class.__name__} of {folder / 'config.json'}",
        tensors,
        wanted,
        [name for name in tensors if name not in wanted],
        hint=model_class.explain_misfit(tensors),
    )
    return found


def _refuse_report(path: Path, report: Mapping[str, Any]) -> None:
    """What diffusers says about a load: of a hub's folder, which was not checked before."""
    lines = [
        f"  {len(report[key])} {what}: {base_file.some([str(item) for item in report[key]])}"
        for key, what in (
            ("missing_keys", "missing"),
            ("unexpected_keys", "unexpected"),
            ("mismatched_keys", "other shape"),
            ("error_msgs", "errors"),
        )
        if report.get(key)
    ]
    if lines:
        raise CheckpointError("\n".join([f"{path} does not fit the model", *lines]))
