"""`find-lr` on a small random model."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_scenes

from scenesplat_lora import __main__ as program

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    tiny_scenes.write_base(folder / "base.pth")
    tiny_scenes.write_scenes(folder / "data")
    return folder


def command(files: Path, output: Path, **given: object) -> list[str]:
    base, data = files / "base.pth", files / "data"
    return ["find-lr", *tiny_scenes.command(base, data, output, **given)]


def test_a_learning_rate_is_found_and_drawn(files: Path, tmp_path: Path, capsys: Capture) -> None:
    ramp = {"ramp_steps": 16, "ramp_from": 1e-3, "ramp_dir": tmp_path / "ramp", "batch_size": 3}
    assert program.main(command(files, tmp_path / "run", **ramp)) == 0
    assert "suggestion: --optimizer.lr " in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "ramp").iterdir()} == {"find_lr.csv", "find_lr.png"}
    assert not (tmp_path / "run").exists()


def test_the_guides_words_are_understood(files: Path, tmp_path: Path, capsys: Capture) -> None:
    settings = tmp_path / "mine.py"
    settings.write_text("optimizer = dict(type='AdamW', lrr=1e-3)\n")
    words = ["find-lr", "--config-file", str(settings), "--options", f"ramp_dir={tmp_path}/ramp"]
    assert program.main(words) == 2
    error = capsys.readouterr().err
    assert "lrr" in error
    assert "mine.py" in error
    settings.write_text(f"epoch = 3\nlora_training = dict(pretrained_path='{tmp_path}/none.pth')\n")
    assert program.main(words) == 2
    assert f"{tmp_path}/none.pth" in capsys.readouterr().err


def test_what_belongs_to_a_training_is_refused(
    files: Path, tmp_path: Path, capsys: Capture
) -> None:
    words = command(files, tmp_path / "run", dry_run="true", ramp_to=1e-9)
    assert program.main(words) == 2
    error = capsys.readouterr().err
    assert "--dry_run belongs to `scenesplat-lora train`" in error
    assert "above 0, and rising" in error
