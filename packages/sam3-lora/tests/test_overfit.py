"""The network learns two pictures by heart from random weights, and what is in neither."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_base
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Sam3Config

from sam3_lora import losses, network
from sam3_lora.outputs import Targets

SIDE = 84
STEPS = 150
RED, BLUE, GREY = (0.9, -0.8, -0.8), (-0.8, -0.8, 0.9), -0.5


def shapes() -> tuple[Tensor, Tensor]:
    """Masks of a disc and of a square, bool [SIDE, SIDE]."""
    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    disc = (x - 30) ** 2 + (y - 34) ** 2 < 16**2
    return disc, ((x - 50).abs() < 14) & ((y - 44).abs() < 14)


def box_of(mask: Tensor) -> Tensor:
    y, x = (places.float() for places in torch.nonzero(mask, as_tuple=True))
    x0, x1, y0, y1 = x.min(), x.max() + 1, y.min(), y.max() + 1
    return torch.stack([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0]) / SIDE


def questions(masks: tuple[Tensor, Tensor]) -> tuple[dict[str, Any], Targets]:
    """Two pictures, each asked for both phrases, of which it holds one."""
    pixels = torch.full((2, 3, SIDE, SIDE), GREY)
    for picture, mask, colour in zip(pixels, masks, (RED, BLUE), strict=True):
        picture[:, mask] = torch.tensor(colour)[:, None]
    ids = torch.zeros(2, 32, dtype=torch.int64)
    ids[:, :3] = torch.tensor([[62, 5, 63], [62, 9, 63]])
    batch = {
        "pixel_values": pixels,
        "input_ids": ids,
        "attention_mask": ids.ne(0).long(),
        "image_ids": torch.tensor([0, 0, 1, 1]),
        "text_ids": torch.tensor([0, 1, 0, 1]),
    }
    boxes, counts = torch.stack([box_of(mask) for mask in masks]), torch.tensor([1, 0, 0, 1])
    return batch, Targets(boxes, counts, torch.stack(masks), torch.tensor([True, True]))


def learn(model: nn.Module, batch: dict[str, Any], targets: Targets) -> None:
    """Train all weights of the network with the official loss."""
    model.requires_grad_(True).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 20) * (1 - step / STEPS) ** 0.5
    )
    for _ in range(STEPS):
        outputs = network.forward(model, batch, masks=True, one_to_many=True)  # type: ignore[arg-type]
        value, _ = losses.loss(outputs, targets)
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()


@pytest.mark.slow
def test_two_pictures_are_learnt_and_the_absent_phrase_is_denied() -> None:
    torch.manual_seed(0)
    model = network.build_network(Sam3Config(**tiny_base.settings()))
    for parameter in model.parameters():
        if parameter.dim() > 1:  # the library's own initial weights are too small for this width
            nn.init.xavier_uniform_(parameter)
    masks = shapes()
    batch, targets = questions(masks)
    learn(model, batch, targets)
    with torch.no_grad():
        outputs = network.forward(model, batch, masks=True, one_to_many=False)
    presence = outputs.presence[-1].sigmoid()
    assert presence[0] > 0.5 > presence[1]
    assert presence[3] > 0.5 > presence[2]
    last = outputs.one_to_one[-1]
    assert last.masks is not None
    for query, mask in ((0, masks[0]), (3, masks[1])):
        best = int(last.logits[query].argmax())
        logits = last.masks[query][best][None, None]
        found = F.interpolate(logits, (SIDE, SIDE), mode="bilinear")[0, 0] > 0
        assert (found & mask).sum() / (found | mask).sum() > 0.8
