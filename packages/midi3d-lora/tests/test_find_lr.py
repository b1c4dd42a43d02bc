"""`find-lr` on a small random model."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_midi_run

from midi3d_lora import __main__ as program

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_midi_run.write_scenes(tmp_path_factory.mktemp("data"))


def command(scenes: Path, folder: Path, **given: object) -> list[str]:
    ramp = {"ramp_dir": folder / "ramp", "ramp_steps": 20, "ramp_from": 1e-4, "batch_size": 3}
    return ["find-lr", *tiny_midi_run.command(scenes, folder / "run", **ramp | given)]


def curve(folder: Path) -> bytes:
    return (folder / "ramp" / "find_lr.csv").read_bytes()


# -- what comes out --------------------------------------------------------------------------------


def test_a_learning_rate_is_found_and_drawn(scenes: Path, tmp_path: Path, capsys: Capture) -> None:
    assert program.main(command(scenes, tmp_path)) == 0
    said = capsys.readouterr().out
    assert 1e-4 < float(said.strip().rpartition("suggestion: --learning_rate ")[2]) < 1
    assert "all 20 steps done, at learning rate 1.0e+00" in said
    assert {path.name for path in (tmp_path / "ramp").iterdir()} == {"find_lr.csv", "find_lr.png"}
    assert not (tmp_path / "run").exists()


def test_the_cache_and_workers_change_no_number(scenes: Path, tmp_path: Path) -> None:
    first, again, plain = (tmp_path / name for name in ("first", "again", "plain"))
    cache = tmp_path / "cache"
    assert program.main(command(scenes, first, cache_dir=cache)) == 0
    assert program.main(command(scenes, again, cache_dir=cache, num_workers=1)) == 0
    assert program.main(command(scenes, plain, cache_dir=None, cache="off")) == 0
    assert curve(first) == curve(again) == curve(plain)
    assert not (plain / "midi3d_cache").exists()


def test_only_what_the_ramp_sees_is_encoded(scenes: Path, tmp_path: Path, capsys: Capture) -> None:
    assert program.main(command(scenes, tmp_path, ramp_steps=10)) == 0
    assert "encoding 3 scenes for " in capsys.readouterr().out
    kept = list((tmp_path / "cache").rglob("*.features"))
    assert len(kept) == 2 * 3  # of each scene its pictures and one of two draws


def test_a_file_with_sections_is_understood(scenes: Path, tmp_path: Path, capsys: Capture) -> None:
    settings = tmp_path / "mine.yaml"
    settings.write_text("training:\n  batch_size: 3\n  batch_sice: 4\n")
    given = command(scenes, tmp_path, batch_size=None, ramp_steps=None)
    words = [*given, "--config", str(settings)]
    assert program.main(words) == 2
    assert "line 3: unknown setting training.batch_sice" in capsys.readouterr().err
    settings.write_text("training:\n  batch_size: 3\nramp:\n  ramp_steps: 10\n")
    assert program.main(words) == 0
    assert len(curve(tmp_path).splitlines()) == 1 + 10


# -- what cannot work ------------------------------------------------------------------------------


@pytest.mark.fault("C19")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--ramp_steps", "9"], "--ramp_steps is 9: it must be at least 10"),
        (["--ramp_from", "0"], "--ramp_from 0.0, --ramp_to 1.0: above 0, and rising"),
        (["--ramp_to", "1e-9"], "--ramp_to 1e-09: above 0, and rising"),
        (["--ramp_to", "1e300"], "--ramp_to 1e+300: above 0, and rising"),
        (["--ramp_dir="], "--ramp_dir is empty: "),
        (["--lora_rank", "0"], "--lora_rank is 0: it must be at least 1"),
        (["--dry_run"], "--dry_run belongs to `midi3d-lora train`: find-lr trains"),
        (["--resume", "x"], "--resume belongs to `midi3d-lora train`: a ramp always starts anew"),
        (["--resume_from_checkpoint", "x"], "--resume_from_checkpoint belongs to `midi3d-lora tr"),
        (["--ramp_step", "20"], "did you mean '--ramp_steps'"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_data_and_files(
    words: list[str],
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert program.main(["find-lr", *words]) == 2
    assert expected in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.fault("C24")
def test_a_ramp_finds_a_file_in_its_way_before_the_data(
    scenes: Path, tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "file").write_text("x")
    words = command(scenes, tmp_path, ramp_dir=tmp_path / "file", data_dir=tmp_path / "none")
    assert program.main(words) == 2
    error = capsys.readouterr().err
    assert f"--ramp_dir {tmp_path / 'file'}: " in error
    assert str(tmp_path / "none") in error  # told together


def test_a_scene_that_is_damaged_is_named(tmp_path: Path, capsys: Capture) -> None:
    scenes = tiny_midi_run.write_scenes(tmp_path / "data")
    (scenes / "train" / "scene_1" / "surface.npy").write_bytes(b"nothing")
    assert program.main(command(scenes, tmp_path)) == 2
    error = capsys.readouterr().err
    assert "scene_1" in error
    assert "surface.npy" in error
    assert not (tmp_path / "ramp").exists()


def test_a_ramp_in_which_nothing_is_learned_suggests_nothing(
    scenes: Path, tmp_path: Path, capsys: Capture
) -> None:
    assert program.main(command(scenes, tmp_path, ramp_from=1e-9, ramp_to=1e-8)) == 2
    told = capsys.readouterr()
    assert "suggestion" not in told.out
    assert "no learning rate from 1e-09 to 1e-08 made the loss fall" in told.err
