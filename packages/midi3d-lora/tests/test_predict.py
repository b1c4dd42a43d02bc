"""`predict` and `inference_with_lora.py`: a picture and its map to a .glb of separate meshes."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import known_scenes as made
import numpy as np
import pytest
import torch
import trimesh
from PIL import Image
from safetensors.torch import load_file, save_file

from lora_core.config import parse
from lora_core.errors import CheckpointError, ConfigError, DataError, NumericError
from lora_core.testing.console import check_light
from midi3d_lora import predict
from midi3d_lora.adapter_files import load_adapter
from midi3d_lora.generation import make_latents
from midi3d_lora.meshes.extraction import Mesh
from midi3d_lora.meshes.mesh_loading import read_meshes
from midi3d_lora.pipeline import MIDIPipeline

PLAIN = ["--views", "false"]
GUIDE = (
    """--lora_path outputs/lora_finetune/lora-final/lora_weights.pth
    --rgb_image assets/example_data/Cartoon-Style/00_rgb.png
    --seg_image assets/example_data/Cartoon-Style/00_seg.png --output output.glb""",
    """--lora_path outputs/lora_finetune/lora-epoch-50/lora_weights.pth --rgb_image my_image.png
    --seg_image my_mask.png --output my_scene.glb --num_inference_steps 100 --guidance_scale 7.0
    --seed 42""",
    """--pretrained_model pretrained_weights/MIDI-3D --lora_path outputs/my_lora/lora-final
    --rgb_image a.png --seg_image b.png --device cuda --lora_rank 16 --lora_alpha 16
    --mi_attention_blocks blocks.8 blocks.9 blocks.10 blocks.11 blocks.12""",
)


@pytest.fixture
def flags(tmp_path: Path) -> list[str]:
    pictures = made.write_pictures(tmp_path)
    return [*made.QUICK, *pictures, "--output", str(tmp_path / "out" / "scene.glb")]


def options(flags: list[str]) -> predict.Options:
    return parse(predict.Options, flags, prog="midi3d-lora predict")


def balls() -> dict[str, Mesh | None]:
    ball = trimesh.creation.icosphere(2, 0.3)
    vertices, faces = ball.vertices.astype(np.float32), ball.faces.astype(np.int32)
    return {"40": Mesh(vertices, faces), "90": None, "200": Mesh(vertices + np.float32(0.5), faces)}


def described(tmp_path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((tmp_path / "out" / "scene.json").read_text())
    return content


# -- commands --------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", GUIDE)
def test_commands_of_the_guide_parse(command: str) -> None:
    said = options(shlex.split(command))
    assert (said.num_inference_steps, said.guidance_scale, said.seed) in {(50, 7, 42), (100, 7, 42)}


def test_defaults_are_those_of_the_guide() -> None:
    said = options(["--rgb_image", "a.png", "--seg_image", "b.png"])
    assert said.pretrained_model == "pretrained_weights/MIDI-3D"
    assert (said.output, said.octree_depth) == ("output.glb", 8)


def test_help_answers_without_heavy_libraries() -> None:
    check_light("midi3d-lora", ["predict", "--help"])


def test_the_script_of_the_guide_is_the_command() -> None:
    script = Path(__file__).parent.parent / "inference_with_lora.py"
    done = subprocess.run(
        [sys.executable, str(script), "--seg_image", "x.png", "--stepz", "3"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "--rgb_image is missing" in done.stderr
    assert "stepz" in done.stderr


# -- scenes ----------------------------------------------------------------------------------------


def test_the_base_model_makes_one_named_mesh_for_each_instance(
    tmp_path: Path, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict.main([*flags, *made.WITH_BLOCKS]) == 0
    said = capsys.readouterr().out
    assert "the base model" in said
    assert "3 instances: 40, 90, 200" in said
    told = described(tmp_path)
    names = ["instance_40", "instance_90", "instance_200"]
    assert [one["name"] for one in told["instances"]] == names
    assert told["made"]["lora"] is None
    assert told["made"]["multi_instance_blocks"] == made.BLOCKS
    assert Image.open(tmp_path / "out" / "scene_views.png").width > 4 * 384


@pytest.mark.fault("P37")
def test_a_scene_is_read_back_as_it_was_made(tmp_path: Path, flags: list[str]) -> None:
    chosen = options([*flags, *made.WITH_BLOCKS, *PLAIN])
    pictures, meshes = predict.read_pictures(chosen), balls()
    list(predict.write(chosen, pictures, meshes))
    notes: list[str] = []
    back = read_meshes(tmp_path / "out" / "scene.glb", notes)
    there = {f"instance_{name}": mesh for name, mesh in meshes.items() if mesh is not None}
    assert [mesh.name for mesh in back] == list(there)
    for mesh in back:
        assert np.array_equal(mesh.vertices.astype(np.float32), there[mesh.name].vertices)
        assert np.array_equal(mesh.faces, there[mesh.name].faces)
    assert not notes


def test_a_seed_is_a_scene(tmp_path: Path, flags: list[str]) -> None:
    words = [*flags, *made.WITH_BLOCKS, *PLAIN]
    scenes = []
    for seed in (1, 1, 2):
        assert predict.main([*words, "--seed", str(seed), "--overwrite"]) == 0
        scenes.append((tmp_path / "out" / "scene.glb").read_bytes())
    assert scenes[0] == scenes[1]
    assert scenes[0] != scenes[2]


@pytest.mark.parametrize("name", ["lora_weights.pth", "peft"])
def test_an_adapter_needs_no_further_flags(tmp_path: Path, flags: list[str], name: str) -> None:
    adapter = made.write_adapter(tmp_path / "lora" / name)
    chosen = options([*flags, "--lora_path", str(adapter)])
    assert chosen.blocks == made.BLOCKS
    pipeline = chosen.load()
    by_hand = MIDIPipeline.from_pretrained(made.MODEL, multi_instance_blocks=made.BLOCKS)
    load_adapter(by_hand.transformer, adapter)
    pictures = predict.read_pictures(chosen)
    made_so = []
    for one in (pipeline, by_hand):
        noise = one.prepare_latents(len(pictures), chosen.seed, chosen.num_tokens)
        made_so.append(one.sample(one.encode_image(pictures), noise, 2, 7.0))
    assert torch.equal(*made_so)
    base = options([*flags, *made.WITH_BLOCKS]).load()
    without = base.sample(base.encode_image(pictures), noise, 2, 7.0)
    assert not torch.allclose(made_so[0], without, atol=1e-3)


def test_half_precision_is_near_and_surfaces_are_decoded_in_full(
    tmp_path: Path, flags: list[str]
) -> None:
    adapter = made.write_adapter(tmp_path / "lora_weights.pth")
    pictures, latents = predict.read_pictures(options(flags)), []
    for dtype in (torch.float32, torch.bfloat16):
        pipeline = MIDIPipeline.from_pretrained(
            made.MODEL, {"default": dtype, "vae": torch.float32}, multi_instance_blocks=made.BLOCKS
        )
        load_adapter(pipeline.transformer, adapter)
        assert pipeline.transformer.dtype == pipeline.image_encoder_2.dtype == dtype
        assert pipeline.vae.dtype == torch.float32
        noise = pipeline.prepare_latents(len(pictures), 0, 32)
        latents.append(pipeline.sample(pipeline.encode_image(pictures), noise, 2, 7.0))
    whole, half = latents
    assert half.dtype == torch.float32
    assert 1e-4 < (half - whole).norm() / whole.norm() < 0.05
    with pytest.raises(ConfigError, match="torch_dtype of 'unet'"):
        MIDIPipeline.from_pretrained(made.MODEL, {"unet": torch.float32})


def test_flags_beside_an_adapter_are_checked(tmp_path: Path, flags: list[str]) -> None:
    adapter = ["--lora_path", str(made.write_adapter(tmp_path / "lora_weights.pth"))]
    right = ["--lora_rank", "2", "--lora_alpha", "4", *made.WITH_BLOCKS]
    options([*flags, *adapter, *right]).glance()
    wrong = ["--lora_rank", "16", "--lora_alpha", "16", "--mi_attention_blocks", "blocks.0"]
    with pytest.raises(ConfigError) as told:
        predict.main([*flags, *adapter, *wrong])
    for part in ("--lora_rank 16", "--lora_alpha 16", "--mi_attention_blocks blocks.0"):
        assert part in str(told.value)
    with pytest.raises(ConfigError, match="give --lora_path"):
        options([*flags, "--lora_rank", "16"])


def test_a_coloured_map_makes_the_same_scene_as_a_grey_one(
    tmp_path: Path, flags: list[str]
) -> None:
    grey = np.asarray(Image.open(tmp_path / "seg.png"))
    table = np.zeros((256, 3), np.uint8)
    table[[40, 90, 200]] = (0, 0, 255), (255, 0, 0), (0, 255, 0)  # by luminance
    Image.fromarray(table[grey]).save(tmp_path / "colours.png")
    words = [*flags, *made.WITH_BLOCKS]
    first, second = (
        predict.read_pictures(options([*words, *more]))
        for more in ([], ["--seg_image", str(tmp_path / "colours.png")])
    )
    assert second.seg.names == ("0000ff", "ff0000", "00ff00")
    assert np.array_equal(first.seg.index, second.seg.index)


def test_a_map_of_another_size_is_brought_to_the_picture(
    tmp_path: Path, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    Image.open(tmp_path / "seg.png").resize((36, 36), Image.Resampling.NEAREST).save(
        tmp_path / "small.png"
    )
    chosen = options([*flags, "--seg_image", str(tmp_path / "small.png")])
    assert predict.read_pictures(chosen).seg.size == (72, 72)
    assert "brought to 72 x 72" in capsys.readouterr().out
    Image.new("L", (36, 50), 9).save(tmp_path / "small.png")
    with pytest.raises(DataError, match="pixel by pixel"):
        predict.read_pictures(chosen)


def test_padding_is_that_of_the_official_demos(flags: list[str]) -> None:
    pictures = predict.read_pictures(options([*flags, "--do_image_padding"]))
    assert pictures.seg.size[0] == pictures.seg.size[1]
    assert pictures.seg.size[0] > 72


@pytest.mark.parametrize(("rows", "works"), [(3, True), (2, False)])
def test_guidance_takes_two_passes_where_memory_ends(
    flags: list[str], rows: int, works: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = options([*flags, *made.WITH_BLOCKS])
    pipeline, pictures = chosen.load(), predict.read_pictures(chosen)
    expected = make_latents(pipeline, pictures, chosen, 0)

    def limited(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if len(inputs[0]) > rows:
            raise torch.OutOfMemoryError("CUDA out of memory")

    pipeline.transformer.proj_in.register_forward_pre_hook(limited)
    if works:
        latents = make_latents(pipeline, pictures, chosen, 0)
        torch.testing.assert_close(latents, expected, atol=1e-4, rtol=0)
        assert "in two" in capsys.readouterr().out
    else:
        with pytest.raises(ConfigError, match="out of memory with a scene of 3 instances"):
            make_latents(pipeline, pictures, chosen, 0)


# -- results ---------------------------------------------------------------------------------------


def test_all_that_is_asked_for_is_written_and_empty_instances_harm_no_other(
    tmp_path: Path, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    chosen = options(
        [
            *flags, "--objects", str(out / "objects"), "--object_format", "obj", "--turntable",
            str(out / "turn.gif"), "--turntable_frames", "3", "--view_size", "64",
        ]
    )  # fmt: skip
    written = list(predict.write(chosen, predict.read_pictures(chosen), balls()))
    assert {path.relative_to(out).as_posix() for path in written} == {
        "scene.glb", "scene_views.png", "turn.gif",
        "objects/instance_40.obj", "objects/instance_200.obj",
    }  # fmt: skip
    assert "without instance_90" in capsys.readouterr().out
    assert [one["vertices"] for one in described(tmp_path)["instances"]] == [162, 0, 162]
    assert Image.open(out / "turn.gif").n_frames == 3  # type: ignore[attr-defined]


@pytest.mark.fault("P36")
def test_a_scene_without_any_surface_is_an_error(tmp_path: Path, flags: list[str]) -> None:
    """Of an autoencoder whose field is 1 everywhere."""
    shutil.copytree(made.MODEL, tmp_path / "model")
    weights = tmp_path / "model" / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["decoder.proj_out.weight"].zero_()
    tensors["decoder.proj_out.bias"].fill_(-1)
    save_file(tensors, weights)
    words = ["--pretrained_model", str(tmp_path / "model"), "--inside", "auto", *made.WITH_BLOCKS]
    with pytest.raises(NumericError, match="none of 3 instances has a surface"):
        predict.main([*flags, *words])
    assert not (tmp_path / "out").exists()


def test_results_stay_and_pictures_always_do(tmp_path: Path, flags: list[str]) -> None:
    (tmp_path / "out").mkdir()
    for name in ("scene.glb", "scene.json", "scene_views.png", "turn.gif", "instance_3.ply"):
        there = tmp_path / "out" / name
        there.touch()
        more = ["--turntable", str(tmp_path / "out" / "turn.gif"), "--object_format", "ply"]
        more += ["--objects", str(tmp_path / "out")]
        with pytest.raises(ConfigError, match=rf"{name} is there already: .* --overwrite"):
            predict.main([*flags, *more])
        there.unlink()
    (tmp_path / "rgb.png").rename(tmp_path / "a_views.png")
    words = ["--rgb_image", str(tmp_path / "a_views.png"), "--output", str(tmp_path / "a.glb")]
    with pytest.raises(ConfigError, match=r"a_views.png is one of the pictures"):
        predict.main([*flags, *words, "--overwrite"])


def test_all_that_is_wrong_is_told_before_weights_are_read(
    tmp_path: Path, flags: list[str]
) -> None:
    (tmp_path / "seg.png").unlink()
    (tmp_path / "rgb.png").write_bytes(b"no picture")
    missing = ["--pretrained_model", str(tmp_path / "nowhere"), "--turntable", "turn.mp4"]
    with pytest.raises(ConfigError) as told:
        predict.main([*flags, *missing, "--lora_path", str(tmp_path / "no.pth")])
    for part in ("ffmpeg -i turn.gif", "nowhere", "no.pth", "seg.png: no such file", "rgb.png"):
        assert part in str(told.value), part
    with pytest.raises(ConfigError, match=r"name it scene\.glb"):
        predict.main([*flags, "--output", str(tmp_path / "scene.obj")])


def test_a_photograph_in_place_of_the_map_is_named(tmp_path: Path, flags: list[str]) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (72, 72, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "seg.png")
    with pytest.raises(DataError, match=r"seg.png: \d+ different values .* photograph"):
        predict.main([*flags, *made.WITH_BLOCKS])


def test_impossible_settings_are_told_together(flags: list[str]) -> None:
    wrong = {
        "num_inference_steps": "0", "guidance_scale": "-1", "octree_depth": "20",
        "view_size": "9", "smallest_share": "1", "turntable_seconds": "0",
    }  # fmt: skip
    words = [word for name, value in wrong.items() for word in (f"--{name}", value)]
    with pytest.raises(ConfigError) as told:
        options([*flags, *words, "--mi_attention_blocks", "block8"])
    assert all(f"--{name}" in str(told.value) for name in [*wrong, "mi_attention_blocks"])


@pytest.mark.fault("C31")
def test_multi_instance_blocks_must_be_known_and_there(flags: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"--mi_attention_blocks is needed: .* has 5 blocks"):
        predict.main(flags)
    with pytest.raises(ConfigError, match=r"blocks.8: .* has blocks.0 to blocks.4"):
        predict.main([*flags, "--mi_attention_blocks", "blocks.1", "blocks.8"])
    options([*flags, "--mi_attention_blocks", "[]"]).check_blocks(3)


def test_a_missing_adapter_is_told(flags: list[str]) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        predict.main([*flags, "--lora_path", "nowhere.pth"])
