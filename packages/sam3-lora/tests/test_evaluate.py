"""`sam3-lora evaluate` as a user runs it: table, JSON, overlays, and the best threshold."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_base
import tiny_run
import torch
from PIL import Image

from lora_core.errors import CheckpointError, ConfigError, DataError
from lora_core.pictures.files import read_image
from lora_core.testing.no_device import no_device
from sam3_lora import Predictor, data, evaluate, predict
from sam3_lora import model as m
from sam3_lora.average_precision import MeanAveragePrecision, match
from sam3_lora.calibration import Calibration, calibrate
from sam3_lora.config import Config, Dataset, Training
from sam3_lora.evaluate import Options, Result
from sam3_lora.evaluation_data import load_pictures
from sam3_lora.evaluation_report import warnings
from sam3_lora.metrics import Unit
from sam3_lora.scoring import ABSENT, EncodedPhrases, false_positives, score

PICTURES = tiny_run.PICTURES


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of every component that changes what is found."""
    path = tmp_path_factory.mktemp("adapter") / "best.pt"
    return m.save_adapter(tiny_base.adapted(base), path, {"phrases": ["bolt", "nut"]})


def run(base: Path, output: Path, *flags: object, folder: Path = PICTURES) -> dict[str, Any]:
    argv = ["--checkpoint", base, "--img_folder", folder, "--output", output, "--device", "cpu"]
    assert evaluate.main([str(word) for word in [*argv, *flags]]) == 0
    content: dict[str, Any] = json.loads((output / "evaluation.json").read_text())
    return content


# -- the command ---------------------------------------------------------------------------------


def test_figures_equal_those_of_the_evaluation_during_training(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    content = run(base, tmp_path, "--adapter", adapter, "--absent_images", 2, "--examples", 0)
    file = str(PICTURES / "_annotations.coco.json")
    cfg = Config(
        dataset=Dataset(str(PICTURES), file, str(PICTURES), file, resolution="84"),
        training=Training(enable_segmentation=True),
    )
    splits = data.load(cfg)
    assert splits.val is not None
    for name, lora in (("base", None), ("LoRA", adapter)):
        network = m.load(base, None, lora)
        texts = [*splits.phrases, *ABSENT]
        with torch.no_grad():
            phrases = EncodedPhrases(network, m.tokenizer(network), texts)
        live = score(network, splits.val, phrases, masks=True).figures()
        found = content["models"][name]["figures"]
        assert {key: found[key] for key in live} == pytest.approx(live)
        two = [splits.val[0], splits.val[1]]
        assert found["absent_FPR"] == false_positives(network, phrases, two, splits.phrases)
    losses = [content["models"][name]["figures"]["loss"] for name in ("base", "LoRA")]
    assert abs(losses[0] - losses[1]) > 1e-2, "the adapter does nothing: this shows nothing"


@pytest.fixture(scope="module")
def own(base: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of which the truth is what the adapted model finds."""
    folder = tmp_path_factory.mktemp("own")
    for name in ("img_0.png", "img_1.png"):
        shutil.copy(PICTURES / name, folder)
    argv = ["--checkpoint", base, "--adapter", adapter, "--images", folder, "--phrases", "bolt",
            "nut", "washer", "--threshold", 0.262, "--output", folder / "found",
            "--device", "cpu"]  # fmt: skip
    assert predict.main([str(word) for word in argv]) == 0
    shutil.copy(folder / "found" / "predictions.json", folder / "_annotations.coco.json")
    return folder


def test_the_model_that_made_the_truth_is_perfect_at_the_threshold_that_made_it(
    base: Path, adapter: Path, own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--adapter", adapter, "--absent_images", 0, "--masks", "false")
    content = run(base, tmp_path, *flags, folder=own)
    truth = json.loads((own / "_annotations.coco.json").read_text())["annotations"]
    lora, plain = content["models"]["LoRA"], content["models"]["base"]
    best = lora["calibration"]
    assert best["objects"] == len(truth) > 5
    assert best["f1"] == best["precision"] == best["recall"] == 1
    predictor = Predictor.load(base, adapter, device="cpu")
    count = 0
    for name in ("img_0.png", "img_1.png"):
        predictor.set_image(read_image(own / name))
        asked = ["bolt", "nut", "washer"]
        count += sum(map(len, predictor.predict(asked, best["threshold"], masks=False)))
    assert count == len(truth)
    assert lora["figures"]["bbox_mAP50"] == pytest.approx(1, abs=1e-3)
    assert plain["figures"]["bbox_mAP50"] < 0.9
    for phrase, value in lora["per_category_AP"]["bbox"].items():
        assert 0.5 < value > plain["per_category_AP"]["bbox"][phrase]
    assert plain["calibration"] is None or plain["calibration"]["f1"] < 1
    said = capsys.readouterr().out
    assert f"LoRA: best threshold {best['threshold']:.3g}: F1 1.0000" in said
    assert "absent_FPR" not in lora["figures"]
    flags = ("--adapter", adapter, "--overwrite")
    assert run(base, tmp_path, "--compare_base", "false", *flags, folder=own)["models"].keys() == {
        "LoRA"
    }


def test_files_and_table_hold_both_models_and_what_was_passed_over(
    base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = run(base, tmp_path, "--adapter", adapter, "--absent_images", 1, "--examples", 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "evaluation.json", "example_1_img_0.png"
    ]  # fmt: skip
    assert content["image_size"] == [84, 84]
    assert (content["pictures"], content["objects"]["bolt"]) == (3, 4)
    said = capsys.readouterr().out
    for text in (
        "7 objects in 3 pictures; 4 questions for phrases that are not there",
        "masks: mAP50",
        "boxes: mAP75",
        "cgF1 = pmF1 x MCC",
        "found of absent concepts",
        "category 'things' has no annotation",
        "1 crowd regions left out (--keep_crowd)",
        "1 phrase that the adapter was not trained on, such as washer",
        "1 queries with objects without a mask left out",
    ):
        assert text in said
    assert any("washer" in note for note in content["notes"])


def test_an_example_shows_base_adapter_and_truth(base: Path, adapter: Path, tmp_path: Path) -> None:
    flags = ("--absent_images", 0, "--examples", 1)
    run(base, tmp_path / "both", *flags, "--adapter", adapter)
    run(base, tmp_path / "one", *flags)
    both, one = (
        np.asarray(Image.open(tmp_path / name / "example_1_img_0.png")) for name in ("both", "one")
    )
    width = one.shape[1] // 2
    assert both.shape[1] == pytest.approx(1.5 * one.shape[1], abs=30)
    rows = slice(70, one.shape[0] - 70)
    # Nothing is found: the first panel is the base's, the last the truth.
    assert (both[rows, : width - 30] == one[rows, : width - 30]).all()
    assert (both[rows, 30 - width :] == one[rows, 30 - width :]).all()
    assert (one[rows, 30 - width :] != one[rows, 25 : width - 5]).any()


def test_boxes_alone_are_scored_without_masks(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    shutil.copytree(PICTURES, folder)
    file = folder / "_annotations.coco.json"
    content = json.loads(file.read_text())
    for one in content["annotations"]:
        one.pop("segmentation", None)
    content["annotations"] = [one for one in content["annotations"] if "bbox" in one]
    file.write_text(json.dumps(content))
    flags = ("--absent_images", 0, "--examples", 1)
    figures = run(base, tmp_path / "out", *flags, folder=folder)["models"]["model"]["figures"]
    assert "bbox_mAP" in figures
    assert "segm_mAP" not in figures
    argv = ["--checkpoint", base, "--img_folder", folder, "--masks", "--output", tmp_path / "x"]
    with no_device(weights=True), pytest.raises(DataError, match="no object has a mask"):
        evaluate.main([str(word) for word in argv])


def test_a_subset_of_the_pictures_is_fixed(tmp_path: Path) -> None:
    chosen = []
    for count in (2, 2, 3, 0):
        options = Options(img_folder=str(PICTURES), max_images=count, output=str(tmp_path))
        chosen.append([record.key for record in load_pictures(options).records])
    assert list(map(len, chosen)) == [2, 2, 3, 3]
    assert chosen[0] == chosen[1]


# -- refusals ------------------------------------------------------------------------------------


def refused(kind: type[Exception], message: str, *argv: object) -> None:
    """No weight is read and no GPU touched before it."""
    with no_device(weights=True), pytest.raises(kind, match=message):
        evaluate.main([str(word) for word in argv])


def test_settings_are_checked_at_once() -> None:
    words = ("--img_folder", "x", "--examples", -1, "--absent_images", 51, "--resolution", 100)
    message = r"--examples is -1(.|\n)*--absent_images is 51(.|\n)*--resolution 100: not mult"
    refused(ConfigError, message, *words)
    refused(ConfigError, "--prompts 'bolt': expected", "--img_folder", "x", "--prompts", "bolt")


def test_an_evaluation_is_replaced_only_on_demand(base: Path, tmp_path: Path) -> None:
    (tmp_path / "evaluation.json").write_text("{}")
    words = ("--checkpoint", base, "--img_folder", PICTURES, "--output", tmp_path)
    refused(ConfigError, "is there already: choose another folder, or add --overwrite", *words)
    assert run(base, tmp_path, "--overwrite", "--absent_images", 0)["models"]


def test_faults_of_model_and_data_are_named_before_weights_are_read(
    base: Path, tmp_path: Path
) -> None:
    out = ("--output", tmp_path / "out")
    gone = tmp_path / "gone.pt"
    refused(CheckpointError, "gone", "--checkpoint", gone, "--img_folder", PICTURES, *out)
    model = ("--checkpoint", base, *out)
    refused(DataError, "--img_folder .*no such folder", *model, "--img_folder", tmp_path / "no")
    (tmp_path / "bare").mkdir()
    refused(DataError, "_annotations.coco.json", *model, "--img_folder", tmp_path / "bare")
    words = (*model, "--img_folder", PICTURES, "--prompts", "screw=bolt")
    refused(ConfigError, "--prompts: no category screw; the phrases are bolt, nut", *words)
    assert not (tmp_path / "out").exists()


def test_bad_pictures_are_listed_or_left_out(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    shutil.copytree(PICTURES, folder)
    (folder / "img_1.png").write_bytes((folder / "img_1.png").read_bytes()[:500])
    words = ("--checkpoint", base, "--img_folder", folder, "--output", tmp_path / "out")
    refused(DataError, "img_1.png", *words)
    flags = ("--on_bad_sample", "skip", "--max_bad_fraction", 0.5, "--absent_images", 0)
    content = run(base, tmp_path / "out", *flags, folder=folder)
    assert content["pictures"] == 2
    assert (tmp_path / "out" / "bad_samples.jsonl").is_file()


# -- warnings ------------------------------------------------------------------------------------


def result(**figures: float) -> Result:
    return Result(figures, {}, None)


def test_harm_done_by_the_adapter_is_said() -> None:
    good = {"bbox_mAP": 0.5, "cgF1": 0.3, "absent_FPR": 0.02}
    fine = {"base": result(**good), "LoRA": result(**{**good, "absent_FPR": 0.0299})}
    assert list(warnings(fine)) == []
    bad = {"base": result(**good), "LoRA": result(bbox_mAP=0.4, cgF1=0.35, absent_FPR=0.04)}
    found = list(warnings(bad))
    assert len(found) == 2
    assert "bbox_mAP is 0.1000 lower" in found[0]
    assert "absent concepts are found more often, by 0.0200" in found[1]
    assert list(warnings({"model": result(**good)})) == []


# -- the threshold -------------------------------------------------------------------------------


def box(x: int, **more: Any) -> dict[str, Any]:
    return {"bbox": [x, 0, 10, 10], **more}


def units(seed: int) -> list[list[Unit]]:
    """Images with two categories each: shifted objects, inventions, ties and a crowd."""
    rng = np.random.default_rng(seed)
    images = []
    for _ in range(6):
        image = []
        for category in (1, 2):
            places = (rng.choice(20, 4, replace=False) * 30).tolist()
            truth = [box(x) for x in places[: rng.integers(0, 4)]]
            if rng.random() < 0.3:
                truth.append(box(900, iscrowd=1))
            found = [
                box(int(x + rng.integers(0, 6)), score=int(rng.integers(1, 11)) / 10)
                for x in [*places, 900, 905][: rng.integers(0, 7)]
            ]
            image.append(Unit(category, truth, found))
        images.append(image)
    return images


def calibrated(images: Sequence[Sequence[Unit]]) -> Calibration | None:
    precision = MeanAveragePrecision("bbox")
    for number, image in enumerate(images):
        precision.add(number, image)
    return calibrate(precision.matches())


def f1_at(images: Sequence[Sequence[Unit]], threshold: float) -> tuple[float, float, float]:
    """F1, precision and recall by matching anew what is above the threshold."""
    tp = found = objects = 0
    for image in images:
        for unit in image:
            kept = [one for one in unit.found if one["score"] > threshold]
            matches = match(Unit(unit.category, unit.truth, kept), "bbox")
            objects += sum(not one.get("iscrowd") for one in unit.truth)
            if matches is not None:
                counts = ~matches.ignored[0, 0]
                found += int(counts.sum())
                tp += int((matches.matched[0, 0] & counts).sum())
    return 2 * tp / max(found + objects, 1), tp / max(found, 1), tp / max(objects, 1)


@pytest.mark.parametrize("seed", range(6))
def test_no_threshold_has_a_higher_f1_than_the_calibrated_one(seed: int) -> None:
    images = units(seed)
    best = calibrated(images)
    assert best is not None
    assert (best.f1, best.precision, best.recall) == pytest.approx(f1_at(images, best.threshold))
    assert best.f1_at_half == pytest.approx(f1_at(images, 0.5)[0])
    others = {threshold: f1_at(images, threshold)[0] for threshold in np.arange(-0.05, 1, 0.05)}
    assert best.f1 >= max(others.values()) - 1e-12
    equal = [threshold for threshold, f1 in others.items() if f1 == pytest.approx(best.f1)]
    assert best.threshold >= max(equal) - 0.051, "of equally good thresholds the highest"


def test_the_threshold_lies_between_what_is_kept_and_what_is_not() -> None:
    found = [box(0, score=0.8), box(30, score=0.6), box(60, score=0.2)]
    best = calibrated([[Unit(1, [box(0), box(30)], found)]])
    assert best == Calibration(pytest.approx(0.4), 1.0, 1.0, 1.0, 1.0, 2)


def test_inventions_where_nothing_is_count_against_a_threshold() -> None:
    images = [
        [Unit(1, [box(0), box(30)], [box(0, score=0.9), box(30, score=0.4)])],
        [Unit(1, [], [box(0, score=score) for score in (0.5, 0.55, 0.6, 0.65)])],
    ]
    best = calibrated(images)
    assert best is not None
    assert best.threshold == pytest.approx((0.9 + 0.65) / 2)
    assert (best.precision, best.recall) == (1.0, 0.5)


@pytest.mark.parametrize(
    "unit",
    [Unit(1, [box(0)], []), Unit(1, [], [box(0, score=0.9)]),
     Unit(1, [box(0)], [box(500, score=0.9)]), Unit(1, [], [])],
    ids=["nothing found", "nothing there", "beside it", "neither"],
)  # fmt: skip
def test_without_a_right_detection_there_is_no_threshold(unit: Unit) -> None:
    assert calibrated([[unit]]) is None
