"""Labels and scores at the limits: every point has one prediction, absent classes do not count."""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np
import pytest
import torch
import use_fixtures
from made_scenes import made_scene

import scenesplat_lora
from scenesplat_lora.labelling import Labelling, label_scene
from scenesplat_lora.metrics import Confusion, class_scores, epoch_scores, final_scores
from scenesplat_lora.network.point_batch import PointBatch
from scenesplat_lora.scenes.collate import collate

FOREIGN = {"spconv", "cumm", "flash_attn", "torch_scatter", "pointops", "MinkowskiEngine"}


@pytest.mark.fault("P30")
def test_nothing_is_needed_that_spconv_or_flash_attention_would_bring() -> None:
    folder = Path(scenesplat_lora.__file__).parent
    found = set()
    for file in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                found |= {name.name.partition(".")[0] for name in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found.add(node.module.partition(".")[0])
    assert "torch" in found
    assert not found & FOREIGN


@pytest.mark.fault("P40", "P24")
def test_every_gaussian_gets_exactly_one_label_and_those_of_one_place_the_same() -> None:
    scene = made_scene(80, side=1.0)
    twice = {name: np.concatenate([array, array[:30]]) for name, array in scene.items()}
    how = Labelling(0.01, 0.05)
    labels = label_scene(use_fixtures.model(), twice, use_fixtures.texts(), how)
    assert labels.shape == (110,)
    assert (labels >= 0).all()
    np.testing.assert_array_equal(labels[80:], labels[:30])


@pytest.mark.fault("P41")
def test_a_class_that_never_occurs_is_left_out_of_the_means_and_has_no_score_of_its_own() -> None:
    table = Confusion(("wall", "chair", "lamp"))
    table.add(np.array([0, 0, 1, 1, -1]), np.array([0, 1, 1, 1, 0]))
    assert final_scores(table)["mIoU"] == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert epoch_scores(table)["mIoU"] == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert epoch_scores(table)["mean_class_acc"] == pytest.approx((1 / 2 + 1) / 2)
    lamp = class_scores(table)["lamp"]
    assert np.isnan(lamp["IoU"])
    assert lamp["points"] == 0


@pytest.mark.fault("R47")
def test_offsets_beyond_int32_are_counted_in_int64() -> None:
    rows = 2**31 + 5
    nothing = torch.zeros(1, 1)
    voxels = torch.zeros(1, 3, dtype=torch.int32)
    offset = torch.tensor([2**31 - 1, rows])
    batch = PointBatch(nothing.expand(rows, 1), voxels.expand(rows, 3), offset)
    assert batch.sizes == [2**31 - 1, 6]
    sizes = [{"offset": torch.tensor([2**31 - 1], dtype=torch.int32)}] * 3
    joined = collate(sizes)["offset"]
    assert joined.dtype == torch.int64
    assert joined.tolist() == [2**31 - 1, 2**32 - 2, 3 * (2**31 - 1)]
