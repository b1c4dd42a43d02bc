"""Cached features and models of the hub: never stale, never another than the one meant."""

import dataclasses
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from lora_core.config import LoraConfig
from lora_core.errors import ConfigError
from lora_core.injection import inject
from lora_core.testing import corrupt
from lora_core.testing.hub import write_model
from sam2_lora import __main__ as program
from sam2_lora import model as m
from sam2_lora import names, official, placement
from sam2_lora.config import Config

Refused = Callable[..., str]


class Hostile:
    """Its pickle makes a folder when it is loaded without care."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, ("canary",)


# -- the cache of image features -------------------------------------------------------------------


def cached(work: Path, checkpoint: str = "base.safetensors", **settings: Any) -> Any:
    """The features of the only training picture, as a run gets them."""
    from sam2_lora.data import load
    from sam2_lora.frozen import frozen_images

    settings = {"image_size": "64", "targets": "decoder", "hflip": False, **settings}
    cfg = Config(data_root="data", mask_kind="binary", cache_dir="cache", **settings)
    splits = load(cfg)
    images = frozen_images(m.load(checkpoint, cfg.size), cfg, "fp32")
    assert images is not None
    splits.use(images)
    return images.features([splits.train[0].pixels])


def entries() -> list[Path]:
    return sorted(Path("cache").glob("*/*.features"))


@pytest.mark.fault("D44")
def test_cached_features_follow_model_picture_and_settings(work: Path) -> None:
    before = cached(work)
    assert len(entries()) == 1
    again = cached(work)
    assert len(entries()) == 1
    assert all(torch.equal(before[name], again[name]) for name in before)
    tensors = official.read_official("base.safetensors").tensors
    tensors["no_mem_embed"] = tensors["no_mem_embed"] + 1
    official.write_official("other.safetensors", tensors)
    assert not torch.equal(cached(work, "other.safetensors")["image_embed"], before["image_embed"])
    assert cached(work, image_size="96")["image_embed"].shape != before["image_embed"].shape
    picture = work / "data/train/images/p.png"
    status = picture.stat()
    rgb = np.asarray(Image.open(picture)).copy()
    rgb[0, 0] ^= 255
    Image.fromarray(rgb).save(picture)
    os.utime(picture, ns=(status.st_atime_ns, status.st_mtime_ns))  # as a restored copy has it
    assert not torch.equal(cached(work)["image_embed"], before["image_embed"])
    assert len(entries()) == 4


@pytest.mark.fault("D45")
@pytest.mark.parametrize("damage", corrupt.DAMAGE)
def test_a_damaged_cache_entry_is_computed_again_and_said_once(
    work: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = cached(work)
    (entry,) = entries()
    corrupt.DAMAGE[damage](entry)
    if damage == "folder":
        entry.rmdir()
    capsys.readouterr()
    after = cached(work)
    assert all(torch.equal(before[name], after[name]) for name in before)
    said = capsys.readouterr().out.count("is damaged: it is computed again")
    assert said == (0 if damage == "folder" else 1)
    assert entries() == [entry]
    assert entry.is_file()
    cached(work)
    assert "damaged" not in capsys.readouterr().out


@pytest.mark.parametrize("layer", ["vision_encoder.neck.convs.0", "mask_decoder.conv_s0"])
def test_what_changes_in_training_is_not_kept(work: Path, layer: str) -> None:
    """The finer maps go through two convolutions that are named as the decoder's."""
    from sam2_lora.frozen import frozen_images

    cfg = Config(image_size="64", targets="decoder")
    network = m.load("base.safetensors", cfg.size)
    assert frozen_images(network, cfg, "fp32") is not None
    inject(network, LoraConfig([layer], r=2))
    assert frozen_images(network, cfg, "fp32") is None
    kept = dataclasses.replace(cfg, cache_dir="cache", adapter="a/b")
    with pytest.raises(ConfigError, match=r"--cache_dir needs an unchanged encoder.* by a/b"):
        frozen_images(network, kept, "fp32")


# -- the hub ---------------------------------------------------------------------------------------


@pytest.fixture
def hub(work: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two revisions of one model in the hub's cache, main is the second."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(work / "cache"))
    tensors = official.read_official("base.safetensors").tensors
    weights = []
    for number in range(2):
        changed = tensors | {"no_mem_embed": tensors["no_mem_embed"] + number}
        state = {k: t.clone() for k, t in names.to_transformers(changed).items()}
        weights.append(safetensors.torch.save(state))
    settings = Path("base.json").read_bytes()
    return write_model(work / "cache", "nobody/sam2-small", settings, weights)


@pytest.mark.fault("H28")
def test_a_model_of_the_hub_is_that_of_its_revision_and_the_adapter_remembers_it(
    hub: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pinned = m.load(f"nobody/sam2-small@{'a' * 40}")
    assert "with this name" not in capsys.readouterr().out
    newest = m.load("nobody/sam2-small")
    name = f"nobody/sam2-small@{'b' * 40}"
    assert f"{name}: with this name it stays the same model" in capsys.readouterr().out
    assert pinned.sam2_base.fingerprint != newest.sam2_base.fingerprint
    placement.adapt(newest, Config())
    m.save_adapter(newest, "of_hub")
    (hub / "refs" / "main").write_text("a" * 40)  # another revision is the newest now
    assert program.main(["merge", "--adapter", "of_hub", "--output", "out.pt"]) == 0
    assert m.adapter_metadata(newest)["base"]["file"] == name


@pytest.mark.fault("H28")
@pytest.mark.parametrize("damage", ["swapped", "partial", "pickle"])
def test_a_model_of_the_hub_that_is_not_what_the_hub_has_is_refused(
    hub: Path, refused: Refused, damage: str
) -> None:
    weights = hub / "snapshots" / ("b" * 40) / "model.safetensors"
    parts = ["model.safetensors is not what the hub has: its SHA-256 is"]
    if damage == "swapped":
        weights.resolve().write_bytes(
            (hub / f"snapshots/{'a' * 40}/model.safetensors").read_bytes()
        )
    elif damage == "partial":
        corrupt.DAMAGE["cut_after_4_of_8"](weights.resolve())
    else:
        weights.unlink()
        (weights.parent / "pytorch_model.bin").write_bytes(pickle.dumps(Hostile()))
        parts = ["needs config.json and model.safetensors", "Pickled weights are not read"]
    refused("predict", *parts, base="nobody/sam2-small", adapter=None)


# -- never done ------------------------------------------------------------------------------------


@pytest.mark.fault("H17", "H18", "K60")
def test_nothing_is_unpacked_and_nothing_is_uploaded() -> None:
    """No code that extracts archive members to the disk, and none that sends anything anywhere."""
    import lora_core
    import sam2_lora

    never = re.compile(
        r"extractall|\.extract\(|unpack_archive|import tarfile|push_to_hub\(|upload_\w+\(|HfApi|"
        r"create_repo|urlopen|import requests|import urllib|http\.client"
    )
    for package in (lora_core, sam2_lora):
        assert package.__file__
        for path in Path(package.__file__).parent.rglob("*.py"):
            if "testing" not in path.parts:
                found = never.search(path.read_text("utf-8"))
                assert not found, f"{path}: {found}"
