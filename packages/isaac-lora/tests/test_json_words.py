"""Values of JSON files in messages, and numbers of things."""

from pathlib import Path
from typing import Any

import pytest
import torch
from recorded_isaac import recorded_model

from isaac_lora.depth.checkpoint import find_depth_checkpoint
from isaac_lora.json_words import in_json, kind
from isaac_lora.merged_model import Merged
from isaac_lora.network.positions import mrope_position_ids
from isaac_lora.official import read_config
from isaac_lora.vision_cache import refuse_changing
from lora_core.errors import CheckpointError, ConfigError, DataError


@pytest.mark.parametrize(
    ("value", "said", "called"),
    [
        (None, "null", "null"),
        (True, "true", "true"),
        (1.5, "1.5", "1.5"),
        ("a\n", "'a\\n'", "text"),
        ([], "[]", "an empty list"),
        ([None], "[None]", "a list"),
        ({}, "{}", "an object"),
    ],
)
def test_values_have_the_words_of_json(value: Any, said: str, called: str) -> None:
    assert (in_json(value), kind(value)) == (said, called)
    assert len(in_json("x" * 10_000)) < 100


def test_settings_of_models_say_null(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": null}')
    with pytest.raises(CheckpointError, match="model_type is null, expected 'isaac'"):
        read_config(tmp_path)
    with pytest.raises(CheckpointError, match="found null with null"):
        find_depth_checkpoint(tmp_path)


def test_one_thing_is_not_called_many() -> None:
    assert "m: 1 tensor, 1 of them changed" in str(Merged(Path("m"), 1, 1, 0.0))
    assert "m: 2 tensors, 1 of them changed" in str(Merged(Path("m"), 2, 1, 0.0))
    tower: Any = recorded_model().requires_grad_(False).model.vision_embedding[0]
    next(tower.parameters()).requires_grad_(True)
    with pytest.raises(ConfigError, match=r"training changes 1 tensor of it \([\w.]+\): leave out"):
        refuse_changing(tower)
    grids = torch.tensor([[2, 2]])
    with pytest.raises(DataError, match="2 image places, but `grids` is of 1 image with 1 token "):
        mrope_position_ids(torch.tensor([[True, True]]), grids, 2)
