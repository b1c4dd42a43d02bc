"""The promises that every model package keeps, on the small random SAM 2 of the goldens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lora_core import testing
from lora_core.config import LoraConfig
from sam2_lora import placement
from sam2_lora.config import Config
from sam2_lora.model import decode, encode, image_size, load
from sam2_lora.names import module_to_official


def masks(model: nn.Module) -> Tensor:
    """Mask logits and scores of two pictures, for a click in each and a box around all."""
    random = torch.Generator().manual_seed(0)
    height, width = image_size(model)
    features = encode(model, torch.randn(2, 3, height, width, generator=random))
    image = torch.arange(2)
    clicks = torch.tensor([[[0.3, 0.4]], [[0.7, 0.6]]]) * width
    boxes = torch.tensor([[0.1, 0.2, 0.8, 0.9], [0.2, 0.1, 0.9, 0.8]]) * width
    clicked = decode(model, features, image, points=clicks)
    boxed = decode(model, features, image, boxes=boxes, multimask=False)
    parts = [*clicked, *boxed]
    return torch.cat([part.flatten() for part in parts])


@pytest.mark.parametrize("targets", ["default", "decoder+heads"])
@pytest.mark.parametrize("promise", testing.CONTRACT, ids=lambda promise: promise.__name__)
def test_contract(
    promise: Callable[[testing.Case, Path], None], targets: str, golden_base: Path, tmp_path: Path
) -> None:
    wanted = placement.targets(Config(targets=targets))
    case = testing.Case(
        make_model=lambda: load(golden_base),
        run=masks,
        config=LoraConfig(wanted, r=1, lora_alpha=2),  # the score head has one output
        rename=module_to_official,
        tolerance=2e-5,
    )
    promise(case, tmp_path)
