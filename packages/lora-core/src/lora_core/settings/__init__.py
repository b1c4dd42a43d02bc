"""How a command's words and files become its settings, an instance of a typed dataclass.

Types are jsonargparse's; this module adds what it does not promise: flags as people write them,
files read strictly (`lora_core.settings.file`), all faults in one message, each with its place and
the nearest spelling. Nothing here imports torch, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import copy
import os
import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from lora_core.errors import ConfigError, listing, near
from lora_core.report import say
from lora_core.settings import file as config_file
from lora_core.settings import types as config_types

T = TypeVar("T")
Given = str | list[str] | None  # a flag's value: its text, the words of a list, or none

_WITHOUT_VALUE = ("help", "h", "version", "print_config", "debug")
_SECRET = re.compile(r"(_key|(^|_)(token|password|passwd|secret))$", re.IGNORECASE)


def option(default: Any, help: str, group: str = "") -> Any:
    """A dataclass field with the text and the group that `--help` shows."""
    metadata = {"help": help, "group": group}
    if isinstance(default, (list, dict, set)):
        return field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def parse(cls: type[T], argv: Sequence[str], *, prog: str, description: str = "") -> T:
    """Turn a command's words into an instance of the dataclass `cls`.

    Flags are written as people write them: `--batch_size 4`, `--batch-size=4`, a bool with or
    without a value, a list as several words, `--section.name 3`, `--options a.b=c d=e`. A field of
    type `dict[str, Any]`, such as `trainer`, collects every `--trainer.NAME value`. Settings come
    from `--config FILE` (or a first word that is a .yaml or .json file), and flags override them.
    In a description, what follows an empty line ends the help.

    Raises:
        ConfigError: all faults of the flags and files together, each with its place.
        SystemExit: with status 0 after `--help` or `--print_config`.
    """
    leaves = {leaf.key: leaf for leaf in _leaves(cls)}
    words = _unfold(list(argv), leaves)
    if any(name in ("h", "help") for name, _ in words):
        say(_help(leaves, prog, description).rstrip())
        raise SystemExit(0)
    if any(name == "version" for name, _ in words):
        package = import_module(cls.__module__.partition(".")[0])
        say(f"{prog.split()[0]} {package.__version__}")
        raise SystemExit(0)
    problems: list[str] = []
    given: dict[str, Any] = {}
    for name, value in words:
        if name == "config":
            path = str(_need(value, "config", "a file"))
            _take_file(given, config_file.read(path), leaves, problems)
    for name, value in words:
        if name != "config" and name not in _WITHOUT_VALUE:
            _take_flag(given, name, value, leaves, problems)
    named = {*given, *(name for name, _ in words)}
    for leaf in leaves.values():
        if leaf.required and leaf.key not in named:
            problems.append(
                f"--{leaf.key} is missing: {leaf.help or config_types.say_type(leaf.hint)}"
            )
    if problems:
        raise ConfigError(listing(problems))
    config = _build(cls, given)
    if any(name == "print_config" for name, _ in words):
        say(as_yaml(config).rstrip())
        raise SystemExit(0)
    return config


def dump(config: Any, path: str | Path) -> None:
    """Write the dataclass `config` as YAML that `--config` reads back equal; replace atomically."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(as_yaml(config), encoding="utf-8")
    os.replace(partial, path)


def as_yaml(config: Any) -> str:
    """Give the dataclass `config` as YAML, each setting under its help text."""
    return "\n".join(_yaml_lines(config, "")) + "\n"


def _yaml_lines(config: Any, indent: str) -> Iterator[str]:
    for item in _ordered(config):
        value = getattr(config, item.name)
        if is_dataclass(value):
            yield f"{indent}{item.name}:"
            yield from _yaml_lines(value, indent + "  ")
            continue
        if item.metadata.get("help"):
            lines = textwrap.wrap(item.metadata["help"], 96 - len(indent))
            yield from (f"{indent}# {line}" for line in lines)
        text = config_file.write(plain({item.name: value}))
        yield from (indent + line for line in text.splitlines())


def plain(value: Any) -> Any:
    """Give settings as dicts, lists, numbers and text, as files keep them.

    What a name such as `hub_token`, `api_key` or `password` stands for is left out: a file of a
    run is shown to others.
    """
    if is_dataclass(value):
        value = {item.name: getattr(value, item.name) for item in fields(value)}
    if isinstance(value, dict):
        return {str(key): _unless_secret(str(key), item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _unless_secret(name: str, value: Any) -> Any:
    return "***" if value is not None and _SECRET.search(name) else plain(value)


@dataclass(frozen=True)
class _Leaf:
    """One setting: its dotted key, its type, and what `--help` says of it."""

    key: str
    hint: Any
    default: Any
    help: str
    group: str

    @property
    def required(self) -> bool:
        return self.default is MISSING

    @property
    def is_dict(self) -> bool:
        return get_origin(self.hint) is dict

    @property
    def is_list(self) -> bool:
        return any(get_origin(kind) in (list, tuple, set) for kind in config_types.kinds(self.hint))


def _leaves(cls: Any, prefix: str = "", parent: Any = None) -> Iterator[_Leaf]:
    """List the settings of a dataclass; a field that is a dataclass is a section with a dot."""
    hints = get_type_hints(cls)
    for item in _ordered(cls):
        if not item.init:
            continue
        key, hint = prefix + item.name, hints[item.name]
        default = getattr(parent, item.name) if parent is not None else _default(item)
        if is_dataclass(hint):
            yield from _leaves(hint, f"{key}.", None if default is MISSING else default)
            continue
        help = item.metadata.get("help", "")
        if item.name == "trainer" and not help:
            help = "Any other field of transformers.TrainingArguments."
        yield _Leaf(key, hint, default, help, item.metadata.get("group") or prefix[:-1])


def _ordered(config: Any) -> list[Any]:
    """The fields of a dataclass, first those of the groups that its `group_order` names."""
    order = {name: place for place, name in enumerate(getattr(config, "group_order", ()))}
    return sorted(
        fields(config), key=lambda item: order.get(item.metadata.get("group"), len(order))
    )


def _default(item: Any) -> Any:
    return item.default if item.default_factory is MISSING else item.default_factory()


def _build(cls: Any, given: dict[str, Any], prefix: str = "", parent: Any = None) -> Any:
    """Make the dataclass from the settings that were given; the others keep their defaults."""
    hints = get_type_hints(cls)
    values: dict[str, Any] = {}
    for item in fields(cls):
        key, hint = prefix + item.name, hints[item.name]
        if key in given:
            values[item.name] = given[key]
        elif is_dataclass(hint):
            default = getattr(parent, item.name) if parent is not None else _default(item)
            values[item.name] = _build(
                hint, given, f"{key}.", None if default is MISSING else default
            )
    return replace(parent, **values) if parent is not None else cls(**values)


# -- words of the command line ---------------------------------------------------------------------


def _unfold(argv: list[str], leaves: dict[str, _Leaf]) -> list[tuple[str, Given]]:
    """Bring the words into one form: (dotted name, its value)."""
    if argv and re.search(r"\.(json|ya?ml)$", argv[0], re.IGNORECASE) and argv[0][0] != "-":
        argv = ["--config", *argv]
    pairs: list[tuple[str, Given]] = []
    while argv:
        word = argv.pop(0)
        if not _is_flag(word):
            after = f" after --{pairs[-1][0]}" if pairs else ""
            raise ConfigError(f"unexpected word {word!r}{after}: settings are written --NAME VALUE")
        name, equals, text = word.lstrip("-").partition("=")
        name = name.replace("-", "_")
        name = "config" if name == "config_file" else name
        values = [text] if equals else []
        leaf = leaves.get(name)
        many = name == "options" or (leaf is not None and leaf.is_list)
        while not equals and argv and not _is_flag(argv[0]) and (many or not values):
            if name in _WITHOUT_VALUE:
                break
            values.append(argv.pop(0))
        if name == "options":
            pairs += [_split_option(item) for item in values]
        elif leaf is not None and leaf.is_list and values:
            pairs.append((name, _as_list(leaf, values)))
        else:
            pairs.append((name, values[0] if values else None))
    return pairs


def _is_flag(word: str) -> bool:
    """Tell `--name` and `-h` from values, among them `-1` and `-.5`."""
    return re.match(r"--?[A-Za-z_]", word) is not None


def _split_option(item: str) -> tuple[str, str]:
    name, equals, text = item.partition("=")
    if not equals or not all(name.split(".")):
        raise ConfigError(f"--options {item!r}: expected NAME=VALUE such as lora.r=8")
    return name.replace("-", "_"), text


def _as_list(leaf: _Leaf, values: list[str]) -> str | list[str]:
    """The words of a list: as they are where text is expected, else as YAML has them."""
    if len(values) == 1 and re.fullmatch(r"\[.*\]", values[0], re.DOTALL):
        return values[0]
    items = {arg for kind in config_types.kinds(leaf.hint) for arg in get_args(kind)}
    return values if str in items or not items else f"[{', '.join(values)}]"


def _need(value: Given, name: str, what: str) -> str | list[str]:
    if value is None:
        raise ConfigError(f"--{name} needs a value: {what}")
    return value


def _take_flag(
    given: dict[str, Any],
    name: str,
    value: Given,
    leaves: dict[str, _Leaf],
    problems: list[str],
) -> None:
    """Put one flag into `given`, or what is wrong with it into `problems`."""
    leaf = leaves.get(name) or leaves.get(name.partition(".")[0])
    try:
        if leaf is None or (leaf.key != name and not (leaf.is_dict and all(name.split(".")))):
            raise ConfigError(_unknown(name, leaves, "--"))
        if leaf.is_dict:
            path = name.removeprefix(leaf.key).split(".")[1:]
            _put(given, leaf, path, True if value is None else config_file.value(str(value)))
            return
        if value is None and bool in config_types.kinds(leaf.hint):
            value = "true"
        value = _need(value, name, config_types.say_type(leaf.hint))
        is_text = isinstance(value, str)
        given[name] = config_types.accept(leaf.hint, value, f"--{name}", flag=is_text)
    except ConfigError as error:
        problems.append(str(error))


def _put(given: dict[str, Any], leaf: _Leaf, path: list[str], value: Any) -> None:
    """Set one entry of a dict field; without a path, `value` holds several."""
    if not path and not isinstance(value, dict):
        raise ConfigError(f"--{leaf.key} is written --{leaf.key}.NAME VALUE")
    target = given.setdefault(leaf.key, copy.deepcopy(leaf.default))
    for part in path[:-1]:
        target = target.setdefault(part, {})
        if not isinstance(target, dict):
            raise ConfigError(f"--{leaf.key}.{'.'.join(path)}: {part} is a single value")
    target.update({path[-1]: value} if path else value)


def _take_file(
    given: dict[str, Any],
    file: config_file.ConfigFile,
    leaves: dict[str, _Leaf],
    problems: list[str],
) -> None:
    """Put a file's settings into `given`; unknown keys and wrong types into `problems`."""

    def walk(values: dict[str, Any], prefix: str) -> None:
        for name, value in values.items():
            key = prefix + name
            leaf = leaves.get(key)
            place = f"{file.place(key)}: {key}"
            try:
                if leaf is None and _is_section(key, leaves) and isinstance(value, dict):
                    walk(value, f"{key}.")
                elif leaf is None:
                    raise ConfigError(f"{file.place(key)}: {_unknown(key, leaves)}")
                elif leaf.is_dict and isinstance(value, dict):
                    config_types.refuse_words(value, place)
                    _put(given, leaf, [], value)
                else:
                    given[key] = config_types.accept(leaf.hint, value, place)
            except ConfigError as error:
                problems.append(str(error))

    walk(file.values, "")


def _is_section(key: str, leaves: dict[str, _Leaf]) -> bool:
    return any(other.startswith(f"{key}.") for other in leaves)


def _unknown(name: str, leaves: dict[str, _Leaf], dashes: str = "") -> str:
    kind = "flag" if dashes else "setting"
    if _is_section(name, leaves):
        return f"{dashes}{name} is a section: set its parts, such as {dashes}{name}.NAME"
    parent = name.rpartition(".")[0]
    if parent in leaves and leaves[parent].is_dict:
        return f"{dashes}{name}: {dashes}{parent} is written {dashes}{parent}.NAME VALUE"
    if parent in leaves:
        return f"unknown {kind} {dashes}{name}: {dashes}{parent} is a single value, without parts"
    sections = dict.fromkeys(key.rpartition(".")[0] for key in leaves if "." in key)
    words = (*leaves, *sections, "config", "print_config", "version")
    if not dashes and name in ("config", *_WITHOUT_VALUE):
        return f"{name} is a flag of the command line, --{name}, and no setting of a file"
    hint = near(dashes + name, [dashes + key for key in words])
    return f"unknown {kind} {dashes}{name}; {hint or 'see --help'}"


# -- help ------------------------------------------------------------------------------------------


def _help(leaves: dict[str, _Leaf], prog: str, description: str) -> str:
    first, _, end = description.partition("\n\n")
    parser = argparse.ArgumentParser(
        prog=prog,
        usage="%(prog)s [FILE.yaml] [--NAME VALUE ...]",
        description=first,
        epilog=end,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32),
        add_help=False,
    )
    general = parser.add_argument_group("general")
    general.add_argument("-h", "--help", action="store_true", help="Show this text.")
    general.add_argument("--version", action="store_true", help="Show the version.")
    general.add_argument("--config", metavar="FILE", help="Read settings from YAML or JSON.")
    general.add_argument("--print_config", action="store_true", help="Show all settings as YAML.")
    general.add_argument("--options", metavar="A.B=C", help="Several settings as NAME=VALUE words.")
    general.add_argument("--debug", action="store_true", help="Keep the traceback of an error.")
    groups: dict[str, Any] = {}
    for leaf in sorted(leaves.values(), key=lambda leaf: not leaf.required):  # required first
        title = leaf.group or (leaf.key if leaf.is_dict else "settings")
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        name = f"--{leaf.key}" + (".NAME" if leaf.is_dict else "")
        text = (leaf.help + _say_default(leaf)).strip().replace("%", "%%")
        groups[title].add_argument(name, metavar=config_types.metavar(leaf.hint), help=text)
    return parser.format_help()


def _say_default(leaf: _Leaf) -> str:
    if leaf.required:
        return " (required)"
    if leaf.is_dict or leaf.default is None or leaf.default == "":
        return ""
    if isinstance(leaf.default, (list, tuple)):
        return f" (default: {' '.join(map(str, leaf.default)) or 'none'})"
    default = str(leaf.default).lower() if isinstance(leaf.default, bool) else leaf.default
    return f" (default: {default})"
