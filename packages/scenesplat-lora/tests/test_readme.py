"""The README's commands are parsed by the programs, and its tables are true."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lora_core.config import parse
from lora_core.testing import check_commands
from scenesplat_lora import (
    demo_run,
    evaluate,
    find_lr,
    merge,
    predict,
    prepare_chunk,
    prepare_import,
    prepare_lang_feat,
    prepare_ply,
    prepare_text,
    train,
    view,
)
from scenesplat_lora.__main__ import COMMANDS
from scenesplat_lora.model_options import LayoutName
from scenesplat_lora.presets import PRESETS
from scenesplat_lora.scenes.values import LAYOUTS

README = Path(__file__).parent.parent / "README.md"
OPTIONS = {
    "evaluate": evaluate.Options,
    "predict": predict.Options,
    "merge": merge.Options,
    "view": view.Options,
    "demo": demo_run.Options,
    "prepare ply": prepare_ply.Options,
    "prepare text": prepare_text.Options,
    "prepare import": prepare_import.Options,
    "prepare lang-feat": prepare_lang_feat.Options,
    "prepare chunk": prepare_chunk.Options,
}


SETTINGS = {"train": train.settings, "find-lr": find_lr.settings}


def verb(argv: list[str]) -> None:
    if argv[0] in SETTINGS:
        SETTINGS[argv[0]](argv[1:])
        return
    words = 2 if argv[0] == "prepare" else 1
    parse(OPTIONS[" ".join(argv[:words])], argv[words:], prog="scenesplat-lora")


def test_commands_of_the_readme_parse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # presets are found from any folder
    found = check_commands(README, {"scenesplat-lora": verb, "train_lora.py": train.settings})
    assert {" ".join(one.argv[:2]) for one in found if one.argv[0] == "prepare"} == {
        name for name in OPTIONS if name.startswith("prepare")
    }
    said = README.read_text("utf-8")
    assert all(f"scenesplat-lora {name}" in said for name in COMMANDS)


@pytest.mark.parametrize("name", PRESETS)
def test_the_table_of_presets_has_their_ranks(name: str) -> None:
    row = re.search(rf"^\| `{name}` \| (\d+) \|", README.read_text("utf-8"), re.MULTILINE)
    assert row
    assert int(row[1]) == PRESETS[name].r


def test_flags_know_every_layout() -> None:
    assert set(LayoutName.__args__) == set(LAYOUTS)  # type: ignore[attr-defined]
