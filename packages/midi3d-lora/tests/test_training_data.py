"""Training samples follow from seed, epoch and index; batches say which rows belong together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_midi_run
import torch

from lora_core.config import parse
from lora_core.errors import DataError
from midi3d_lora import data, memory, model, scene_encodings
from midi3d_lora.config import Config


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_midi_run.write_scenes(tmp_path_factory.mktemp("data"))


def settings(scenes: Path, output: Path, **given: Any) -> Config:
    return parse(Config, tiny_midi_run.command(scenes, output, **given), prog="train")


def train_set(cfg: Config, kept: bool = False) -> data.TrainSet:
    net = model.skeleton(cfg)
    made = scene_encodings.encodings_of(cfg, net, torch.device("cpu"), torch.float32, kept=kept)
    return data.TrainSet(data.load(cfg).train, made, cfg, net.config.in_channels)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return bool(a == b)


# -- samples ---------------------------------------------------------------------------------------


@pytest.mark.fault("R46")
def test_a_sample_is_the_same_again_and_another_one_in_another_epoch(
    scenes: Path, tmp_path: Path
) -> None:
    cfg = settings(scenes, tmp_path / "run")
    first, second = train_set(cfg), train_set(cfg)
    second.set_epoch(3)
    second[0]
    second.set_epoch(0)
    assert same(first[2], second[2])
    second.set_epoch(1)
    other = second[2]
    for name in ("sigma", "noise", "posterior_noise"):
        assert not torch.equal(first[2][name], other[name]), name


def test_the_cache_changes_no_random_number(scenes: Path, tmp_path: Path) -> None:
    cfg = settings(scenes, tmp_path / "run")
    plain, kept = train_set(cfg), train_set(cfg, kept=True)
    kept.encodings.fill(kept.records)
    for index in range(len(plain)):
        a, b = plain[index], kept[index]
        assert "surface" in a.pop("encoding")
        assert "mean" in b.pop("encoding")
        assert same(a, b)


def test_draws_of_points_take_turns_over_the_epochs(scenes: Path, tmp_path: Path) -> None:
    found = train_set(settings(scenes, tmp_path / "run", surface_draws=2))
    surfaces = []
    for epoch in range(4):
        found.set_epoch(epoch)
        surfaces.append(found[0]["encoding"]["surface"])
    # As many points as are drawn, so that all draws have the same ones.
    assert torch.equal(surfaces[0], surfaces[2])
    fewer = train_set(settings(scenes, tmp_path / "run", num_points=70))
    first = fewer[0]["encoding"]["surface"]
    fewer.set_epoch(1)
    assert not torch.equal(first, fewer[0]["encoding"]["surface"])
    fewer.set_epoch(2)
    assert torch.equal(first, fewer[0]["encoding"]["surface"])


@pytest.mark.fault("P35")
def test_of_many_instances_a_random_choice_is_trained() -> None:
    rng = np.random.default_rng(0)
    draws = [data.chosen_rows(9, 4, rng).tolist() for _ in range(200)]
    assert all(draw == sorted(set(draw)) and len(draw) == 4 for draw in draws)
    counts = np.bincount(np.concatenate(draws), minlength=9)
    assert counts.min() > 60  # 200 · 4 / 9 = 89
    assert data.chosen_rows(3, 4, rng).tolist() == [0, 1, 2]


def test_chosen_instances_have_as_much_noise(scenes: Path, tmp_path: Path) -> None:
    found = train_set(settings(scenes, tmp_path / "run", max_instances=2))[1]
    assert len(found["chosen"]) == len(found["noise"]) == len(found["posterior_noise"]) == 2
    assert found["encoding"]["surface"].shape[0] == 3


@pytest.mark.parametrize("ratio", [0.0, 0.3, 1.0])
def test_a_share_of_the_scenes_is_trained_object_by_object(
    scenes: Path, tmp_path: Path, ratio: float
) -> None:
    found = train_set(settings(scenes, tmp_path / "run", single_object_ratio=ratio))
    counted = 0
    for epoch in range(60):
        found.set_epoch(epoch)
        counted += found[0]["apart"]
    assert counted / 60 == pytest.approx(ratio, abs=0.18)


# -- batches ---------------------------------------------------------------------------------------


def sample(rows: int, apart: bool = False) -> dict[str, Any]:
    return {
        "key": f"{rows} rows", "encoding": {}, "chosen": torch.arange(rows), "apart": apart,
        "sigma": torch.tensor([0.1 * rows]), "dropped": torch.tensor([rows == 2]),
        "posterior_noise": torch.zeros(rows, 8, 6), "noise": torch.ones(rows, 8, 6),
    }  # fmt: skip


def test_rows_of_a_scene_share_a_noise_level_and_see_each_other() -> None:
    batch = data.collate([sample(2), sample(1), sample(3)])
    assert batch["scene_of_row"].tolist() == [0, 0, 1, 2, 2, 2]
    groups = batch["instance_groups"]
    assert groups[0] == groups[1]
    assert groups[3] == groups[4] == groups[5]
    assert len(set(groups)) == 3
    assert batch["sigmas"].tolist() == pytest.approx([0.2, 0.1, 0.3])
    assert batch["dropped"].tolist() == [True, False, False]
    assert data.rows_of(batch) == len(batch["noise"]) == 6


def test_rows_that_are_trained_alone_see_nothing_but_keep_the_noise_level_of_their_scene() -> None:
    batch = data.collate([sample(2, apart=True), sample(2)])
    assert len(set(batch["instance_groups"])) == 3
    assert batch["scene_of_row"].tolist() == [0, 0, 1, 1]


def test_the_largest_batch_has_the_shapes_of_a_real_one(scenes: Path, tmp_path: Path) -> None:
    cfg = settings(scenes, tmp_path / "run")
    found, net = train_set(cfg), model.skeleton(cfg)
    real = data.collate([found[1], found[0]])  # of 3 and 2 instances
    made = memory.largest_batch(cfg, data.load(cfg), net)(2)
    assert made["instance_groups"] == real["instance_groups"]
    for name in ("noise", "posterior_noise", "sigmas", "dropped", "scene_of_row"):
        assert made[name].shape == real[name].shape, name
        assert made[name].dtype == real[name].dtype, name
    encoded = found.encodings.encoded(real["encodings"][0], torch.device("cpu"))
    for name, tensor in vars(encoded).items():
        assert made["encodings"][0][name].shape == tensor.shape, name


def test_the_size_of_the_cache_is_known_before_it_is_filled(scenes: Path, tmp_path: Path) -> None:
    cfg = settings(scenes, tmp_path / "run")
    splits, net = data.load(cfg), model.skeleton(cfg)
    made = scene_encodings.encodings_of(cfg, net, torch.device("cpu"), torch.float32)
    scene_encodings.fill(made, splits, torch.device("cpu"))
    files = list(cfg.cache_place.rglob("*.features"))
    assert len(files) == 3 * 3 + 2  # pictures and two draws; of validation scenes one
    written = sum(path.stat().st_size for path in files)
    expected = memory.cache_bytes(cfg, splits, net, 4)
    assert expected < written < expected + 1500 * len(files)  # the rest is headers


# -- splits ----------------------------------------------------------------------------------------


def named(root: Path, count: int) -> Path:
    for number in range(count):
        tiny_midi_run.write_scene(root / f"s{number:03d}", number, 1)
    return root


@pytest.mark.fault("P45")
def test_a_tenth_of_the_scenes_is_kept_out_and_stays_out_when_scenes_come(tmp_path: Path) -> None:
    cfg = Config(data_dir=str(named(tmp_path / "data", 20)))
    before = {folder.name for folder in data.folders_of(cfg)["val"]}
    assert len(before) == 2
    named(tmp_path / "data", 22)
    after = data.folders_of(cfg)
    assert len(after["val"]) == 2
    assert len({folder.name for folder in after["val"]} & before) >= 1
    assert not {f.name for f in after["val"]} & {f.name for f in after["train"]}


def test_few_scenes_are_all_trained(tmp_path: Path) -> None:
    found = data.folders_of(Config(data_dir=str(named(tmp_path / "data", 9))))
    assert [len(part) for part in found.values()] == [9]


def test_both_missing_folders_are_told_at_once(tmp_path: Path) -> None:
    cfg = Config(data_dir=str(tmp_path / "a"), val_data_dir=str(tmp_path / "b"))
    with pytest.raises(DataError) as told:
        data.folders_of(cfg)
    assert str(tmp_path / "a") in str(told.value)
    assert str(tmp_path / "b") in str(told.value)


def test_bad_scenes_stop_a_run_or_are_left_out(tmp_path: Path) -> None:
    root = named(tmp_path / "data", 4)
    (root / "s001" / "surface.npy").unlink()
    (root / "s002" / "seg.png").write_bytes(b"no picture")
    given: dict[str, Any] = {
        "data_dir": str(root),
        "image_size": 48,
        "output_dir": str(tmp_path / "run"),
    }
    with pytest.raises(DataError) as told:
        data.load(Config(**given))
    assert "s001" in str(told.value)
    assert "s002" in str(told.value)
    splits = data.load(Config(**given, on_bad_sample="skip", max_bad_fraction=0.6))
    assert [scene.key for scene in splits.train] == ["s000", "s003"]
    assert len(splits.bad) == 2
    assert "left out" in str(splits)


def test_a_scene_in_both_splits_is_told(tmp_path: Path) -> None:
    root = named(tmp_path / "data", 2)
    cfg = Config(data_dir=str(root), val_data_dir=str(root), image_size=48)
    assert "2 scenes of val in train too" in str(data.load(cfg))


def test_the_identity_of_the_data_is_its_content(tmp_path: Path) -> None:
    cfg = Config(data_dir=str(named(tmp_path / "data", 2)), image_size=48)
    before = data.fingerprint(data.load(cfg))
    (tmp_path / "data").rename(tmp_path / "moved")
    moved = Config(data_dir=str(tmp_path / "moved"), image_size=48)
    assert data.fingerprint(data.load(moved)) == before
    tiny_midi_run.write_scene(tmp_path / "moved" / "s001", 77, 1)
    assert data.fingerprint(data.load(moved)) != before
