"""Recorded numbers: cases that an official implementation computed once."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor


@dataclass
class Golden:
    """One recorded case: its settings, inputs and outputs, the base model's tensors, its folder."""

    folder: Path
    config: dict[str, Any]
    io: dict[str, Tensor]
    weights: dict[str, Tensor]


def load_golden(folder: str | Path) -> Golden:
    """Read `config.json`, `io.safetensors` and, where there is one, `weights.safetensors`."""
    folder = Path(folder)
    weights = folder / "weights.safetensors"
    return Golden(
        folder,
        json.loads((folder / "config.json").read_text("utf-8")),
        safetensors.torch.load_file(folder / "io.safetensors"),
        safetensors.torch.load_file(weights) if weights.exists() else {},
    )


def assert_close_golden(
    actual: Tensor, expected: Tensor, rtol: float = 1e-5, atol: float = 2e-6
) -> None:
    """Require `|actual - expected| <= rtol |expected| + atol max |expected|` everywhere."""
    assert actual.shape == expected.shape, f"shape {actual.shape}, recorded {expected.shape}"
    a, e = actual.detach().double(), expected.double()
    error = (a - e).abs() - rtol * e.abs()
    bound = atol * e.abs().max()
    assert (error <= bound).all(), f"off by {(a - e).abs().max():.2e} of {e.abs().max():.2e}"


def assert_gradient_close(actual: Tensor | None, expected: Tensor, rtol: float = 2e-5) -> None:
    """Require `|actual - expected| <= rtol |expected|` in the Euclidean norm."""
    assert actual is not None, "no gradient arrived"
    assert actual.shape == expected.shape, f"shape {actual.shape}, recorded {expected.shape}"
    error = (actual.double() - expected.double()).norm() / expected.double().norm()
    assert error <= rtol, f"relative error {error:.2e}, allowed {rtol:.0e}"
