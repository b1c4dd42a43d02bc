"""Checkpoints that describe their own network need no settings beside them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import lora_models
import pytest
import tiny_scenes
import torch
import use_fixtures as made
from safetensors.torch import load_file, save_file

from lora_core.config import parse
from lora_core.errors import CheckpointError
from scenesplat_lora import demo, load_official
from scenesplat_lora import model as models
from scenesplat_lora.config import Config
from scenesplat_lora.demo_base import rooms
from scenesplat_lora.evaluate import Options
from scenesplat_lora.network.description import KEY, RELEASED_GRID, Description, base_grid_size
from scenesplat_lora.network.models import LangPretrainer
from scenesplat_lora.network.official import read_official, write_official
from scenesplat_lora.settings.words import for_parser

SAID = Description(lora_models.TINY, 0.1, ("wall", "floor"))


def written(path: Path, said: Description | None = SAID) -> Path:
    return write_official(path, lora_models.tiny_model().state_dict(), 3, said)


def config(base: Path, **given: object) -> Config:
    values = {"lora_training.pretrained_path": base, **given}
    with for_parser(["--options", *(f"{name}={value}" for name, value in values.items())]) as words:
        return parse(Config, words, prog="train")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_what_is_written_is_read_back_and_builds_the_network(tmp_path: Path, suffix: str) -> None:
    path = written(tmp_path / f"base{suffix}")
    file = read_official(path, "meta")
    assert file.description == SAID
    assert base_grid_size(file) == 0.1
    model = load_official(path)
    assert model.backbone.config == lora_models.TINY
    batch = lora_models.tiny_batch()
    with torch.no_grad():
        assert torch.equal(model(batch), lora_models.tiny_model()(batch))


def test_official_readers_find_what_they_look_for(tmp_path: Path) -> None:
    content = torch.load(written(tmp_path / "base.pth"), weights_only=True)
    assert (content["epoch"], set(content)) == (3, {"epoch", "state_dict", KEY})
    assert set(content["state_dict"]) == set(lora_models.tiny_model().state_dict())
    assert set(load_file(written(tmp_path / "a.safetensors"))) == set(content["state_dict"])


def test_files_that_say_nothing_are_released_ones_or_need_settings(tmp_path: Path) -> None:
    file = read_official(written(tmp_path / "base.pth", said=None))
    assert file.description is None
    assert base_grid_size(file) == RELEASED_GRID
    with pytest.raises(CheckpointError, match="does not describe itself"):
        load_official(tmp_path / "base.pth")
    assert load_official(tmp_path / "base.pth", config=lora_models.TINY)


@pytest.mark.parametrize(
    "entry",
    [
        "{",
        "[1]",
        '{"grid_size": 1}',
        '{"backbone": {"enc_chanels": 3}}',
        '{"backbone": {"stride": 2}}',
        '{"backbone": {}, "grid_size": -1}',
        '{"backbone": {}, "grid_size": "2 cm"}',
        '{"backbone": {}, "classes": [1]}',
        "[" * 5000,
    ],
)
def test_an_unreadable_description_is_refused(tmp_path: Path, entry: str) -> None:
    state = {k: v.contiguous() for k, v in lora_models.tiny_model().state_dict().items()}
    save_file(state, tmp_path / "base.safetensors", {KEY: entry})
    with pytest.raises(CheckpointError, match=r"base\.safetensors: what it says about its network"):
        read_official(tmp_path / "base.safetensors")


def test_settings_win_over_the_description_and_must_fit(tmp_path: Path) -> None:
    base = written(tmp_path / "base.pth")
    cfg = config(base, **{"model.backbone.drop_path": 0.2, "model.backbone.order": "[z]"})
    net = models.skeleton(cfg)
    assert net.backbone.config == replace(lora_models.TINY, drop_path=0.2, order=("z",))
    with pytest.raises(CheckpointError, match="do not fit"):
        models.skeleton(config(base, **{"model.backbone.in_channels": 7}))


def test_voxels_are_those_of_the_base_unless_they_are_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = written(tmp_path / "base.pth")
    assert models.with_grid_size(config(base)).data.grid_size == 0.1
    assert "voxels of 0.1 m, as the base has them" in capsys.readouterr().out
    assert models.with_grid_size(config(base, **{"data.grid_size": 0.03})).data.grid_size == 0.03
    plain = written(tmp_path / "plain.pth", said=None)
    assert models.with_grid_size(config(plain)).data.grid_size == 0.02
    options = {"checkpoint": str(base), "text": "t.npz", "data_root": "data"}
    assert Options(**options).voxels() == 0.1
    assert Options(**options).labelling().first_grid == 0.05
    assert Options(**options, grid_size=0.04, first_grid=0.01).labelling().first_grid == 0.01


def test_an_adapter_says_the_voxels_that_it_was_trained_with(tmp_path: Path) -> None:
    from scenesplat_lora.lora import inject_lora_to_ptv3, save_lora_checkpoint

    adapted = inject_lora_to_ptv3(made.model())
    path = save_lora_checkpoint(adapted, tmp_path / "a.pth", {"settings": {"data.grid_size": 0.07}})
    base = written(tmp_path / "base.pth")
    options = Options(checkpoint=str(base), adapter=str(path), text="t.npz", data_root="data")
    assert options.voxels() == 0.07
    assert models.with_grid_size(config(base, adapter=path)).data.grid_size == 0.07


def test_a_merged_model_describes_itself(tmp_path: Path) -> None:
    from scenesplat_lora.train import main

    base = tiny_scenes.write_base(tmp_path / "base.pth")
    data = tiny_scenes.write_scenes(tmp_path / "data", train=2, val=0)
    given = {"lora_training__merge_on_end": "true", "epoch": 1, "data__val__split": "[]"}
    assert main(tiny_scenes.command(base, data, tmp_path / "run", **given)) == 0
    merged = tmp_path / "run" / "model" / "model_best.pth"
    assert read_official(merged, "meta").description.grid_size == 0.05
    model = load_official(merged)
    assert isinstance(model, LangPretrainer)
    assert model.backbone.config.enc_channels == (8, 12, 16)


def test_the_packaged_base_describes_itself_and_has_its_old_values() -> None:
    file = read_official(demo.base_checkpoint())
    assert file.description.grid_size == rooms.GRID_SIZE
    assert load_official(demo.base_checkpoint()).backbone.config == file.description.backbone
    assert not demo.base_checkpoint().with_suffix(".json").exists()
    digest = hashlib.sha256()
    for name, tensor in sorted(file.tensors.items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    assert digest.hexdigest() == "c3c90cd35228e00f9b03b36f0a4eecc78fdf63a98cd29c2b0995b1b23cb9c4ea"
    raw = demo.base_checkpoint().read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert json.loads(header["__metadata__"][KEY])["backbone"]["enc_patch_size"] == [256] * 4
