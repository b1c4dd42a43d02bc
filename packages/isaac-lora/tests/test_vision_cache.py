"""The vision features of a picture are computed once, and losses stay the same, bit for bit."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from recorded_isaac import recorded_model
from torch import Tensor, nn

from isaac_lora.network.isaac import IsaacForConditionalGeneration
from isaac_lora.pictures.content import KnownPicture, Picture, content_digest
from isaac_lora.pictures.pixels import preprocess
from isaac_lora.pictures.target_size import PictureRules, patch_grid, token_grid
from isaac_lora.vision_cache import ENTRY, UnseenPicture, VisionFeatures
from lora_core.cache import FeatureCache
from lora_core.errors import ConfigError, NumericError

RULES = PictureRules(patch_size=4, max_num_patches=128, min_num_patches=16)
SIZES = ((40, 25), (17, 64), (8, 8))
RNG = np.random.default_rng(5)
PICTURES = [RNG.integers(0, 256, (*size, 3), dtype=np.uint8) for size in SIZES]


@pytest.fixture(scope="module")
def model() -> IsaacForConditionalGeneration:
    model = recorded_model().train()
    model.model.vision_embedding[0].requires_grad_(False)
    return model


def known(picture: Picture, name: str = "a.jpg") -> KnownPicture:
    grid = token_grid(patch_grid(*picture.shape[:2], RULES), RULES)
    return KnownPicture(name, content_digest(picture), tuple(grid), lambda: picture)


KNOWN = [known(picture) for picture in PICTURES]


def features_of(model: nn.Module, folder: Path | None, **settings: Any) -> VisionFeatures:
    cache = None if folder is None else FeatureCache(folder, settings.pop("size", 10**7))
    tower = model.get_submodule("model.vision_embedding.0")
    return VisionFeatures(tower, **({"rules": RULES, "cache": cache} | settings))


def batch(**images: Tensor) -> dict[str, Any]:
    """Three samples, packed, each with one picture; labels on their last tokens."""
    ids, mask, labels, documents = [], [], [], []
    for number, picture in enumerate(KNOWN):
        count = picture.grid[0] * picture.grid[1]
        text = torch.arange(5) + 10 * number
        ids += [text, torch.full((count,), 300), text + 5]
        mask += [torch.zeros(5), torch.ones(count), torch.zeros(5)]
        labels += [torch.full((5 + count,), -100), text + 5]
        documents += [torch.full((10 + count,), number)]
    rows = {"input_ids": ids, "image_mask": mask, "labels": labels, "document_ids": documents}
    joined = {name: torch.cat(values)[None] for name, values in rows.items()}
    return joined | {"image_mask": joined["image_mask"].bool()} | images


def grids() -> Tensor:
    return torch.tensor([patch_grid(*size, RULES) for size in SIZES])


def loss_and_gradients(model: IsaacForConditionalGeneration, features: Tensor) -> list[Tensor]:
    model.zero_grad()
    loss = model(**batch(grids=grids(), vision_features=features)).loss
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def joined(features: VisionFeatures) -> Tensor:
    return features.joined([features.part(picture) for picture in KNOWN])


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_losses_and_gradients_with_and_without_the_cache_are_bitwise_equal(
    model: IsaacForConditionalGeneration, tmp_path: Path, autocast: torch.dtype | None
) -> None:
    plain = features_of(model, None, autocast=autocast)
    cached = features_of(model, tmp_path, autocast=autocast)
    assert cached.fill(KNOWN) == 3
    found = [cached.part(picture) for picture in KNOWN]
    assert all(isinstance(part, Tensor) for part in found)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast is not None):
        without = loss_and_gradients(model, joined(plain))
        with_it = loss_and_gradients(model, cached.joined(found))
    assert len(without) > 20
    for one, other in zip(without, with_it, strict=True):
        assert torch.equal(one, other)


def test_losses_are_those_of_the_tower_inside_the_model(
    model: IsaacForConditionalGeneration, tmp_path: Path
) -> None:
    features = features_of(model, tmp_path)
    features.fill(KNOWN)
    patches = torch.cat([preprocess(picture, RULES)[0] for picture in PICTURES])
    with torch.no_grad():
        inside = model(**batch(grids=grids(), patches=patches)).loss
    assert abs(loss_and_gradients(model, joined(features))[0] - inside) < 1e-6


def test_after_filling_the_tower_does_not_run_and_pictures_are_not_read(
    model: IsaacForConditionalGeneration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    features = features_of(model, tmp_path)
    wanted = joined(features)
    unread = [
        KnownPicture(one.name, one.content, one.grid, lambda: pytest.fail("it was read"))
        for one in KNOWN
    ]
    monkeypatch.setattr(features, "compute", lambda _: pytest.fail("the tower ran"))
    assert features.fill(unread) == 0
    assert torch.equal(features.joined([features.part(one) for one in unread]), wanted)


def test_equal_pictures_are_computed_once(
    model: IsaacForConditionalGeneration, tmp_path: Path
) -> None:
    again = known(PICTURES[0].copy(), "copy.png")
    assert features_of(model, tmp_path).fill([KNOWN[0], again, KNOWN[1]]) == 2


@pytest.mark.parametrize("change", ["picture", "weights", "rules", "autocast", "dtype"])
def test_what_features_depend_on_makes_another_entry(
    model: IsaacForConditionalGeneration, tmp_path: Path, change: str
) -> None:
    features_of(model, tmp_path).fill(KNOWN[:1])
    settings: dict[str, Any] = {}
    other, picture = copy.deepcopy(model), PICTURES[0].copy()
    if change == "picture":
        picture[3, 3, 0] ^= 1
    elif change == "weights":
        other.model.vision_embedding[0].post_layernorm.bias.data[0] += 1e-4
    elif change == "rules":
        settings["rules"] = PictureRules(patch_size=4, max_num_patches=64, min_num_patches=16)
    elif change == "autocast":
        settings["autocast"] = torch.bfloat16
    else:
        other.model.vision_embedding[0].to(torch.float64)
    features = features_of(other, tmp_path, **settings)
    assert features.find(content_digest(picture)) is None
    assert features_of(model, tmp_path).find(KNOWN[0].content) is not None


def test_weights_outside_the_tower_keep_the_entries(
    model: IsaacForConditionalGeneration, tmp_path: Path
) -> None:
    features_of(model, tmp_path).fill(KNOWN)
    other = copy.deepcopy(model)
    other.model.vision_embedding[1].weight.data += 1
    assert features_of(other, tmp_path).fill(KNOWN) == 0


def test_entries_that_were_lost_are_computed_again(
    model: IsaacForConditionalGeneration, tmp_path: Path
) -> None:
    features = features_of(model, tmp_path)
    wanted = joined(features)
    gone, damaged = sorted(tmp_path.rglob("*.features"))[:2]
    gone.unlink()
    damaged.write_bytes(damaged.read_bytes()[:-3])
    parts = [features.part(picture) for picture in KNOWN]
    assert sum(isinstance(part, UnseenPicture) for part in parts) == 2
    assert torch.equal(features.joined(parts), wanted)
    assert features.fill(KNOWN) == 0


def test_workers_get_no_tower_and_send_what_it_reads(
    model: IsaacForConditionalGeneration, tmp_path: Path
) -> None:
    features = features_of(model, tmp_path)
    sent = pickle.dumps(features)
    assert len(sent) < 2000
    part = pickle.loads(pickle.dumps(pickle.loads(sent).part(KNOWN[1])))
    assert isinstance(part, UnseenPicture)
    assert torch.equal(features.joined([part]), features.joined([features.part(KNOWN[1])]))
    found = pickle.loads(sent).part(KNOWN[1])
    assert isinstance(found, Tensor)


def test_the_bytes_on_disk_are_those_foretold(
    model: IsaacForConditionalGeneration, tmp_path: Path
) -> None:
    features = features_of(model, tmp_path)
    features.fill(KNOWN)
    written = sum(path.stat().st_size for path in tmp_path.rglob("*.features"))
    assert written <= features.bytes_of(KNOWN) < written + 3 * ENTRY


def test_a_cache_that_cannot_hold_all_is_refused_before_anything_is_computed(
    model: IsaacForConditionalGeneration, tmp_path: Path
) -> None:
    features = features_of(model, tmp_path, size=5000)
    with pytest.raises(ConfigError, match=r"3 pictures take .* kB, the cache may hold 5.00 kB"):
        features.fill(KNOWN)
    assert not list(tmp_path.iterdir())


def test_a_tower_that_changes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"changes \d+ tensors of it \(embeddings"):
        features_of(recorded_model(), tmp_path)
    adapted = recorded_model().requires_grad_(False)
    projection: Any = adapted.model.vision_embedding[0].encoder.layers[0].self_attn.q_proj
    projection.lora_A = nn.ModuleDict({"default": nn.Linear(4, 4, bias=False)})
    projection.lora_A.requires_grad_(False)
    with pytest.raises(ConfigError, match="changes 1 tensor of it"):
        features_of(adapted, tmp_path)
    dropping = recorded_model().requires_grad_(False)
    dropping.model.vision_embedding[0].config.attention_dropout = 0.1
    with pytest.raises(ConfigError, match=r"attention_dropout 0\.1"):
        features_of(dropping, tmp_path)


def test_features_that_are_not_finite_are_an_error_and_not_kept(
    model: IsaacForConditionalGeneration, tmp_path: Path
) -> None:
    broken = copy.deepcopy(model)
    broken.model.vision_embedding[0].post_layernorm.weight.data[0] = torch.inf
    features = features_of(broken, tmp_path)
    with pytest.raises(NumericError, match=r"^a\.jpg: the vision tower gives NaN .* in float32"):
        features.fill(KNOWN)
    assert features.find(KNOWN[0].content) is None


def test_without_a_cache_nothing_is_filled_and_a_batch_may_have_no_pictures(
    model: IsaacForConditionalGeneration,
) -> None:
    features = features_of(model, None)
    assert features.fill(KNOWN) == 0
    assert features.find(KNOWN[0].content) is None
    assert features.joined([]).shape == (0, features.width)
