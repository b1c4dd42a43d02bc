"""The promises that every model package keeps, on a small random network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from lora_models import tiny_batch, tiny_model

from lora_core import testing
from lora_core.config import LoraConfig
from scenesplat_lora.network.frozen_norms import freeze_statistics
from scenesplat_lora.network.models import LangPretrainer


def model_with_fixed_statistics() -> LangPretrainer:
    """As `inject_lora_to_ptv3` leaves it: the statistics of its frozen norms never move."""
    model = tiny_model()
    freeze_statistics(model)
    return model


@pytest.mark.parametrize("layers", [["qkv", "proj"], ["fc1", "fc2"]], ids=["attn", "mlp"])
@pytest.mark.parametrize("promise", testing.CONTRACT, ids=lambda promise: promise.__name__)
def test_contract(
    promise: Callable[[testing.Case, Path], None], layers: list[str], tmp_path: Path
) -> None:
    names = "|".join(layers)
    targets = rf"backbone\.(enc|dec)\..*\.block\d+\.(attn|mlp\.0)\.({names})"
    case = testing.Case(
        make_model=model_with_fixed_statistics,
        run=lambda model: model(tiny_batch()),
        config=LoraConfig(targets, r=2, lora_alpha=4),
        tolerance=2e-5,
    )
    promise(case, tmp_path)
