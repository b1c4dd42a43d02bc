"""Samples, batches, evaluation pictures, and the reading of whole data sets."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from lora_core.cache import FeatureCache
from lora_core.errors import ConfigError, DataError
from lora_core.frozen import FrozenImages
from lora_core.pictures.encodings import Shape, encode_bitmap
from lora_core.pictures.masks import trim
from lora_core.pictures.survey import doubles
from sam2_lora.config import Config
from sam2_lora.data import EvalSet, Sample, TrainSet, collate, load, load_split
from sam2_lora.image import preprocess
from sam2_lora.records import Record
from sam2_lora.survey import count, look, split_by_name, subset

SIZE = (40, 90)
BOXES = [(5, 5, 25, 15), (30, 10, 60, 35), (70, 2, 85, 38)]


def config(root: Path = Path("none"), **changes: Any) -> Config:
    return Config(**{"data_root": str(root), "image_size": "64x96", "hflip": False} | changes)


def picture(path: Path, seed: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 255, (*SIZE, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    return path


def mask_of(boxes: list[tuple[int, int, int, int]]) -> np.ndarray:
    mask = np.zeros(SIZE, dtype=bool)
    for x0, y0, x1, y1 in boxes:
        mask[y0:y1, x0:x1] = True
    return mask


def shape(*boxes: tuple[int, int, int, int], label: str = "rust") -> Shape:
    return Shape(
        "bitmap", encode_bitmap(trim(mask_of(list(boxes)), (0, 0), SIZE, label)), label, "here"
    )


def records(folder: Path, *shapes: tuple[Shape, ...], merged: bool = False) -> list[Record]:
    return [
        Record(f"{k}.png", picture(folder / f"{k}.png", k), SIZE, items, merged=merged)
        for k, items in enumerate(shapes)
    ]


def severstal(root: Path, splits: dict[str, list[list]], first: int = 0) -> Path:
    """Supervisely splits: split -> the boxes of each of its pictures."""
    for split, pictures in splits.items():
        (root / split / "ann").mkdir(parents=True)
        for boxes in pictures:
            name = f"p{first:03}.png"
            picture(root / split / "img" / name, first)
            objects = []
            for box in boxes:
                data, origin = encode_bitmap(trim(mask_of([box]), (0, 0), SIZE, ""))
                bitmap = {"data": data, "origin": list(origin)}
                label = f"defect_{box[0]}"
                objects.append({"geometryType": "bitmap", "classTitle": label, "bitmap": bitmap})
            content = {"size": {"height": SIZE[0], "width": SIZE[1]}, "objects": objects}
            (root / split / "ann" / f"{name}.json").write_text(json.dumps(content))
            first += 1
    return root


def same(one: Any, other: Any) -> bool:
    """Whether two samples or batches are equal to the bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


# -- samples ---------------------------------------------------------------------------------------


def test_a_sample_has_the_picture_and_a_target_for_each_object(tmp_path: Path) -> None:
    (record,) = records(tmp_path, (shape(BOXES[0]), shape(BOXES[1])))
    sample = TrainSet([record], config(prompts="point"))[0]
    assert sample.pixels.dtype == torch.uint8
    assert (sample.pixels.numpy() == np.asarray(Image.open(record.image))).all()
    assert sample.targets.shape == (2, 64, 96)
    assert sample.targets.dtype == torch.uint8
    share = sample.targets.float().mean((1, 2))
    expected = torch.tensor([20 * 10, 30 * 25]) / (40 * 90)
    torch.testing.assert_close(share, expected, rtol=0.05, atol=0)


def test_clicks_lie_on_their_targets_and_boxes_around_them(tmp_path: Path) -> None:
    items = tuple(shape(box) for box in BOXES)
    for flip in (False, True):
        for kind in ("point", "box"):
            train = TrainSet(
                records(tmp_path, items), config(prompts=kind, hflip=flip, box_jitter=0)
            )
            for epoch in range(20):
                train.set_epoch(epoch)
                sample = train[0]
                prompts = sample.points if kind == "point" else sample.boxes
                assert prompts is not None
                assert prompts.dtype == torch.float32
                for target, prompt in zip(sample.targets, prompts, strict=True):
                    y, x = np.nonzero(target.numpy())
                    if kind == "box":
                        tight = np.array([x.min(), y.min(), x.max(), y.max()])
                        assert np.abs(prompt.numpy() - tight).max() < 2.5
                    else:
                        distance = np.abs(np.stack([x, y], 1) - prompt.numpy()).max(1)
                        assert distance.min() < 1


def test_flipping_mirrors_picture_and_targets_together(tmp_path: Path) -> None:
    train = TrainSet(records(tmp_path, (shape(BOXES[0]),)), config(prompts="point"))
    plain = train[0]
    flipping = TrainSet(train.records, config(prompts="point", hflip=True))
    seen = set()
    for epoch in range(20):
        flipping.set_epoch(epoch)
        sample = flipping[0]
        mirrored = torch.equal(sample.targets, plain.targets.flip(-1))
        pixels = plain.pixels
        pixels = pixels.flip(1) if mirrored else pixels
        assert torch.equal(sample.pixels, pixels)
        seen.add(mirrored)
    assert seen == {True, False}


def test_mixed_prompts_are_half_points_and_half_boxes(tmp_path: Path) -> None:
    train = TrainSet(records(tmp_path, (shape(BOXES[0]), shape(BOXES[1]))), config())
    kinds = []
    for epoch in range(200):
        train.set_epoch(epoch)
        sample = train[0]
        assert (sample.points is None) != (sample.boxes is None)
        kinds.append(sample.points is None)
    assert 70 < sum(kinds) < 130


def test_too_many_objects_are_chosen_from_anew_in_each_epoch(tmp_path: Path) -> None:
    items = tuple(shape(box) for box in BOXES)
    train = TrainSet(records(tmp_path, items), config(max_objects=2))
    seen = set()
    for epoch in range(30):
        train.set_epoch(epoch)
        targets = train[0].targets
        assert len(targets) == 2
        seen |= {tuple(np.flatnonzero(target.numpy().any(0))) for target in targets}
    assert len(seen) == 3


def test_pictures_without_objects_get_an_empty_target_under_a_click(tmp_path: Path) -> None:
    train = TrainSet(records(tmp_path, ()), config(prompts="box"))
    sample = train[0]
    assert sample.boxes is None
    assert sample.points is not None
    assert sample.points.shape == (1, 1, 2)
    assert sample.targets.shape == (1, 64, 96)
    assert not sample.targets.any()


def test_a_click_for_nothing_keeps_off_small_objects(tmp_path: Path) -> None:
    nearly_all = mask_of([(0, 0, 90, 40)])
    nearly_all[7, 9] = False
    whole = trim(nearly_all, (0, 0), SIZE, "a")
    item = Shape("bitmap", encode_bitmap(whole), "a", "here")
    train = TrainSet(records(tmp_path, (item,)), config(min_object_area=10**6))
    sample = train[0]
    assert not sample.targets.any()
    assert sample.points is not None
    torch.testing.assert_close(sample.points, torch.tensor([[[9 / 90 * 96, 7 / 40 * 64]]]))


@pytest.mark.fault("K11")
def test_a_sample_is_a_function_of_seed_epoch_and_index(tmp_path: Path) -> None:
    items = tuple(shape(box) for box in BOXES)
    settings = {"hflip": True, "max_objects": 2}
    train = TrainSet(records(tmp_path, items, items[:2], ()), config(**settings))
    again = TrainSet(train.records, config(**settings))
    again.set_epoch(5)
    _ = again[0], np.random.random(), torch.rand(1)  # noqa: NPY002 - global state must not matter
    again.set_epoch(0)
    for index in (2, 0, 1):
        assert same(train[index], again[index])
    again.set_epoch(1)
    assert not same(train[0], again[0])
    assert not same(train[0], TrainSet(train.records, config(**settings, seed=1))[0])
    assert train[0].seed != train[1].seed


@pytest.mark.fault("R16")
@pytest.mark.parametrize("persistent", [False, True])
def test_workers_give_the_same_batches_in_every_epoch(tmp_path: Path, persistent: bool) -> None:
    items = tuple(shape(box) for box in BOXES)
    found = records(tmp_path, items, (), items[:1], items[1:])

    def batches(workers: int) -> list[dict]:
        train = TrainSet(found, config(hflip=True))
        loader = DataLoader(
            train, 2, collate_fn=collate, num_workers=workers,
            persistent_workers=persistent and workers > 0,
        )  # fmt: skip
        result = []
        for epoch in range(2):
            train.set_epoch(epoch)
            result += list(loader)
        return result

    here = batches(0)
    assert same(here, batches(2))
    assert {image.dtype for batch in here for image in batch["images"]} == {torch.uint8}


@pytest.mark.fault("R33", "R16")
def test_a_data_set_that_was_used_already_can_be_sent_to_spawned_workers(tmp_path: Path) -> None:
    items = tuple(shape(box) for box in BOXES)
    train = TrainSet(records(tmp_path, items, items[:1]), config(hflip=True))
    train.set_epoch(1)
    expected = [train[0], train[1]]
    loader = DataLoader(train, None, num_workers=1, multiprocessing_context="spawn")
    assert same(list(loader), expected)


def test_cached_features_replace_the_picture_and_its_mirror_image(tmp_path: Path) -> None:
    found = records(tmp_path, (shape(BOXES[0]),), ())
    train, plain = (TrainSet(found, config(hflip=True)) for _ in range(2))
    seen = []

    def encode(picture: torch.Tensor) -> dict[str, torch.Tensor]:
        seen.append(picture)
        return {"image_embed": preprocess(picture, (64, 96))[None]}

    train.frozen = FrozenImages(
        encode, {}, torch.device("cpu"), FeatureCache(tmp_path / "cache", 10**9)
    )
    for epoch in range(8):
        train.set_epoch(epoch)
        plain.set_epoch(epoch)
        batch = collate([train[0], train[1]])
        assert not any(isinstance(image, torch.Tensor) for image in batch["images"])
        bytes_of_both = collate([plain[0], plain[1]])["images"]
        expected = torch.stack([preprocess(picture, (64, 96)) for picture in bytes_of_both])
        found = train.frozen.features(batch["images"])["image_embed"]
        assert torch.equal(found, expected)
    assert len(seen) == 4  # two pictures, and each mirrored


@pytest.mark.fault("D05")
@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1)])
@pytest.mark.parametrize("prompts", ["point", "box"])
def test_extreme_pictures_are_samples_too(tmp_path: Path, size: tuple, prompts: str) -> None:
    path = tmp_path / "x.png"
    Image.new("RGB", size[::-1]).save(path)
    item = Shape("rectangle", (0, 0, size[1] - 1, size[0] - 1), "all", "here")
    record = Record("x", path, size, (item,))
    sample = TrainSet([record], config(prompts=prompts, min_object_area=1))[0]
    assert sample.pixels.shape == (*size, 3)
    assert sample.targets.all()
    (picture,) = EvalSet([record], config(min_object_area=1))
    assert picture.objects[0].mask.shape == size


# -- batches ---------------------------------------------------------------------------------------


def sample(key: str, count: int, kind: str) -> Sample:
    value = torch.arange(count, dtype=torch.float32)[:, None]
    return Sample(
        key=key,
        pixels=torch.zeros(4 + count, 6, 3, dtype=torch.uint8),
        points=value[:, None].expand(count, 1, 2) if kind == "point" else None,
        boxes=value.expand(count, 4) if kind == "box" else None,
        targets=torch.zeros(count, 4, 6, dtype=torch.uint8),
        seed=count,
    )


def test_objects_are_put_together_by_the_structure_of_their_prompts() -> None:
    parts = [sample("a", 2, "point"), sample("b", 3, "box"), sample("c", 1, "point")]
    batch = collate(parts)
    assert {image.dtype for image in batch["images"]} == {torch.uint8}
    assert [tuple(image.shape) for image in batch["images"]] == [(6, 6, 3), (7, 6, 3), (5, 6, 3)]
    assert batch["keys"] == ["a", "b", "c"]
    assert batch["seed"] == [2, 3, 1]
    clicks, boxes = batch["buckets"]
    assert clicks["image"].tolist() == [0, 0, 2]
    assert clicks["points"][:, 0, 0].tolist() == [0, 1, 0]
    assert clicks["labels"].tolist() == [[1], [1], [1]]
    assert clicks["targets"].shape == (3, 4, 6)
    assert "boxes" not in clicks
    assert boxes["image"].tolist() == [1, 1, 1]
    assert boxes["boxes"].shape == (3, 4)
    assert "points" not in boxes
    assert len(collate(parts[:1])["buckets"]) == 1


# -- objects and counts ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "merged", "areas"),
    [
        ("auto", False, [200 + 750, 570]),
        ("auto", True, [200, 750, 570]),
        ("components", False, [200, 750, 570]),
        ("annotations", True, [200 + 750, 570]),
        ("union", False, [200 + 750 + 570]),
    ],
)
def test_what_one_object_is(tmp_path: Path, rule: str, merged: bool, areas: list[int]) -> None:
    (record,) = records(
        tmp_path, (shape(BOXES[0], BOXES[1]), shape((70, 0, 85, 38))), merged=merged
    )
    (found,) = EvalSet([record], config(objects=rule))
    assert [item.area for item in found.objects] == areas


def test_small_objects_are_left_out_and_counted(tmp_path: Path) -> None:
    found = records(
        tmp_path, (shape((0, 0, 3, 5)), shape((20, 0, 24, 4))), (shape((0, 0, 1, 1)),), ()
    )
    counts = count(look(record, config()) for record in found)
    assert (counts.pictures, counts.empty, counts.small) == (3, 1, 2)
    assert counts.objects == {"rust": 1}
    pictures = list(EvalSet(found, config()))
    assert [len(record.objects) for record in pictures] == [1, 0, 0]
    assert [len(record.small) for record in pictures] == [1, 1, 0]
    assert count(look(record, config(min_object_area=0)) for record in found).objects == {"rust": 3}


def test_evaluation_pictures_keep_their_size(tmp_path: Path) -> None:
    found = records(tmp_path, (shape(BOXES[2]),))
    (record,) = EvalSet(found, config())
    assert record.rgb.shape == (*SIZE, 3)
    assert (record.rgb == np.asarray(Image.open(found[0].image))).all()
    assert (record.objects[0].mask == mask_of([BOXES[2]])).all()


# -- splits ----------------------------------------------------------------------------------------


def named(count: int) -> list[Record]:
    return [Record(f"{k}.png", Path(f"{k}.png"), SIZE) for k in range(count)]


def test_a_picture_never_changes_sides() -> None:
    train, val = split_by_name(named(1000), 0.1)
    assert 70 < len(val) < 130
    assert len(train) + len(val) == 1000
    more_train, more_val = split_by_name(named(2000), 0.1)
    assert {record.key for record in train} < {record.key for record in more_train}
    assert {record.key for record in val} < {record.key for record in more_val}


@pytest.mark.parametrize("share", [0.001, 0.5, 0.999])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_both_sides_get_a_picture(count: int, share: float) -> None:
    train, val = split_by_name(named(count), share)
    assert train
    assert val
    assert len(train) + len(val) == count


@pytest.mark.fault("D09")
def test_a_single_picture_is_on_both_sides() -> None:
    assert [len(side) for side in split_by_name(named(1), 0.1)] == [1, 1]


def test_smaller_subsets_lie_in_larger_ones() -> None:
    small, large = ({r.key for r in subset(named(100), n)} for n in (10, 30))
    assert len(small) == 10
    assert small < large


@pytest.mark.fault("D10")
def test_doubled_pictures_are_found_by_their_bytes(tmp_path: Path) -> None:
    found = records(tmp_path / "a", (), (), ())
    others = records(tmp_path / "b", (), ())
    others[1].image.write_bytes(found[2].image.read_bytes())
    changed = bytearray(found[0].image.read_bytes())
    changed[-1] ^= 1
    others[0].image.write_bytes(changed)
    assert doubles(found, others) == ["2.png"]
    assert doubles(found, found) == ["0.png", "1.png", "2.png"]


# -- whole data sets -------------------------------------------------------------------------------


def test_a_data_set_is_loaded_and_described(tmp_path: Path) -> None:
    splits = {
        "train_split": [BOXES, [], [(0, 0, 2, 2)]],
        "val_split": [BOXES[:2]],
        "test_split": [[]],
    }
    found = load(config(severstal(tmp_path, splits)))
    assert [len(part) for part in (found.train, found.val, found.test or [])] == [3, 1, 1]
    assert found.classes == ("defect_30", "defect_5", "defect_70")
    text = str(found)
    lines = [line.split() for line in text.splitlines()]
    assert ["train", "3", "1", "3", "1"] in lines
    assert ["val", "1", "0", "2", "0"] in lines
    assert ["defect_70", "1", "0", "0"] in lines
    assert "note" not in text
    assert isinstance(found.train[0], Sample)


@pytest.mark.fault("H32")
def test_class_names_cannot_steer_the_terminal(tmp_path: Path) -> None:
    root = severstal(tmp_path, {"train_split": [BOXES[:1]], "val_split": [BOXES[:1]]})
    for path in root.rglob("*.json"):
        path.write_text(path.read_text().replace("defect_5", "a\\u001b[2Jb\\nc" + "x" * 99))
    text = str(load(config(root)))
    assert "\x1b" not in text
    assert "b cxxx" in text
    assert max(map(len, text.splitlines())) < 100


def test_without_a_validation_split_some_training_pictures_become_one(tmp_path: Path) -> None:
    root = severstal(tmp_path, {"train_split": [BOXES] * 30})
    found = load(config(root, val_fraction=0.3))
    assert 3 <= len(found.val) <= 15
    assert len(found.train) + len(found.val) == 30
    assert found.test is None
    assert load_split(config(root), "test") is None
    half = load_split(config(root, val_fraction=0.3), "val")
    assert half is not None
    assert [r.key for r in half.records] == [r.key for r in found.val.records]


def test_a_test_split_alone_can_be_evaluated(tmp_path: Path) -> None:
    root = severstal(tmp_path, {"test_split": [BOXES]})
    found = load_split(config(root), "test")
    assert found is not None
    assert len(found) == 1
    with pytest.raises(DataError, match=r"the training split \(train_split or train\) is missing"):
        load(config(root))


def test_validation_can_be_a_fixed_part(tmp_path: Path) -> None:
    root = severstal(tmp_path, {"train_split": [BOXES], "val_split": [BOXES] * 9})
    found = load(config(root, max_val_images=4))
    assert len(found.val) == 4
    again = load(config(root, max_val_images=4, seed=3))
    assert [r.key for r in again.val.records] == [r.key for r in found.val.records]


def test_subsets_replace_the_training_split(tmp_path: Path) -> None:
    root = severstal(tmp_path, {"train_split": [BOXES] * 3, "val_split": [BOXES]})
    severstal(root / "subsets", {"500_subset": [BOXES]}, first=10)
    assert len(load(config(root, dataset_size="500")).train) == 1
    with pytest.raises(ConfigError, match=r"--dataset_size 1000: .*1000_subset: no such folder"):
        load(config(root, dataset_size="1000"))


@pytest.mark.fault("D10")
def test_pictures_in_two_splits_are_remarked_on(tmp_path: Path) -> None:
    root = severstal(tmp_path, {"train_split": [BOXES] * 2, "val_split": [BOXES]})
    inside = root / "train_split" / "img" / "p000.png"
    (root / "val_split" / "img" / "p002.png").write_bytes(inside.read_bytes())
    text = str(load(config(root)))
    assert "note: 1 picture of val in train too" in text
    assert "val_split/img/p002.png" in text


def test_one_picture_is_enough_and_remarked_on(tmp_path: Path) -> None:
    found = load(config(severstal(tmp_path, {"train_split": [BOXES]})))
    assert len(found.train) == len(found.val) == 1
    assert "in train too" in str(found)


@pytest.mark.fault("D01")
def test_faults_of_all_splits_are_reported_together(tmp_path: Path) -> None:
    root = severstal(tmp_path, {"train_split": [BOXES] * 2, "val_split": [BOXES]})
    (root / "train_split" / "img" / "p000.png").write_bytes(b"")
    annotation = root / "train_split" / "ann" / "p001.png.json"
    annotation.write_text(annotation.read_text().replace('"data": "', '"data": "!!'))
    (root / "val_split" / "ann" / "p002.png.json").write_text("{")
    with pytest.raises(DataError) as caught:
        load(config(root))
    text = str(caught.value)
    assert text.startswith(f"{root}: 5 problems\n")
    assert "p000.png: the file is empty" in text
    assert "p001.png.json: object 1: bitmap: not base64" in text
    assert "p002.png.json:1:2: not JSON" in text


@pytest.mark.parametrize(
    ("splits", "reason"),
    [
        ({"train_split": [], "val_split": [BOXES]}, "no pictures in the train split"),
        ({"train_split": [BOXES], "val_split": []}, "no pictures in the val split"),
        ({"train_split": [[]], "val_split": [BOXES]}, "no objects in the 1 picture of the train"),
        (
            {"train_split": [BOXES], "val_split": [[]]},
            r"of the val split: add pictures with objects to it$",
        ),
    ],
)
def test_splits_that_teach_nothing_are_refused(tmp_path: Path, splits: dict, reason: str) -> None:
    root = severstal(tmp_path, splits)
    for split in splits:
        (root / split / "img").mkdir(exist_ok=True)
    with pytest.raises(DataError, match=reason):
        load(config(root))


def test_the_settings_of_a_folder_of_masks_reach_it(tmp_path: Path) -> None:
    (tmp_path / "masks").mkdir()
    for k in range(4):
        picture(tmp_path / "images" / f"{k}.png", k)
        values = mask_of(BOXES[:1]) * np.uint8(4) + mask_of(BOXES[1:]) * np.uint8(9)
        Image.fromarray(values).save(tmp_path / "masks" / f"{k}.png")
    with pytest.raises(DataError, match="--mask_kind"):
        load(config(tmp_path))
    assert load(config(tmp_path, mask_kind="labels")).classes == ("class_4", "class_9")
    counts = load(config(tmp_path, mask_kind="instances", val_fraction=0.5)).counts
    assert sum(part.objects["object"] for part in counts.values()) == 8
