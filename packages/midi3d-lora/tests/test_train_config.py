"""The guide's commands and settings mean what it says; mistakes are told with their place."""

from __future__ import annotations

import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import get_args

import pytest

from lora_core.config import parse
from lora_core.errors import ConfigError
from midi3d_lora.config import Config, Scheme
from midi3d_lora.config_sections import without_sections
from midi3d_lora.flow.losses import SCHEMES

PACKAGE = Path(__file__).parents[1]
YAML = PACKAGE / "configs" / "train" / "lora_finetune.yaml"
GUIDE = [
    "--config configs/train/lora_finetune.yaml",
    """--pretrained_model pretrained_weights/MIDI-3D --data_dir data/training_data
    --output_dir outputs/lora_finetune --batch_size 4 --num_epochs 100 --learning_rate 1e-4
    --lora_rank 16""",
    """--data_dir data/training_data --output_dir outputs/my_lora --batch_size 4 --num_epochs 50
    --lora_rank 16""",
    """--data_dir d --lora_alpha 16 --lora_dropout 0.1 --lora_target_modules to_q to_k to_v to_out.0
    --gradient_accumulation_steps 1 --gradient_checkpointing --mixed_precision fp16
    --enable_multi_instance_attention --mi_attention_blocks blocks.8 blocks.9 --image_size 512
    --lr_scheduler constant_with_warmup --lr_warmup_steps 500 --max_grad_norm 1.0 --seed 42
    --weighting_scheme sigma_sqrt --logit_mean 0.0 --logit_std 1.0 --save_every_n_epochs 10
    --checkpointing_steps 500 --resume_from_checkpoint outputs/lora_finetune/checkpoint-500""",
]
# Of the guide; mixed_precision is fp16 there, which not every machine computes in.
DEFAULTS = {
    "pretrained_model": "pretrained_weights/MIDI-3D",
    "output_dir": "outputs/lora_finetune",
    "lora_rank": 16,
    "lora_alpha": 16,
    "lora_dropout": 0.1,
    "lora_target_modules": ["to_q", "to_k", "to_v", "to_out.0"],
    "enable_multi_instance_attention": True,
    "mi_attention_blocks": [f"blocks.{n}" for n in range(8, 13)],
    "batch_size": 4,
    "gradient_accumulation_steps": 1,
    "num_epochs": 100,
    "image_size": 512,
    "learning_rate": 1e-4,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 500,
    "max_grad_norm": 1.0,
    "gradient_checkpointing": False,
    "weighting_scheme": "logit_normal_dist",
    "logit_mean": 0.0,
    "logit_std": 1.0,
    "save_every_n_epochs": 10,
    "checkpointing_steps": 500,
    "resume_from_checkpoint": None,
    "seed": 42,
}


def read(*words: str) -> Config:
    with without_sections(words) as flat:
        return parse(Config, flat, prog="midi3d-lora train")


@pytest.mark.parametrize("words", GUIDE, ids=["config", "flags", "session", "all flags"])
def test_commands_of_the_guide_are_understood(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(PACKAGE)
    read(*shlex.split(words))


def test_defaults_are_those_of_the_guide() -> None:
    assert {name: getattr(Config(), name) for name in DEFAULTS} == DEFAULTS


def test_the_example_file_says_what_holds_without_it_but_for_memory() -> None:
    here, usual = read("--config", str(YAML)), Config()
    differing = {f.name for f in fields(Config) if getattr(here, f.name) != getattr(usual, f.name)}
    assert differing == {"name", "gradient_checkpointing"}


def test_the_schemes_are_those_of_the_loss() -> None:
    assert set(get_args(Scheme)) == set(SCHEMES)


def test_no_is_a_precision_and_not_a_truth_value(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("mixed_precision: 'no'\ncache: 'off'\n")
    assert read("--cache", "off").cache == "off"
    assert read("--config", str(tmp_path / "a.yaml")).mixed_precision == "no"
    assert read("--mixed_precision", "no").mixed_precision == "no"


def test_multi_instance_attention_can_be_switched_off() -> None:
    assert not read("--enable_multi_instance_attention", "false").enable_multi_instance_attention


def test_resume_has_two_names_of_which_one_is_enough() -> None:
    for name in ("resume", "resume_from_checkpoint"):
        cfg = read(f"--{name}", "outputs/a")
        assert (cfg.resume, cfg.resume_from_checkpoint) == ("outputs/a", "outputs/a")
    with pytest.raises(ConfigError, match="give one of them"):
        read("--resume", "a", "--resume_from_checkpoint", "b")


def test_sections_of_a_file_count_as_if_their_settings_stood_at_the_top(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(
        "model: {lora: {lora_rank: 8}}\ntraining:\n  batch_size: 2\ntrainer: {adam_beta2: 0.9}\n"
    )
    for words in (["--config", str(path)], [f"--config={path}"], [str(path)]):
        cfg = read(*words, "--seed", "1")
        assert (cfg.lora_rank, cfg.batch_size, cfg.seed) == (8, 2, 1)
        assert cfg.trainer == {"adam_beta2": 0.9}


def test_what_stands_twice_or_is_unknown_is_told_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("batch_size: 2\ntraining:\n  batch_size: 3\n  batch_sice: 4\n")
    with pytest.raises(ConfigError) as told:
        read("--config", str(path))
    assert "line 3: batch_size stands twice" in str(told.value)
    assert "line 4: unknown setting training.batch_sice" in str(told.value)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--lora_dropout", "1"], "0 <= p < 1"),
        (["--single_object_ratio", "1.5"], "share"),
        (["--learning_rate", "0"], "above 0"),
        (["--lora_rank", "0"], "at least 1"),
        (["--logit_std", "1e39"], "finite"),
        (["--image_size", "8"], "14 to 8192"),
        (["--data_dir", ""], "empty"),
        (["--weighting_scheme", "logit_norm"], "logit_normal"),
        (["--num_tokens", "0"], "at least 1"),
        (["--lora_target_modules"], "lora_target_modules"),
    ],
)
def test_values_that_cannot_work_are_refused(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        read(*words)


def test_settings_are_read_without_torch() -> None:
    code = (
        "import sys, midi3d_lora.config, midi3d_lora.config_sections, midi3d_lora.artifacts, "
        "midi3d_lora.train; assert not {'torch', 'transformers', 'diffusers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_script_of_the_guide_answers_help() -> None:
    words = [sys.executable, str(PACKAGE / "train_lora.py"), "--help"]
    found = subprocess.run(words, capture_output=True, text=True, check=True, timeout=60)
    assert "--mi_attention_blocks" in found.stdout
