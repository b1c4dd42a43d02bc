"""The promises that every model package keeps, on a small random transformer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_transformers import random_inputs

from lora_core import testing
from midi3d_lora.lora import ROLES, LoraChoice
from midi3d_lora.transformer.dit import TripoSGDiTModel

GROUPS = [0, 0, 1]  # a scene of two instances, and one of one


def small_transformer() -> TripoSGDiTModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = TripoSGDiTModel(4, 32, 6, 5, 12, 20)
        model.set_multi_instance_blocks(["blocks.1", "blocks.3"])
        return model.eval()


def output(model: torch.nn.Module) -> torch.Tensor:
    inputs = random_inputs(small_transformer(), rows=len(GROUPS))
    found: torch.Tensor = model(**inputs, instance_groups=GROUPS, return_dict=False)[0]
    return found


@pytest.mark.parametrize(
    "targets", [LoraChoice().target_modules, ("all-linear",)], ids=["attention", "all"]
)
@pytest.mark.parametrize("promise", testing.CONTRACT, ids=lambda promise: promise.__name__)
def test_contract(
    promise: Callable[[testing.Case, Path], None], targets: tuple[str, ...], tmp_path: Path
) -> None:
    case = testing.Case(
        make_model=small_transformer,
        run=output,
        config=LoraChoice(2, 4, 0.0, targets).config(),
        roles=ROLES,
        tolerance=2e-5,
    )
    promise(case, tmp_path)
