"""What frozen networks made of pictures reaches the model through samples and batches."""

from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import tiny_depth
import torch
from isaac_texts import record, small_tokenizer, write_picture, write_records
from recorded_isaac import recorded_model
from torch.utils.data import DataLoader

from isaac_lora import data
from isaac_lora.config import Config
from isaac_lora.depth.checkpoint import find_depth_checkpoint
from isaac_lora.depth.depth_cache import DepthGrids, UnseenDepth
from isaac_lora.depth.encoding import encode_depth
from isaac_lora.examples import Example, single_rows
from isaac_lora.network.isaac import IsaacForConditionalGeneration
from isaac_lora.processing import IsaacProcessor
from isaac_lora.vision_cache import UnseenPicture, VisionFeatures
from lora_core.cache import FeatureCache


@cache
def small() -> IsaacProcessor:
    return IsaacProcessor(small_tokenizer(), patch_size=4, max_num_patches=64, min_num_patches=16)


@pytest.fixture
def examples(tmp_path: Path) -> list[Example]:
    """Two conversations with three pictures in all, and one between them without."""
    for number, size in enumerate(((23, 31), (9, 6), (40, 20))):
        write_picture(tmp_path / f"{number}.png", *size, number)
    records = [
        record("<image> or <image>?", images=["0.png", "1.png"]),
        record(),
        record("<image>!", image="2.png"),
    ]
    path = write_records(tmp_path / "train.json", records)
    cfg = Config(
        model_path="model", data_path=str(path), image_folder=str(tmp_path), output_dir="run"
    )
    return data.load(cfg, small()).train


def batch_of(examples: list[Example], workers: int = 0, **given: Any) -> dict[str, Any]:
    train: Any = data.TrainSet(single_rows(examples), small(), **given)
    collate = partial(data.collate, processor=small())
    [batch] = DataLoader(train, 3, num_workers=workers, collate_fn=collate)
    return batch


def loss_of(model: IsaacForConditionalGeneration, batch: dict[str, Any]) -> torch.Tensor:
    unknown = ("keys", "vision_parts", "depth_parts")
    with torch.no_grad():
        return model(**{name: value for name, value in batch.items() if name not in unknown}).loss


def pictures_of(examples: list[Example]) -> list[Any]:
    return [picture for one in examples for picture in one.pictures(small().rules)]


def test_vision_features_of_workers_give_the_loss_of_patches(
    examples: list[Example], tmp_path: Path
) -> None:
    model = recorded_model()
    model.requires_grad_(False)
    tower: Any = model.model.vision_embedding[0]
    kept = VisionFeatures(tower, small().rules, FeatureCache(tmp_path / "cache", 10**8))
    assert kept.fill(pictures_of(examples)) == 3
    losses = []
    for features, workers in ((kept, 1), (VisionFeatures(tower, small().rules), 0)):
        batch = batch_of(examples, workers, vision=features)
        assert "patches" not in batch
        parts = batch["vision_parts"]
        assert [isinstance(part, UnseenPicture) for part in parts] == [features is not kept] * 3
        losses.append(loss_of(model, batch | {"vision_features": features.joined(parts)}))
    assert torch.equal(*losses)
    torch.testing.assert_close(losses[0], loss_of(model, batch_of(examples)), atol=1e-5, rtol=0)


def test_patches_of_bytes_give_the_loss_of_floats_bit_for_bit(examples: list[Example]) -> None:
    model = recorded_model()
    batch = batch_of(examples)
    assert batch["patches"].dtype == torch.uint8
    floats = (batch["patches"].float() / 255 - 0.5) / 0.5
    assert torch.equal(loss_of(model, batch), loss_of(model, batch | {"patches": floats}))


def test_depth_of_workers_stands_at_the_places_of_its_pictures(
    examples: list[Example], tmp_path: Path
) -> None:
    checkpoint = find_depth_checkpoint(tiny_depth.write_folder(tmp_path / "depth"))
    depths = DepthGrids(checkpoint, 70, "cpu", FeatureCache(tmp_path / "cache", 10**8))
    first = batch_of(examples, depth=depths)
    assert all(isinstance(part, UnseenDepth) for part in first["depth_parts"])
    computed = depths.joined(first["depth_parts"])
    second = batch_of(examples, 1, depth=depths)
    assert not any(isinstance(part, UnseenDepth) for part in second["depth_parts"])
    assert torch.equal(depths.joined(second["depth_parts"]), computed)
    assert len(computed) == int(second["image_mask"].sum())
    model = recorded_model()
    encoding = encode_depth(100 * computed, model.config.hidden_size)
    with_depth = loss_of(model, second | {"depth_encoding": encoding})
    assert with_depth != loss_of(model, second)


def test_a_picture_is_decoded_once_for_vision_and_depth(
    examples: list[Example], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from isaac_lora import examples as home

    read = []
    real = home.read_picture
    monkeypatch.setattr(home, "read_picture", lambda *of: read.append(of[0]) or real(*of))
    checkpoint = find_depth_checkpoint(tiny_depth.write_folder(tmp_path / "depth"))
    batch_of(examples, depth=DepthGrids(checkpoint, 70))
    assert read == ["0.png", "1.png", "2.png"]
