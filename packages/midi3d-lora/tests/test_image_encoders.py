"""The two image encoders: official embeddings, and folders that are not theirs."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_core.errors import CheckpointError
from lora_core.testing import load_golden
from midi3d_lora.conditioning.clip import clip_embeds, clip_pixels, read_clip
from midi3d_lora.conditioning.dino import dino_embeds, dino_pixels, read_dino
from midi3d_lora.conditioning.embeddings import embed_scene
from midi3d_lora.conditioning.pictures import split, to_square
from midi3d_lora.conditioning.pixel_values import read_picture_settings
from midi3d_lora.conditioning.seg_maps import seg_map

GOLDEN = load_golden(Path(__file__).parent / "goldens" / "pipeline")
MODEL = GOLDEN.folder / "model"
SCENE = split(GOLDEN.io["rgb"].numpy(), seg_map(GOLDEN.io["seg"].numpy()))
SETTINGS = [read_picture_settings(MODEL / f"feature_extractor_{n}") for n in (1, 2)]


def test_embeddings_of_a_scene_are_the_official_ones() -> None:
    found = embed_scene(
        SCENE,
        read_clip(MODEL / "image_encoder_1"), SETTINGS[0],
        read_dino(MODEL / "image_encoder_2"), SETTINGS[1],
    )  # fmt: skip
    torch.testing.assert_close(found.image_embeds_1, GOLDEN.io["image_embeds_1"], atol=5e-6, rtol=0)
    torch.testing.assert_close(found.image_embeds_2, GOLDEN.io["image_embeds_2"], atol=5e-6, rtol=0)
    none = found.unconditional()
    assert none.image_embeds_2.shape == found.image_embeds_2.shape
    assert not none.image_embeds_1.any()
    assert not none.image_embeds_2.any()


def test_seven_channels_are_instance_scene_and_mask_in_this_order() -> None:
    pixels = dino_pixels(SCENE, SETTINGS[1])
    assert pixels.shape == (3, 7, 42, 42)
    assert torch.equal(pixels[:, :3], GOLDEN.io["dino_pixel_values_instance"])
    assert torch.equal(pixels[:, 3:6], GOLDEN.io["dino_pixel_values_scene"])
    assert pixels[:, 6].unique().tolist() == [0.0, 1.0]


def test_instances_are_embedded_each_for_itself() -> None:
    clip, dino = read_clip(MODEL / "image_encoder_1"), read_dino(MODEL / "image_encoder_2")
    first, second = clip_pixels(SCENE, SETTINGS[0]), dino_pixels(SCENE, SETTINGS[1])
    torch.testing.assert_close(clip_embeds(clip, first)[1:2], clip_embeds(clip, first[1:2]))
    many = dino_embeds(dino, second.repeat(4, 1, 1, 1))  # more than are computed at once
    torch.testing.assert_close(many[:3], many[9:])


def test_a_scene_that_is_no_square_is_extended_and_not_cropped() -> None:
    wide = split(SCENE.picture[:50], seg_map(GOLDEN.io["seg"].numpy()[:50]))
    pixels = dino_pixels(to_square(wide), SETTINGS[1])
    assert pixels.shape[-2:] == (42, 42)
    assert not pixels[:, 6, 30:].any()  # 22 of 72 rows were added below


def test_encoders_are_frozen_and_in_evaluation_mode() -> None:
    model = read_clip(MODEL / "image_encoder_1", torch.bfloat16)
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


# -- faults ----------------------------------------------------------------------------------------


def changed(tmp_path: Path, name: str, change: Callable[[dict, dict], None]) -> Path:
    """A copy of an encoder's folder with other settings or tensors."""
    folder = tmp_path / name
    shutil.copytree(MODEL / name, folder)
    settings = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    change(settings, tensors)
    (folder / "config.json").write_text(json.dumps(settings))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_tensors_that_do_not_fit_are_named(tmp_path: Path) -> None:
    def change(_: dict, tensors: dict) -> None:
        del tensors["visual_projection.weight"]
        tensors["extra.weight"] = torch.zeros(2)
        tensors["vision_model.post_layernorm.bias"] = torch.zeros(3)

    with pytest.raises(CheckpointError) as told:
        read_clip(changed(tmp_path, "image_encoder_1", change))
    for word in (
        "1 missing: visual_projection.weight",
        "1 unexpected: extra.weight",
        "1 other shape: vision_model.post_layernorm.bias [3] instead of [16]",
    ):
        assert word in str(told.value)


def test_an_old_buffer_of_positions_does_no_harm(tmp_path: Path) -> None:
    def change(_: dict, tensors: dict) -> None:
        tensors["vision_model.embeddings.position_ids"] = torch.arange(5)[None]

    read_clip(changed(tmp_path, "image_encoder_1", change))


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    def change(_: dict, tensors: dict) -> None:
        tensors["layernorm.bias"][3] = torch.nan

    with pytest.raises(CheckpointError, match=r"NaN.*layernorm\.bias"):
        read_dino(changed(tmp_path, "image_encoder_2", change))


def test_an_ordinary_dino_is_refused(tmp_path: Path) -> None:
    def change(settings: dict, _: dict) -> None:
        settings["num_channels"] = 3

    with pytest.raises(CheckpointError, match="num_channels is 3, expected 7"):
        read_dino(changed(tmp_path, "image_encoder_2", change))


def test_the_encoders_in_each_others_place_are_refused() -> None:
    with pytest.raises(CheckpointError, match="model_type is 'dinov2', expected 'clip_vision"):
        read_clip(MODEL / "image_encoder_2")


def test_impossible_settings_are_told_with_the_file(tmp_path: Path) -> None:
    def change(settings: dict, _: dict) -> None:
        settings["hidden_act"] = "no such function"

    with pytest.raises(CheckpointError, match=r"config\.json: no possible settings"):
        read_clip(changed(tmp_path, "image_encoder_1", change))
