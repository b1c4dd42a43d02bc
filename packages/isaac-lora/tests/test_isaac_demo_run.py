"""The command that goes all the way with the packaged models and generated pictures."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from isaac_lora import demo, demo_run
from lora_core.errors import ConfigError

FEW = {"train": 4, "val": 1, "test": 3}


@pytest.mark.parametrize(
    ("setting", "value"),
    [("epochs", 0), ("batch_size", 0), ("seed", -1), ("learning_rate", float("nan"))],
)
def test_impossible_settings_are_refused_by_name(setting: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"--{setting} is {value}"):
        demo_run.Options(**{setting: value})  # type: ignore[arg-type]


def test_both_trainings_differ_in_depth_alone(tmp_path: Path) -> None:
    options = demo_run.Options()
    without, with_depth = (demo_run.training(options, tmp_path, name) for name in demo_run.RUNS)
    differing = {name for name in with_depth if with_depth[name] != without.get(name)}
    assert differing == {*demo_run.depth_of(tmp_path), "output_dir"}


def test_test_pictures_play_no_part_in_training(tmp_path: Path) -> None:
    settings = demo_run.training(demo_run.Options(), tmp_path, "lora_depth")
    assert {Path(str(settings[name])).stem for name in ("data_path", "val_data_path")} == {
        "train", "val",
    }  # fmt: skip


def test_the_sheet_shows_picture_depth_and_what_was_said() -> None:
    made = demo.scene_of("test", 0)
    depth = np.zeros((56, 56), np.float32)
    depth[:, 28:] = 1
    answers = [("Which shape is nearest?", [("base", "ring"), ("truth", "cross")])]
    sheet = demo_run.before_after(made.picture(), depth, answers)
    height, width = 48 * demo_run.PIXELS, 72 * demo_run.PIXELS
    assert sheet.shape[0] > height + 3 * 16
    panels = sheet[: sheet.shape[0] - 80]
    dark, light = ((panels == value).all(-1) for value in (0, 255))
    assert dark[:, width:].sum() > 0.3 * height * width
    assert light[:, width + width // 2 :].sum() > 0.3 * height * width
    again = demo_run.before_after(made.picture(), depth, [("Which?", [("base", "ring")])])
    assert again.shape[0] < sheet.shape[0]


@pytest.mark.slow
def test_demo_goes_from_the_base_to_the_merged_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo.write, "__defaults__", (FEW,))
    folder = tmp_path / "demo"
    assert demo_run.main(["--output", str(folder), "--epochs", "1", "--batch_size", "4"]) == 0
    said = capsys.readouterr().out
    for verb in ("train", "merge", "evaluate", "predict"):
        assert f"\nisaac-lora {verb} " in said
    table = said[said.rindex("6 questions about test pictures") :]
    for name, _, _ in demo_run.MODELS:
        assert f"\n{name.rstrip()} " in table
    models = {
        name: json.loads((folder / "evaluation" / name / "evaluation.json").read_text())["models"]
        for name in demo_run.RUNS
    }
    assert models["lora"]["base"] == models["lora_depth"]["base"]
    with_depth = models["lora_depth"]
    assert with_depth["merged"]["loss"] == pytest.approx(with_depth["LoRA"]["loss"], abs=1e-4)
    assert with_depth["LoRA, shuffled depth"]["loss"] != with_depth["LoRA"]["loss"]
    with open(folder / "evaluation" / "lora" / "answers.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["truth"] for row in rows[:2]] == [
        one.answer for one in demo.nearness(demo.scene_of("test", 0))
    ]
    for name in ("lora_depth/adapter_config.json", "lora_depth/depth.json", "merged/config.json"):
        assert (folder / name).is_file()
    assert not (folder / "lora" / "depth.json").exists()
    pictures = sorted((folder / "pictures").iterdir())
    assert [path.name for path in pictures] == [f"test_{n:04}.png" for n in range(3)]
    assert all(Image.open(path).size[0] > 72 * demo_run.PIXELS for path in pictures)
    with pytest.raises(ConfigError, match="add --overwrite"):
        demo_run.main(["--output", str(folder)])
