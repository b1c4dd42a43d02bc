"""The packaged data set, and the command that goes all the way with it."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from lora_core.errors import ConfigError
from lora_core.pictures.encodings import decode_counts
from sam3_lora import demo, demo_run
from sam3_lora.demo_base import scenes

FEW = {"train": 6, "valid": 3, "test": 4}


def content(folder):
    return {
        path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def test_the_same_call_writes_the_same_files(tmp_path) -> None:
    first, again = (demo.write(tmp_path / name, FEW) for name in ("a", "b"))
    assert content(first) == content(again)


def test_no_picture_is_in_two_splits_or_among_those_of_the_base() -> None:
    everything = [
        *(scene.image.tobytes() for split in FEW for scene in demo.pictures_of(split, 20)),
        *(scene.image.tobytes() for scene in scenes.held_out(20, scenes.SHIFTED)),
    ]
    assert len(set(everything)) == len(everything)


def test_a_phrase_has_a_mask_for_every_object_that_it_describes(tmp_path) -> None:
    demo.write(tmp_path, {"train": 40, "valid": 1, "test": 1})
    data = json.loads((tmp_path / "train" / "_annotations.coco.json").read_text())
    names = {one["id"]: one["name"] for one in data["categories"]}
    assert tuple(names.values()) == demo.PHRASES
    files = {one["id"]: one["file_name"] for one in data["images"]}
    found = dict.fromkeys(files.values(), ())
    for one in data["annotations"]:
        mask = decode_counts(one["segmentation"]["counts"], tuple(one["segmentation"]["size"])).mask
        rows, columns = np.nonzero(mask)
        x, y, width, height = one["bbox"]
        assert (columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1) == (
            x, y, width, height,
        )  # fmt: skip
        assert one["area"] == mask.sum()
        found[files[one["image_id"]]] += ((names[one["category_id"]], mask.tobytes()),)
    for scene, (name, objects) in zip(demo.pictures_of("train", 40), found.items(), strict=True):
        assert np.array_equal(np.asarray(Image.open(tmp_path / "train" / name)), scene.image)
        expected = [
            (p, scene.things[k].mask.tobytes()) for p in demo.PHRASES for k in scene.answers(p)
        ]
        assert sorted(objects) == sorted(expected)


def test_every_word_of_the_phrases_is_known_and_no_phrase_was_pretrained() -> None:
    known = {word for phrase in scenes.PHRASES for word in phrase.split()}
    assert {word for phrase in demo.PHRASES for word in phrase.split()} <= known
    assert not set(demo.PHRASES) & set(scenes.PHRASES)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("epochs", 0), ("batch_size", 0), ("seed", -1), ("learning_rate", float("nan"))],
)
def test_impossible_settings_are_refused_by_name(setting, value) -> None:
    with pytest.raises(ConfigError, match=f"--{setting} is {value}"):
        demo_run.Options(**{setting: value})


@pytest.mark.slow
def test_demo_goes_from_the_base_to_the_merged_model(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(demo.write, "__defaults__", (FEW,))
    folder = tmp_path / "demo"
    assert demo_run.main(["--output", str(folder), "--epochs", "1"]) == 0
    said = capsys.readouterr().out
    table = said[said.rindex("test pictures, the merged model") :].splitlines()
    rows = {words[0]: words[1:] for words in map(str.split, table) if len(words) == 7}
    assert rows["merged"] == rows["LoRA"]
    assert rows["base"] != rows["LoRA"]
    assert (folder / "merged.pt").is_file()
    assert len(list((folder / "overlays").glob("*.png"))) >= 1
    with pytest.raises(ConfigError, match="add --overwrite"):
        demo_run.main(["--output", str(folder)])
