"""Configuration files read strictly: YAML or JSON to plain values, each with the line it stands on.

YAML follows its 1.2 core schema, so `1e-4` is a number and `010` or `12:30` are text. What other
readers pass over in silence is an error here: a key that stands twice, and the words yes, no, on
and off where it is not clear whether a name or a truth value is meant (see `Word`).
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import yaml

from lora_core.errors import ConfigError, near, printable

MAX_BYTES = 1_000_000
MAX_DEPTH = 40
MAX_VALUES = 100_000  # counted with aliases expanded: nine levels of nine aliases stop here
_TAG = "tag:yaml.org,2002:"
_FLOAT = re.compile(
    r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"
)
_WORDS = re.compile(r"^(yes|no|on|off)$", re.IGNORECASE)


class Word(str):
    """An unquoted yes, no, on or off: true and false to some readers, a name to others."""


@dataclass
class ConfigFile:
    """What a file says: nested values, and the line of each key by its dotted path."""

    name: str
    values: dict[str, Any]
    lines: dict[str, int] = field(default_factory=dict)

    def place(self, key: str) -> str:
        """Say where `key` stands, as `run.yaml, line 3`."""
        line = self.lines.get(key)
        return f"{self.name}, line {line}" if line else self.name


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: ClassVar[dict[str, list[Any]]] = {}  # type: ignore[misc]


class _Dumper(yaml.SafeDumper):
    """Quotes what either YAML 1.1 or our reader would not read back as text."""


_Loader.add_implicit_resolver(
    f"{_TAG}bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    f"{_TAG}null", re.compile(r"^(~|null|Null|NULL|)$"), ["~", "n", "N", ""]
)
_Loader.add_implicit_resolver(
    f"{_TAG}int", re.compile(r"^[-+]?(0|[1-9][0-9]*)$"), list("-+0123456789")
)
for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(f"{_TAG}float", _FLOAT, list("-+.0123456789"))


def read(path: str | Path) -> ConfigFile:
    """Read a .yaml, .yml or .json file of settings.

    Raises:
        ConfigError: not a readable regular file of at most 1 MB of UTF-8 text, not a mapping, a
            syntax error, a key that stands twice, a tag, or deep nesting; with line and column.
    """
    path = Path(path)
    try:
        text = _read_text(path)
    except OSError as error:
        name = printable(str(path.absolute())[:200])
        raise ConfigError(f"cannot read {name}: {error.strerror}") from None
    if path.suffix.lower() == ".json":
        _check_json(path, text)
        text = text.replace("\t", " ")  # JSON is YAML but for tabs between its tokens
    try:
        root = yaml.compose(text, _Loader)
    except yaml.MarkedYAMLError as error:
        raise ConfigError(f"{path}{_position(error.problem_mark)}: {_problem(error)}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: {str(error).splitlines()[0]}") from None
    except RecursionError:
        raise ConfigError(f"{path}: nested too deeply (limit {MAX_DEPTH} levels)") from None
    if root is None:
        raise ConfigError(f"{path}: the file is empty, expected settings such as 'seed: 1'")
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(
            f"{path}: expected settings such as 'seed: 1', not a single value or list"
        )
    walk = _Walk(str(path))
    return ConfigFile(str(path), walk.mapping(root, "", 0), walk.lines)


def value(text: str) -> Any:
    """Read one value as a file would: `3`, `1e-4`, `true`, `[a, b]`; other text stays text."""
    try:
        node = yaml.compose(text, _Loader)
    except (yaml.YAMLError, RecursionError):
        return text
    walk = _Walk("the command line", keep_words=False)
    return walk.value(node, "", 0) if node is not None else None


def write(values: dict[str, Any]) -> str:
    """Give `values` as YAML that `read` reads back equal."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


@dataclass
class _Walk:
    """Turns YAML nodes into plain values, and remembers the lines of the keys."""

    name: str
    lines: dict[str, int] = field(default_factory=dict)
    count: int = 0
    keep_words: bool = True

    def value(self, node: yaml.Node, key: str, depth: int) -> Any:
        self.count += 1
        if depth > MAX_DEPTH:
            raise self.error(node, f"nested too deeply (limit {MAX_DEPTH} levels)")
        if self.count > MAX_VALUES:
            raise self.error(node, f"more than {MAX_VALUES} values once its aliases are expanded")
        if isinstance(node, yaml.MappingNode) and node.tag == f"{_TAG}map":
            return self.mapping(node, f"{key}." if key else "", depth)
        if isinstance(node, yaml.SequenceNode) and node.tag == f"{_TAG}seq":
            return [self.value(item, key, depth + 1) for item in node.value]
        if isinstance(node, yaml.ScalarNode):
            return self.scalar(node)
        raise self.error(node, f"the tag {node.tag} is not allowed")

    def mapping(self, node: yaml.MappingNode, prefix: str, depth: int) -> dict[str, Any]:
        values: dict[str, Any] = {}
        first: dict[str, int] = {}
        for key_node, value_node in node.value:
            key = self.key(key_node)
            line = key_node.start_mark.line + 1
            if key in first:
                lines = f"lines {first[key]} and {line}"
                raise ConfigError(f"{self.name}: {prefix}{key} stands twice, on {lines}")
            first[key] = self.lines[f"{prefix}{key}"] = line
            values[key] = self.value(value_node, f"{prefix}{key}", depth + 1)
        return values

    def key(self, node: yaml.Node) -> str:
        if not isinstance(node, yaml.ScalarNode):
            raise self.error(node, "a key must be a name")
        if isinstance(self.scalar(node), (Word, bool, type(None))):
            raise self.error(node, f"put the key {node.value!r} in quotes")
        return str(node.value)

    def scalar(self, node: yaml.ScalarNode) -> Any:
        kind, text = node.tag.removeprefix(_TAG), str(node.value)
        if kind == "str":
            unclear = self.keep_words and node.style is None and _WORDS.match(text)
            return Word(text) if unclear else _join_surrogates(text)
        try:
            match kind:
                case "int":
                    return int(text)
                case "float":
                    return float(re.sub(r"\.(?=inf|nan)", "", text.lower()))
                case "bool":
                    return text.lower() == "true"
                case "null":
                    return None
        except ValueError:
            raise self.error(node, f"{text[:40]!r} is no usable number") from None
        raise self.error(node, f"the tag {node.tag} is not allowed")

    def error(self, node: yaml.Node, text: str) -> ConfigError:
        return ConfigError(f"{self.name}{_position(node.start_mark)}: {text}")


def _join_surrogates(text: str) -> str:
    """JSON writes a character outside the basic plane as two escapes, which YAML keeps apart."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _read_text(path: Path) -> str:
    tried = path.absolute()
    if not path.exists():
        folder = tried.parent
        names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
        hint = near(path.name, names)
        raise ConfigError(f"configuration file not found: {tried}{hint and '; ' + hint}")
    if not path.is_file():
        raise ConfigError(f"{tried} is not a file: give a .yaml or .json file of settings")
    if path.stat().st_size > MAX_BYTES:
        raise ConfigError(f"{tried} has more than {MAX_BYTES} bytes: that is no configuration file")
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        column = error.start - data.rfind(b"\n", 0, error.start)
        raise ConfigError(f"{path}, line {line}, column {column}: save the file as UTF-8") from None


def _check_json(path: Path, text: str) -> None:
    def refuse(constant: str) -> None:
        raise ConfigError(f"{path}: {constant} is not a number in JSON")

    try:
        json.loads(text, parse_constant=refuse)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise ConfigError(f"{path}, {where}: not JSON: {error.msg}") from None
    except RecursionError:
        raise ConfigError(f"{path}: nested too deeply (limit {MAX_DEPTH} levels)") from None
    except ConfigError:
        raise
    except ValueError:  # more digits than Python converts to a whole number
        raise ConfigError(f"{path}: a number has thousands of digits") from None


def _position(mark: yaml.Mark | None) -> str:
    return f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""


def _problem(error: yaml.MarkedYAMLError) -> str:
    problem = error.problem or "not YAML"
    if "'\\t'" in problem:
        return "a tab; indent with spaces"
    return f"not YAML: {error.context + ', ' if error.context else ''}{problem}"
