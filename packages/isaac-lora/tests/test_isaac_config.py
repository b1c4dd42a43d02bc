"""The configuration: what files may say, what is kept, what contradicts."""

import json
from pathlib import Path
from typing import Any

import pytest
from recorded_isaac import CASE, GOLDENS

from isaac_lora.network.configuration import IsaacConfig
from lora_core.errors import ConfigError

PUBLISHED = json.loads((GOLDENS / "keys" / "isaac_0_1_config.json").read_text("utf-8"))


def tiny(**changes: Any) -> IsaacConfig:
    vision = CASE.config["vision_config"] | changes.pop("vision_config", {})
    return IsaacConfig(**CASE.config | {"vision_config": vision} | changes)


def test_the_published_file_keeps_all_its_values(tmp_path: Path) -> None:
    first = IsaacConfig.from_pretrained(GOLDENS / "keys" / "isaac_0_1_config.json")
    first.save_pretrained(tmp_path)
    again = IsaacConfig.from_pretrained(tmp_path)
    assert again.to_dict() == first.to_dict()
    moved = {"rope_scaling", "rope_theta", "dtype", "vision_config"}
    for name in set(PUBLISHED) - moved:
        assert getattr(again, name) == PUBLISHED[name], name
    for name in set(PUBLISHED["vision_config"]) - moved:
        assert getattr(again.vision_config, name) == PUBLISHED["vision_config"][name], name
    assert again.rope_parameters == {"rope_type": "default", "rope_theta": 1_000_000.0}
    saved = json.loads((tmp_path / "config.json").read_text("utf-8"))
    assert saved["model_type"] == "isaac"
    assert saved["vision_config"]["model_type"] == "pixel_shuffle_siglip2"


def test_what_a_file_leaves_out_is_as_in_the_original() -> None:
    config = IsaacConfig()
    assert config.vision_max_num_patches == 256
    assert config.vision_min_num_patches is None
    assert config.pixel_shuffle_scale == config.vision_config.pixel_shuffle_scale_factor == 1
    assert config.max_sequence_length == 16384
    assert config.vision_token == "<image>"
    assert config.vision_config.num_patches == 256
    depth = (config.use_depth, config.depth_alpha, config.depth_input_size)
    assert depth == (False, 100.0, 518)
    assert config.depth_checkpoint_path is None


@pytest.mark.parametrize("name", ["video_patch_size", "vision_patch_size"])
def test_both_names_of_the_patch_size_survive_saving(name: str, tmp_path: Path) -> None:
    config = IsaacConfig(**{name: 4})
    assert config.vision_config.patch_size == 4
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text("utf-8"))["video_patch_size"] == 4
    assert IsaacConfig.from_pretrained(tmp_path).video_patch_size == 4


def test_two_different_patch_sizes_are_refused() -> None:
    with pytest.raises(ConfigError, match="vision_patch_size is 8 and video_patch_size is 4"):
        tiny(vision_patch_size=8)
    assert tiny(vision_patch_size=4).video_patch_size == 4


CONTRADICTIONS: list[tuple[dict[str, Any], str]] = [
    ({"video_patch_size": 8}, r"video_patch_size is 8 and vision_config\.patch_size is 4"),
    ({"pixel_shuffle_scale": 1}, "pixel_shuffle_scale is 1 and vision_config"),
    ({"vision_min_num_patches": 65}, "65, more than vision_max_num_patches, 64"),
    ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_type is 'linear'"),
    ({"head_dim": 12}, "head_dim is 12; .* multiple of 8"),
    ({"num_key_value_heads": 3}, "num_attention_heads is 4, no multiple of num_key_value_heads, 3"),
    (
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
        "Isaac has full attention in every layer",
    ),
    ({"vision_config": {"num_patches": 50}}, "num_patches is 50; .* square number"),
    ({"vision_config": {"hidden_size": 33}}, "hidden_size is 33, no multiple"),
    ({"vision_config": {"pixel_shuffle_scale_factor": 0}, "pixel_shuffle_scale": 0}, "least is 1"),
]


@pytest.mark.parametrize(("changes", "message"), CONTRADICTIONS)
def test_fields_that_contradict_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny(**changes)


def test_all_contradictions_are_told_together() -> None:
    with pytest.raises(ConfigError) as told:
        tiny(video_patch_size=8, pixel_shuffle_scale=1, head_dim=12)
    assert len(str(told.value).splitlines()) == 4
