"""The command that goes all the way with the packaged model and generated scenes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lora_core.errors import ConfigError
from midi3d_lora import demo, demo_run
from midi3d_lora.meshes.extraction import Mesh
from midi3d_lora.meshes.mesh_loading import read_meshes

FEW = {"train": 3, "val": 1, "test": 2}


@pytest.mark.parametrize(
    ("setting", "value"),
    [("epochs", 0), ("batch_size", 0), ("seed", -1), ("learning_rate", float("nan"))],
)
def test_impossible_settings_are_refused_by_name(setting: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"--{setting} is {value}"):
        demo_run.Options(**{setting: value})  # type: ignore[arg-type]


def test_the_picture_before_and_after_shows_what_each_model_made() -> None:
    scene = demo.scene_of("test", 0)
    meshes = [
        Mesh(mesh.vertices.astype(np.float32), mesh.faces.astype(np.int32))
        for mesh in scene.meshes()
    ]
    picture = scene.picture()
    made = {"base": [], "LoRA": meshes}
    sheet = demo_run.before_after(picture.rgb, picture.instances, made)
    height, width = sheet.shape[0] // 2, sheet.shape[1] // 3
    for top in (0, height):  # from the front, from above
        views = sheet[top + height - demo_run.PIXELS : top + height]
        assert (views[:, width + 10 : 2 * width - 10] == 255).all()
        shown = (views[:, 2 * width :] != 255).any(axis=-1)
        assert 0.05 < shown.mean() < 0.9


@pytest.mark.slow
def test_demo_goes_from_the_base_to_the_merged_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo.write, "__defaults__", (FEW,))
    folder = tmp_path / "demo"
    assert demo_run.main(["--output", str(folder), "--epochs", "1"]) == 0
    said = capsys.readouterr().out
    for verb in ("prepare", "train", "merge", "evaluate", "predict"):
        assert f"\nmidi3d-lora {verb} " in said
    table = said[said.rindex("mean of 2 test scenes") :].splitlines()
    rows = [words[0] for words in map(str.split, table) if len(words) == 6]
    assert rows[-3:] == list(demo_run.MODELS)
    evaluated = json.loads((folder / "evaluation" / "evaluation.json").read_text())["models"]
    assert set(evaluated["merged"]["scenes"]) == {"test_000", "test_001"}
    for key, of_lora in evaluated["LoRA"]["mean"].items():
        # Registration (ICP) may settle elsewhere after a rounding; the scenes do not.
        assert "icp" in key or evaluated["merged"]["mean"][key] == pytest.approx(of_lora, abs=0.01)
    assert evaluated["base"]["mean"] != evaluated["LoRA"]["mean"]
    for name in ("run/adapter/adapter_config.json", "merged/transformer/config.json"):
        assert (folder / name).is_file()
    truth = demo.scene_of("test", 0)
    assert len(read_meshes(folder / "predicted" / "test_000.glb", [])) == len(truth)
    with Image.open(folder / "predicted" / "test_000.gif") as turntable:
        assert getattr(turntable, "n_frames", 1) > 1
    pictures = sorted((folder / "pictures").iterdir())
    assert [path.name for path in pictures] == ["test_000.png", "test_001.png"]
    assert "scenes/test" not in (folder / "run" / "config.yaml").read_text()
    with pytest.raises(ConfigError, match="add --overwrite"):
        demo_run.main(["--output", str(folder)])
