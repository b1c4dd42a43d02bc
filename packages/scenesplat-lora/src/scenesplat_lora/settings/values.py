"""The values in a configuration file of Python's syntax: computed from its tree, never executed."""

from __future__ import annotations

import ast
import copy
import operator
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lora_core.errors import near, one_line

MAX_DEPTH = 40  # of values in values
MAX_VALUES = 100_000  # of all values of a file, those of names counted wherever they are used
MAX_BYTES = 1_000_000  # of a file, and of the text that it puts together
MAX_NUMBER = 2**63
RESERVED = ("filename", "text", "pretty_text")  # attributes of the official configuration object
OPERATORS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
}
_OF_BASE = re.compile(r"\{\{\s*_base_\.([\w.]+)\s*\}\}")
_OF_FILE = re.compile(
    r"\{\{\s*(fileDirname|fileBasename|fileBasenameNoExtension|fileExtname)\s*\}\}"
)


class _Refused(Exception):
    """What an expression must not be, and where."""

    def __init__(self, node: ast.AST, text: str) -> None:
        super().__init__(text)
        self.line = getattr(node, "lineno", 0)


class FileValues:
    """Turns the statements of one file into values."""

    def __init__(self, path: Path, base: dict[str, Any]) -> None:
        self.path = path
        self.base = base
        self.values: dict[str, Any] = {}
        self.places: dict[str, tuple[str, int]] = {}
        self.problems: list[str] = []
        self.failed: set[str] = set()  # names whose own line has a fault already
        self.count = 0  # of values
        self.letters = 0  # of text that was put together

    def statements(self, body: list[ast.stmt]) -> None:
        for node in body:
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                continue  # a text that explains the file
            names = target_names(node)
            try:
                if names is None or ("_base_" in names and names != ["_base_"]):
                    raise _Refused(node, f"{_say(node)}: only NAME = VALUE may stand here")
                if names != ["_base_"]:
                    self.assign(names, node)
            except _Refused as error:
                self.failed |= set(names or ())
                self.problems.append(f"{one_line(self.path)}, line {error.line}: {error}")

    def assign(self, names: list[str], node: ast.stmt) -> None:
        assert isinstance(node, (ast.Assign, ast.AnnAssign))
        assert node.value is not None
        for name in names:
            if name in RESERVED:
                raise _Refused(node, f"the name {name!r} is reserved")
            if name.startswith("__"):
                raise _Refused(node, f"names must not begin with two underscores: {name!r}")
        for name in names:
            value = self.value(node.value, name, 0)
            if _depth(value) > MAX_DEPTH:  # by way of names: every line could add a level
                raise _Refused(node, f"nested too deeply (limit {MAX_DEPTH} levels)")
            self.values[name] = value
            self.places[name] = (str(self.path), node.lineno)

    def value(self, node: ast.expr, key: str, depth: int) -> Any:
        self.count += 1
        if depth > MAX_DEPTH:
            raise _Refused(node, f"nested too deeply (limit {MAX_DEPTH} levels)")
        if self.count > MAX_VALUES:
            raise _Refused(node, f"more than {MAX_VALUES} values")
        match node:
            case ast.Constant():
                return self.constant(node)
            case ast.Name():
                return self.name(node)
            case ast.List() | ast.Tuple():
                items = [self.value(i, f"{key}.{n}", depth + 1) for n, i in enumerate(node.elts)]
                return items if isinstance(node, ast.List) else tuple(items)
            case ast.Dict():
                return self.entries(
                    node, list(zip(node.keys, node.values, strict=True)), key, depth
                )
            case ast.Set(elts=[ast.Set(elts=[ast.Attribute() as inner])]):  # {{_base_.x.y}}
                return self.of_base(node, _dotted(inner))
            case ast.Call():
                return self.call(node, key, depth)
            case ast.BinOp() if type(node.op) in OPERATORS:
                left, right = (self.value(n, key, depth + 1) for n in (node.left, node.right))
                return self.computed(node, OPERATORS[type(node.op)], left, right)
            case ast.UnaryOp(op=ast.USub() | ast.UAdd() as sign, operand=operand):
                number = self.value(operand, key, depth + 1)
                if not _is_number(number):
                    raise _Refused(node, f"a sign before {number!r:.40}, which is no number")
                return -number if isinstance(sign, ast.USub) else number
        raise _Refused(node, f"{_say(node)} is not allowed: configuration files are not executed")

    def constant(self, node: ast.Constant) -> Any:
        value = node.value
        if isinstance(value, str):
            return self.text(node, value)
        if value is not None and not isinstance(value, (bool, int, float)):
            raise _Refused(node, f"{value!r:.40} is no text, number, True, False or None")
        if value is not None and not abs(value) < MAX_NUMBER:
            raise _Refused(node, "a number beyond 2^63")
        return value

    def text(self, node: ast.Constant, text: str) -> Any:
        """Text with what {{...}} stands for; a lone {{_base_.key}} keeps that value's type."""
        text = _OF_FILE.sub(lambda found: self.of_file(found[1]), text)
        whole = _OF_BASE.fullmatch(text)
        if whole:
            return self.of_base(node, f"_base_.{whole[1]}")
        return _OF_BASE.sub(lambda found: self.part_of_text(node, found[1]), text)

    def part_of_text(self, node: ast.Constant, key: str) -> str:
        value = self.of_base(node, f"_base_.{key}")
        if not isinstance(value, str):
            raise _Refused(node, f"_base_.{key} is {value!r:.40}: only text can be part of a text")
        self.count_letters(node, value)
        return value

    def count_letters(self, node: ast.AST, text: str) -> None:
        self.letters += len(text)
        if self.letters > MAX_BYTES:
            raise _Refused(node, f"more than {MAX_BYTES} characters of text are put together")

    def of_file(self, what: str) -> str:
        place = self.path.absolute()
        return {
            "fileDirname": place.parent.as_posix(),
            "fileBasename": place.name,
            "fileBasenameNoExtension": place.stem,
            "fileExtname": place.suffix,
        }[what]

    def of_base(self, node: ast.AST, dotted: str) -> Any:
        first, *keys = dotted.split(".")
        value: Any = self.base
        for key in keys:
            if isinstance(value, (list, tuple)) and key.isdecimal() and int(key) < len(value):
                value = value[int(key)]
            elif first == "_base_" and isinstance(value, dict) and key in value:
                value = value[key]
            else:
                raise _Refused(node, f"{{{{{dotted}}}}}: the files of _base_ have no such value")
        return self.copied(node, value)

    def name(self, node: ast.Name) -> Any:
        if node.id in self.values:
            return self.copied(node, self.values[node.id])
        if node.id in self.failed:
            raise _Refused(node, f"{node.id!r} has no value, see above")
        hint = near(node.id, self.values)
        if node.id in self.base:
            hint = f"a value of _base_ is written {{{{_base_.{node.id}}}}}"
        raise _Refused(node, f"the name {node.id!r} is not defined above{hint and '; ' + hint}")

    def copied(self, node: ast.AST, value: Any) -> Any:
        self.count += _size(value)
        if self.count > MAX_VALUES:
            raise _Refused(node, f"more than {MAX_VALUES} values")
        return copy.deepcopy(value)

    def call(self, node: ast.Call, key: str, depth: int) -> Any:
        match node:
            case ast.Call(func=ast.Name("dict"), args=[]):
                pairs = [
                    (None if word.arg is None else ast.Constant(word.arg), word.value)
                    for word in node.keywords
                ]
                return self.entries(node, pairs, key, depth)
            case ast.Call(func=ast.Name("tuple" | "list" as kind), args=[inner], keywords=[]):
                items = self.value(inner, key, depth + 1)
                if not isinstance(items, (list, tuple)):
                    raise _Refused(node, f"{kind}() of something that is no list or tuple")
                return tuple(items) if kind == "tuple" else list(items)
        raise _Refused(node, f"the call {_say(node)} is not allowed: only dict(a=1, ...)")

    def entries(
        self, node: ast.AST, pairs: Sequence[tuple[ast.expr | None, ast.expr]], key: str, depth: int
    ) -> dict[str, Any]:
        """A dict; a pair without a name is `**other`, whose entries may be written anew."""
        found: dict[str, Any] = {}
        named: set[str] = set()
        for name_node, value_node in pairs:
            if name_node is None:
                other = self.value(value_node, key, depth + 1)
                if not isinstance(other, dict):
                    raise _Refused(value_node, "** of something that is no dict")
                found |= other
                continue
            if not isinstance(name_node, ast.Constant) or not isinstance(name_node.value, str):
                raise _Refused(name_node, "the keys of a dict must be text")
            name = name_node.value
            if name in named:
                raise _Refused(value_node, f"the key {name!r} stands twice in one dict")
            named.add(name)
            found[name] = self.value(value_node, f"{key}.{name}", depth + 1)
            self.places[f"{key}.{name}"] = (str(self.path), value_node.lineno)
        return found

    def computed(
        self, node: ast.AST, operate: Callable[[Any, Any], Any], left: Any, right: Any
    ) -> Any:
        """The result of + - * / //, with limits on what it may become."""
        if operate is operator.mul:
            _check_repetition(node, left, right)
        if isinstance(left, dict) or isinstance(right, dict):
            raise _Refused(node, "dicts are joined as dict(**one, ...)")
        try:
            result = operate(left, right)
        except ZeroDivisionError:
            raise _Refused(node, "a division by zero") from None
        except (TypeError, OverflowError) as error:
            raise _Refused(node, str(error)) from None
        if isinstance(result, str):
            self.count_letters(node, result)
        if _is_number(result) and not abs(result) < MAX_NUMBER:
            raise _Refused(node, "a number beyond 2^63")
        if isinstance(result, (list, tuple)):
            self.count += _size(result)
            if self.count > MAX_VALUES:
                raise _Refused(node, f"more than {MAX_VALUES} values")
        return result


def _check_repetition(node: ast.AST, left: Any, right: Any) -> None:
    for many, times in ((left, right), (right, left)):
        if isinstance(many, (str, list, tuple)) and _is_number(times):
            most = MAX_BYTES if isinstance(many, str) else MAX_VALUES
            size = len(many) if isinstance(many, str) else _size(many)
            if size * max(times, 0) > most:
                raise _Refused(node, f"a repetition to more than {most} values or characters")


def target_names(node: ast.stmt) -> list[str] | None:
    """The names on the left of an assignment; None if it is none, or assigns to parts."""
    if isinstance(node, ast.AnnAssign):
        return [node.target.id] if isinstance(node.target, ast.Name) and node.value else None
    if not isinstance(node, ast.Assign):
        return None
    names = [target.id for target in node.targets if isinstance(target, ast.Name)]
    return names if len(names) == len(node.targets) else None


def _size(value: Any) -> int:
    if isinstance(value, dict):
        return 1 + sum(map(_size, value.values()))
    if isinstance(value, (list, tuple)):
        return 1 + sum(map(_size, value))
    return 1


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _depth(value: Any) -> int:
    """Levels of dicts, lists and tuples; at most twice MAX_DEPTH can have been put together."""
    if isinstance(value, dict):
        value = list(value.values())
    return 1 + max(map(_depth, value), default=0) if isinstance(value, (list, tuple)) else 0


def _dotted(node: ast.expr) -> str:
    """`a.b.c` of nested attributes; "" if it is anything else."""
    names = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return ".".join([node.id, *names[::-1]]) if isinstance(node, ast.Name) else ""


def _say(node: ast.AST) -> str:
    """A piece of the file, at most 40 characters of its first line."""
    try:
        first = ast.unparse(node).splitlines()[0]
    except RecursionError:
        return "this"
    return repr(first if len(first) <= 40 else f"{first[:40]}...")
