"""The command: its verbs, their help without heavy libraries, and what it says about mistakes."""

import importlib.util

import pytest

from lora_core.testing.console import check_light
from midi3d_lora.__main__ import COMMANDS, main


def test_usage_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    text = capsys.readouterr().out
    assert {"train", "predict", "prepare", "merge", "export"} <= COMMANDS.keys()
    assert all(name in text for name in COMMANDS)


def test_an_unknown_command_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["exprot"]) == 2
    assert "did you mean 'export'" in capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_module(name: str) -> None:
    module = "demo_run" if name == "demo" else name.replace("-", "_")
    assert importlib.util.find_spec(f"midi3d_lora.{module}") is not None


@pytest.mark.parametrize("command", [[], ["--version"], *([name, "--help"] for name in COMMANDS)])
def test_help_needs_no_torch(command: list[str]) -> None:
    check_light("midi3d-lora", command)


def test_the_public_names_are_loaded_on_first_use() -> None:
    import midi3d_lora

    for name in midi3d_lora.__all__:
        assert getattr(midi3d_lora, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'LoraChoise'"):
        midi3d_lora.__getattr__("LoraChoise")
