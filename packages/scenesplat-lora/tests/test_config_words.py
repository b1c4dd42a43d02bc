"""The guide's command line: files in Python's syntax, options, presets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lora_core.config import parse
from lora_core.errors import ConfigError
from scenesplat_lora.config import Config
from scenesplat_lora.settings.files import find
from scenesplat_lora.settings.words import file_settings, for_parser

GUIDE = "configs/scannet/lora-finetune-scannet-mcmc.py"


def read(*words: str) -> Config:
    with for_parser(words) as usual:
        return parse(Config, usual, prog="train")


def written(folder: Path, text: str) -> str:
    path = folder / "own.py"
    path.write_text(text)
    return str(path)


def test_the_guides_first_command_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)  # the file comes with the package
    cfg = read(
        "--config-file", GUIDE, "--options", "save_path=exp_runs/lora_finetune_scannet", "lora.r=8",
        "lora_training.pretrained_path=checkpoints/pretrained.pth",
    )  # fmt: skip
    choice = cfg.lora.choice(0)
    assert (choice.r, choice.lora_alpha, choice.target_modules) == (8, 8, ("attn",))
    assert cfg.save_path == "exp_runs/lora_finetune_scannet"
    assert (cfg.epoch, cfg.optimizer.lr, cfg.scheduler.warmup_epochs) == (50, 1e-4, 10)
    assert cfg.data.train.split == ["train_grid1.0cm_chunk6x6_stride3x3"]


@pytest.mark.parametrize(("preset", "r", "prompt"), [("minimal", 4, False), ("full", 16, True)])
def test_the_guides_presets_are_read(preset: str, r: int, prompt: bool) -> None:
    cfg = read("--config-file", GUIDE, "--options", "save_path=x", f"lora.preset={preset}")
    choice = cfg.lora.choice(0)
    assert (choice.r, choice.enable_prompt) == (r, prompt)


@pytest.mark.fault("C15")
def test_a_preset_of_the_command_line_replaces_what_a_file_says_of_layers(tmp_path: Path) -> None:
    file = written(tmp_path, "lora = dict(r=2, target_modules=['mlp'], lora_dropout=0.5)")
    cfg = read("--config-file", file, "--options", "lora.preset=minimal", "lora.r=3")
    choice = cfg.lora.choice(0)
    assert (choice.r, choice.target_modules) == (3, ("attn",))
    assert cfg.lora.lora_dropout == 0.5


def test_options_have_the_type_of_the_setting() -> None:
    cfg = read(
        "--options", "lora.target_modules=attn,mlp", "lora.target_stages=[3,4]", "lora.r=None",
        "data.train.split=(train,test)", "data.val.split=val", "model.backbone.stride=(2,2)",
    )  # fmt: skip
    assert cfg.lora.target_modules == ["attn", "mlp"]
    assert cfg.lora.target_stages == [3, 4]
    assert cfg.lora.r is None
    assert (cfg.data.train.split, cfg.data.val.split) == (["train", "test"], ["val"])
    assert cfg.model.backbone == {"stride": [2, 2]}


def test_all_faults_of_a_file_are_told_with_their_lines(tmp_path: Path) -> None:
    file = written(tmp_path, "epoch = 3\nlora = dict(r='four', rang=2)\nsede = 1\noptimizer = 2\n")
    with pytest.raises(ConfigError) as caught:
        read("--config-file", file)
    text = str(caught.value)
    for part in ("own.py, line 2: lora.r", "lora.rang", "line 3: unknown setting sede", "seed",
                 "line 4: optimizer is a section"):  # fmt: skip
        assert part in text, text


def test_lora_inside_of_model_is_taken(tmp_path: Path) -> None:
    file = written(tmp_path, "model = dict(type='LangPretrainer', lora=dict(r=5))")
    assert file_settings(Path(file))["lora"] == {"r": 5}


def test_an_own_file_over_a_preset_is_read_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = written(
        tmp_path, "_base_ = 'configs/generic/lora-finetune.py'\ndata = dict(num_classes=7)"
    )
    cfg = read("--config-file", file)
    assert (cfg.data.num_classes, cfg.data.layout, cfg.model.type) == (7, "generic", None)


@pytest.mark.fault("C35", "H10")
def test_a_file_is_never_run(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    file = written(tmp_path, f"import os\nepoch = os.mkdir({json.dumps(str(marker))})")
    with pytest.raises(ConfigError, match="line 1"):
        read("--config-file", file)
    assert not marker.exists()


def test_own_files_come_before_those_of_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert find(GUIDE).is_absolute()
    (tmp_path / GUIDE).parent.mkdir(parents=True)
    (tmp_path / GUIDE).write_text("epoch = 7")
    assert read("--config-file", GUIDE).epoch == 7


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"lora.enabled": "false"}, "lora.enabled"),
        ({"lora.freeze_backbone": "false"}, "freeze_backbone"),
        ({"lora.target_modules": "[conv]"}, "conv"),
        ({"mix_prob": 2}, "mix_prob"),
        ({"optimizer.betas": "[0.9]"}, "betas"),
        ({"lora.preset": "full", "lora_training.merge_on_end": "true"}, "prompt"),
        ({"data.train.split": "[]"}, "data.train.split"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        read("--options", *(f"{name}={value}" for name, value in settings.items()))


@pytest.mark.parametrize(
    "words",
    [
        ["--model.backbone", '{"stride": [2, 2]}'],
        ["--model.backbone.stride", "(2,2)"],
        ["--options", "model.backbone.stride=(2,2)"],
    ],
)
def test_fields_of_the_network_are_given_alone_or_together(words: list[str]) -> None:
    assert read(*words).model.backbone == {"stride": [2, 2]}
