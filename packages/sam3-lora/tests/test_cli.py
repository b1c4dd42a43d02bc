"""The command: what it offers, how it refuses, and that help is quick."""

from __future__ import annotations

import subprocess
import sys

import pytest

from sam3_lora.__main__ import COMMANDS, main


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
    code = (
        "import sys; from sam3_lora.__main__ import main; status = main(sys.argv[1:]); "
        "heavy = {'torch', 'transformers', 'scipy', 'PIL'} & set(sys.modules); "
        "sys.exit(status or (f'imported {heavy}' if heavy else 0))"
    )
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "sam3-lora" in done.stdout
