"""The command that goes all the way with the packaged model and generated rooms."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from lora_core.errors import ConfigError
from scenesplat_lora import demo, demo_run
from scenesplat_lora.demo_base import rooms
from scenesplat_lora.picture import class_colours

FEW = {"train": 2, "val": 1, "test": 2}


@pytest.mark.parametrize(
    ("setting", "value"),
    [("epochs", 0), ("batch_size", 0), ("seed", -1), ("learning_rate", float("nan"))],
)
def test_impossible_settings_are_refused_by_name(setting, value) -> None:
    with pytest.raises(ConfigError, match=f"--{setting} is {value}"):
        demo_run.Options(**{setting: value})


def test_the_picture_before_and_after_tells_what_each_model_scores() -> None:
    room = demo.room_of("test", 0) | {"name": "test_000"}
    truth = room["segment"]
    floor = np.full_like(truth, rooms.CLASSES.index("floor"))
    sheets = {
        name: demo_run.before_after(room, {"base": floor, "LoRA": labels}, rooms.CLASSES)
        for name, labels in (("right", truth), ("wrong", floor))
    }
    width = sheets["right"].shape[1] // 4
    panels = {name: sheet[60:-60, 2 * width : 3 * width] for name, sheet in sheets.items()}
    colours = {
        name: {tuple(colour) for colour in np.unique(panel.reshape(-1, 3), axis=0).tolist()}
        for name, panel in panels.items()
    }
    known = {tuple(colour) for colour in class_colours(len(rooms.CLASSES)).tolist()}
    there = {tuple(class_colours(len(rooms.CLASSES))[c].tolist()) for c in set(truth) - {-1}}
    assert len(colours["right"] & there) >= len(there) - 1  # one may be behind others
    assert colours["wrong"] & known == {tuple(class_colours(2)[1].tolist())}
    assert (200, 200, 200) not in colours["right"]  # Gaussians in the air are left out


@pytest.mark.slow
def test_demo_goes_from_the_base_to_the_merged_model(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(demo.write, "__defaults__", (FEW, rooms.NIGHT))
    folder = tmp_path / "demo"
    assert demo_run.main(["--output", str(folder), "--epochs", "1"]) == 0
    said = capsys.readouterr().out
    assert "2 test rooms, the merged model from its file:" in said
    table = said[said.rindex("test rooms, the merged") :].splitlines()
    rows = {words[0]: words[1:] for words in map(str.split, table) if len(words) == 5}
    assert rows["merged"] == rows["LoRA"]
    assert float(rows["LoRA"][0]) > float(rows["base"][0])
    for verb in ("train", "merge", "evaluate", "predict"):
        assert f"\nscenesplat-lora {verb} " in said
    for name in ("run/model/lora_best.pth", "run/adapter/adapter_config.json", "merged.pth"):
        assert (folder / name).is_file()
    pictures = sorted((folder / "pictures").iterdir())
    assert [path.name for path in pictures] == ["test_000.png", "test_001.png"]
    assert all(Image.open(path).size[0] > 4 * demo_run.WIDTH for path in pictures)
    config = (folder / "run" / "config.yaml").read_text()
    evaluated = json.loads((folder / "evaluation" / "merged" / "evaluation.json").read_text())
    assert "test" not in {line.strip(" -") for line in config.splitlines()}
    assert evaluated["scenes"] == ["test_000", "test_001"]
    with pytest.raises(ConfigError, match="add --overwrite"):
        demo_run.main(["--output", str(folder)])
