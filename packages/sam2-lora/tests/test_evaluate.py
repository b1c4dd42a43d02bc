"""`sam2-lora evaluate` as a user runs it: table, CSV row, JSON, overlays."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lora_core.errors import ConfigError, DataError
from sam2_lora import evaluate, placement
from sam2_lora.config import Config
from sam2_lora.data import load_split
from sam2_lora.evaluate import COLUMNS, Options, compare
from sam2_lora.metrics import evaluate as measure
from sam2_lora.model import load, save_adapter
from sam2_lora.predictor import Predictor


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Test and validation pictures of 96 x 160 with binary masks; one test picture has none."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for split, count in (("train", 1), ("val", 1), ("test", 3)):
        for kind in ("images", "masks"):
            (root / split / kind).mkdir(parents=True)
        for index in range(count):
            mask = np.zeros((96, 160), dtype=np.uint8)
            if index < 2:
                mask[20:50, 30 : 60 + 10 * index] = 255
            rgb = rng.integers(0, 256, (96, 160, 3), dtype=np.uint8)
            Image.fromarray(rgb).save(root / split / "images" / f"p{index}.png")
            Image.fromarray(mask).save(root / split / "masks" / f"p{index}.png")
    return root


@pytest.fixture(scope="module")
def adapter(golden_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that changes the masks, with the facts that training writes."""
    network = load(golden_base)
    placement.adapt(network, Config(image_size="128", lora_rank=4, lora_alpha=8))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in network.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    facts = {"step": 120, "learning_rate": 2e-3, "weight_decay": 0.05, "seed": 9}
    return save_adapter(network, tmp_path_factory.mktemp("run") / "adapter", facts)


def run(base: Path, data: Path, output: Path, *flags: str) -> None:
    argv = ["--checkpoint", str(base), "--data_root", str(data), "--output_dir", str(output),
            "--mask_kind", "binary", "--device", "cpu", *flags]  # fmt: skip
    assert evaluate.main(argv) == 0


def rows_of(output: Path) -> list[dict[str, str]]:
    with (output / "evaluation.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.fault("R49")
def test_base_and_adapter_are_scored_side_by_side(
    golden_base: Path, data: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(golden_base, data, tmp_path, "--adapter", str(adapter), "--exp_id", "exp 7/b")
    base, lora = rows_of(tmp_path)
    assert tuple(base) == COLUMNS
    assert [row["variant"] for row in (base, lora)] == ["base", "lora_r4_a8"]
    assert (lora["lr"], lora["wd"], lora["seed"], lora["steps"]) == ("0.002", "0.05", "9", "120")
    assert (base["lr"], base["steps"]) == ("", "")
    assert base["img_size"] == lora["img_size"] == "128"
    assert (base["exp_id"], base["prompt_type"]) == ("exp_7_b", "point")
    assert base["val_mIoU"] == "" != base["test_mIoU"]
    assert base["test_mIoU"] != lora["test_mIoU"]
    assert (base["ckpt_path"], lora["ckpt_path"]) == (str(golden_base), str(adapter))
    content = json.loads((tmp_path / "exp_7_b.json").read_text())
    assert float(lora["test_mIoU"]) == content["figures"]["lora"]["iou"]
    assert content["figures"]["base"]["empty_images"] == 1
    assert sorted(path.name for path in tmp_path.glob("*.png")) == [
        "exp_7_b_test_images_p0.png", "exp_7_b_test_images_p1.png"
    ]  # fmt: skip
    text = capsys.readouterr().out
    assert "filled box" in text
    assert "2 objects in 3 pictures" in text
    assert "without objects: 1 picture; the automatic grid finds some in" in text


@pytest.mark.fault("R49")
def test_figures_equal_those_of_the_evaluation_during_training(
    golden_base: Path, data: Path, adapter: Path, tmp_path: Path
) -> None:
    run(golden_base, data, tmp_path, "--adapter", str(adapter), "--examples", "0")
    figures = json.loads((tmp_path / "adapter.json").read_text())["figures"]
    cfg = Config(data_root=str(data), mask_kind="binary", image_size="128")
    pictures = load_split(cfg, "test")
    assert pictures is not None
    for name, file in (("base", None), ("lora", adapter)):
        live = measure(load(golden_base, adapter=file), pictures, cfg)
        assert {key: figures[name][key] for key in live} == live


def test_later_evaluations_are_appended(golden_base: Path, data: Path, tmp_path: Path) -> None:
    run(golden_base, data, tmp_path, "--examples", "0")
    run(golden_base, data, tmp_path, "--examples", "0", "--split", "val", "--image_size", "64x96")
    first, second = rows_of(tmp_path)
    assert (first["img_size"], second["img_size"]) == ("128", "64x96")
    assert first["val_mIoU"] == second["test_mIoU"] == ""
    assert second["val_mIoU"] != ""
    assert first["variant"] == "model"


def test_a_split_that_does_not_exist_is_named(
    golden_base: Path, data: Path, tmp_path: Path
) -> None:
    root = tmp_path / "data"
    root.mkdir()
    for split in ("train", "val"):
        (root / split).symlink_to(data / split)
    with pytest.raises(DataError, match="no test split: try --split val"):
        run(golden_base, root, tmp_path)


def test_settings_are_checked_as_in_training() -> None:
    with pytest.raises(ConfigError, match="--examples is -1"):
        Options(examples=-1)
    with pytest.raises(ConfigError, match="multiples of 32"):
        Options(image_size="100")


def test_what_was_passed_over_is_said(
    golden_base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(data, tmp_path / "data")
    (tmp_path / "data" / "test" / "images" / "notes.txt").write_text("not a picture")
    run(golden_base, tmp_path / "data", tmp_path / "out", "--examples", "0", "--max_images", "1")
    assert "images that are no pictures" in capsys.readouterr().out


def test_a_subset_of_the_pictures_is_fixed(golden_base: Path, data: Path, tmp_path: Path) -> None:
    for _ in range(2):
        run(golden_base, data, tmp_path, "--max_images", "1", "--examples", "0")
    first, second = rows_of(tmp_path)
    assert json.loads((tmp_path / "base.json").read_text())["figures"]["model"]["images"] == 1
    assert first["test_mIoU"] == second["test_mIoU"]


def test_comparing_shows_the_base_without_the_adapter(
    golden_base: Path, data: Path, adapter: Path
) -> None:
    cfg = Config(data_root=str(data), mask_kind="binary", image_size="128")
    pictures: Any = load_split(cfg, "test")
    adapted, plain = Predictor.load(golden_base, adapter), Predictor.load(golden_base)
    both = compare(adapted, pictures[0], ("base", "LoRA"))
    alone = compare(plain, pictures[0], ("base",))
    width = alone.shape[1] // 2 - 20
    assert both.shape[1] > alone.shape[1]
    assert (both[:, :width] == alone[:, :width]).all()


@pytest.mark.fault("H19")
def test_every_picture_has_an_overlay_of_its_own_whatever_its_name(
    golden_base: Path, data: Path, tmp_path: Path
) -> None:
    shutil.copytree(data, tmp_path / "data")
    for kind in ("images", "masks"):
        folder = tmp_path / "data" / "test" / kind
        for name in ("a b", "a_b", "A b", "日" * 83, "n" * 251):
            shutil.copy(folder / "p0.png", folder / f"{name}.png")
    output = tmp_path / "out"
    words = ("--exp_id", "日" * 120, "--examples", "99", "--image_size", "64")
    run(golden_base, tmp_path / "data", output, *words)
    names = sorted(path.name.removeprefix(f"{'日' * 33}_") for path in output.glob("*.png"))
    assert len(names) == 2 + 5
    assert len({name.casefold() for name in names}) == 7
    assert {f"test_images_{name}.png" for name in ("A_b", "a_b_2", "a_b_3", "p0")} <= set(names)
    assert f"{'n' * 100}.png" in names
    assert f"{'日' * 33}.png" in names
