"""RoIAlign: recorded numbers, the definition written as loops, and gradients."""

import math
from pathlib import Path

import torch
from torch import Tensor

from lora_core.testing import load_golden
from sam3_lora.positions import corners
from sam3_lora.roi import roi_align

CASE = Path(__file__).parent / "goldens" / "roi_align"


def test_golden() -> None:
    golden = load_golden(CASE)
    features, boxes = golden.io["features"], golden.io["boxes_cxcywh"]
    height, width = features.shape[-2:]
    cells = corners(boxes.flatten(0, 1)) * torch.tensor([width, height, width, height])
    out = roi_align(features, cells, torch.arange(2).repeat_interleave(3))
    torch.testing.assert_close(out, golden.io["output"].flatten(0, 1), rtol=0, atol=1e-5)


def sample(feature: Tensor, y: float, x: float) -> Tensor:
    """Bilinear value of [C, H, W] at a point: 0 further than a cell outside."""
    height, width = feature.shape[-2:]
    if not (-1 <= y <= height and -1 <= x <= width):
        return feature.new_zeros(len(feature))
    y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
    y0, x0 = int(y), int(x)
    y1, x1 = min(y0 + 1, height - 1), min(x0 + 1, width - 1)
    top = feature[:, y0, x0] * (1 - x + x0) + feature[:, y0, x1] * (x - x0)
    bottom = feature[:, y1, x0] * (1 - x + x0) + feature[:, y1, x1] * (x - x0)
    return top * (1 - y + y0) + bottom * (y - y0)


def by_loops(feature: Tensor, box: list[float], bins: int) -> Tensor:
    x0, y0, x1, y1 = box
    high, wide = max(y1 - y0, 1), max(x1 - x0, 1)
    n, m = math.ceil(high / bins), math.ceil(wide / bins)
    out = feature.new_zeros(len(feature), bins, bins)
    for i in range(bins):
        for j in range(bins):
            for s in range(n):
                for t in range(m):
                    y = y0 + (i + (s + 0.5) / n) * high / bins
                    x = x0 + (j + (t + 0.5) / m) * wide / bins
                    out[:, i, j] += sample(feature, y, x) / (n * m)
    return out


def test_definition_inside_at_the_border_outside_and_for_points() -> None:
    features = torch.randn(2, 4, 9, 12, generator=torch.Generator().manual_seed(0))
    boxes = [
        [1.3, 2.2, 8.9, 7.7],
        [-4.0, -3.5, 5.0, 4.0],  # sticks out by more than a cell
        [6.0, 3.0, 15.5, 13.0],
        [0.0, 0.0, 12.0, 9.0],
        [3.4, 4.4, 3.4, 4.4],  # no area
        [20.0, 20.0, 30.0, 30.0],  # all outside
    ]
    images = torch.tensor([0, 1, 0, 1, 1, 0])
    out = roi_align(features, torch.tensor(boxes), images, bins=5)
    for found, box, image in zip(out, boxes, images.tolist(), strict=True):
        torch.testing.assert_close(found, by_loops(features[image], box, 5), rtol=1e-5, atol=1e-5)
    assert not out[5].any()


def test_gradients_reach_the_features_and_no_boxes_are_fine() -> None:
    features = torch.randn(2, 2, 5, 4, dtype=torch.float64, requires_grad=True)
    boxes = torch.tensor([[0.4, -0.6, 3.7, 4.9], [-2.0, 1.0, 2.0, 6.5]])
    images = torch.tensor([1, 0])
    assert torch.autograd.gradcheck(lambda f: roi_align(f, boxes, images, 3), features)
    assert roi_align(features, boxes[:0], images[:0], 3).shape == (0, 2, 3, 3)
