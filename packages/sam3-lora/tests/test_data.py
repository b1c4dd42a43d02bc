"""Samples, batches, validation pictures, and the reading of whole data sets."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import Sam3Config

from lora_core.errors import ConfigError, DataError
from lora_core.pictures.encodings import decode_counts
from lora_core.testing.goldens import Golden, load_golden
from sam3_lora import network, objective
from sam3_lora.config import Config, Dataset, Training
from sam3_lora.data import (
    Sample,
    Splits,
    TrainSet,
    collate,
    fingerprint,
    load,
    notes_on_length,
)
from sam3_lora.losses import LossSettings, loss
from sam3_lora.outputs import Targets
from sam3_lora.queries import asked
from sam3_lora.records import Record
from sam3_lora.samples import in_input
from sam3_lora.tokenizer import Tokenizer, learn_merges, vocabulary
from sam3_lora.transforms import Placement, filling, network_input, place_picture

GOLDEN = Path(__file__).parent / "goldens" / "data"
SIZE = (40, 90)  # height, width
SQUARE = [10, 5, 40, 5, 40, 30, 10, 30]


@pytest.fixture(autouse=True)
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test begins without what another has looked at."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    merges = learn_merges(["things", "bolt", "nut", "washer", "visual", "rust", "object"])
    return Tokenizer(vocabulary(merges), merges)


def content(pictures: int = 4, names: tuple[str, ...] = ("bolt", "nut", "washer")) -> dict:
    """A COCO file: picture k has one square of category k % len(names) + 1."""
    return {
        "images": [
            {"id": k, "file_name": f"{k}.png", "height": SIZE[0], "width": SIZE[1]}
            for k in range(pictures)
        ],
        "annotations": [
            {
                "id": k,
                "image_id": k,
                "category_id": k % len(names) + 1,
                "bbox": [10, 5, 30, 25],
                "segmentation": [list(SQUARE)],
            }
            for k in range(pictures)
        ],
        "categories": [{"id": k, "name": name} for k, name in enumerate(names, start=1)],
    }


def write(folder: Path, value: dict, seed: int = 0) -> Path:
    """The file and its pictures, all different."""
    folder.mkdir(parents=True, exist_ok=True)
    for image in value["images"]:
        rng = np.random.default_rng([seed, len(list(folder.iterdir()))])
        pixels = rng.integers(0, 255, (*SIZE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / image["file_name"])
    (folder / "_annotations.coco.json").write_text(json.dumps(value))
    return folder


def config(
    train: Path, val: Path | None = None, masks: bool = True, seed: int = 0, **dataset: Any
) -> Config:
    return Config(
        dataset=Dataset(
            train_img_folder=str(train),
            train_ann_file=str(train / "_annotations.coco.json"),
            val_img_folder=str(val) if val else None,
            val_ann_file=str(val / "_annotations.coco.json") if val else None,
            **{"resolution": "84", **dataset},
        ),
        training=Training(enable_segmentation=masks),
        seed=seed,
        on_bad_sample="stop",
    )


def boxes_of(sample: Sample) -> dict[str, int]:
    return {query.phrase: len(query.boxes) for query in sample.queries}


# -- the recorded case -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden() -> Golden:
    return load_golden(GOLDEN)


def golden_splits(**settings: Any) -> Splits:
    return load(config(GOLDEN / "train", resolution="56", **settings))


def golden_batch(splits: Splits, place: Placement, tokenizer: Tokenizer) -> dict[str, Any]:
    """The batch of all pictures, each asked for every phrase, without anything random."""
    phrases, samples = splits.train.phrases, []
    for record in splits.train.records:
        instances, _ = record.instances(crowds=False)
        queries = [
            in_input(query, record.size, place, masks=True)
            for query in asked(instances, phrases, phrases)
        ]
        samples.append(Sample(record.key, place_picture(record.pixels(), place), queries))
    return collate(samples, tokenizer)


PLACES = {"plain": filling((56, 56)), "padded": Placement((40, 40), (3, 5), (56, 56))}


@pytest.mark.parametrize("pipeline", PLACES)
def test_the_batch_of_the_official_loader_is_reproduced(
    golden: Golden, pipeline: str, tokenizer: Tokenizer
) -> None:
    splits = golden_splits(keep_placeholder_category=True)
    batch = golden_batch(splits, PLACES[pipeline], tokenizer)
    expected = {
        name.removeprefix(f"{pipeline}."): value
        for name, value in golden.io.items()
        if name.startswith(pipeline)
    }
    assert batch["phrases"] == golden.config[pipeline]["text_batch"]
    assert len(batch["keys"]) == 12
    for ours, theirs in (("image_ids", "img_ids"), ("text_ids", "text_ids")):
        assert batch[ours].tolist() == expected[theirs].tolist()
    assert batch["targets"]["counts"].tolist() == expected["num_boxes"].tolist()
    assert torch.equal(network_input(batch["images"]), expected["images"])
    boxes, recorded = batch["targets"]["boxes"], expected["boxes"].flatten(1)
    cut = 2  # x = -4: official training keeps the width of 20, the rule here is to cut the corner
    rest = [k for k in range(7) if k != cut]
    assert (boxes - recorded)[rest].abs().max() < 1e-6
    scale, left = (PLACES[pipeline].content[1] / 61, PLACES[pipeline].offset[0])
    corners = [(left + x * scale) / 56 for x in (0, 16)]
    assert boxes[cut, 0] == pytest.approx(sum(corners) / 2, abs=1e-6)
    assert boxes[cut, 2] == pytest.approx(corners[1] - corners[0], abs=1e-6)
    assert boxes[cut, 1::2].tolist() == pytest.approx(recorded[cut, 1::2].tolist(), abs=1e-6)
    assert batch["targets"]["has_mask"].int().tolist() == expected["is_valid_segment"].tolist()
    assert torch.equal(batch["targets"]["masks"], expected["segments"])


def test_the_placeholder_category_is_dropped_with_a_note(tokenizer: Tokenizer) -> None:
    splits = golden_splits()
    assert splits.phrases == ("bolt", "nut", "washer")
    assert len(golden_batch(splits, PLACES["plain"], tokenizer)["keys"]) == 9
    assert any("'things'" in note and "Roboflow" in note for note in splits.notes)
    assert not any("Roboflow" in n for n in golden_splits(keep_placeholder_category=True).notes)


def test_masks_at_the_original_size_are_those_of_pycocotools(golden: Golden) -> None:
    records = golden_splits().train.records
    found = [
        [(one.phrase, one.mask.mask) for one in record.instances()[0] if one.mask is not None]
        for record in records
    ]
    # The recorded ones are in the order of the categories.
    for image, places in ((0, (0, 3, 4, 5)), (1, (0, 1))):
        recorded = [golden.io[f"decoded.{image}.{place}"].bool().numpy() for place in places]
        ours = sorted(found[image], key=lambda one: one[0])
        assert len(ours) == len(recorded)
        for (_, mask), expected in zip(ours, recorded, strict=True):
            assert (mask == expected).all()


def test_what_was_passed_over_is_counted() -> None:
    splits = golden_splits()
    text = str(splits)
    assert "note: boxes without width or height, left out: 1" in text
    assert "note: train: 1 crowd regions left out (--dataset.keep_crowd)" in text
    assert "note: boxes that leave their picture, cut: 1\n" in text
    counts = splits.counts["train"]
    assert (counts.pictures, counts.empty, counts.masks) == (3, 1, 5)
    assert counts.objects == {"bolt": 4, "nut": 2, "washer": 1}
    kept = golden_splits(keep_crowd=True).counts["train"]
    assert kept.objects == {"bolt": 4, "nut": 3, "washer": 1}


# -- training --------------------------------------------------------------------------------------


def test_a_sample_is_a_function_of_seed_epoch_and_index(tmp_path: Path) -> None:
    cfg = config(write(tmp_path / "train", content(6)), max_negatives=1, exemplars=0.5)
    one, two = load(cfg).train, load(cfg).train
    other = TrainSet(one.records, one.phrases, config(tmp_path / "train", seed=1, max_negatives=1))
    one.set_epoch(3)
    _ = one[5], one[1]  # what was asked for before does not matter
    two.set_epoch(3)
    assert_equal_samples(one[2], two[2])
    other.set_epoch(3)
    seen = {}
    for epoch in range(4):
        two.set_epoch(epoch)
        seen[epoch] = [boxes_of(two[index]) for index in range(6)]
    assert len({str(value) for value in seen.values()}) > 1, "negatives are drawn anew"
    assert [boxes_of(other[index]) for index in range(6)] != seen[3]


def assert_equal_samples(one: Sample, two: Sample) -> None:
    assert one.key == two.key
    assert torch.equal(one.pixels, two.pixels)
    assert [query.phrase for query in one.queries] == [query.phrase for query in two.queries]
    for mine, theirs in zip(one.queries, two.queries, strict=True):
        assert torch.equal(mine.boxes, theirs.boxes)
        assert mine.masks is not None
        assert torch.equal(mine.masks, theirs.masks)
        assert (mine.exemplar is None) == (theirs.exemplar is None)


def test_workers_give_what_one_process_gives(tmp_path: Path, tokenizer: Tokenizer) -> None:
    train = load(config(write(tmp_path / "train", content(6)))).train
    train.set_epoch(2)
    here = [sample.pixels for sample in (train[k] for k in range(6))]
    loader = DataLoader(train, num_workers=2, collate_fn=partial(collate, tokenizer=tokenizer))
    there = [batch["images"][0] for batch in loader]
    assert {picture.dtype for picture in there} == {torch.uint8}
    assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))


def test_pictures_are_placed_at_random_unless_augmentation_is_off(tmp_path: Path) -> None:
    write(tmp_path / "train", content(1))
    moved = load(config(tmp_path / "train")).train
    whole = load(config(tmp_path / "train", enable_augmentation=False)).train
    margins = set()
    for epoch in range(8):
        moved.set_epoch(epoch)
        sample = moved[0]
        covered = (sample.pixels > 0).any(2)
        rows, columns = covered.any(1).nonzero().flatten(), covered.any(0).nonzero().flatten()
        margins.add((int(rows[0]), int(columns[0]), len(rows)))
        x0 = (10 / 90) * len(columns) + int(columns[0])
        x1 = (40 / 90) * len(columns) + int(columns[0])
        box = sample.queries[0].boxes[0]
        assert float(box[0]) * 84 == pytest.approx((x0 + x1) / 2, abs=1.0)
    assert len(margins) > 4
    assert (whole[0].pixels > 0).any(2).float().mean() > 0.99
    assert whole[0].queries[0].boxes[0].tolist() == pytest.approx(
        [25 / 90, 17.5 / 40, 1 / 3, 5 / 8]
    )


def test_boxes_and_masks_stay_on_their_objects_when_mirrored(tmp_path: Path) -> None:
    """The object is the only bright thing of its picture, left of its middle."""
    write(tmp_path / "train", content(1))
    pixels = np.zeros((*SIZE, 3), np.uint8)
    pixels[5:30, 10:40] = 255
    Image.fromarray(pixels).save(tmp_path / "train" / "0.png")
    for augmented in (True, False):
        cfg = config(tmp_path / "train", hflip=True, enable_augmentation=augmented)
        train, sides = load(cfg).train, set()
        for epoch in range(8):
            train.set_epoch(epoch)
            query = train[0].queries[0]
            assert query.masks is not None
            bright = train[0].pixels[..., 0] > 127
            assert (bright ^ query.masks[0].bool()).sum() <= 0.06 * bright.sum()
            x = bright.any(0).nonzero().flatten().float().mean() + 0.5
            assert float(query.boxes[0, 0]) * 84 == pytest.approx(float(x), abs=1.0)
            sides.add(bool(x < 42))
        assert augmented or sides == {True, False}


def test_a_share_of_the_queries_shows_a_box_instead_of_the_phrase(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    train = load(config(write(tmp_path / "train", content(3)), exemplars=1.0)).train
    batch = collate([train[0], train[1]], tokenizer)
    present = batch["targets"]["counts"] > 0
    assert batch["exemplars"].shape == (6, 1, 4)
    assert (batch["exemplar_labels"][:, 0] == torch.where(present, 1, -10)).all()
    visual = batch["phrases"].index("visual")
    assert (batch["text_ids"][present] == visual).all()
    assert (batch["text_ids"][~present] != visual).all()
    shown, boxes = batch["exemplars"][present, 0], batch["targets"]["boxes"]
    assert 0 < (shown - boxes).abs().max() < 0.3, "near the object, but not exactly"
    without = load(config(tmp_path / "train")).train
    assert "exemplars" not in collate([without[0]], tokenizer)


@pytest.mark.fault("C34")
def test_a_query_with_too_many_objects_is_dropped_and_counted(tmp_path: Path) -> None:
    value = content(2)
    more = [value["annotations"][0] | {"id": 10 + k} for k in range(4)]
    value["annotations"] += more
    splits = load(config(write(tmp_path / "train", value), max_ann_per_img=4))
    assert boxes_of(splits.train[0]) == {"nut": 0, "washer": 0}
    assert boxes_of(splits.train[1]) == {"bolt": 0, "nut": 1, "washer": 0}
    note = "train: 1 queries with more than 4 objects left out (--dataset.max_ann_per_img)"
    assert note in splits.notes
    assert boxes_of(load(config(tmp_path / "train", max_ann_per_img=5)).train[0])["bolt"] == 5


def test_pictures_that_can_be_asked_nothing_are_left_out(tmp_path: Path) -> None:
    value = content(4)
    del value["annotations"][2:]
    write(tmp_path / "train", value)
    assert len(load(config(tmp_path / "train")).train) == 4
    splits = load(config(tmp_path / "train", max_negatives=0))
    assert [record.key for record in splits.train.records] == ["0.png", "1.png"]
    assert "2 pictures of train left out that can be asked nothing" in splits.notes
    assert any("train asks for nothing in vain" in note for note in splits.notes)


def test_boxes_alone_are_trained_without_decoding_masks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer
) -> None:
    splits = load(config(write(tmp_path / "train", content(3)), masks=False))
    monkeypatch.setattr("sam3_lora.records.decode", None)
    batch = collate([splits.train[0]], tokenizer)
    assert batch["targets"].keys() == {"boxes", "counts"}
    assert Targets(**batch["targets"]).masks is None


def test_a_batch_of_absent_phrases_has_empty_targets(tmp_path: Path, tokenizer: Tokenizer) -> None:
    value = content(2)
    value["images"].append({"id": 9, "file_name": "9.png"})
    train = load(config(write(tmp_path / "train", value))).train
    targets = collate([train[2]], tokenizer)["targets"]
    assert targets["boxes"].shape == (0, 4)
    assert targets["masks"].shape == (0, 84, 84)
    assert targets["has_mask"].shape == (0,)
    assert targets["counts"].tolist() == [0, 0, 0]


def test_an_object_whose_mask_vanishes_is_trained_as_a_box(tmp_path: Path) -> None:
    value = content(1)
    value["annotations"][0] |= {"bbox": [3, 3, 1, 1], "segmentation": [[3, 3, 4, 3, 4, 3.4]]}
    splits = load(config(write(tmp_path / "train", value), resolution="14"))
    query = splits.train[0].queries[0]
    assert query.has_mask.tolist() == [False]
    assert len(query.boxes) == 1


@pytest.mark.parametrize("masks", [False, True])
def test_a_batch_of_bytes_gives_the_loss_of_floats_bit_for_bit(
    tmp_path: Path, tokenizer: Tokenizer, masks: bool
) -> None:
    cfg = config(write(tmp_path / "train", content(2)), masks=masks, exemplars=0.5)
    train = load(cfg).train
    batch = collate([train[0], train[1]], tokenizer)
    settings = load_golden(GOLDEN.parent / "transformers_model").config["sam3_config"]
    model = network.build_network(Sam3Config(**settings)).train()
    batch["input_ids"] = batch["input_ids"].clamp(max=settings["text_config"]["vocab_size"] - 1)
    assert {picture.dtype for picture in batch["images"]} == {torch.uint8}
    torch.manual_seed(0)
    found, _ = objective.loss_of(cfg, None)(model, batch)
    found.backward()
    # Floats as a data set with official training's transform gives them.
    pixels = [
        one.permute(2, 0, 1).contiguous().float().div(255).sub(0.5).div(0.5)
        for one in batch["images"]
    ]
    floats = batch | {"pixel_values": torch.stack(pixels)}
    torch.manual_seed(0)
    outputs = network.forward(model, floats, masks=masks, one_to_many=cfg.training.o2m_weight > 0)
    weights = LossSettings(masks=masks, o2m_weight=cfg.training.o2m_weight)
    expected, _ = loss(outputs, Targets(**batch["targets"]), weights)
    assert torch.isfinite(expected)
    assert torch.equal(found, expected)


# -- validation ------------------------------------------------------------------------------------


def test_a_validation_picture_has_its_phrases_and_their_truth(tmp_path: Path) -> None:
    value = content(3)
    value["images"][1]["id"] = value["annotations"][1]["image_id"] = 77
    runs = {"size": [40, 90], "counts": [2000, 600, 1000]}
    crowd = {"id": 50, "image_id": 77, "category_id": 2, "iscrowd": 1, "segmentation": runs}
    value["annotations"].append(crowd)
    write(tmp_path / "valid", value, seed=1)
    splits = load(config(write(tmp_path / "train", content(3)), tmp_path / "valid"))
    assert splits.val is not None
    record = list(splits.val)[1]
    assert (record.key, record.image_id, record.size) == ("1.png", 77, SIZE)
    assert record.pixels.shape == (84, 84, 3)
    assert record.phrases == ["bolt", "nut", "washer"]
    assert record.categories == [1, 2, 3]
    assert record.exhaustive == [True] * 3
    nothing, found, nothing_either = record.truth
    assert nothing == nothing_either == []
    assert [one["iscrowd"] for one in found] == [0, 1]
    assert found[0]["bbox"] == [10, 5, 30, 25]
    assert found[0]["area"] == 750
    mask = decode_counts(found[0]["segmentation"]["counts"], SIZE).mask
    assert mask[5:30, 10:40].all()
    assert mask.sum() == 750


def test_the_absent_phrases_of_validation_never_change(tmp_path: Path) -> None:
    names = tuple(f"kind {k}" for k in range(30))
    write(tmp_path / "valid", content(6, names), seed=1)
    write(tmp_path / "train", content(6, names))

    def phrases(**settings: Any) -> list[list[str]]:
        splits = load(config(tmp_path / "train", tmp_path / "valid", **settings))
        assert splits.val is not None
        return [record.phrases for record in splits.val]

    first = phrases()
    assert first == phrases(seed=99)
    assert [len(one) for one in first] == [11] * 6
    assert len({tuple(one) for one in first}) == 6, "they differ between pictures"
    assert all(f"kind {k}" in one for k, one in enumerate(first))
    assert [len(one) for one in phrases(max_val_negatives=3)] == [4] * 6


def test_training_and_validation_may_have_other_ids_and_phrases(tmp_path: Path) -> None:
    value = content(3, ("washer", "bolt", "gear"))
    splits = load(
        config(write(tmp_path / "train", content(3)), write(tmp_path / "valid", value, seed=1))
    )
    assert splits.phrases == ("bolt", "nut", "washer", "gear")
    assert splits.val is not None
    assert splits.val[0].phrases == ["washer", "bolt", "gear"]
    assert "phrases of val that train does not have: 'gear'" in splits.notes


def test_only_what_is_known_to_be_absent_is_asked_in_vain(tmp_path: Path) -> None:
    """As in LVIS, where most categories are not looked for in a picture."""
    value = content(2)
    value["images"][0] |= {"neg_category_ids": [3], "not_exhaustive_category_ids": [1]}
    write(tmp_path / "train", value)
    write(tmp_path / "valid", value, seed=1)
    splits = load(config(tmp_path / "train", tmp_path / "valid"))
    assert boxes_of(splits.train[0]) == {"bolt": 1, "washer": 0}
    assert boxes_of(splits.train[1]) == {"bolt": 0, "nut": 1, "washer": 0}
    assert splits.val is not None
    assert splits.val[0].phrases == ["bolt", "washer"]
    assert splits.val[0].exhaustive == [False, True]


# -- the whole data set ----------------------------------------------------------------------------


def test_the_minimal_form_is_read(tmp_path: Path) -> None:
    """Images with image_id, no categories, no iscrowd, run lengths."""
    value = {
        "images": [{"image_id": 1, "file_name": "image1.png", "height": 40, "width": 90}],
        "annotations": [
            {
                "id": 1, "image_id": 1, "bbox": [10, 5, 30, 25], "area": 12345,
                "segmentation": {"size": [40, 90], "counts": [405, 25, 3170]},
            }
        ],
    }  # fmt: skip
    write(tmp_path / "train", value)
    assert load(config(tmp_path / "train")).phrases == ("object",)
    splits = load(config(tmp_path / "train", phrase="rust patch"))
    assert splits.phrases == ("rust patch",)
    assert boxes_of(splits.train[0]) == {"rust patch": 1}


@pytest.mark.parametrize(("given", "real"), [("valid", "val"), ("val", "valid")])
def test_the_validation_folder_may_have_either_name(tmp_path: Path, given: str, real: str) -> None:
    write(tmp_path / "train", content(2))
    write(tmp_path / real, content(3), seed=1)
    splits = load(config(tmp_path / "train", tmp_path / given))
    assert splits.val is not None
    assert len(splits.val) == 3


def test_validation_is_optional_unless_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "data" / "train", content(2))
    splits = load(Config())
    assert splits.val is None
    assert any("no validation pictures" in note for note in splits.notes)
    with pytest.raises(DataError, match=r"val_img_folder .*holdout: no such folder"):
        load(config(tmp_path / "data" / "train", tmp_path / "holdout"))


def test_other_words_for_categories_are_asked(tmp_path: Path) -> None:
    write(tmp_path / "train", content(3, ("HW_bolt-m8", "nut", "washer")))
    assert load(config(tmp_path / "train")).phrases == ("HW bolt m8", "nut", "washer")
    assert load(config(tmp_path / "train", clean_names=False)).phrases[0] == "HW_bolt-m8"
    prompts = ["1=hexagon bolt", "washer=thin_ring"]
    splits = load(config(tmp_path / "train", prompts=prompts))
    assert splits.phrases == ("hexagon bolt", "nut", "thin_ring")
    with pytest.raises(ConfigError, match=r"no category 'wahser'; did you mean 'washer'\?"):
        load(config(tmp_path / "train", prompts=["wahser=ring"]))


def test_long_phrases_are_noted(tokenizer: Tokenizer) -> None:
    assert notes_on_length(["bolt", "nut " * 30], tokenizer) == []
    (note,) = notes_on_length(["bolt", "nut " * 31], tokenizer)
    assert note.startswith("1 phrase cut to 32 tokens, such as 'nut nut")


def test_the_table_tells_what_there_is(tmp_path: Path) -> None:
    write(tmp_path / "train", content(4))
    lines = str(load(config(tmp_path / "train"))).splitlines()
    assert " ".join(lines[0].split()) == "split pictures empty objects with mask absent phrases"
    assert ["train", "4", "0", "4", "4", "8"] in [line.split() for line in lines]
    assert any(line.split() == ["bolt", "2"] for line in lines)


def test_the_fingerprint_is_of_the_data_and_not_of_its_place(tmp_path: Path) -> None:
    write(tmp_path / "a" / "train", content(3))
    write(tmp_path / "b" / "train", content(3))
    one, two = (load(config(tmp_path / name / "train")) for name in "ab")
    assert fingerprint(one) == fingerprint(two)
    value = content(3)
    value["annotations"][1]["bbox"][0] += 1
    write(tmp_path / "b" / "train", value)
    assert fingerprint(load(config(tmp_path / "b" / "train"))) != fingerprint(one)
    value = content(3)
    value["categories"].append({"id": 4, "name": "gear"})
    write(tmp_path / "b" / "train", value)
    assert fingerprint(load(config(tmp_path / "b" / "train"))) != fingerprint(one)


def test_a_picture_of_another_size_than_surveyed_is_refused(tmp_path: Path) -> None:
    train = load(config(write(tmp_path / "train", content(2)))).train
    record: Record = train.records[1]
    Image.new("RGB", (30, 30)).save(record.image)
    with pytest.raises(DataError, match=r"1\.png: 30 x 30 pixels .*was the picture exchanged"):
        record.pixels()
