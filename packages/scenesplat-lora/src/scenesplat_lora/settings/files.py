"""Configuration files in Python's syntax, read without ever being executed.

    _base_ = ["../_base_/runtime.py"]
    epoch = 50
    scheduler = dict(type="OneCycleLR", max_lr=[1e-4, 1e-5], total=epoch * 2)
    save_path = "exp/{{fileBasenameNoExtension}}"
    data = {{_base_.data}}

A file is a list of assignments. Values are literals, names assigned above, dict(...), tuple(...),
list(...), displays, and + - * / // of these; anything else is an error with its line. The files of
`_base_` come first and what follows is merged into them: dicts key by key, all else replaced; a
dict with `_delete_=True` replaces too. Nothing is ever imported or called.

A path in `_base_` is relative to the file. Where nothing lies there, it may name a preset that came
with the package: "../_base_/lora_runtime.py", "configs/generic/lora-finetune.py" and
"generic/lora-finetune.py" do from anywhere. The same holds for the file itself.
"""

from __future__ import annotations

import ast
import copy
import os
import warnings
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from lora_core.errors import ConfigError, listing, near, one_line
from lora_core.report import say
from scenesplat_lora.settings.values import MAX_BYTES, FileValues, target_names

MAX_FILES = 100  # that one file may lead to
CONFIGS = Path(__file__).parents[1] / "configs"  # the presets that came with the package


@dataclass
class PythonConfig:
    """What a file and its bases say together, and the place of each dotted key.

    Attributes:
        name: the file. values: nested dicts, lists, tuples, text, numbers, None.
        places: dotted key -> (file, line).
    """

    name: str
    values: dict[str, Any]
    places: dict[str, tuple[str, int]] = field(default_factory=dict)

    def place(self, key: str) -> str:
        """Say where `key` stands, as `lora.py, line 3`."""
        while key and key not in self.places:  # a part of something that came as a whole
            key = key.rpartition(".")[0]
        file, line = self.places.get(key, (self.name, 0))
        return f"{one_line(file)}, line {line}" if line else one_line(file)


def read_config(path: str | Path) -> PythonConfig:
    """Read a .py file of settings, with the files of its `_base_`.

    Raises:
        ConfigError: not a readable file of at most 1 MB of UTF-8 text, not Python's syntax, or
            anything in it that is more than values; all faults of one file together.
    """
    return _read(Path(path), (), [])


def _read(path: Path, inside: tuple[Path, ...], all_files: list[Path]) -> PythonConfig:
    """Read a file: `inside` are the files that lead to it, `all_files` those read so far."""
    here = path.resolve()
    if here in inside:
        chain = " -> ".join(one_line(file) for file in (*inside, here))
        raise ConfigError(f"{one_line(path)}: _base_ leads back to the file itself: {chain}")
    all_files.append(here)
    if len(all_files) > MAX_FILES:
        raise ConfigError(f"{one_line(path)}: _base_ leads to more than {MAX_FILES} files")
    tree = _parse(path)
    names = _base_names(path, tree)
    bases = [_read(find(name, path.parent), (*inside, here), all_files) for name in names]
    base = _united(path, bases)
    reader = FileValues(path, base.values)
    reader.statements(tree.body)
    if reader.problems:
        raise ConfigError(listing(reader.problems))
    values = merged(base.values, reader.values, one_line(path))
    return PythonConfig(str(path), values, base.places | reader.places)


# -- files -----------------------------------------------------------------------------------------


def find(name: str, folder: Path | None = None) -> Path:
    """A file of settings: in a folder, or a preset of the package with this name, which is said.

    Args:
        folder: what the name is relative to; None: the working directory.
    """
    path = Path(name) if folder is None else folder / name
    if os.path.lexists(path):  # Path.exists raises for long names
        return path
    own = packaged(name)
    if own is None:
        return path
    say(f"{one_line(path)} does not exist: the preset of scenesplat-lora is used, {own}")
    return own


def packaged(name: str) -> Path | None:
    """The package's preset that a path names: what follows its leading `..` and `configs`."""
    given = PurePosixPath(name.replace("\\", "/"))
    parts = list(given.parts)
    while parts[:1] == [".."]:
        parts = parts[1:]
    parts = parts[parts[:1] == ["configs"] :]
    if given.is_absolute() or not parts or ".." in parts:
        return None
    return CONFIGS.joinpath(*parts) if "/".join(parts) in presets() else None


def presets() -> list[str]:
    """The presets of the package, as paths in its `configs`."""
    return sorted(path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*.py"))


def _parse(path: Path) -> ast.Module:
    text = _text(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of backslashes in text, which here are just text
            return ast.parse(text)
    except SyntaxError as error:
        where = f"line {error.lineno}, column {error.offset}"
        raise ConfigError(f"{one_line(path)}, {where}: {error.msg}") from None
    except (RecursionError, MemoryError):
        raise ConfigError(f"{one_line(path)}: nested too deeply") from None
    except ValueError as error:  # a null byte, in some versions of Python
        raise ConfigError(f"{one_line(path)}: {error}") from None


def _text(path: Path) -> str:
    tried = one_line(path.absolute())
    try:
        if not path.exists():
            folder = path.absolute().parent
            names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
            hint = near(path.name, names)
            raise ConfigError(
                f"configuration file not found: {tried}{hint and '; ' + hint}. Presets that come "
                f"with the package: {', '.join(f'configs/{preset}' for preset in presets())}"
            )
        if not path.is_file():
            raise ConfigError(f"{tried} is not a file: give a .py file of settings")
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError(f"{tried} has more than {MAX_BYTES} bytes: no configuration file")
        data = path.read_bytes()
        return data.decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"cannot read {tried}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{tried}, line {line}: save the file as UTF-8") from None


def _base_names(path: Path, tree: ast.Module) -> list[str]:
    found = [node for node in tree.body if "_base_" in (target_names(node) or ())]
    if not found:
        return []
    where = f"{one_line(path)}, line {found[-1].lineno}: _base_"
    if len(found) > 1:
        raise ConfigError(f"{where} is assigned for the second time")
    match found[0]:
        case ast.Assign(value=ast.Constant(str() as name)):
            return [name]
        case ast.Assign(value=ast.List(items) | ast.Tuple(items)):
            names = [item.value for item in items if isinstance(item, ast.Constant)]
            if len(names) == len(items) and all(isinstance(name, str) for name in names):
                return [str(name) for name in names]
    raise ConfigError(f"{where} must be a path or a list of paths")


def _united(path: Path, bases: list[PythonConfig]) -> PythonConfig:
    """The bases of one file side by side."""
    together = PythonConfig(str(path), {})
    for base in bases:
        both = sorted(set(together.values) & set(base.values))
        if both:
            raise ConfigError(
                f"{one_line(path)}: two files of _base_ define {', '.join(both)}: "
                f"{together.place(both[0])} and {base.place(both[0])}"
            )
        together.values |= base.values
        together.places |= base.places
    return together


# -- merging ---------------------------------------------------------------------------------------


def merged(base: dict[str, Any], child: dict[str, Any], where: str = "") -> dict[str, Any]:
    """`child` over `base`: dicts key by key, unless `_delete_` is true; anything else replaces.

    Raises:
        ConfigError: a dict over something that is none.
    """
    result = copy.deepcopy(base)
    for key, value in child.items():
        if not isinstance(value, dict):
            result[key] = copy.deepcopy(value)
        elif value.get("_delete_") or key not in base:
            result[key] = _without_delete(value)
        elif isinstance(base[key], dict):
            result[key] = merged(base[key], value, f"{where}: {key}")
        else:
            raise ConfigError(
                f"{where}: {key} is a dict, but {type(base[key]).__name__} in _base_: "
                f"to replace it, write dict(_delete_=True, ...)"
            )
    result.pop("_delete_", None)
    return result


def _without_delete(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_delete(item) for key, item in value.items() if key != "_delete_"}
    return copy.deepcopy(value)
