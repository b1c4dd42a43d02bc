"""Configuration files of Python's syntax: read as recorded, and never executed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lora_core.errors import ConfigError
from scenesplat_lora.settings.files import merged, packaged, read_config

CASE: dict[str, Any] = json.loads(
    (Path(__file__).parent / "goldens" / "config_system" / "config.json").read_text()
)


def plain(value: Any) -> Any:
    """The recorded form: tuples are {"__tuple__": [...]}."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return {"__tuple__": [plain(item) for item in value]}
    return [plain(item) for item in value] if isinstance(value, list) else value


def read(folder: Path, text: str, **others: str) -> dict[str, Any]:
    for name, content in others.items():
        (folder / f"{name}.py").write_text(content, "utf-8")
    (folder / "run.py").write_text(text, "utf-8")
    return read_config(folder / "run.py").values


def recorded(folder: Path) -> dict[str, Any]:
    for name, content in CASE["files"].items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content)
    return read_config(folder / "child.py").values


def test_the_recorded_files_give_the_recorded_settings(tmp_path: Path) -> None:
    found = recorded(tmp_path)
    assert found.pop("ref") == "exp/default"  # recorded is a random placeholder of the original
    expected = {name: value for name, value in CASE["loaded"].items() if name != "ref"}
    assert plain(found) == expected


def test_values_names_and_arithmetic(tmp_path: Path) -> None:
    text = '''"""A file may explain itself."""
epoch: int = 8
half = last = epoch // 2 - -1
rate = 1e-3 * 2 / 4
names = ["a", 'b'] + ["c"] * 2
data = dict(split=("train", "test"), n=epoch, none=None, on=True, inner={"k": [1, (2,)]})
more = dict(**data, extra=tuple([1, 2]))
data2 = {**data, "n": 9}
'''
    found = read(tmp_path, text)
    assert found["half"] == found["last"] == 5
    assert found["rate"] == 0.0005
    assert found["names"] == ["a", "b", "c", "c"]
    assert found["data"]["inner"] == {"k": [1, (2,)]}
    assert found["more"]["extra"] == (1, 2)
    assert found["data2"]["n"] == 9
    found["more"]["inner"]["k"].append(3)  # names stand for values of their own
    assert found["data"]["inner"] == {"k": [1, (2,)]}


def test_placeholders_of_bases_and_files(tmp_path: Path) -> None:
    text = """_base_ = "./one.py"
bare = {{ _base_.data.list }}
item = {{_base_.data}}
quoted = "{{_base_.data.list.1}}"
inside = "exp/{{ _base_.path }}/{{fileBasenameNoExtension}}{{fileExtname}}"
where = '{{fileDirname}}'
"""
    found = read(tmp_path, text, one="data = dict(list=[1, 2])\npath = 'x'\n")
    assert found["bare"] == [1, 2]
    assert found["item"] == {"list": [1, 2]}
    assert found["quoted"] == 2
    assert found["inside"] == "exp/x/run.py"
    assert found["where"] == tmp_path.as_posix()


def test_bases_merge_over_folders_and_generations(tmp_path: Path) -> None:
    (tmp_path / "_base_").mkdir()
    (tmp_path / "_base_" / "old.py").write_text("a = dict(x=1, y=dict(z=2))\n")
    (tmp_path / "_base_" / "new.py").write_text("_base_ = 'old.py'\na = dict(y=dict(w=3))\n")
    found = read(tmp_path, "_base_ = ('_base_/new.py', 'two.py')\na = dict(x=9)", two="b = 1")
    assert found == {"a": {"x": 9, "y": {"z": 2, "w": 3}}, "b": 1}


def test_delete_replaces_and_leaves_no_trace() -> None:
    child = {"a": {"_delete_": True, "n": {"_delete_": True, "k": 1}}, "b": {"_delete_": True}}
    assert merged({"a": {"old": 1}, "c": 2}, child) == {"a": {"n": {"k": 1}}, "b": {}, "c": 2}


def test_each_key_knows_its_place(tmp_path: Path) -> None:
    text = "_base_ = 'one.py'\n\nlora = dict(\n    r=8,\n    hooks=[dict(type='A')])\n"
    (tmp_path / "one.py").write_text("seed = 1\nlora = dict(alpha=4)\n")
    (tmp_path / "run.py").write_text(text)
    config = read_config(tmp_path / "run.py")
    assert config.place("lora.r").endswith("run.py, line 4")
    assert config.place("lora.hooks.0.type").endswith("run.py, line 5")
    assert config.place("lora.alpha").endswith("one.py, line 2")
    assert config.place("seed").endswith("one.py, line 1")


RUNTIME = "_base_/lora_runtime.py"


@pytest.mark.parametrize(
    "base", [f"../{RUNTIME}", RUNTIME, f"configs/{RUNTIME}", f"../../configs/{RUNTIME}"]
)
def test_a_base_that_is_not_there_is_a_preset_of_the_package(
    tmp_path: Path, base: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = read(tmp_path, f"_base_ = [{base!r}]\nepoch = 3\nlora_training = dict(save_epoch=1)\n")
    assert (found["epoch"], found["batch_size"]) == (3, 2)
    assert (found["lora_training"]["save_epoch"], found["lora_training"]["eval_epoch"]) == (1, 1)
    assert "the preset of scenesplat-lora is used" in capsys.readouterr().out


def test_presets_are_bases_with_their_own_bases(tmp_path: Path) -> None:
    found = read(tmp_path, "_base_ = 'configs/generic/lora-finetune.py'\nseed = 4\n")
    assert found["seed"] == 4
    assert found["optimizer"]["type"] == "AdamW"
    assert found["data"]["layout"] == "generic"


def test_own_bases_come_before_presets(tmp_path: Path) -> None:
    (tmp_path / "_base_").mkdir()
    (tmp_path / RUNTIME).write_text("epoch = 99\n")
    assert read(tmp_path, f"_base_ = {RUNTIME!r}\n") == {"epoch": 99}


@pytest.mark.parametrize(
    "name",
    [
        "../configs/../config.py",
        "configs/../ptv3.py",
        "/configs/_base_/lora_runtime.py",
        "configs",
        "..",
        "",
        "_base_/lora_runtime.py/x.py",
        "_base_/./../_base_/lora_runtime.py",
        "__init__.py",
    ],
)
def test_presets_are_those_of_the_folder_alone(name: str) -> None:
    assert packaged(name) is None


def test_a_missing_file_names_the_presets(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"not found.*configs/generic/lora-finetune\.py"):
        read(tmp_path, "_base_ = '../_base_/lora_run.py'")


@pytest.mark.fault("C20")
@pytest.mark.parametrize("start", [b"\xef\xbb\xbf", b""])
def test_windows_files_are_read(tmp_path: Path, start: bytes) -> None:
    (tmp_path / "run.py").write_bytes(start + "name = 'Küche'\r\nn = 1\r\n".encode())
    assert read_config(tmp_path / "run.py").values == {"name": "Küche", "n": 1}


HOSTILE = [
    "import os",
    "from os import system",
    "x = __import__('os').system('touch canary')",
    "x = open('canary', 'w')",
    "x = print(1)",
    "x = (1).__class__",
    "x = [i for i in range(9)]",
    "x = lambda: 1",
    "x = f'{1}'",
    "x = a if 1 else 2",
    "x = 2 ** 9",
    "x = 1 < 2",
    "x = [1][0]",
    "x = dict([('a', 1)])",
    "x = {1: 2}",
    "x = b'1'",
    "x = 1j",
    "x = ...",
    "x = {1, 2}",
    "while True: pass",
    "def f(): pass",
    "class A: pass",
    "x += 1",
    "x.y = 1",
    "del x",
    "exec('1')",
    "__builtins__ = 1",
    "x = (y := 1)",
    "x = await_",
]


@pytest.mark.fault("C35", "H10")
@pytest.mark.parametrize("line", HOSTILE)
def test_anything_but_values_is_refused_with_its_line(tmp_path: Path, line: str) -> None:
    with pytest.raises(ConfigError, match=r"run\.py, line 2"):
        read(tmp_path, f"ok = 1\n{line}\n")
    assert {path.name for path in tmp_path.iterdir()} == {"run.py"}


BOMBS = {
    "power of lists": "a = [1] * 1000\nb = [a, a] * 1000\n",
    "doubling names": "a = [1] * 9\n" + "".join(f"a = [a, a]\nb{i} = a\n" for i in range(40)),
    "long text": "a = 'x' * 10000000\n",
    "many texts": f"a = '{'x' * 900000}'\n" + "b = a + 'y'\n" * 9,
    "text of a base": "_base_ = 'one.py'\na = '" + "{{_base_.path}}" * 9 + "'\n",
    "doubling text": "a = 'xxxxxxxxxxxxxxxx'\n" + "a = a + a\n" * 40,
    "nested": f"a = {'[' * 60}{']' * 60}\n",
    "nested brackets": f"a = {'(' * 30000}\n",
    "nested signs": f"a = {'-' * 20000}1\n",
    "nested by names": "a = [1]\n" + "a = [a]\n" * 300,
    "large number": "a = 10 * 10000000000000000000\n",
    "digits": f"a = {'9' * 9000}\n",
    "hexadecimal": f"a = 0x{'f' * 9000}\n",
    "infinite": "a = 1e999\n",
    "zero": "a = 1 / 0\n",
    "size": "#" * 1_000_001,
}


@pytest.mark.fault("C35", "H10")
@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs_are_refused_quickly(tmp_path: Path, bomb: str) -> None:
    with pytest.raises(ConfigError, match=r"run\.py"):
        read(tmp_path, BOMBS[bomb], one=f"path = '{'x' * 900000}'\n")


FAULTS = {
    "undefined": ("x = epohc", "'epohc' is not defined above"),
    "name of a base": (
        "_base_ = 'one.py'\nx = path",
        r"a value of _base_ is written {{_base_.path}}",
    ),
    "no such value": ("_base_ = 'one.py'\nx = {{_base_.pth}}", "have no such value"),
    "twice": ("x = dict(a=1, **{'b': 1})\ny = {'a': 1, 'a': 2}", "'a' stands twice"),
    "reserved": ("text = 1", "'text' is reserved"),
    "dict over value": (
        "_base_ = 'one.py'\npath = dict(a=1)",
        r"path is a dict, but str in _base_",
    ),
    "same key": ("_base_ = ['one.py', 'two.py']", r"define path: .*one.py, line 1 and .*two.py"),
    "itself": ("_base_ = 'run.py'", "leads back"),
    "many": ("_base_ = [" + "'three.py', " * 101 + "]", "more than 100 files"),
    "missing": ("_base_ = 'onee.py'", "not found: .*did you mean 'one.py'"),
    "base type": ("_base_ = 3", "line 1: _base_ must be a path"),
    "base twice": ("_base_ = 'one.py'\n_base_ = 'two.py'", "line 2: _base_ .*second time"),
    "base beside": ("a = _base_ = 'one.py'", "only NAME = VALUE"),
    "syntax": ("x = (1,\n", "line 1, column"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_told_with_their_place(tmp_path: Path, fault: str) -> None:
    text, message = FAULTS[fault]
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, text, one="path = 'x'\n", two="path = 'y'\n", three="")


def test_all_faults_of_a_file_come_together_and_not_their_consequences(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        read(tmp_path, "a = open('x')\nb = 1\nimport os\nc = d\n")
    assert [line.split(", line ")[1][0] for line in str(error.value).splitlines()] == [
        "1",
        "3",
        "4",
    ]


def test_what_is_no_file_of_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "latin.py").write_bytes("a = 1\nb = 'ü'\n".encode("latin-1"))
    with pytest.raises(ConfigError, match="line 2: save the file as UTF-8"):
        read_config(tmp_path / "latin.py")
    (tmp_path / "null.py").write_bytes(b"a = 1\0\n")
    with pytest.raises(ConfigError, match="null"):
        read_config(tmp_path / "null.py")
    with pytest.raises(ConfigError, match="is not a file"):
        read_config(tmp_path)
