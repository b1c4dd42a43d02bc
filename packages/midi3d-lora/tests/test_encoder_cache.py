"""Encodings are made once, are what the encoders make, and are made again when that is needed."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_midi_run
import torch
from torch import Tensor

from lora_core.cache import FeatureCache
from lora_core.testing.goldens import load_golden
from midi3d_lora.conditioning import clip, dino
from midi3d_lora.encoder_cache import (
    Encoded,
    Encodings,
    FrozenEncoders,
    Plan,
    Scene,
    content_digest,
    token_count,
)
from midi3d_lora.scenes.scene_folders import SceneSettings, read_scene

SETTINGS = SceneSettings(image_size=tiny_midi_run.SIZE, num_points=tiny_midi_run.POINTS)
CPU = torch.device("cpu")
GOLDEN = load_golden(tiny_midi_run.MODEL.parent)


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    folder = tiny_midi_run.write_scene(tmp_path / "scene", seed=3, instances=3)
    return Scene(folder, "scene", 3, content_digest(folder))


@pytest.fixture
def cached(tmp_path: Path) -> Encodings:
    return encodings(tmp_path / "cache")


def encodings(folder: Path | None, **changes: object) -> Encodings:
    plan = replace(Plan(SETTINGS, num_tokens=8, draws=2), **changes)  # type: ignore[arg-type]
    cache = None if folder is None else FeatureCache(folder, 10**9)
    return Encodings(FrozenEncoders(tiny_midi_run.MODEL, CPU), plan, cache)


def tensors(found: Encoded) -> Iterator[tuple[str, Tensor]]:
    yield from vars(found).items()


def of(made: Encodings, scene: Scene, draw: int = 0) -> Encoded:
    return made.encoded(made.sample(scene, draw), CPU)


def assert_equal(first: Encoded, second: Encoded) -> None:
    for (name, a), (_, b) in zip(tensors(first), tensors(second), strict=True):
        assert a.dtype == b.dtype, name
        assert torch.equal(a, b), name


def test_encodings_are_those_of_the_pipeline_and_of_the_autoencoder(scene: Scene) -> None:
    from midi3d_lora.pipeline import MIDIPipeline

    pipeline = MIDIPipeline.from_pretrained(tiny_midi_run.MODEL, multi_instance_blocks=[])
    made = encodings(None)
    found = of(made, scene, draw=1)
    rng = np.random.default_rng([int(scene.content[:8], 16), 1])
    read = read_scene(scene.folder, SETTINGS, rng)
    embeds = pipeline.encode_image(read.pictures)
    torch.testing.assert_close(found.image_embeds_1, embeds.image_embeds_1)
    torch.testing.assert_close(found.image_embeds_2, embeds.image_embeds_2)
    points = torch.from_numpy(np.stack([surface.joined() for surface in read.surfaces]))
    with torch.no_grad():
        posterior = pipeline.vae.encode(points, 8, seed=1).latent_dist
    torch.testing.assert_close(found.mean, posterior.mean)
    torch.testing.assert_close(found.logvar, posterior.logvar)
    assert found.mean.shape == (3, 8, 6)


def test_official_embeddings_come_out_of_the_cache(tmp_path: Path) -> None:
    """The recorded pictures as a scene: the embeddings that the official pipeline makes of them."""
    from PIL import Image

    folder = tmp_path / "golden"
    folder.mkdir()
    for name, key in (("rgb", "rgb"), ("scene_rgb", "rgb"), ("seg", "seg")):
        Image.fromarray(GOLDEN.io[key].numpy()).save(folder / f"{name}.png")
    labels = np.unique(GOLDEN.io["seg"].numpy())[1:]
    cloud = np.random.default_rng(0).uniform(-1, 1, (len(labels), 70, 6)).astype(np.float32)
    np.save(folder / "surface.npy", cloud)
    side = GOLDEN.io["rgb"].shape[0]
    made = encodings(tmp_path / "cache", scene=replace(SETTINGS, image_size=side))
    scene = Scene(folder, "golden", len(labels), content_digest(folder))
    of(made, scene)
    found = of(made, scene)
    for name in ("image_embeds_1", "image_embeds_2"):
        wanted = GOLDEN.io[name]
        torch.testing.assert_close(getattr(found, name), wanted, atol=1e-5, rtol=0, msg=name)


def test_the_cache_changes_no_bit(scene: Scene, cached: Encodings) -> None:
    for draw in (0, 1):
        first, again = of(cached, scene, draw), of(cached, scene, draw)
        plain = of(encodings(None), scene, draw)
        assert_equal(first, plain)
        assert_equal(again, plain)
    assert not torch.equal(of(cached, scene, 0).mean, of(cached, scene, 1).mean)


def test_after_filling_no_encoder_is_needed_or_in_memory(
    scene: Scene, cached: Encodings, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cached.fill([scene]) == 3  # pictures, and two draws of points
    assert cached.encoders._models == {}
    assert cached.fill([scene]) == 0
    monkeypatch.setattr(cached.encoders, "_read", lambda name: pytest.fail(f"{name} was read"))
    sample = cached.sample(scene, 1)
    assert set(sample) == {"image_embeds_1", "image_embeds_2", "mean", "logvar"}
    assert_equal(cached.encoded(sample, CPU), of(encodings(None), scene, 1))


def test_the_decoder_of_the_autoencoder_is_not_kept_in_memory() -> None:
    names = [name for name, _ in FrozenEncoders(tiny_midi_run.MODEL, CPU).vae().named_parameters()]
    assert names
    assert not [name for name in names if name.startswith("decoder.")]


@pytest.mark.parametrize("harm", ["deleted", "damaged", "cut"])
def test_what_is_missing_or_damaged_is_made_again(
    scene: Scene, cached: Encodings, harm: str
) -> None:
    cached.fill([scene])
    wanted = of(cached, scene, 1)
    for path in sorted(cached.cache.folder.rglob("*.features")):  # type: ignore[union-attr]
        data = path.read_bytes()
        if harm == "deleted":
            path.unlink()
        else:
            path.write_bytes(data[:-9] if harm == "cut" else data[:-9] + bytes(9))
    assert_equal(of(cached, scene, 1), wanted)
    assert "mean" in cached.sample(scene, 1)  # it is there again


def test_a_scene_is_known_by_its_content_wherever_it_lies(
    scene: Scene, cached: Encodings, tmp_path: Path
) -> None:
    cached.fill([scene])
    moved = tmp_path / "elsewhere" / "other name"
    shutil.copytree(scene.folder, moved)
    assert cached.fill([Scene(moved, "other name", 3, content_digest(moved))]) == 0


@pytest.mark.parametrize("name", ["rgb.png", "seg.png", "scene_rgb.png", "surface.npy"])
def test_another_file_makes_another_entry(scene: Scene, cached: Encodings, name: str) -> None:
    cached.fill([scene])
    other = tiny_midi_run.write_scene(scene.folder.parent / "other", seed=4, instances=2)
    shutil.copy(other / name, scene.folder / name)
    assert content_digest(scene.folder) != scene.content


@pytest.mark.fault("P34")
def test_other_settings_and_encoders_make_other_entries(
    scene: Scene, cached: Encodings, tmp_path: Path
) -> None:
    keys = [cached.picture_key(scene), cached.surface_key(scene, 0)]
    for changes, pictures, surfaces in (
        ({"num_tokens": 4}, False, True),
        ({"dtype": torch.bfloat16}, True, False),
        ({"scene": replace(SETTINGS, num_points=70)}, False, True),
        ({"scene": replace(SETTINGS, image_size=56)}, True, True),
        ({"draws": 5}, False, False),
    ):
        made = encodings(tmp_path / "cache", **changes)
        others = [made.picture_key(scene), made.surface_key(scene, 0)]
        assert [a != b for a, b in zip(keys, others, strict=True)] == [pictures, surfaces], changes
    model = tmp_path / "model"
    shutil.copytree(tiny_midi_run.MODEL, model)
    settings = model / "feature_extractor_2" / "preprocessor_config.json"
    settings.write_text(settings.read_text().replace("0.485", "0.5"))
    other = Encodings(FrozenEncoders(model, CPU), cached.plan, cached.cache)
    assert other.picture_key(scene) != keys[0]
    assert other.surface_key(scene, 0) == keys[1]


def test_half_precision_embeddings_are_rounded_alike_with_and_without_a_cache(
    scene: Scene, tmp_path: Path
) -> None:
    with_cache = encodings(tmp_path / "cache", dtype=torch.bfloat16)
    first, again = of(with_cache, scene), of(with_cache, scene)
    assert first.image_embeds_2.dtype == torch.bfloat16
    assert first.mean.dtype == torch.float32
    assert_equal(first, again)
    assert_equal(first, of(encodings(None, dtype=torch.bfloat16), scene))


def test_autocast_around_the_loss_does_not_reach_the_encoders(scene: Scene) -> None:
    made = encodings(None)
    with torch.autocast("cpu", torch.bfloat16):
        inside = of(made, scene)
    assert_equal(inside, of(made, scene))


def test_the_count_of_picture_tokens_is_known_without_the_encoder(scene: Scene) -> None:
    found = of(encodings(None), scene)
    assert found.image_embeds_2.shape[1] == token_count(tiny_midi_run.MODEL, 48)


def test_pictures_are_prepared_as_the_pipeline_does(scene: Scene) -> None:
    made = encodings(None)
    raw = made.raw(scene, 0)
    read = read_scene(scene.folder, SETTINGS, np.random.default_rng(0))
    first, second = made.encoders.settings
    assert torch.equal(raw["clip"], clip.clip_pixels(read.pictures, first))
    assert torch.equal(raw["dino"], dino.dino_pixels(read.pictures, second))
