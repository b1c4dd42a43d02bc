"""`isaac-lora find-lr` on the recorded tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_isaac_run

from isaac_lora.find_lr import main as program
from lora_core.errors import ConfigError, DataError, NumericError, UserError

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_isaac_run.write_all(tmp_path_factory.mktemp("data"))


def command(root: Path, folder: Path, **given: object) -> list[str]:
    ramp = {"ramp_dir": folder / "ramp", "ramp_steps": 12, "ramp_from": 1e-3}
    return tiny_isaac_run.command(root, folder / "run", **ramp | given)


def curve(folder: Path) -> bytes:
    return (folder / "ramp" / "find_lr.csv").read_bytes()


# -- what comes out --------------------------------------------------------------------------------


def test_a_learning_rate_is_found_and_drawn(root: Path, tmp_path: Path, capsys: Capture) -> None:
    assert program(command(root, tmp_path)) == 0
    said = capsys.readouterr().out
    assert 1e-3 < float(said.strip().rpartition("suggestion: --learning_rate ")[2]) < 1
    assert {path.name for path in (tmp_path / "ramp").iterdir()} == {"find_lr.csv", "find_lr.png"}
    assert len(curve(tmp_path).splitlines()) == 1 + 12
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "given", [{}, {"val_data_path": None}, {"val_data_path": None, "val_fraction": 0.2}]
)
def test_nothing_is_said_of_a_validation_which_there_is_not(
    root: Path, tmp_path: Path, capsys: Capture, given: dict[str, object]
) -> None:
    assert program(command(root, tmp_path, **given | {"ramp_steps": 10})) == 0
    said = capsys.readouterr().out
    assert "train " in said.splitlines()[2]
    assert "val" not in said.partition("module ")[0]


def test_caches_and_workers_change_no_number(root: Path, tmp_path: Path) -> None:
    depth = tiny_isaac_run.depth(root)
    plain, first, again = (tmp_path / name for name in ("plain", "first", "again"))
    cached = {**depth, "cache_vision": "true", "cache_dir": tmp_path / "cache", "ramp_steps": 10}
    assert program(command(root, plain, **depth, ramp_steps=10)) == 0
    assert program(command(root, first, **cached)) == 0
    kept = len(list((tmp_path / "cache").rglob("*.features")))
    assert kept == 2 * 6  # depth and vision features of each picture that is trained on
    assert program(command(root, again, **cached, dataloader_num_workers=1)) == 0
    assert curve(plain) == curve(first) == curve(again)


def test_only_what_the_ramp_sees_is_computed_before(root: Path, tmp_path: Path) -> None:
    more = tiny_isaac_run.write_conversations(tmp_path / "more", train=14)
    given = tiny_isaac_run.depth(root) | {"model_path": root / "isaac_model"}
    batch = {"ramp_steps": 10, "per_device_train_batch_size": 1}
    assert program(command(more, tmp_path, **given, **batch)) == 0
    pictures = len(list((more / "images").glob("train*")))
    assert 0 < len(list((tmp_path / "cache").rglob("*.features"))) < pictures


def test_settings_of_scripts_on_transformers_are_understood(
    root: Path, tmp_path: Path, capsys: Capture
) -> None:
    settings = tmp_path / "mine.json"
    settings.write_text('{"ramp_steps": 10, "no_cuda": true, "remove_unused_columns": false}')
    words = command(root, tmp_path, ramp_steps=None, use_cpu=None)
    assert program([str(settings), *words]) == 0
    assert len(curve(tmp_path).splitlines()) == 1 + 10
    settings.write_text('{"ramp_steps": 10, "push_to_hub": true, "ramp_dri": "x"}')
    with pytest.raises(ConfigError, match=r"(?s)push_to_hub True cannot be set.*ramp_dri"):
        program([str(settings), *words])


# -- what cannot work ------------------------------------------------------------------------------


@pytest.mark.fault("C19")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--ramp_steps", "9"], "--ramp_steps is 9: it must be at least 10"),
        (["--ramp_from", "0"], r"--ramp_from 0\.0, --ramp_to 1\.0: above 0, and rising"),
        (["--ramp_to", "1e-9"], "--ramp_to 1e-09: above 0, and rising"),
        (["--ramp_dir="], "--ramp_dir is empty: "),
        (["--lora_r", "0"], "--lora_r is 0: it must be at least 1"),
        (["--dry_run"], "--dry_run belongs to `isaac-lora train`: find-lr trains"),
        (["--resume", "x"], "--resume belongs to `isaac-lora train`: a ramp always starts anew"),
        (["--resume_from_checkpoint", "x"], "--resume_from_checkpoint belongs to `isaac-lora t"),
        (["--ramp_step", "20"], "did you mean '--ramp_steps'"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_data_and_files(
    words: list[str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=expected):
        program(words)
    assert not list(tmp_path.iterdir())


@pytest.mark.fault("C24")
def test_a_ramp_finds_a_file_in_its_way_before_the_data(root: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    words = command(root, tmp_path, ramp_dir=tmp_path / "file", data_path=tmp_path / "none.json")
    with pytest.raises(UserError, match=r"(?s)--ramp_dir .*file.*none\.json"):
        program(words)


def test_a_picture_that_is_damaged_is_named(root: Path, tmp_path: Path) -> None:
    data = tiny_isaac_run.write_conversations(tmp_path / "data")
    (data / "images" / "train1_0.png").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"train1_0\.png"):
        program(command(data, tmp_path, model_path=root / "isaac_model"))
    assert not (tmp_path / "ramp").exists()


def test_a_ramp_in_which_nothing_is_learned_suggests_nothing(
    root: Path, tmp_path: Path, capsys: Capture
) -> None:
    words = command(root, tmp_path, ramp_from=1e-9, ramp_to=1e-8)
    with pytest.raises(NumericError, match="no learning rate from 1e-09 to 1e-08 made the loss"):
        program(words)
    assert "suggestion" not in capsys.readouterr().out
