"""The guide's commands mean what it says, and every field of TrainingArguments has its answer."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import pytest
from training_arguments_page import PAGE, page

from isaac_lora.config import Config
from isaac_lora.training_flags import (
    ALIASES,
    EARLIER,
    FIXED,
    REFUSED,
    SET_BY_US,
    Schedule,
    TrainingFlags,
    description,
)
from isaac_lora.training_words import settled
from lora_core.config import dump, parse
from lora_core.errors import ConfigError
from lora_core.settings.types import kinds

BASIC = """--model_path ./isaac_model --data_path ./data/train.json --image_folder ./data/images
    --output_dir ./checkpoints/isaac-lora --lora_r 128 --lora_alpha 256 --use_depth True
    --depth_checkpoint_path ./depth_anything_v2_vitl.pth --num_train_epochs 3
    --per_device_train_batch_size 1 --gradient_accumulation_steps 4 --learning_rate 2e-4
    --fp16 True --save_steps 500 --logging_steps 10"""
FILE = {
    "model_path": "./isaac_model",
    "data_path": "./data/train.json",
    "image_folder": "./data/images",
    "output_dir": "./checkpoints/isaac-lora",
    "use_depth": True,
    "depth_checkpoint_path": "./depth_anything_v2_vitl.pth",
    "lora_r": 128,
    "lora_alpha": 256,
    "num_train_epochs": 3,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 4,
    "learning_rate": 2e-4,
    "fp16": True,
    "save_steps": 500,
    "logging_steps": 10,
}
NEEDED = ("--model_path", "m", "--data_path", "d", "--output_dir", "o")
GUIDE_DEFAULTS = {
    "use_depth": False,
    "depth_checkpoint_path": None,
    "depth_alpha": 100.0,
    "depth_input_size": 518,
    "image_folder": None,
    "max_seq_length": 16384,
    "lora_r": 128,
    "lora_alpha": 256,
    "lora_dropout": 0.05,
    "lora_bias": "none",
    "target_modules": None,
}
# Fields whose default differs from that of TrainingArguments, and why.
OTHER_DEFAULTS = {
    "output_dir": "it has to be named",
    "fp16": "not given: what the device does best",
    "bf16": "not given: what the device does best",
}


def read(*words: str) -> Config:
    with settled(words) as flat:
        return parse(Config, flat, prog="isaac-lora train")


def written(folder: Path, content: dict[str, Any]) -> str:
    path = folder / "config.json"
    path.write_text(json.dumps(content))
    return str(path)


def theirs() -> dict[str, Any]:
    """Field of the installed TrainingArguments -> its default."""
    from transformers import TrainingArguments

    return {
        item.name: item.default if item.default_factory is MISSING else item.default_factory()
        for item in fields(TrainingArguments)
    }


# -- the guide -----------------------------------------------------------------------------------


def test_command_and_file_of_the_guide_are_the_same_run(tmp_path: Path) -> None:
    of_words, of_file = read(*shlex.split(BASIC)), read(written(tmp_path, FILE))
    assert of_words == of_file
    assert {name: getattr(of_file, name) for name in FILE} == FILE
    assert (of_file.precision, of_file.device) == ("fp16", "auto")


def test_defaults_are_those_of_the_guide() -> None:
    cfg = read(*NEEDED)
    assert {name: getattr(cfg, name) for name in GUIDE_DEFAULTS} == GUIDE_DEFAULTS


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        ("--use_depth False", "use_depth", False),
        ("--bf16", "precision", "bf16"),
        ("--fp16 True", "precision", "fp16"),
        ("--bf16 False", "precision", "fp32"),
        ("", "precision", "auto"),
        ("--gradient_checkpointing", "gradient_checkpointing", True),
        ("--activation_checkpointing True", "gradient_checkpointing", True),
        ("--use_cpu", "device", "cpu"),
        ("--target_modules q_proj,k_proj", "target_modules", ["q_proj,k_proj"]),
        ("--target_modules q_proj k_proj", "target_modules", ["q_proj", "k_proj"]),
        ("--report_to wandb", "reporters", ["wandb"]),
        ("--report_to tensorboard wandb", "reporters", ["tensorboard", "wandb"]),
        ("--report_to none", "reporters", []),
        ("--save_total_limit 3", "keep_last", 3),
        ("--resume_from_checkpoint True", "resume", "o"),
        ("--resume_from_checkpoint o/state/checkpoint-5", "resume", "o/state/checkpoint-5"),
        ("--resume_from_checkpoint False", "resume", None),
        ("--learning-rate=1e-4", "learning_rate", 1e-4),
        ("--trainer.weight_decay 0.1", "weight_decay", 0.1),
        ("--lr_scheduler_type cosine --warmup_ratio 0.03", "warmup_ratio", 0.03),
    ],
)
def test_flags_are_understood_as_people_write_them(words: str, name: str, value: Any) -> None:
    assert getattr(read(*NEEDED, *words.split()), name) == value


def test_a_run_is_continued_without_naming_its_settings_again() -> None:
    assert read("--resume", "old").resume_from_checkpoint == "old"


def test_settings_come_back_from_the_file_of_a_run(tmp_path: Path) -> None:
    cfg = read(*shlex.split(BASIC), "--target_modules", "q_proj,v_proj", "--save_total_limit", "3")
    dump(cfg, tmp_path / "config.yaml")
    assert read("--config", str(tmp_path / "config.yaml")) == cfg


def test_settings_of_the_schedule_are_a_mapping(tmp_path: Path) -> None:
    for words in (
        ["--lr_scheduler_kwargs", '{"num_cycles": 2}'],
        ["--config", written(tmp_path, {"lr_scheduler_kwargs": {"num_cycles": 2}})],
    ):
        assert read(*NEEDED, *words).trainer["lr_scheduler_kwargs"] == {"num_cycles": 2}


def test_help_shows_every_setting_and_debug_stays_a_flag(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        read("--help")
    said = capsys.readouterr().out
    assert all(f"--{item.name}" in said for item in fields(Config))
    assert read(*NEEDED, "--debug") == read(*NEEDED)


@pytest.mark.parametrize(
    ("words", "updates"),
    [
        ("", 0),
        ("--warmup_steps 7", 7),
        ("--warmup_steps 0.1", 10),
        ("--warmup_ratio 0.03", 3),
        ("--warmup_ratio 1", 100),
    ],
)
def test_the_warm_up_is_counted_or_a_share(words: str, updates: int) -> None:
    assert read(*NEEDED, *words.split()).warmup_updates(100) == updates


# -- the three lists -----------------------------------------------------------------------------


def test_every_field_of_training_arguments_is_in_one_list() -> None:
    supported = {item.name for item in fields(Config)} | ALIASES.keys()
    lists = [supported, SET_BY_US.keys(), REFUSED.keys()]
    for name in theirs():
        assert sum(name in one for one in lists) == 1, name
    assert not EARLIER.keys() & theirs().keys()
    assert (SET_BY_US.keys() | REFUSED.keys()) <= theirs().keys()


def test_the_page_is_what_the_tables_say() -> None:
    assert PAGE.read_text("utf-8") == page(set(theirs())), f"run {page.__module__}.py"


def test_defaults_are_those_of_training_arguments() -> None:
    known, here = theirs(), Config(model_path="m", data_path="d", output_dir="o")
    for item in fields(Config):
        if item.name in known and item.name not in OTHER_DEFAULTS:
            assert getattr(here, item.name) == known[item.name], item.name
    for name, fixed in (SET_BY_US | REFUSED).items():
        if name in REFUSED:  # what does not ask for anything is always taken
            assert any(known[name] == held for held in fixed.holds), name


def test_flags_take_no_type_that_training_arguments_does_not() -> None:
    from transformers import TrainingArguments

    known, ours = get_type_hints(TrainingArguments), get_type_hints(Config)
    more = {"fp16": {type(None)}, "bf16": {type(None)}, "resume_from_checkpoint": {bool}}
    for name in ours.keys() & known.keys() - {"lr_scheduler_type"}:
        allowed = {get_origin(kind) or kind for kind in kinds(known[name])}
        allowed |= {int} if float in allowed else set()
        found = {get_origin(kind) or kind for kind in kinds(ours[name])}
        assert found <= allowed | more.get(name, set()), name


def test_schedules_are_those_of_transformers_that_a_resumed_run_can_continue() -> None:
    from transformers.trainer_utils import SchedulerType

    known = {item.value for item in SchedulerType}
    assert set(get_args(Schedule)) == known - {"reduce_lr_on_plateau", "greedy"}


def test_what_is_handed_on_is_taken_by_the_trainer() -> None:
    import torch

    from lora_core.training.fields import check_extra

    defaults = {item.name: item.default for item in fields(TrainingFlags)}
    said = {name: value for name, value in defaults.items() if value is not None}
    assert check_extra(said, torch.device("cpu")) == said
    cfg = read(*NEEDED, "--adam_beta2", "0.95", "--logging_first_step", "--torch_compile", "True")
    assert cfg.trainer == {
        "adam_beta2": 0.95,
        "logging_first_step": True,
        "torch_compile": True,
        "lr_scheduler_type": "linear",
    }
    check_extra(cfg.trainer, torch.device("cpu"))


@pytest.mark.parametrize("name", FIXED)
def test_what_cannot_be_chosen_is_refused_with_its_reason(name: str, tmp_path: Path) -> None:
    for place in (["--" + name, "something"], [written(tmp_path, {name: "something"})]):
        with pytest.raises(ConfigError) as told:
            read(*place)
        assert f"{name} 'something' cannot be set: {FIXED[name].why}" in str(told.value)
        assert "--model_path is missing" in str(told.value)  # all at once


@pytest.mark.parametrize("name", FIXED)
def test_what_holds_anyway_is_taken(name: str, tmp_path: Path) -> None:
    plain = read(*NEEDED)
    for value in FIXED[name].holds:
        assert read(written(tmp_path, {name: value}), *NEEDED) == plain
        if value != "":
            assert read(*NEEDED, f"--{name}={json.dumps(value)}") == plain
    if True in FIXED[name].holds:
        assert read(*NEEDED, f"--{name}") == plain


def test_the_help_names_all_that_cannot_be_chosen() -> None:
    text = description()
    assert all(name in text for name in (*SET_BY_US, *REFUSED))


@pytest.mark.parametrize("name", ALIASES)
def test_earlier_names_stand_for_the_present_ones(name: str) -> None:
    if ALIASES[name] in FIXED:
        assert read(*NEEDED, f"--{name}", "steps") == read(*NEEDED)
        return
    boolean = "use_cpu" in ALIASES[name] or "checkpointing" in ALIASES[name]
    cfg = read(*NEEDED, f"--{name}", "true" if boolean else "3")
    assert getattr(cfg, ALIASES[name]) == (True if boolean else 3)


def test_a_section_of_other_programs_counts_as_if_it_stood_at_the_top(tmp_path: Path) -> None:
    content = {**FILE, "do_train": True, "trainer": {"adam_beta2": 0.9, "push_to_hub": False}}
    cfg = read(written(tmp_path, content), "--seed", "1")
    assert (cfg.adam_beta2, cfg.seed, cfg.lora_r) == (0.9, 1, 128)
    content["trainer"] = {"seed": 3, "adam_beta1": 0.8}
    content["seed"] = 4
    with pytest.raises(ConfigError, match="seed stands twice"):
        read(written(tmp_path, content))


def test_mistakes_in_a_file_that_was_rewritten_have_their_place_in_it(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("do_train: true\n\nlora_r: 8\ntrainer:\n  seed: 1\n\nlora_rnk: 4\nseed: x\n")
    with pytest.raises(ConfigError, match="line 8: seed stands twice"):
        read(str(path))
    path.write_text("do_train: true\n\nlora_r: 8\ntrainer:\n  seed: x\n\nlora_rnk: 4\n")
    with pytest.raises(ConfigError) as told:
        read(str(path), *NEEDED)
    assert f"{path}, line 5: seed: expected a whole number" in str(told.value)
    assert f"{path}, line 7: unknown setting lora_rnk" in str(told.value)


# -- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--use_depth True", "needs --depth_checkpoint_path"),
        ("--depth_input_size 500", "--depth_input_size 500: expected a multiple of 14"),
        ("--depth_alpha 0", "--depth_alpha 0"),
        ("--fp16 True --bf16 True", "exclude each other"),
        ("--lora_r 0", "at least 1"),
        ("--lora_alpha 0", "above 0"),
        ("--lora_dropout 1", "0 <= share < 1"),
        ("--lora_bias some", "lora_only"),
        ("--learning_rate 1e39", "finite"),
        ("--num_train_epochs 0", "above 0"),
        ("--max_steps 0", "at least 1"),
        ("--max_steps -5", "at least 1"),
        ("--warmup_ratio 0.1 --warmup_steps 5", "give one of them"),
        ("--warmup_steps 1.5", "whole number"),
        ("--target_modules q_proj,", "expected names"),
        ("--data_path=", "--data_path is missing"),
        ("--image_folder=", "--image_folder is empty"),
        ("--resume a --resume_from_checkpoint b", "give one of them"),
        ("--val_data_path v.json --val_fraction 0.1", "exclude each other"),
        ("--cache_vision --target_modules vision", "train the tower"),
        ("--report_to all", "name the tools"),
        ("--report_to tensorboard --tensorboard false", "contradict"),
        ("--lr_scheduler_type cosin", "did you mean 'cosine'"),
        ("--per_device_train_batchsize 2", "per_device_train_batch_size"),
        ("--save_steps 0", "at least 1"),
        ("--eval_steps 0", "at least 1"),
    ],
)
def test_values_that_cannot_work_are_refused(words: str, said: str) -> None:
    with pytest.raises(ConfigError) as told:
        read(*NEEDED, *words.split())
    assert said in str(told.value)


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as told:
        read("--lora_r", "0", "--deepspeed", "ds.json", "--use_depth")
    for said in ("--deepspeed", "--lora_r is 0", "--model_path is missing", "--use_depth needs"):
        assert said in str(told.value)


def test_settings_are_read_without_torch() -> None:
    code = (
        "import sys, isaac_lora.config, isaac_lora.training_words, isaac_lora.lora_choice; "
        "assert not {'torch', 'transformers', 'peft'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
