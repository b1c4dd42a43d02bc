"""The command: what it offers, how it refuses, and that help is quick."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_core.config import parse
from lora_core.testing import check_commands
from lora_core.testing.console import check_light
from sam3_lora import demo_run, evaluate, find_lr, merge, predict, prepare
from sam3_lora.__main__ import COMMANDS, main
from sam3_lora.config import Config

PACKAGE = Path(__file__).parent.parent
OPTIONS = {
    "train": Config,
    "find-lr": find_lr.Options,
    "predict": predict.Options,
    "evaluate": evaluate.Options,
    "prepare": prepare.Options,
    "merge": merge.Options,
    "demo": demo_run.Options,
}


def verb(argv: list[str]) -> None:
    parse(OPTIONS[argv[0]], argv[1:], prog=argv[0])


def settings(argv: list[str]) -> None:
    parse(Config, argv, prog="train")


def test_every_command_of_the_readme_parses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(PACKAGE)  # where its example configuration is
    readme = PACKAGE / "README.md"
    found = check_commands(readme, {"sam3-lora": verb, "train.py": settings})
    assert found
    said = readme.read_text("utf-8")
    assert all(f"sam3-lora {name}" in said for name in COMMANDS)


def test_usage_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in COMMANDS)


def test_an_unknown_command_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["mrege"]) == 2
    assert "did you mean 'merge'" in capsys.readouterr().err


def test_an_unknown_flag_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", "--adaptr", "a", "--output", "o"]) == 2
    assert "adapter" in capsys.readouterr().err


@pytest.mark.parametrize("command", [[], ["--version"], *([name, "--help"] for name in COMMANDS)])
def test_help_needs_no_torch(command: list[str]) -> None:
    check_light("sam3-lora", command)
