"""What demos share: commands that can be pasted, refused options, folders that are theirs."""

from __future__ import annotations

import shlex
from types import SimpleNamespace

import pytest

from lora_core.demo_folder import COLUMNS, check_options, empty_folder, run_verb, typed, words
from lora_core.errors import ConfigError

LEAST = {"epochs": 1, "seed": 0}


def test_a_shown_command_is_what_a_shell_understands() -> None:
    settings = {
        "data_root": "my data/it's", "seed": 0, "scenes": ["a b", "c" * 60, "d" * 60],
        "output": "x" * 70, "learning_rate": 1e-3, "text": "y" * 40,
    }  # fmt: skip
    argv = ["sam2-lora", "train", *words(settings)]
    shown = typed(argv)
    assert shlex.split(shown.replace("\\\n", " ")) == argv
    lines = shown.split("\n")
    assert len(lines) > 1
    assert all(line.endswith(" \\") for line in lines[:-1])
    assert all(len(line) <= COLUMNS for line in lines)
    assert all(line.startswith("    ") for line in lines[1:])


def test_a_command_is_shown_and_run_with_the_same_words(capsys) -> None:
    got = []
    run_verb("sam2-lora", "merge", got.append, {"adapter": "a.pt", "scenes": ("b", "c")})
    assert got == [["--adapter", "a.pt", "--scenes", "b", "c"]]
    assert capsys.readouterr().out == "\nsam2-lora merge --adapter a.pt --scenes b c\n\n"


def test_all_impossible_options_are_named_together() -> None:
    options = SimpleNamespace(epochs=0, seed=-1, learning_rate=float("inf"))
    with pytest.raises(ConfigError) as caught:
        check_options(options, LEAST)
    named = [line.split(" is ")[0] for line in str(caught.value).splitlines()]
    assert named == ["--epochs", "--seed", "--learning_rate"]
    check_options(SimpleNamespace(epochs=1, seed=0, learning_rate=1e-3), LEAST)


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan")])
def test_a_learning_rate_is_a_finite_number_above_0(rate) -> None:
    with pytest.raises(ConfigError, match=f"--learning_rate is {rate}: "):
        check_options(SimpleNamespace(epochs=1, seed=0, learning_rate=rate), LEAST)


def test_only_a_folder_of_the_same_demo_is_emptied(tmp_path) -> None:
    folder = empty_folder(tmp_path / "demo", "sam2-lora", overwrite=False)
    (folder / "old").write_text("old")
    with pytest.raises(ConfigError, match="add --overwrite"):
        empty_folder(folder, "sam2-lora", overwrite=False)
    with pytest.raises(ConfigError, match="not made by sam3-lora demo"):
        empty_folder(folder, "sam3-lora", overwrite=True)
    assert (folder / "old").exists()
    assert not (empty_folder(folder, "sam2-lora", overwrite=True) / "old").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("text")
    with pytest.raises(ConfigError, match="not made by sam2-lora demo"):
        empty_folder(tmp_path / "mine", "sam2-lora", overwrite=True)
    assert (tmp_path / "mine" / "thesis.tex").exists()
