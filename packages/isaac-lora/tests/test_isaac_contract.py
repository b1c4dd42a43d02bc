"""The promises that every model package keeps, on the recorded tiny Isaac."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from recorded_isaac import recorded_model, sample

from isaac_lora.lora_choice import ROLES, LoraChoice
from lora_core import testing

TARGETS = (("auto",), ("vision", "attention"))


def output(model: torch.nn.Module) -> torch.Tensor:
    found: torch.Tensor = model(**sample("image2")).logits
    return found


@pytest.mark.parametrize("targets", TARGETS, ids=["default", "tower"])
@pytest.mark.parametrize("promise", testing.CONTRACT, ids=lambda promise: promise.__name__)
def test_contract(
    promise: Callable[[testing.Case, Path], None], targets: tuple[str, ...], tmp_path: Path
) -> None:
    case: Any = testing.Case(
        make_model=recorded_model,
        run=output,
        config=LoraChoice(4, 8.0, 0.0).config(targets),
        roles=ROLES,
        tolerance=2e-5,
    )
    promise(case, tmp_path)
