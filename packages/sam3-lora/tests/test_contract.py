"""The promises that every model package keeps, on the small random SAM 3 of the goldens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_base
import torch
from torch import Tensor, nn

from lora_core import testing
from lora_core.config import LoraConfig
from lora_core.testing import load_golden
from sam3_lora import model as m
from sam3_lora import network, placement
from sam3_lora.config import COMPONENTS

DEFAULT = ("vision_encoder", "detr_encoder", "detr_decoder", "mask_decoder")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base.write(tmp_path_factory.mktemp("base") / "base.pt", tiny_base.content())


def outputs(model: nn.Module) -> Tensor:
    """All that the network says of two pictures, two phrases and boxes."""
    io = load_golden(tiny_base.GOLDENS / "official_model").io
    batch = {name: io[name] for name in ("pixel_values", "input_ids")}
    batch |= {"attention_mask": io["input_ids"].ne(0).long(), "image_ids": io["img_ids"]}
    batch |= {"text_ids": io["text_ids"], "exemplars": io["boxes.input_boxes"]}
    batch |= {"exemplar_labels": io["boxes.input_boxes_labels"]}
    out = network.forward(model, batch, masks=True, one_to_many=False)
    last = out.one_to_one[-1]
    assert last.masks is not None
    assert out.semantic is not None
    masks = torch.stack([last.masks[b] for b in range(3)])
    parts = [last.logits, last.boxes, masks, out.presence[-1], out.semantic]
    return torch.cat([part.flatten() for part in parts])


@pytest.mark.parametrize("components", [DEFAULT, COMPONENTS], ids=["default", "all"])
@pytest.mark.parametrize("promise", testing.CONTRACT, ids=lambda promise: promise.__name__)
def test_contract(
    promise: Callable[[testing.Case, Path], None],
    components: tuple[str, ...],
    base: Path,
    tmp_path: Path,
) -> None:
    case = testing.Case(
        make_model=lambda: m.load(base),
        run=outputs,
        config=LoraConfig(placement.targets(["all"], components), r=2, lora_alpha=4),
        tolerance=2e-5,
    )
    promise(case, tmp_path)
