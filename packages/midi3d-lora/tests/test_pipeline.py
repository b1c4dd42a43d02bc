"""The pipeline: official latents from pictures, meshes, and model directories read and written."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lora_core.errors import CheckpointError, ConfigError
from lora_core.testing import load_golden
from midi3d_lora.meshes.extraction import ExtractionSettings
from midi3d_lora.pipeline import MIDIPipeline, scene_pictures

GOLDEN = load_golden(Path(__file__).parent / "goldens" / "pipeline")
MODEL, BLOCKS = GOLDEN.folder / "model", GOLDEN.config["multi_instance_blocks"]
STEPS, GUIDANCE = GOLDEN.config["num_inference_steps"], GOLDEN.config["guidance_scale"]
RGB, SEG = (Image.fromarray(GOLDEN.io[name].numpy()) for name in ("rgb", "seg"))


@pytest.fixture(scope="module")
def pipeline() -> MIDIPipeline:
    return MIDIPipeline.from_pretrained(MODEL, multi_instance_blocks=BLOCKS)


def test_latents_of_a_scene_are_the_official_ones(pipeline: MIDIPipeline) -> None:
    made = pipeline(
        RGB, SEG, num_inference_steps=STEPS, guidance_scale=GUIDANCE,
        latents=GOLDEN.io["latents"], output_type="latent",
    )  # fmt: skip
    torch.testing.assert_close(made.latents, GOLDEN.io["final_latents"], atol=1e-4, rtol=0)
    assert made.meshes == []
    assert made.labels == [str(value) for value in np.unique(np.asarray(SEG))[1:]]


def test_guidance_in_two_passes_gives_the_same_latents(pipeline: MIDIPipeline) -> None:
    embeds = pipeline.encode_image(scene_pictures(RGB, SEG))
    made = pipeline.sample(embeds, GOLDEN.io["latents"], STEPS, GUIDANCE, one_pass=False)
    torch.testing.assert_close(made, GOLDEN.io["final_latents"], atol=1e-4, rtol=0)


def test_every_instance_becomes_a_mesh(pipeline: MIDIPipeline) -> None:
    settings = ExtractionSettings(depth=4, coarse_depth=3, inside="negative", fit_box=False)
    meshes = pipeline.extract(GOLDEN.io["final_latents"], settings)
    assert len(meshes) == 3
    assert all(mesh is not None and len(mesh.faces) for mesh in meshes)


def test_a_seed_repeats_a_scene(pipeline: MIDIPipeline) -> None:
    first, again, other = (
        pipeline(RGB, SEG, num_inference_steps=1, num_tokens=8, seed=s, output_type="latent")
        for s in (1, 1, 2)
    )
    assert torch.equal(first.latents, again.latents)
    assert not torch.equal(first.latents, other.latents)


def test_an_instance_alone_is_a_scene(pipeline: MIDIPipeline) -> None:
    seg = np.where(np.asarray(SEG) > 0, np.uint8(255), np.uint8(0))
    made = pipeline(RGB, seg, num_inference_steps=1, num_tokens=8, output_type="latent")
    assert made.labels == ["255"]
    assert made.latents.shape == (1, 8, 6)


def test_transparent_pixels_are_white() -> None:
    clear = RGB.copy().convert("RGBA")
    clear.putalpha(0)
    assert (scene_pictures(clear, SEG).scene == 255).all()


# -- directories -----------------------------------------------------------------------------------


def test_a_saved_pipeline_is_read_back_and_has_the_official_layout(
    pipeline: MIDIPipeline, tmp_path: Path
) -> None:
    pipeline.save_pretrained(tmp_path)
    made, official = (
        {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
        for folder in (tmp_path, MODEL)
    )
    assert made >= official
    index, wanted = (json.loads((f / "model_index.json").read_text()) for f in (tmp_path, MODEL))
    assert {**index, "_diffusers_version": ""} == {**wanted, "_diffusers_version": ""}
    again = MIDIPipeline.from_pretrained(tmp_path, multi_instance_blocks=BLOCKS)
    for name in ("vae", "transformer", "image_encoder_1", "image_encoder_2"):
        before, after = (getattr(p, name).state_dict() for p in (pipeline, again))
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)


def test_all_missing_parts_are_told_at_once(tmp_path: Path) -> None:
    shutil.copytree(MODEL, tmp_path / "model")
    shutil.rmtree(tmp_path / "model" / "vae")
    (tmp_path / "model" / "image_encoder_2" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError) as told:
        MIDIPipeline.from_pretrained(tmp_path / "model")
    assert "vae" in str(told.value)
    assert "image_encoder_2" in str(told.value)


def test_parts_of_different_models_are_refused(pipeline: MIDIPipeline) -> None:
    parts = dict(pipeline.components)
    parts["image_encoder_1"] = parts["image_encoder_1"].__class__(
        parts["image_encoder_1"].config.__class__(
            hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1,
            projection_dim=10, image_size=28, patch_size=14,
        )
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"cross_attention_dim is 12, but projection_dim .* 10"):
        MIDIPipeline(**parts)


def test_a_transformer_of_another_depth_is_not_guessed_about() -> None:
    unset = MIDIPipeline.from_pretrained(MODEL)
    with pytest.raises(ConfigError, match="set_multi_instance_blocks"):
        unset(RGB, SEG, num_inference_steps=1, num_tokens=8, output_type="latent")
