"""The folder of a run: its settings again, what travels, and how a run is taken up."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from lora_core.config import dump, option
from lora_core.errors import CheckpointError, ConfigError
from lora_core.guards import Guards
from lora_core.ramp import Ramp
from lora_core.run_folder import RunFolder, by_flag, named, read_settings, travelling
from lora_core.validate import REPORT, Bad, read_and_settle

ABOUT = {"prog": "x-lora train", "description": ""}


@dataclass
class Lora:
    rank: int = option(8, "Rank.")


@dataclass
class Config(Guards):
    lora: Lora = field(default_factory=Lora)
    base: str = option("base.pt", "Base.")
    api_key: str | None = option(None, "Secret.")
    steps: int = option(10, "Steps.")
    resume: str | None = option(None, "Run.")
    adapter: str | None = option(None, "Adapter.")


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    made = RunFolder(folder)
    dump(Config(lora=Lora(4), steps=20), made.config)
    return made


def found(resume):
    return RunFolder(named(resume)[1])


def test_a_resumed_run_has_its_settings_changed_by_the_flags_given_now(run):
    cfg, resumed = read_settings(
        Config, ["--resume", str(run.folder), "--steps", "30"], found, **ABOUT
    )
    assert (cfg.lora.rank, cfg.steps, resumed) == (4, 30, run)
    assert run.settings(Config).steps == 20
    file = run.folder / "best.pt"
    file.touch()
    assert read_settings(Config, ["--resume", str(file)], found, **ABOUT)[1] == run
    assert read_settings(Config, [], found, **ABOUT) == (Config(), None)


def test_what_cannot_be_resumed_is_said(run, tmp_path):
    with pytest.raises(CheckpointError, match=f"--resume {tmp_path}/gone: no such file or folder"):
        read_settings(Config, ["--resume", f"{tmp_path}/gone"], found, **ABOUT)
    both = ["--resume", str(run.folder), "--adapter", "a"]
    with pytest.raises(ConfigError, match="give one of them"):
        read_settings(Config, both, found, **ABOUT)


def test_settings_that_travel_have_names_of_flags_and_no_paths_or_secrets():
    cfg = Config(api_key="abc")
    assert dict(by_flag(cfg))["lora.rank"] == 8
    kept = travelling(cfg, {"base"})
    assert kept["lora.rank"] == 8
    assert "base" not in kept
    assert "abc" not in json.dumps(kept)


def test_the_summary_and_the_bad_samples_are_written_whole(run, capsys):
    run.write_summary({"steps": 3})
    assert json.loads(run.summary.read_text()) == {"steps": 3}
    assert [path.name for path in run.folder.iterdir() if path.suffix == ".tmp"] == []
    run.list_bad_samples([], torch.device("cpu"))
    assert not (run.folder / REPORT).exists()
    bad = [Bad("train", "a.png", "broken"), Bad("train", "a.png", "and small")]
    run.list_bad_samples(bad, torch.device("cpu"))
    assert len((run.folder / REPORT).read_text().splitlines()) == 2
    run.say_left_out(bad)
    assert capsys.readouterr().out == f"  left out: 1 bad sample, see {run.folder / REPORT}\n"


def test_each_process_reads_but_only_the_first_settles():
    settled, reads = [], []

    def read():
        reads.append(len(reads))
        return ["a", "b"]

    def settle(samples):
        settled.append(samples)
        return len(samples)

    assert read_and_settle(read, settle, lambda make: make()) == (["a", "b"], 2)
    assert read_and_settle(read, settle, lambda make: 2) == (["a", "b"], 2), "of another process"
    assert (settled, reads) == ([["a", "b"]], [0, 1])


# -- find-lr ---------------------------------------------------------------------------------------


@dataclass
class Options(Ramp, Config):
    train_command = "x-lora train"


def test_the_settings_of_find_lr_come_after_those_of_a_training_and_are_checked():
    names = [name for name, _ in by_flag(Options())]
    assert names[-4:] == ["ramp_from", "ramp_to", "ramp_steps", "ramp_dir"]
    wrong = {
        "ramp_steps": (9, "--ramp_steps is 9: it must be at least 10"),
        "ramp_to": (float("inf"), "above 0, and rising"),
        "ramp_dir": ("", "--ramp_dir is empty"),
        "dry_run": (True, "--dry_run belongs to `x-lora train`: find-lr trains"),
        "resume": ("run", "--resume belongs to `x-lora train`: a ramp always starts anew"),
        "max_bad_fraction": (2.0, "--max_bad_fraction is 2.0"),
    }
    with pytest.raises(ConfigError) as error:
        Options(**{name: value for name, (value, _) in wrong.items()})
    for _, complaint in wrong.values():
        assert complaint in str(error.value)
    assert Path(Options().ramp_dir) == Path("find_lr")
