"""Features of frozen image encoders: from the cache as computed, and never stale."""

import multiprocessing
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from lora_core.cache import FeatureCache
from lora_core.config import LoraConfig
from lora_core.frozen import FrozenImages, Unseen, why_changing
from lora_core.injection import inject

SIDE = 24


def encoder(seed=0):
    """Convolutions whose last bits may depend on how many pictures they see at once."""
    torch.manual_seed(seed)
    layers = nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 7, 3, stride=2)
    return nn.Sequential(*layers).requires_grad_(False).eval()


def frozen(network, cache=None, **facts):
    """Features of `network`, and the shapes of the pictures that it saw."""
    seen = []

    def encode(picture):
        assert picture.dtype == torch.uint8
        seen.append(tuple(picture.shape))
        found = network(as_floats(picture)[None])
        return {"map": found, "half": found.mean((2, 3)).half()}

    return FrozenImages(encode, facts, torch.device("cpu"), cache), seen


@pytest.fixture
def pictures(tmp_path):
    """Files of four pictures."""
    noise = np.random.default_rng(0).integers(0, 255, (4, SIDE, SIDE, 3), dtype=np.uint8)
    for number, rgb in enumerate(noise):
        Image.fromarray(rgb).save(tmp_path / f"{number}.png")
    return [tmp_path / f"{number}.png" for number in range(4)]


def pixels_of(path):
    return torch.from_numpy(np.array(Image.open(path)))


def as_floats(picture):
    return picture.permute(2, 0, 1).contiguous() / 255


def items(images, paths, placement="as it is"):
    return [images.item(path, placement, lambda path=path: pixels_of(path)) for path in paths]


def never():
    raise AssertionError("read again")


def same(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert all(one[name].dtype == other[name].dtype for name in one)


def test_with_and_without_a_cache_features_are_equal_in_every_bit(tmp_path, pictures):
    network = encoder()
    plain, seen = frozen(network)
    batch = items(plain, pictures)
    expected = plain.features(batch)
    assert seen == [(SIDE, SIDE, 3)] * 4
    assert expected["map"].shape == (4, 7, 11, 11)
    torch.testing.assert_close(expected["map"], network(torch.stack([*map(as_floats, batch)])))
    cached, seen = frozen(network, FeatureCache(tmp_path / "cache", 10**9))
    same(
        cached.features(items(cached, pictures[:1])),
        {k: v[:1] for k, v in expected.items()},
    )
    mixed = items(cached, pictures)  # one is at hand
    assert [isinstance(item, Unseen) for item in mixed] == [False, True, True, True]
    same(cached.features(mixed), expected)
    found = [cached.item(path, "as it is", never) for path in pictures]
    same(cached.features(found), expected)
    assert len(seen) == 4


def test_content_placement_and_facts_make_the_entry_and_the_name_does_not(tmp_path, pictures):
    images, seen = frozen(encoder(), FeatureCache(tmp_path / "cache", 10**9), base="a")
    images.features(items(images, pictures[:1]))
    other_name = pictures[0].rename(tmp_path / "other.png")
    assert not isinstance(images.item(other_name, "as it is", never), Unseen)
    assert isinstance(items(images, [other_name], "mirrored")[0], Unseen)
    assert isinstance(items(images, pictures[1:2])[0], Unseen)
    changed, _ = frozen(encoder(1), images.cache, base="b")
    assert isinstance(items(changed, [other_name])[0], Unseen)
    assert len(seen) == 1


def test_features_carry_no_graph_and_weights_get_no_gradient(pictures):
    network = encoder().requires_grad_(True)
    images, _ = frozen(network)
    found = images.features(items(images, pictures))
    assert not any(tensor.requires_grad for tensor in found.values())


def test_a_worker_looks_up_and_computes_nothing(tmp_path, pictures):
    images, _ = frozen(encoder(), FeatureCache(tmp_path / "cache", 10**9))
    expected = images.features(items(images, pictures[:1]))
    there = pickle.loads(pickle.dumps(images))
    same(there.features(items(there, pictures[:1])), expected)
    with pytest.raises(RuntimeError, match="in the process that trains"):
        there.features(items(there, pictures[1:]))


def fill(folder, paths, queue):
    torch.set_num_threads(1)  # threads do not survive a fork
    images, seen = frozen(encoder(), FeatureCache(folder, 10**9))
    found = images.features(items(images, paths))
    queue.put((len(seen), found["map"].numpy()))


def test_two_processes_share_one_folder(tmp_path, pictures):
    context = multiprocessing.get_context("fork")  # the others cannot import a file of tests
    queue = context.Queue()
    argument = (tmp_path / "cache", pictures, queue)
    others = [context.Process(target=fill, args=argument) for _ in range(2)]
    for process in others:
        process.start()
    maps = [queue.get(timeout=100)[1] for _ in others]
    for process in others:
        process.join()
        assert process.exitcode == 0
    images, seen = frozen(encoder(), FeatureCache(tmp_path / "cache", 10**9))
    found = images.features([images.item(path, "as it is", never) for path in pictures])
    assert seen == []
    for one in maps:
        np.testing.assert_array_equal(found["map"].numpy(), one)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda net: None, ""),
        (lambda net: net[2].requires_grad_(True), "it is trained (2.weight)"),
        (lambda net: inject(net, LoraConfig(["2"], r=2)), "it is adapted (2."),
        (lambda net: net.append(nn.Dropout(0.1)), "it has dropout (3, p = 0.1)"),
        (lambda net: net.append(nn.Dropout(0.0)), ""),
    ],
)
def test_an_encoder_that_changes_is_told_from_one_that_does_not(change, reason):
    network = encoder()
    change(network)
    found = why_changing(network)
    assert found.startswith(reason) if reason else not found


def test_frozen_adapters_change_what_an_encoder_makes():
    network = encoder()
    inject(network, LoraConfig(["2"], r=2))
    network.requires_grad_(False)
    assert why_changing(network).startswith("it is adapted")
