"""Depth is computed once for each picture, and is then what it was."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import tiny_depth
import torch

from isaac_lora.depth.checkpoint import DepthCheckpoint, find_depth_checkpoint
from isaac_lora.depth.depth_cache import DepthGrids
from isaac_lora.depth.encoding import pool_depth
from isaac_lora.pictures.content import KnownPicture, content_digest
from lora_core.cache import FeatureCache

PICTURE = tiny_depth.GOLDEN.io["image0"].numpy()
OTHER = tiny_depth.GOLDEN.io["image2"].numpy()
GRID = (3, 4)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> DepthCheckpoint:
    return find_depth_checkpoint(tiny_depth.write_folder(tmp_path_factory.mktemp("depth") / "tiny"))


@pytest.fixture
def cached(checkpoint: DepthCheckpoint, tmp_path: Path) -> DepthGrids:
    return grids(checkpoint, tmp_path / "cache")


def grids(checkpoint: DepthCheckpoint, folder: Path | None, size: int = 70) -> DepthGrids:
    cache = None if folder is None else FeatureCache(folder, 10**8)
    return DepthGrids(checkpoint, size, "cpu", cache)


def wanted_picture(picture: np.ndarray = PICTURE, grid: tuple[int, int] = GRID) -> KnownPicture:
    return KnownPicture("example", content_digest(picture), grid, lambda: picture)


def of(depths: DepthGrids, picture: np.ndarray = PICTURE, grid: tuple[int, int] = GRID):
    return depths.values(picture, content_digest(picture), grid)


def test_values_are_the_pooled_normalised_depth(cached: DepthGrids) -> None:
    wanted = pool_depth(tiny_depth.GOLDEN.io["normalized0"][0], GRID)
    torch.testing.assert_close(of(cached), wanted, atol=1e-5, rtol=0)


def test_the_cache_changes_no_bit(cached: DepthGrids, checkpoint: DepthCheckpoint) -> None:
    first, again, plain = of(cached), of(cached), of(grids(checkpoint, None))
    assert torch.equal(first, plain)
    assert torch.equal(again, plain)
    assert cached.cache is not None
    assert cached.cache.hits == 1


def test_after_filling_no_depth_model_is_needed_or_in_memory(
    cached: DepthGrids, monkeypatch: pytest.MonkeyPatch, checkpoint: DepthCheckpoint
) -> None:
    pictures = [wanted_picture(), wanted_picture(), wanted_picture(OTHER), wanted_picture(OTHER)]
    assert cached.fill(pictures) == 2
    assert cached._estimator is None
    monkeypatch.setattr(cached, "estimator", lambda: pytest.fail("the depth model was read"))
    assert cached.fill(pictures) == 0
    assert cached.settings(alpha=30.0).alpha == 30.0
    found = cached.find(content_digest(OTHER), GRID)
    assert found is not None
    assert torch.equal(found, of(grids(checkpoint, None), OTHER))


def test_pictures_that_are_cached_are_not_read(cached: DepthGrids) -> None:
    cached.fill([wanted_picture()])
    unread = KnownPicture("a", content_digest(PICTURE), GRID, lambda: pytest.fail("it was read"))
    assert cached.fill([unread]) == 0


@pytest.mark.parametrize("change", ["picture", "grid", "size", "weights"])
def test_what_the_depth_depends_on_makes_another_entry(
    cached: DepthGrids, checkpoint: DepthCheckpoint, tmp_path: Path, change: str
) -> None:
    cached.fill([wanted_picture()])
    other, picture, grid = cached, PICTURE, GRID
    if change == "picture":
        picture = PICTURE.copy()
        picture[5, 5, 1] ^= 1
    elif change == "grid":
        grid = (4, 3)
    elif change == "size":
        other = grids(checkpoint, tmp_path / "cache", 98)
    else:
        other = grids(other_weights(tmp_path), tmp_path / "cache")
    assert other.find(content_digest(picture), grid) is None
    assert other.fill([wanted_picture(picture, grid)]) == 1


def other_weights(tmp_path: Path) -> DepthCheckpoint:
    tensors = {name: tensor.clone() for name, tensor in tiny_depth.GOLDEN.weights.items()}
    tensors["pretrained.norm.bias"][0] += 1e-3
    path = tiny_depth.write_original(tmp_path / "other.pth", tensors)
    return tiny_depth.find_original(path)


def test_the_same_weights_in_another_form_of_file_share_their_entries(
    cached: DepthGrids, tmp_path: Path
) -> None:
    cached.fill([wanted_picture()])
    path = tiny_depth.write_original(tmp_path / "tiny.pth")
    assert grids(tiny_depth.find_original(path), tmp_path / "cache").fill([wanted_picture()]) == 0


def test_size_and_pixels_make_the_digest_and_not_the_memory_layout() -> None:
    assert content_digest(PICTURE) == content_digest(np.asfortranarray(PICTURE))
    black = np.zeros((4, 6, 3), np.uint8)
    assert content_digest(black) != content_digest(black.reshape(6, 4, 3))


def test_damaged_entries_are_computed_again(cached: DepthGrids) -> None:
    wanted = of(cached)
    assert cached.cache is not None
    (path,) = cached.cache.folder.rglob("*.features")
    path.write_bytes(path.read_bytes()[:-1])
    assert cached.find(content_digest(PICTURE), GRID) is None
    assert torch.equal(of(cached), wanted)
    assert cached.find(content_digest(PICTURE), GRID) is not None


def test_workers_get_the_names_of_entries_and_not_the_weights(cached: DepthGrids) -> None:
    cached.fill([wanted_picture()])
    cached.estimator()
    sent = pickle.dumps(cached)
    assert len(sent) < 20_000
    found = pickle.loads(sent).find(content_digest(PICTURE), GRID)
    assert torch.equal(found, of(cached))


def test_without_a_cache_nothing_is_filled_and_values_are_computed(
    checkpoint: DepthCheckpoint,
) -> None:
    plain = grids(checkpoint, None)
    assert plain.fill([wanted_picture()]) == 0
    assert plain.find(content_digest(PICTURE), GRID) is None
    assert of(plain).shape == (12,)


def test_parts_of_a_batch_join_to_the_same_values_whether_they_were_cached_or_not(
    cached: DepthGrids, checkpoint: DepthCheckpoint
) -> None:
    pictures = [wanted_picture(), wanted_picture(OTHER, (2, 2))]
    cached.fill(pictures[:1])
    parts = [pickle.loads(pickle.dumps(cached.part(picture))) for picture in pictures]
    assert [isinstance(part, torch.Tensor) for part in parts] == [True, False]
    wanted = torch.cat([of(grids(checkpoint, None)), of(cached, OTHER, (2, 2))])
    assert torch.equal(cached.joined(parts), wanted)
    assert cached.joined([]).shape == (0,)
