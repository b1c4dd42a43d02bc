"""Run lengths and bitmaps of the Severstal data set, against goldens."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from lora_core.pictures.encodings import decode_runs, encode_runs
from sam2_lora.formats import _supervisely_shape

CASE = Path(__file__).parent / "goldens" / "severstal"
STRIP = (256, 1600)


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    packed = load_file(CASE / "io.safetensors")
    count = STRIP[0] * STRIP[1]
    return {
        name: np.unpackbits(bits)[:count].reshape(STRIP).astype(bool)
        for name, bits in packed.items()
    }


def golden_rows() -> list[tuple[str, str, str]]:
    with (CASE / "train.csv").open() as file:
        return [(name, class_id, runs) for name, class_id, runs in list(csv.reader(file))[1:]]


@pytest.mark.parametrize(("name", "class_id", "runs"), golden_rows())
def test_kaggle_rows_decode_to_the_golden_masks(
    golden: dict, name: str, class_id: str, runs: str
) -> None:
    item = decode_runs(runs, STRIP)
    assert (item.mask == golden[f"rle.{name}.{class_id}"]).all()
    assert encode_runs(item) == runs


def test_supervisely_objects_decode_to_the_golden_masks(golden: dict) -> None:
    content = json.loads((CASE / "0a1b2c3d4.jpg.json").read_text())
    shapes = [_supervisely_shape(item, STRIP, "here") for item in content["objects"]]
    masks = [shape.decode(STRIP).mask for shape in shapes if shape is not None]
    for number in range(4):
        assert (masks[number] == golden[f"ann.object{number}"]).all()
    assert (masks[6] == golden["ann.object_clipped"]).all()
    assert (
        (masks[0] | masks[1] | masks[2] | masks[3] | masks[6]) == golden["ann.union_bitmaps"]
    ).all()
    rectangle = np.zeros(STRIP, dtype=bool)
    rectangle[20:91, 10:111] = True
    assert (masks[4] == rectangle).all()
    triangle = (1200 + 1300 + 1250) / 3, (30 + 40 + 120) / 3
    rows, columns = np.nonzero(masks[5])
    assert abs(columns.mean() - triangle[0]) < 0.5
    assert abs(rows.mean() - triangle[1]) < 0.5
    assert abs(len(rows) / 4250 - 1) < 0.01  # half of 100 * 90 - 10 * 50
