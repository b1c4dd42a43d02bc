"""What several packages do with data: epochs, folders that appear whole, sizes, prompts."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from lora_core.data_file import new_tree
from lora_core.errors import ConfigError, DataError
from lora_core.pictures.input_size import parse_size
from lora_core.pictures.user_prompts import are_coordinates, read_entries, refuse_outside
from lora_core.testing.coco import DOUBLES, PLACES, doubled, not_finite
from lora_core.training.loading import EpochDataset


@dataclass(frozen=True)
class Record:
    key: str


class Noise(EpochDataset[Record, float]):
    def __getitem__(self, index):
        return float(self.rng(index).random())


def test_a_sample_is_a_function_of_seed_epoch_and_index():
    train = Noise([Record("a"), Record("b")], seed=3)
    first = [train[0], train[1]]
    assert first == [train[0], train[1]]
    train.set_epoch(1)
    second = [train[0], train[1]]
    assert not set(first) & set(second)
    train.set_epoch(0)
    assert [train[0], train[1]] == first
    assert Noise(train.records, seed=4)[0] != first[0]
    assert (len(train), train.name_of(1)) == (2, "b")
    Noise(train.records, seed=-1)[0]  # every seed that settings allow


def test_workers_that_outlive_an_epoch_hear_of_the_next_one():
    train = Noise([Record("a"), Record("b")], seed=3)
    loader = DataLoader(train, num_workers=1, persistent_workers=True)
    for epoch in (0, 1):
        train.set_epoch(epoch)
        assert [float(value) for value in loader] == [train[0], train[1]]


# -- folders that are written ----------------------------------------------------------------------


def test_a_new_folder_appears_whole_and_replaces_the_old_one(tmp_path):
    output = tmp_path / "made" / "set"
    for content in ("old", "new"):
        with new_tree(output) as tree:
            tree.mkdir()
            (tree / content).touch()
        assert [path.name for path in output.iterdir()] == [content]
    assert list(output.parent.iterdir()) == [output], "nothing else is left"


def test_a_folder_that_cannot_be_made_leaves_the_old_one(tmp_path):
    output = tmp_path / "set"
    output.mkdir()
    (output / "old").touch()
    lost = rf"{output}: cannot be written: .*gone\.png: No such file"
    with pytest.raises(DataError, match=lost), new_tree(output) as tree:
        (tree.parent / "gone.png").read_bytes()
    with pytest.raises(DataError, match="cannot be written"), new_tree(output):
        pass  # nothing was made
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    assert (output / "old").exists()


# -- sizes -----------------------------------------------------------------------------------------


def test_a_size_is_read_or_the_nearest_one_is_named():
    def size(text):
        return parse_size(text, "--size", multiple=32, largest=640, such_as="640 or 64x640")

    assert (size("64"), size("64x96"), size(96)) == ((64, 64), (64, 96), (96, 96))
    for text, complaint in {
        "64x": "--size '64x': expected 640 or 64x640",
        "1x2x3": "expected 640",
        "-64": "expected 640",
        "672": "--size 672: a side is at most 640 pixels",
        "60x7": "--size 60x7: not multiples of 32; try 64x32",
    }.items():
        with pytest.raises(ConfigError, match=complaint):
            size(text)


# -- prompts of users ------------------------------------------------------------------------------


def points(entry, where):
    if not are_coordinates(entry, 2):
        raise DataError(f"{where}: expected [x, y]")
    return [tuple(entry)]


def test_the_prompts_of_a_file_go_to_their_pictures_and_all_faults_are_told(tmp_path):
    images = [Path("a.png"), Path("b.png"), Path("c.png")]
    file = tmp_path / "prompts.json"
    file.write_text(json.dumps({"a.png": [1, 2], "b.png": [1, True], "bb.png": [3, 4]}))
    prompts, problems = read_entries(file, images, points, "")
    assert prompts == {images[0]: [(1, 2)], images[1]: []}
    assert problems[0] == f"{file}: 'b.png': expected [x, y]"
    assert problems[1].startswith(f"{file}: no picture 'bb.png' among --images; ")
    assert "b.png" in problems[1].partition(";")[2]
    file.write_text("[]")
    with pytest.raises(DataError, match=r"expected an object \{\}"):
        read_entries(file, images, points, "{}")


@pytest.mark.parametrize("value", [[1], [1, 2, 3], [1, None], [1, float("nan")], [1, 1e9], (1, 2)])
def test_what_is_no_pair_of_finite_numbers_is_none(value):
    assert not are_coordinates(value, 2)


def test_prompts_outside_and_broken_pictures_are_told_together(tmp_path):
    good, bad = tmp_path / "a.png", tmp_path / "b.png"
    Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(good)
    bad.write_text("no picture")

    def outside(point, size):
        return [] if point[0] < size[1] and point[1] < size[0] else [f"{point} is outside"]

    refuse_outside({good: [(5, 3)]}, outside)
    with pytest.raises(DataError) as error:
        refuse_outside({good: [(5, 3), (3, 5)], bad: [(0, 0)]}, outside)
    assert "a.png: (3, 5) is outside of 6 x 4 pixels" in str(error.value)
    assert "b.png" in str(error.value)


# -- the fault kit ---------------------------------------------------------------------------------


def test_the_faulty_coco_files_are_faulty():
    def content():
        numbers = range(4)
        square = [[0, 0, 4, 0, 4, 4, 0, 4]]
        return {
            "images": [{"id": k, "file_name": f"{k}.png", "height": 8} for k in numbers],
            "annotations": [{"id": k, "segmentation": [list(square[0])]} for k in numbers],
            "categories": [{"id": 1}],
        }

    for place in PLACES:
        text, complaint = not_finite(content(), place, "-Infinity")
        assert text.count("-Infinity") == 1
        assert complaint.endswith("is -inf, expected a finite number")
    for kind in DOUBLES:
        changed = content()
        assert doubled(changed, kind)
        assert changed != content()
