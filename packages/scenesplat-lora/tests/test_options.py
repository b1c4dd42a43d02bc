"""`--options`: words as the official launcher reads them, over the settings of a file."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from test_config_files import CASE, plain, recorded

from lora_core.errors import ConfigError
from scenesplat_lora.settings.options import apply_options, parse_options, parse_value


def test_the_recorded_words_give_the_recorded_values() -> None:
    found = parse_options(CASE["options"])
    assert plain(found) == CASE["parsed"]
    assert list(map(type, found.values())) == [
        dict if value is None else type(value) for value in found.values()
    ]
    assert type(found["flag"]) is bool


def test_the_recorded_override_gives_the_recorded_settings(tmp_path: Path) -> None:
    values = recorded(tmp_path)
    before = copy.deepcopy(values)
    found = apply_options(values, CASE["override"])
    assert values == before
    del found["ref"]
    expected = {name: value for name, value in CASE["after_override"].items() if name != "ref"}
    assert plain(found) == expected


@pytest.mark.fault("H11")
@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", ""),
        ("1_000", "1_000"),
        ("TRUE", True),
        ("a b", "ab"),
        ("[]", []),
        ("()", ()),
        ("[1]", [1]),
        ("(1)", (1,)),
        ("1,", [1]),
        ("[[1,2],[3]]", [[1, 2], [3]]),
        ("(1,2),(3,4)", [(1, 2), (3, 4)]),
        ("['a','b']", ["a", "b"]),
        ("__import__('os').system('x')", "__import__('os').system('x')"),
    ],
)
def test_values_are_read_and_never_evaluated(text: str, value: Any) -> None:
    found = parse_value(text)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.fault("C22")
def test_all_wrong_words_are_told_together() -> None:
    words = ["a.b", "=x", "a..b=1", "a=[1,2", "b=1)", "c=1", "c=2", "d=" + "[" * 99 + "]" * 99]
    with pytest.raises(ConfigError) as error:
        parse_options(words)
    lines = str(error.value).splitlines()
    assert len(lines) == 7
    assert "'a.b': expected NAME=VALUE" in lines[0]
    assert "']' is missing" in lines[3]
    assert "c is given twice" in lines[5]
    assert "nested too deeply" in lines[6]


@pytest.mark.fault("C22")
def test_parts_of_what_has_no_parts_are_refused_together() -> None:
    values = {"epoch": 5, "hooks": [1, 2], "split": (1, 2)}
    options = {"epoch.x": 1, "hooks.2": 1, "hooks.x.y": 1, "split.0": 1, "new.0": 1}
    with pytest.raises(ConfigError) as error:
        apply_options(values, options)
    lines = str(error.value).splitlines()
    assert "--options epoch.x: epoch is 5, a single value" in lines[0]
    assert "hooks is a list of 2 items, counted from 0: there is no item '2'" in lines[1]
    assert "no item 'x'" in lines[2]
    assert "a tuple, which is replaced as a whole" in lines[3]
    assert len(lines) == 4
