"""The README's commands are parsed by the programs, and its tables are true."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lora_core.config import parse
from lora_core.testing import check_commands
from scenesplat_lora import evaluate, predict, prepare_chunk, prepare_lang_feat, prepare_ply
from scenesplat_lora.model_options import LayoutName
from scenesplat_lora.presets import PRESETS
from scenesplat_lora.scene_values import LAYOUTS

README = Path(__file__).parent.parent / "README.md"
OPTIONS = {
    "evaluate": evaluate.Options,
    "predict": predict.Options,
    "prepare ply": prepare_ply.Options,
    "prepare lang-feat": prepare_lang_feat.Options,
    "prepare chunk": prepare_chunk.Options,
}


def verb(argv: list[str]) -> None:
    words = 2 if argv[0] == "prepare" else 1
    parse(OPTIONS[" ".join(argv[:words])], argv[words:], prog="scenesplat-lora")


def test_commands_of_the_readme_parse() -> None:
    found = check_commands(README, {"scenesplat-lora": verb})
    assert {" ".join(one.argv[:2]) for one in found if one.argv[0] == "prepare"} == {
        name for name in OPTIONS if name.startswith("prepare")
    }


@pytest.mark.parametrize("name", PRESETS)
def test_the_table_of_presets_has_their_ranks(name: str) -> None:
    row = re.search(rf"^\| `{name}` \| (\d+) \|", README.read_text("utf-8"), re.MULTILINE)
    assert row
    assert int(row[1]) == PRESETS[name].r


def test_flags_know_every_layout() -> None:
    assert set(LayoutName.__args__) == set(LAYOUTS)  # type: ignore[attr-defined]
