"""What demos share: commands that can be pasted, refused options, folders that are theirs."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

import pytest
import torch

from lora_core.config import option
from lora_core.demo_folder import (
    COLUMNS,
    MARK,
    Demo,
    empty_folder,
    main,
    one_thread,
    run_verb,
    typed,
    words,
)
from lora_core.errors import ConfigError


@dataclass
class Options(Demo):
    """Settings of a package's demo."""

    epochs: int = option(8, "Passes over the data.", "training")
    seed: int = option(0, "Fixes everything.", "training")


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


def test_all_impossible_settings_are_named_together() -> None:
    with pytest.raises(ConfigError) as caught:
        Options(epochs=0, seed=-1, learning_rate=float("inf"))
    named = [line.split(" is ")[0] for line in str(caught.value).splitlines()]
    assert sorted(named) == ["--epochs", "--learning_rate", "--seed"]
    assert Options(epochs=1, seed=0).output == "demo_run"


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan")])
def test_a_learning_rate_is_a_finite_number_above_0(rate) -> None:
    with pytest.raises(ConfigError, match=f"--learning_rate is {rate}: "):
        Options(learning_rate=rate)


def test_a_demo_runs_in_an_empty_folder_of_its_own(tmp_path, capsys) -> None:
    seen = []

    def run(options: Options, folder) -> None:
        seen.append((options.epochs, sorted(path.name for path in folder.iterdir())))
        (folder / "result").write_text("done")

    words = ["--output", str(tmp_path / "demo"), "--epochs", "3"]
    assert main("sam2-lora", Options, run, words) == 0
    assert seen == [(3, [MARK])]
    assert "done in " in capsys.readouterr().out
    with pytest.raises(ConfigError, match="add --overwrite"):
        main("sam2-lora", Options, run, words)
    assert main("sam2-lora", Options, run, [*words, "--overwrite"]) == 0
    assert seen[1] == seen[0]


def test_one_thread_computes_meanwhile() -> None:
    before = torch.get_num_threads()
    with one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


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
