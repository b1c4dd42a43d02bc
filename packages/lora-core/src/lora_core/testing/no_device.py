"""A guard for tests: what is wrong must be said before GPU, network and weights are touched."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import safetensors.torch
import torch

_active: list[list[str]] = []  # of each guard: what it has seen
_installed: list[bool] = []  # an audit hook cannot be taken back


class Touched(AssertionError):
    """Something was used that the test forbids."""


@contextmanager
def no_device(weights: bool = False) -> Iterator[None]:
    """Fail when the block initialises CUDA, uses the network, or reads the values of weights.

    Shapes and names of weights, which a header tells, may be read.

    Args:
        weights: True: reading them is allowed, as in a whole run.

    Raises:
        Touched: at the place, and again at the end of the block if the program caught it.
    """
    if not _installed:
        sys.addaudithook(_listen)
        _installed.append(True)
    seen: list[str] = []
    with ExitStack() as stack:
        # What every first use of a GPU calls, from Python and from C++.
        initialise = torch.cuda._lazy_init
        stack.enter_context(
            mock.patch("torch.cuda._lazy_init", _refuse("CUDA was initialised", initialise))
        )
        if not weights:
            stack.enter_context(mock.patch("torch.load", _only_names(torch.load)))
            for read in (safetensors.torch.load, safetensors.torch.load_file):
                name = f"safetensors.torch.{read.__name__}"
                stack.enter_context(mock.patch(name, _refuse(f"{name} read weights", read)))
        _active.append(seen)
        stack.callback(_active.remove, seen)
        yield
    if seen:
        raise Touched("; ".join(seen))


def _forbid(what: str) -> None:
    for seen in _active:
        seen.append(what)
    if _active:
        raise Touched(what)


def _refuse(what: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Stand for `function`. A library that is imported in the block keeps this for good, so
    outside of it the function is called."""

    def refusing(*arguments: Any, **settings: Any) -> Any:
        _forbid(what)
        return function(*arguments, **settings)

    return refusing


def _only_names(load: Callable[..., Any]) -> Callable[..., Any]:
    def reading(*arguments: Any, **settings: Any) -> Any:
        if str(settings.get("map_location")) != "meta":
            _forbid("torch.load read weights")
        return load(*arguments, **settings)

    return reading


def _listen(event: str, arguments: tuple[Any, ...]) -> None:
    if not _active:
        return
    if event in ("socket.getaddrinfo", "socket.gethostbyname"):
        _forbid(f"the address of {arguments[0]!r} was asked for")
    elif event in ("socket.connect", "socket.bind", "socket.sendto") and (
        arguments[0].family in (socket.AF_INET, socket.AF_INET6)
    ):
        _forbid(f"{event} {arguments[1]!r}")
