"""The README's programs run as they stand there, its commands are parsed, its figures are true."""

import json
import re
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_depth
import torch
from PIL import Image
from recorded_isaac import GOLDENS, recorded_model

import isaac_lora.depth.checkpoint as depth_checkpoint
from isaac_lora import (
    IsaacForConditionalGeneration,
    demo_run,
    evaluate,
    find_lr,
    merge,
    predict,
    prepare_coco,
    train,
)
from isaac_lora.__main__ import COMMANDS
from isaac_lora.artifacts import run_in, start
from isaac_lora.config import Config
from isaac_lora.conversations.records import read_conversations
from isaac_lora.lora import inject
from isaac_lora.lora_choice import LoraChoice
from isaac_lora.network.configuration import IsaacConfig
from lora_core.config import parse
from lora_core.testing import check_commands

PATH = Path(__file__).parent.parent / "README.md"
README = PATH.read_text("utf-8")
PROGRAMS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
OPTIONS: dict[str, Any] = {
    "demo": demo_run.Options,
    "predict": predict.Options,
    "evaluate": evaluate.Options,
    "merge": merge.Options,
    "prepare coco": prepare_coco.Options,
}
SETTINGS = {"train": train.settings, "find-lr": find_lr.settings}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the model and the files that the README speaks of."""
    recorded_model().save_pretrained(tmp_path / "isaac_model")
    for path in (GOLDENS / "tokenizer").iterdir():
        shutil.copy(path, tmp_path / "isaac_model")
    picture = np.random.default_rng(0).integers(0, 255, (60, 80, 3), np.uint8)
    Image.fromarray(picture).save(tmp_path / "boxes.jpg")
    tiny_depth.write_original(tmp_path / "depth_anything_v2_vits.pth")
    # The recorded depth model has none of the published sizes.
    monkeypatch.setattr(depth_checkpoint, "_published", lambda path: tiny_depth.SETTINGS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_question_is_answered_and_otherwise_with_depth(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    peft, ask, ask_with_depth = PROGRAMS
    assert "PeftModel" in peft  # run in test_isaac_train.py on a run's own folder
    names: dict[str, Any] = {}
    exec(ask, names)
    printed, without = capsys.readouterr().out, names["answer"]
    new = without[0, names["inputs"]["input_ids"].shape[1] :]
    assert printed.strip() == names["processor"].decode(new).strip()
    exec(ask_with_depth, names)
    assert not torch.equal(names["answer"], without)


def verb(argv: list[str]) -> None:
    if argv[0] in SETTINGS:
        SETTINGS[argv[0]](argv[1:])
        return
    words = 2 if " ".join(argv[:2]) in OPTIONS else 1
    parse(OPTIONS[" ".join(argv[:words])], argv[words:], prog="isaac-lora")


def test_commands_are_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    needed = {"model_path": "isaac_model", "data_path": "train.json", "output_dir": "run"}
    (tmp_path / "config.json").write_text(json.dumps(needed))
    start(run_in(Path("checkpoints/isaac-lora")), Config(**needed), "")  # one to go on with
    found = check_commands(PATH, {"isaac-lora": verb, "train_lora.py": train.settings})
    used = {one.argv[0] for one in found if one.program == "isaac-lora"}
    assert used == COMMANDS.keys()


def test_every_flag_that_is_named_exists() -> None:
    known = {item.name for kind in (find_lr.Options, *OPTIONS.values()) for item in fields(kind)}
    known |= {"config", "help", "nproc"}  # of all commands, of torchrun
    named = set(re.findall(r"(?<![\w-])--(\w+)", README))
    assert named <= known, named - known


def test_the_data_that_is_shown_is_read(tmp_path: Path) -> None:
    (shown,) = re.findall(r"```json\n(.*?)```", README, re.DOTALL)
    (tmp_path / "train.json").write_text(shown)
    reading = read_conversations(tmp_path / "train.json")
    reading.stop_if_wrong()
    assert [record.images for record in reading.records] == [("pictures/boxes.jpg",)]


def test_the_number_of_trained_parameters_is_that_of_the_released_model() -> None:
    (per_rank, total, share) = re.search(
        r"r x ([\d,]+) parameters are trained: ([\d,]+) at rank 128, ([\d.]+) %", README
    ).groups()
    config = IsaacConfig.from_pretrained(GOLDENS / "keys" / "isaac_0_1_config.json")
    with torch.device("meta"):
        model = IsaacForConditionalGeneration(config)
    base = sum(parameter.numel() for parameter in model.parameters())
    trained = inject(model, LoraChoice(r=1)).trainable
    assert f"{trained:,}" == per_rank
    assert f"{128 * trained:,}" == total
    assert f"{100 * 128 * trained / base:.1f}" == share
