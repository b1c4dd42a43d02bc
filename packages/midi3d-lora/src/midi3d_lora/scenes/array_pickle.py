"""Dictionaries of arrays that `np.save` has pickled, read without running the pickle.

The published surfaces of 3D-FRONT are such files: `{"surface_points": [N, 3], ...}`. A pickle is a
program; here its instructions are decoded by `pickletools`, which runs nothing, and those few are
followed that numbers, text, bytes and arrays need. No name that a pickle holds is looked up.
"""

from __future__ import annotations

import pickletools
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from lora_core.data_file import open_regular
from lora_core.errors import DataError, one_line
from lora_core.npy_file import read_header

SURFACE = ("surface_points", "surface_normals")
MAX_BYTES = 2**30  # of a file; the published ones have some 50 MB
MAX_STEPS = 10_000  # instructions; a dictionary of two arrays has about 100
PLAIN = {
    "NONE", "INT", "LONG", "LONG1", "LONG4", "BININT", "BININT1", "BININT2",
    "FLOAT", "BINFLOAT", "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE",
    "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
    "BYTEARRAY8",
}  # fmt: skip
ARRAY = {f"{home}.multiarray _reconstruct" for home in ("numpy.core", "numpy._core")}
BUFFER = {f"{home}.numeric _frombuffer" for home in ("numpy.core", "numpy._core")}
DAMAGED = (ValueError, TypeError, LookupError, OverflowError, AttributeError, struct.error)
DTYPE, ENCODE, CLASS = "numpy dtype", "_codecs encode", "numpy ndarray"


class _Name(str):
    """A function or class that a pickle names: "module name"; it is compared, never looked up."""


class _Array:
    """An array or a type that is being made: numpy sets its state when it has made it."""

    def __init__(self, value: Any = None) -> None:
        self.value = value


def read_array_dict(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of numbers in a .npy file that holds one dictionary.

    Raises:
        DataError: missing, too large, no such file, or a pickle with anything else in it.
        OSError: it cannot be opened.
    """
    name = one_line(path)
    with open_regular(path) as file:
        shape, _, dtype = read_header(file, name)
        if not dtype.hasobject or shape not in ((), (1,)):
            raise DataError(f"{name}: holds {dtype} {list(shape)}, expected one dictionary")
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise DataError(f"{name}: more than {MAX_BYTES / 1e9:.1f} GB")
    try:
        held = _unwrapped(_followed(data))
        if isinstance(held, np.ndarray) and held.dtype.hasobject and held.size == 1:
            held = _unwrapped(held.reshape(-1)[0])
        if not isinstance(held, dict):
            raise ValueError("it is no dictionary")
        return {str(key): _numbers(str(key), value) for key, value in held.items()}
    except DAMAGED as error:
        reason = one_line(str(error).partition("\n")[0])[:120]
        raise DataError(
            f"{name}: a pickle that is damaged, or holds more than arrays of numbers: {reason}"
        ) from None


def read_surface_dict(path: Path) -> NDArray[np.float64]:
    """Points and normals [N, 6] of a published surface.

    Raises:
        DataError: as `read_array_dict`, and where it does not hold both.
    """
    try:
        held = read_array_dict(path)
    except OSError as error:
        raise DataError(f"{one_line(path)}: cannot be read: {error.strerror}") from None
    found = [held[name] for name in SURFACE if name in held]
    if len(found) == 2 and found[0].shape == found[1].shape and found[0].shape[1:] == (3,):
        return np.concatenate(found, axis=1, dtype=np.float64)
    there = ", ".join(f"{one_line(name)} {list(one.shape)}" for name, one in held.items())
    raise DataError(f"{one_line(path)}: holds {there}, expected {' and '.join(SURFACE)} [N, 3]")


def _numbers(key: str, value: Any) -> NDArray[Any]:
    value = _unwrapped(value)
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "iuf":
        raise ValueError(f"{key!r} is no array of numbers")
    return value


def _unwrapped(value: Any) -> Any:
    return value.value if isinstance(value, _Array) else value


def _followed(data: bytes) -> Any:
    """What the pickle makes."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}
    for step, (code, given, _) in enumerate(pickletools.genops(data)):
        kind, argument = code.name, cast(Any, given)
        if step > MAX_STEPS:
            raise ValueError(f"more than {MAX_STEPS} instructions")
        if kind == "STOP":
            return stack.pop()
        if kind in PLAIN:
            stack.append(argument)
        elif kind == "MARK":
            marks.append(len(stack))
        elif kind in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif kind == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif kind in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif kind in STEPS:
            STEPS[kind](stack, marks)
        elif kind == "GLOBAL":
            stack.append(_Name(argument))
        elif kind not in ("PROTO", "FRAME"):
            raise ValueError(f"the instruction {kind}")
    raise ValueError("it has no end")


# -- instructions that take from the stack ---------------------------------------------------------


def _above_mark(stack: list[Any], marks: list[int]) -> list[Any]:
    begin = marks.pop()
    taken = stack[begin:]
    del stack[begin:]
    return taken


def _tuple_of(count: int) -> Callable[[list[Any], list[int]], None]:
    def take(stack: list[Any], marks: list[int]) -> None:
        taken = tuple(stack[len(stack) - count :])
        if len(taken) < count:
            raise ValueError("too few values")
        stack[len(stack) - count :] = [taken]

    return take


def _set_items(stack: list[Any], pairs: list[Any]) -> None:
    if not isinstance(stack[-1], dict) or len(pairs) % 2:
        raise ValueError("items of what is no dictionary")
    for key, value in zip(pairs[::2], pairs[1::2], strict=True):
        if not isinstance(key, str):
            raise ValueError("a key that is no text")
        stack[-1][key] = value


def _append(stack: list[Any], values: list[Any]) -> None:
    if not isinstance(stack[-1], list):
        raise ValueError("items of what is no list")
    stack[-1].extend(values)


def _name(stack: list[Any], marks: list[int]) -> None:
    name, module = stack.pop(), stack.pop()
    stack.append(_Name(f"{module} {name}"))


def _call(stack: list[Any], marks: list[int]) -> None:
    """REDUCE: of the functions that a pickle can name, those that make arrays and their types."""
    arguments, function = stack.pop(), stack.pop()
    if not isinstance(function, _Name) or not isinstance(arguments, tuple):
        raise ValueError("a call of what is no function")
    if function in ARRAY and arguments[:1] == (CLASS,):
        stack.append(_Array())
    elif function == DTYPE and isinstance(arguments[0], str):
        stack.append(_Array(np.dtype(_plain_type(arguments[0]))))
    elif function == ENCODE and arguments[1:] == ("latin1",):  # bytes, as Python 2 could read them
        stack.append(str(arguments[0]).encode("latin1"))
    elif function in BUFFER and len(arguments) == 4:
        data, dtype, shape, order = arguments
        stack.append(_filled(data, dtype.value, shape, order))
    else:
        raise ValueError(f"a call of {function}")


def _plain_type(text: str) -> str:
    kinds = ("O8", "O", *(f"{kind}{size}" for kind in "iuf" for size in (1, 2, 4, 8)))
    if text not in kinds:
        raise ValueError(f"the type {text!r}")
    return text


def _build(stack: list[Any], marks: list[int]) -> None:
    """BUILD: the state of an array, (version, shape, type, order, bytes), or of a type."""
    state, target = stack.pop(), stack[-1]
    if not isinstance(target, _Array) or not isinstance(state, tuple):
        raise ValueError("a state of what has none")
    if isinstance(target.value, np.dtype):
        if state[1] not in ("<", ">", "|", "="):
            raise ValueError(f"the byte order {state[1]!r}")
        target.value = target.value.newbyteorder(state[1])
        return
    _, shape, dtype, fortran, content = state
    target.value = _filled(content, dtype.value, shape, "F" if fortran else "C").value


def _filled(content: Any, dtype: np.dtype[Any], shape: Any, order: str) -> _Array:
    if not isinstance(shape, tuple) or len(shape) > 3 or any(type(n) is not int for n in shape):
        raise ValueError(f"the shape {shape}")
    if dtype.hasobject:
        if not isinstance(content, list) or len(content) != 1:
            raise ValueError("objects in an array")
        held = np.empty(1, object)
        held[0] = content[0]
        return _Array(held)
    if order not in ("C", "F"):
        raise ValueError(f"the order {order!r}")
    return _Array(np.frombuffer(content, dtype).reshape(shape, order=order))  # type: ignore[call-overload]


STEPS: dict[str, Callable[[list[Any], list[int]], None]] = {
    "NEWTRUE": lambda stack, marks: stack.append(True),
    "NEWFALSE": lambda stack, marks: stack.append(False),
    "EMPTY_DICT": lambda stack, marks: stack.append({}),
    "EMPTY_LIST": lambda stack, marks: stack.append([]),
    "EMPTY_TUPLE": lambda stack, marks: stack.append(()),
    "TUPLE": lambda stack, marks: stack.append(tuple(_above_mark(stack, marks))),
    "TUPLE1": _tuple_of(1),
    "TUPLE2": _tuple_of(2),
    "TUPLE3": _tuple_of(3),
    "LIST": lambda stack, marks: stack.append(_above_mark(stack, marks)),
    "APPEND": lambda stack, marks: _append(stack, [stack.pop()]),
    "APPENDS": lambda stack, marks: _append(stack, _above_mark(stack, marks)),
    "SETITEM": lambda stack, marks: _set_items(stack, _pair(stack)),
    "SETITEMS": lambda stack, marks: _set_items(stack, _above_mark(stack, marks)),
    "STACK_GLOBAL": _name,
    "REDUCE": _call,
    "BUILD": _build,
}


def _pair(stack: list[Any]) -> list[Any]:
    value, key = stack.pop(), stack.pop()
    return [key, value]
