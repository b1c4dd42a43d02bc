"""The README's commands are parsed by the programs, and its tables are true."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_core.config import parse
from lora_core.testing import check_commands
from midi3d_lora import (
    LoraChoice,
    TripoSGDiTModel,
    demo_run,
    evaluate,
    export,
    find_lr,
    inject,
    merge,
    predict,
    prepare_3d_front,
    prepare_folders,
    prepare_objaverse,
    train,
)
from midi3d_lora.__main__ import COMMANDS

PACKAGE = Path(__file__).parent.parent
README = PACKAGE / "README.md"
OPTIONS: dict[str, Any] = {
    "demo": demo_run.Options,
    "predict": predict.Options,
    "evaluate": evaluate.Options,
    "merge": merge.Options,
    "export": export.Options,
    "prepare": prepare_folders.Options,
    "prepare 3d-front": prepare_3d_front.Options,
    "prepare objaverse": prepare_objaverse.Options,
}
SETTINGS = {"train": train.settings, "find-lr": find_lr.settings}  # files with sections, too
TABLES = {"From meshes": prepare_folders.Options, "Generate a scene": predict.Options}


def options(command: str, argv: list[str]) -> None:
    parse(OPTIONS[command], argv, prog=f"midi3d-lora {command}")


def verb(argv: list[str]) -> None:
    if argv[0] in SETTINGS:
        SETTINGS[argv[0]](argv[1:])
        return
    words = 2 if " ".join(argv[:2]) in OPTIONS else 1
    options(" ".join(argv[:words]), argv[words:])


def test_commands_of_the_readme_parse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(PACKAGE)  # where its configuration is
    programs = {
        "midi3d-lora": verb,
        "train_lora.py": train.settings,
        "inference_with_lora.py": lambda argv: options("predict", argv),
        "prepare_data.py": lambda argv: options("prepare", argv),
    }
    found = check_commands(README, programs)
    assert {one.program for one in found} == programs.keys()
    used = {one.argv[0] for one in found if one.program == "midi3d-lora"}
    assert used == COMMANDS.keys()  # prepare: its steps for published data


def default_of(settings: Any, name: str) -> Any:
    (found,) = [field for field in fields(settings) if field.name == name]
    made = found.default_factory
    value = found.default if made is MISSING else made()
    return str(value).lower() if isinstance(value, bool) else value


def rows_of_options(heading: str) -> Iterator[tuple[str, str]]:
    """(option, default) of the table of options below a heading."""
    (section,) = re.findall(
        rf"^#+ {heading}$(.*?)(?=^#|\Z)", README.read_text("utf-8"), re.MULTILINE | re.DOTALL
    )
    for names, values in re.findall(r"^\| (`--.*?`) \| (.*?) \|", section, re.MULTILINE):
        yield from zip(re.findall(r"--(\w+)", names), values.split(", "), strict=True)


@pytest.mark.parametrize("heading", TABLES)
def test_defaults_in_tables_are_those_of_the_commands(heading: str) -> None:
    rows = list(rows_of_options(heading))
    assert len(rows) > 5
    for name, said in rows:
        default = default_of(TABLES[heading], name)
        assert said == f"{default:g}" if said == "0" else said == str(default), name


def test_every_flag_that_is_named_exists() -> None:
    known = {field.name for cls in (find_lr.Options, *OPTIONS.values()) for field in fields(cls)}
    known |= {"config", "logdir"}  # of all commands, of tensorboard
    named = set(re.findall(r"(?<![\w-])--(\w+)", README.read_text("utf-8")))
    assert named <= known, named - known


def test_the_table_of_ranks_counts_the_released_model() -> None:
    with torch.device("meta"):
        model = TripoSGDiTModel()
        summary = inject(model, LoraChoice(rank=1))
    base = sum(p.numel() for p in model.parameters()) - summary.trainable
    linear = sum(isinstance(m, torch.nn.Linear) for m in model.modules())
    said = README.read_text("utf-8")
    rows = re.findall(r"^\| (\d+) \| ([\d,]+) \| ([\d.]+) % \| (\d+) MB \|", said, re.MULTILINE)
    assert [int(rank) for rank, *_ in rows] == [4, 8, 16, 32, 64]
    for rank, count, share, megabytes in rows:
        trained = summary.trainable * int(rank)
        digits = len(share.partition(".")[2])
        assert f"{trained:,}" == count
        assert f"{100 * trained / (base + trained):.{digits}f}" == share
        assert round(trained * 4 / 1e6) == int(megabytes)
    assert (len(summary.rows), linear) == (231, 308)
    assert "231 of the 308" in " ".join(said.split())
