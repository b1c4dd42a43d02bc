"""Frozen encoders of SAM 3 run once: cached features train the same bits, and are never stale."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_run
import torch
from PIL import Image
from tiny_run import command, rows, same, summary

from lora_core.cache import FeatureCache
from lora_core.config import parse
from lora_core.errors import ConfigError
from lora_core.testing import corrupt
from sam3_lora import data, frozen, model, network, objective, scoring, vision
from sam3_lora.config import Config, Dataset, Lora
from sam3_lora.train import main

Capture = pytest.CaptureFixture[str]
OFF = {"lora__apply_to_vision_encoder": False, "dataset__enable_augmentation": False}
MASKS = {"training__enable_segmentation": True, "training__mask_points": 100}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.write_base(tmp_path_factory.mktemp("base"))


def entries(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*.features"))


def kinds(folder: Path) -> dict[str, int]:
    """How many entries of pictures and of phrases there are."""
    names = [
        b"trunk" if b'"trunk":' in path.read_bytes() else b"phrase" for path in entries(folder)
    ]
    return {"pictures": names.count(b"trunk"), "phrases": names.count(b"phrase")}


# -- training --------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [{}, {**MASKS, "dataset__hflip": True, "dataset__num_workers": 1}])
def test_cached_features_train_the_same_bits(
    base: Path, tmp_path: Path, more: dict[str, Any]
) -> None:
    """Batches of two pictures of three, so that sizes of batches differ."""
    cache = tmp_path / "cache"
    places = {"plain": None, "filling": cache, "filled": cache}
    for name, place in places.items():
        given = {**OFF, **more} | ({"cache_dir": place} if place else {})
        assert main(command(base, tmp_path / name, **given)) == 0
    found = kinds(cache)
    # Each picture as it is, for training and validation; mirrored ones besides.
    assert found["pictures"] == 3 if not more else 3 < found["pictures"] <= 6
    assert found["phrases"] == len({"bolt", "nut", "washer", "visual", *scoring.ABSENT})
    for name in ("filling", "filled"):
        for file in ("best.pt", "epoch_1.pt", "epoch_2.pt"):
            checkpoints = [tmp_path / run / "checkpoints" / file for run in ("plain", name)]
            assert same(*checkpoints), (name, file)
        assert rows(tmp_path / name) == rows(tmp_path / "plain")
        assert summary(tmp_path / name) == summary(tmp_path / "plain")


def test_a_filled_cache_is_not_computed_again(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    assert main(command(base, tmp_path / "first", cache_dir=cache, tensorboard=False, **OFF)) == 0
    calls = {"image": 0, "text": 0}
    trunk, text = vision.encode_trunk, network.encode_text

    def counted_trunk(*args: Any, **named: Any) -> torch.Tensor:
        calls["image"] += 1
        return trunk(*args, **named)

    def counted_text(*args: Any, **named: Any) -> torch.Tensor:
        calls["text"] += 1
        return text(*args, **named)

    monkeypatch.setattr(vision, "encode_trunk", counted_trunk)
    monkeypatch.setattr(frozen, "encode_trunk", counted_trunk)
    monkeypatch.setattr(network, "encode_text", counted_text)
    assert main(command(base, tmp_path / "second", cache_dir=cache, **OFF)) == 0
    assert calls == {"image": 0, "text": 0}


def test_a_cached_run_that_was_killed_resumes_to_the_same_bits(base: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    whole = command(base, tmp_path / "whole", cache_dir=cache, **OFF)
    assert main(whole) == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    checkpoints = tmp_path / "killed" / "checkpoints"
    for name in ("epoch_2.pt", "training_summary.json"):
        (checkpoints / name).unlink()
    shutil.rmtree(checkpoints / "state" / "checkpoint-4")
    shutil.rmtree(cache)  # without it, all is computed again
    argv = ["--resume", str(checkpoints), "--logging.log_dir", str(tmp_path / "killed" / "logs")]
    assert main([*argv, "--cache_dir", str(tmp_path / "other cache")]) == 0
    assert same(checkpoints / "epoch_2.pt", tmp_path / "whole" / "checkpoints" / "epoch_2.pt")
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")
    assert kinds(tmp_path / "other cache")["pictures"] == 3


def test_with_an_adapted_image_encoder_phrases_are_kept_alone(
    base: Path, tmp_path: Path, capsys: Capture
) -> None:
    cache = tmp_path / "cache"
    given = {"cache_dir": cache, "training__max_epochs": 1}
    assert main(command(base, tmp_path / "run", **given)) == 0
    assert kinds(cache)["pictures"] == 0
    assert kinds(cache)["phrases"] > 3
    assert "without pictures; of the image encoder, it is adapted" in capsys.readouterr().out


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lora": Lora(apply_to_vision_encoder=False)}, "--dataset.enable_augmentation false"),
        ({"lora": Lora(apply_to_text_encoder=True)}, "both are adapted"),
        (
            {
                "lora": Lora(apply_to_vision_encoder=False),
                "dataset": Dataset(enable_augmentation=False),
                "shard_base": True,
            },
            "--shard_base divides",
        ),
        ({"cache_gb": 0.0}, "--cache_gb is 0.0"),
        ({"cache_gb": float("nan")}, "--cache_gb is nan"),
        ({"cache_dir": ""}, "--cache_dir is empty"),
    ],
)
def test_a_cache_that_cannot_work_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Config(**{"cache_dir": "cache", **given})


# -- entries ---------------------------------------------------------------------------------------


def setting(base: Path, cache: Path, **given: Any) -> tuple[Any, data.Splits]:
    """What a run with a frozen image encoder makes its features with."""
    argv = command(base, Path("unused"), cache_dir=cache, **OFF, **given)
    cfg = parse(Config, argv, prog="t")
    splits = data.load(cfg)
    net = objective.adapted(model.build(cfg), cfg)
    images = frozen.frozen_images(net, cfg, "fp32", frozen.cache_of(cfg))
    splits.use(images)
    return images, splits


def trunks(base: Path, cache: Path, **given: Any) -> torch.Tensor:
    """The features of the training pictures."""
    images, splits = setting(base, cache, **given)
    samples = [splits.train[number].pixels for number in range(3)]
    found: torch.Tensor = images.features(samples)["trunk"]
    return found


@pytest.mark.fault("D44")
def test_features_follow_model_picture_size_and_side(base: Path, tmp_path: Path) -> None:
    cache, pictures = tmp_path / "cache", tmp_path / "pictures"
    shutil.copytree(tiny_run.PICTURES, pictures)
    where = {"dataset__train_img_folder": pictures}
    before = trunks(base, cache, **where)
    assert len(entries(cache)) == 3
    assert torch.equal(trunks(base, cache, **where), before)
    assert len(entries(cache)) == 3
    assert trunks(base, cache, dataset__resolution="70", **where).shape != before.shape
    assert len(entries(cache)) == 6
    path = pictures / "img_0.png"
    status, whole = path.stat(), path.read_bytes()
    rgb = np.asarray(Image.open(path).convert("RGB")).copy()
    rgb[0, 0] ^= 255
    Image.fromarray(rgb).save(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # as a restored copy has it
    changed = trunks(base, cache, **where)
    assert len(entries(cache)) == 7
    assert not torch.equal(changed[0], before[0])
    assert torch.equal(changed[1:], before[1:])
    path.write_bytes(whole)
    other = tiny_run.write_base(tmp_path / "other")
    tensors = torch.load(other, weights_only=True)
    name = next(name for name in tensors if name.endswith("trunk.ln_pre.weight"))
    tensors[name] = tensors[name] + 0.5
    torch.save(tensors, other)
    assert not torch.equal(trunks(other, cache, **where), before)
    assert len(entries(cache)) == 10


@pytest.mark.fault("D45")
@pytest.mark.parametrize("damage", corrupt.DAMAGE)
def test_a_damaged_entry_is_computed_again(base: Path, tmp_path: Path, damage: str) -> None:
    cache = tmp_path / "cache"
    before = trunks(base, cache)
    found = entries(cache)
    corrupt.DAMAGE[damage](found[0])
    if damage == "folder":
        found[0].rmdir()
    assert torch.equal(trunks(base, cache), before)
    assert entries(cache) == found


def test_phrases_do_not_depend_on_each_other_or_on_the_cache(base: Path, tmp_path: Path) -> None:
    net = model.load(base, (84, 84))
    words = model.tokenizer(net)
    cache = FeatureCache(tmp_path / "cache", 10**6)
    texts = ["bolt", "nut", "washer", "bolt nut washer"]
    with torch.no_grad():
        several = scoring.EncodedPhrases.one_by_one(net, words, texts, cache)
        lone = scoring.EncodedPhrases.one_by_one(net, words, ["nut"])
        at_once = scoring.EncodedPhrases(net, words, texts)
    assert torch.equal(several.features[1], lone.features[0])
    assert torch.equal(several.mask, at_once.mask)
    spoken = several.mask.bool()
    torch.testing.assert_close(several.features[spoken], at_once.features[spoken])
    network.drop_text_encoder(net)  # all of them are known now
    net.text_projection = torch.nn.Linear(1, several.features.shape[-1])
    again = scoring.EncodedPhrases.one_by_one(net, words, texts, cache)
    assert torch.equal(again.features, several.features)


def test_an_encoder_with_dropout_is_not_kept(base: Path, tmp_path: Path, capsys: Capture) -> None:
    def dropping(net: Any) -> Any:
        net.vision_encoder.backbone.layers[0].dropout.p = 0.1
        return net

    argv = command(base, Path("unused"), cache_dir=tmp_path / "cache", **OFF)
    cfg = parse(Config, argv, prog="t")
    net = dropping(model.build(cfg))
    assert frozen.frozen_images(net, cfg, "fp32", frozen.cache_of(cfg)) is None
    assert "it has dropout (layers.0.dropout, p = 0.1)" in capsys.readouterr().out
