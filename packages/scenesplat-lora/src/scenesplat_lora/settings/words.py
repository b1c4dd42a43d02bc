"""The guide's command line, `--config-file x.py --options a.b=c`, for `lora_core.config.parse`.

A file in Python's syntax is read by `config_files`, never executed, and handed on as JSON with the
same content. Each of its values is checked here, where its file and line are known.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from lora_core.errors import ConfigError, listing, near
from lora_core.settings import types as setting_types
from scenesplat_lora.config import Config
from scenesplat_lora.settings.files import PythonConfig, find, read_config
from scenesplat_lora.settings.options import parse_value

# Flags of the official launcher, and the value that means what happens anyway.
LAUNCHER = {
    "--num-gpus": "1", "--num-machines": "1", "--machine-rank": "0", "--dist-url": "auto",
}  # fmt: skip
# What a preset stands for: named on the command line it replaces a file's own.
OF_PRESET = ("r", "lora_alpha", "target_modules", "enable_prompt", "encoder_only", "target_stages")


@contextmanager
def for_parser(argv: Sequence[str]) -> Iterator[list[str]]:
    """The words with every .py file replaced by a temporary JSON file of the same settings.

    Raises:
        ConfigError: a file that cannot be read, or settings in it that are unknown or of another
            type; all of them, each with its place.
    """
    with tempfile.TemporaryDirectory(prefix="scenesplat-settings-") as folder:
        words: list[str] = []
        backbone: dict[str, Any] = {}
        options = False
        preset = any(re.match(r"(--)?lora\.preset(=|$)", word) for word in argv)
        for word in _without_backbone(_without_launcher(_split_flags(argv)), backbone):
            after_config = words[-1:] == ["--config"]
            if word.startswith("--"):
                options = word == "--options"
            if after_config and word.endswith(".py"):
                path = Path(folder) / f"settings{len(words)}.json"
                values = file_settings(find(word), without_preset=preset)
                path.write_text(json.dumps(values), "utf-8")
                words.append(str(path))
            else:
                words.append(_option(word) if options and not word.startswith("--") else word)
        if backbone:
            path = Path(folder) / "backbone.json"
            path.write_text(json.dumps({"model": {"backbone": backbone}}), "utf-8")
            words += ["--config", str(path)]
        yield words


def _without_backbone(argv: Sequence[str], backbone: dict[str, Any]) -> list[str]:
    """The words without settings of the network's fields, which go into `backbone`.

    Its fields are those of PT-v3m1 and no settings of their own for the parser.
    """
    words: list[str] = []
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        match = re.fullmatch(r"(--)?model\.backbone\.(\w+)(?:=(.*))?", word, re.DOTALL)
        if match is None or (match[1] is None and match[3] is None):
            words.append(word)
            continue
        text = match[3]
        if text is None:
            if not rest or rest[0].startswith("--"):
                raise ConfigError(f"{word} needs a value")
            text = rest.pop(0)
        backbone[match[2]] = _listed(parse_value(text))
    return words


def _split_flags(argv: Sequence[str]) -> list[str]:
    """`--config-file=x.py` as two words, and `--config_file` with its hyphen."""
    words: list[str] = []
    for word in argv:
        match = re.fullmatch(r"--config(?:[-_]file)?(?:=(.*))?", word, re.DOTALL)
        if match is None:
            words.append(word)
        else:
            words += ["--config", match[1]] if match[1] is not None else ["--config"]
    return words


def _without_launcher(argv: Sequence[str]) -> list[str]:
    """The words without flags of the official launcher, which start one process as we do.

    Raises:
        ConfigError: they ask for more than one process or machine.
    """
    words: list[str] = []
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        flag, equals, text = word.partition("=")
        flag = flag.replace("_", "-")
        if flag == "--multi-node":
            raise ConfigError(f"{word}: start every machine with torchrun --nnodes")
        if flag not in LAUNCHER:
            words.append(word)
            continue
        text = text if equals else (rest.pop(0) if rest else "")
        if text != LAUNCHER[flag]:
            raise ConfigError(
                f"{flag} {text}: several processes are started by torchrun --nproc_per_node "
                f"{text if flag == '--num-gpus' else 'N'} tools/train_lora.py ..., without {flag}"
            )
    return words


# -- files ---------------------------------------------------------------------------------------


def file_settings(path: Path, without_preset: bool = False) -> dict[str, Any]:
    """The settings of a .py file as nested dicts with the names of `Config`.

    Args:
        without_preset: leave out what a preset on the command line stands for.

    Raises:
        ConfigError: unknown settings or wrong types, all of them with file and line.
    """
    file = read_config(path)
    values = _lora_at_top(file)
    if without_preset and isinstance(values.get("lora"), Mapping):
        values["lora"] = {k: v for k, v in values["lora"].items() if k not in OF_PRESET}
    problems: list[str] = []
    known = _fitted(Config, values, "", file, problems)
    if problems:
        raise ConfigError(listing(problems))
    return known


def _lora_at_top(file: PythonConfig) -> dict[str, Any]:
    """`model.lora`, as older files have it, at its place at the top."""
    values = dict(file.values)
    model = values.get("model")
    if isinstance(model, Mapping) and "lora" in model:
        if "lora" in values:
            raise ConfigError(
                f"{file.place('model.lora')}: model.lora and lora ({file.place('lora')}): "
                "keep one of them"
            )
        values["lora"] = model["lora"]
        values["model"] = {key: value for key, value in model.items() if key != "lora"}
    return values


def _fitted(
    cls: Any, values: Mapping[str, Any], prefix: str, file: PythonConfig, problems: list[str]
) -> dict[str, Any]:
    """The values of one section; what does not fit goes into `problems`."""
    hints = get_type_hints(cls)
    known = {item.name: hints[item.name] for item in fields(cls)}
    fitted: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        place = f"{file.place(key)}: {key}"
        if name not in known:
            hint = near(name, known)
            problems.append(f"{file.place(key)}: unknown setting {key}; {hint or 'see --help'}")
        elif is_dataclass(known[name]):
            if isinstance(value, Mapping):
                fitted[name] = _fitted(known[name], value, f"{key}.", file, problems)
            else:
                problems.append(f"{place} is a section: expected dict(...), not {value!r:.80}")
        else:
            try:
                fitted[name] = _accepted(known[name], value, place)
            except ConfigError as error:
                problems.append(str(error))
    return fitted


def _accepted(hint: Any, value: Any, place: str) -> Any:
    """A value in the type of its setting; tuples are lists, and one item of a list may be alone."""
    value = _listed(value)
    lists = [kind for kind in setting_types.kinds(hint) if get_origin(kind) is list]
    if lists and get_args(lists[0]) == (str,) and isinstance(value, str):
        value = [value]
    if hint == dict[str, Any]:
        if not isinstance(value, dict):
            raise ConfigError(f"{place}: expected dict(...), not {value!r:.80}")
        return value
    return setting_types.accept(hint, value, place)


def _listed(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_listed(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _listed(item) for key, item in value.items()}
    return value


# -- options -------------------------------------------------------------------------------------


def _option(word: str) -> str:
    """`a.b=1,2` and `a.b=(1,2)` as `a.b=[1, 2]` where a list is expected; None as null."""
    name, equals, text = word.partition("=")
    kinds = setting_types.kinds(_hint(name))
    if not equals:
        return word
    if text == "None" and type(None) in kinds:
        return f"{name}=null"
    is_list = any(get_origin(kind) is list for kind in kinds)
    if not is_list or text in ("null", "") or "{" in text:  # dicts are written as JSON has them
        return word
    value = _listed(parse_value(text))
    return f"{name}={json.dumps(value if isinstance(value, list) else [value])}"


def _hint(name: str) -> Any:
    """The type of a setting by its dotted name; None: there is none."""
    cls: Any = Config
    for part in name.split("."):
        cls = get_type_hints(cls).get(part) if is_dataclass(cls) else None
    return cls
