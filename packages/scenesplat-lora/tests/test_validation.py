"""What a run measures on its validation scenes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_scenes
import torch

from lora_core.config import parse
from lora_core.errors import DataError
from scenesplat_lora import data, model, objective, validation
from scenesplat_lora.config import Config


@pytest.fixture
def files(tmp_path: Path) -> Path:
    tiny_scenes.write_base(tmp_path / "base.pth")
    tiny_scenes.write_scenes(tmp_path / "data", train=1, val=2)
    tiny_scenes.write_texts(tmp_path / "texts.npz")
    return tmp_path


def figures(files: Path, **given: Any) -> dict[str, float]:
    """Of the base, as a run has them before it trains."""
    words = tiny_scenes.command(files / "base.pth", files / "data", files / "run", **given)
    cfg = parse(Config, words, prog="train")
    net, text = model.build(cfg), validation.texts(cfg)
    needs = objective.needs_of(net, text)
    evaluate = validation.evaluation(cfg, data.load(cfg, needs), needs, text)
    assert evaluate is not None
    with torch.no_grad():
        return evaluate(net)


def test_with_texts_a_language_model_has_a_loss_and_the_miou(files: Path) -> None:
    alone = figures(files)
    assert set(alone) == {"minus_loss", "loss"}
    both = figures(files, data__text_embeddings=files / "texts.npz")
    assert next(iter(both)) == "mIoU"  # which the best adapter follows
    assert both["loss"] == alone["loss"] == -alone["minus_loss"]


def test_scenes_without_language_features_count_for_the_miou_alone(files: Path) -> None:
    given = {"data__text_embeddings": files / "texts.npz"}
    both = figures(files, **given)
    (files / "data" / "val" / "room_0" / "lang_feat.npy").unlink()
    part = figures(files, **given)
    assert part["mIoU"] == both["mIoU"]
    assert part["loss"] != both["loss"]
    (files / "data" / "val" / "room_1" / "lang_feat.npy").unlink()
    assert "loss" not in figures(files, **given)


def test_language_features_of_another_model_are_refused(files: Path) -> None:
    file = files / "data" / "val" / "room_0" / "lang_feat.npy"
    np.save(file, np.ones((240, 7), np.float16))
    with pytest.raises(DataError, match="width 7"):
        figures(files, data__text_embeddings=files / "texts.npz")


def test_a_segmentation_model_has_the_names_of_its_classes(files: Path) -> None:
    tiny_scenes.write_base(files / "base.pth", classes=5)
    (files / "names.txt").write_text("\n".join(tiny_scenes.CLASSES))
    given = {"data__class_names": files / "names.txt", "data__excluded": "wall"}
    found = figures(files, **given)
    assert next(iter(found)) == "fg_mIoU"
    assert found["loss"] > 0
