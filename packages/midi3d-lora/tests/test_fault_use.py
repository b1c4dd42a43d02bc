"""Pictures and places that `predict` and `evaluate` cannot use: told before weights are read."""

from __future__ import annotations

import os
import shutil
import zlib
from pathlib import Path
from types import ModuleType

import known_scenes as made
import numpy as np
import pytest
import torch
from PIL import Image

from lora_core.config import parse
from lora_core.errors import UserError
from midi3d_lora import evaluate, predict


@pytest.fixture
def flags(tmp_path: Path) -> list[str]:
    pictures = made.write_pictures(tmp_path)
    return [*made.QUICK, *made.WITH_BLOCKS, *pictures, "--output", str(tmp_path / "scene.glb")]


def refused(flags: list[str]) -> str:
    """What `predict` says before it reads a weight."""
    with pytest.raises(UserError) as told:
        predict.ready(parse(predict.Options, flags, prog="midi3d-lora predict"))
    return str(told.value)


def bomb(path: Path) -> None:
    """The header of a PNG of 20000 x 20000 grey pixels, and a few bytes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = zlib.crc32(kind + content).to_bytes(4, "big")
        return len(content).to_bytes(4, "big") + kind + content + check

    header = (20000).to_bytes(4, "big") * 2 + bytes([8, 0, 0, 0, 0])
    rows = zlib.compress(bytes(100_000))
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + parts)


@pytest.mark.fault("D06", "H20")
@pytest.mark.parametrize("name", ["rgb.png", "seg.png"])
def test_a_picture_or_map_that_is_a_bomb_is_refused_from_its_header(
    tmp_path: Path, flags: list[str], name: str
) -> None:
    bomb(tmp_path / name)
    said = refused(flags)
    assert name in said
    assert "more than 150 million pixels" in said


@pytest.mark.fault("D07")
@pytest.mark.parametrize("name", ["rgb.png", "seg.png"])
def test_a_pipe_in_place_of_a_picture_or_map_is_not_waited_for(
    tmp_path: Path, flags: list[str], name: str
) -> None:
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    assert name in refused(flags)


@pytest.mark.fault("D01", "D02")
def test_pictures_that_are_cut_off_or_missing_are_told_together(
    tmp_path: Path, flags: list[str]
) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (72, 72, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "rgb.png")
    content = (tmp_path / "rgb.png").read_bytes()
    (tmp_path / "rgb.png").write_bytes(content[: len(content) // 2])
    (tmp_path / "seg.png").unlink()
    said = refused(flags)
    assert "rgb.png" in said
    assert "seg.png" in said


@pytest.mark.fault("C36")
def test_a_gpu_that_is_not_there_is_told_before_weights_are_read(flags: list[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert "cuda" in refused([*flags, "--device", "cuda"])


@pytest.mark.fault("C25")
@pytest.mark.parametrize("command", [predict, evaluate])
def test_a_base_that_was_not_fetched_is_called_so(
    tmp_path: Path, flags: list[str], command: ModuleType
) -> None:
    base = shutil.copytree(made.MODEL, tmp_path / "model")
    weights = base / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    if command is evaluate:
        data = made.write_scene_folders(tmp_path / "data", 1)
        flags = [*made.QUICK, "--data_dir", str(data), "--output", str(tmp_path / "scores")]
        flags += ["--image_size", "56", "--num_points", "200", *made.WITH_BLOCKS]
    with pytest.raises(UserError, match="LFS pointer"):
        command.main([*flags, "--pretrained_model", str(base)])
    assert not (tmp_path / "scene.glb").exists()
