"""The whole run on real files: what it leaves, that it learns, resumes and stops."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lora_core.config import parse
from lora_core.errors import CheckpointError
from sam2_lora import data, demo, losses, metrics, model
from sam2_lora.artifacts import find_run, plain
from sam2_lora.config import Config
from sam2_lora.predictor import Predictor
from sam2_lora.train import main, train

SIDE = 128


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight pictures of two striped discs each, with instance masks: a domain of its own."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:SIDE, :SIDE]
    for number in range(8):
        split = root / ("train" if number < 5 else "val" if number < 7 else "test")
        for name in ("images", "masks"):
            (split / name).mkdir(parents=True, exist_ok=True)
        ids = np.zeros((SIDE, SIDE), np.uint8)
        for index, (cx, cy) in enumerate([(38, 40), (88, 84)], start=1):
            cx, cy = cx + rng.integers(-6, 7), cy + rng.integers(-6, 7)
            ids[np.hypot(x - cx, y - cy) < rng.integers(18, 26)] = index
        stripes = 60 + 130 * ((x + y) // 5 % 2)
        grey = np.where(ids > 0, stripes, 128) + rng.normal(0, 12, ids.shape)
        rgb = np.repeat(grey.clip(0, 255).astype(np.uint8)[..., None], 3, 2)
        Image.fromarray(rgb).save(split / "images" / f"{number}.png")
        Image.fromarray(ids).save(split / "masks" / f"{number}.png")
    return root


def command(pictures: Path, output: Path, **settings: object) -> list[str]:
    """Flags of a small run on the packaged base."""
    words: dict[str, object] = {
        "data_root": pictures,
        "mask_kind": "instances",
        "checkpoint": demo.base_checkpoint(),
        "image_size": SIDE,
        "steps": 4,
        "eval_steps": 2,
        "log_steps": 2,
        "num_workers": 0,
        "tensorboard": False,
        "output_dir": output,
        "logs_dir": output / "logs",
        **settings,
    }
    return [word for name, value in words.items() for word in (f"--{name}", str(value))]


def run_folder(output: Path) -> Path:
    (folder,) = [path for path in output.iterdir() if path.name.startswith("sam2_")]
    return folder


def rows(output: Path) -> list[dict[str, str]]:
    (path,) = (output / "logs").glob("training_metrics_lora_*.csv")
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["tensors"]


@pytest.fixture(scope="module")
def finished(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of one run of six steps with everything switched on."""
    output = tmp_path_factory.mktemp("finished")
    argv = command(
        pictures, output, steps=6, eval_steps=3, batch_size=2, correction_clicks=1,
        gradient_accumulation_steps=2, lora_dropout=0.1, tensorboard=True,
    )  # fmt: skip
    assert main(argv) == 0
    return output


GUIDE_SUMMARY = {
    "model_size", "tuning_method", "dataset_size", "lora_rank", "lora_alpha", "lora_dropout",
    "learning_rate", "weight_decay", "total_steps", "actual_steps", "best_val_iou",
    "final_train_iou", "early_stopping_triggered", "early_stopping_patience", "timestamp",
    "checkpoint_dir", "note",
}  # fmt: skip


def test_a_run_leaves_the_files_that_the_guide_promises(finished: Path) -> None:
    folder = run_folder(finished)
    assert re.fullmatch(r"sam2_\w+_lora_r8_a16_lr1e-3_\d{8}_\d{4}", folder.name)
    names = [path.name for path in folder.iterdir()]
    best = [
        n for n in names if re.fullmatch(r"best_lora_step\d_iou0\.\d{4}_dice0\.\d{4}\.torch", n)
    ]
    assert best
    assert {name.replace("best_lora", "best_merged") for name in best} <= set(names)
    assert {"latest_lora_step6.torch", "final_lora_step6.torch", "config.yaml"} <= set(names)
    assert {"adapter", "state", "tensorboard", "training_summary.json"} <= set(names)
    summary = json.loads((folder / "training_summary.json").read_text())
    assert summary.keys() >= GUIDE_SUMMARY
    assert summary["tuning_method"] == "lora"
    assert summary["actual_steps"] == summary["total_steps"] == 6
    assert summary["early_stopping_triggered"] is False
    assert 0 < summary["best_val_iou"] <= 1
    assert 0 < summary["final_train_iou"] <= 1
    assert set(summary["test"]) == {"base", "lora"}
    assert 0 < summary["test"]["base"]["iou"] < 1


def test_the_csv_begins_with_the_base_and_has_every_validation(finished: Path) -> None:
    found = [(row["step"], row["split"]) for row in rows(finished)]
    assert found[0] == ("0", "val")
    assert [step for step, split in found if split == "val"] == ["0", "3", "6"]
    train_rows = [row for row in rows(finished) if row["split"] == "train"]
    assert all(float(row[name]) > 0 for row in train_rows for name in ("loss", "iou", "lr"))
    measured = ("iou", "dice", "box_iou", "click3_iou", "click5_iou")
    val_rows = [row for row in rows(finished) if row["split"] == "val"]
    assert all(0 < float(row[name]) <= 1 for row in val_rows for name in measured)
    counted = [(row["empty_images"], row["false_positive_images"]) for row in val_rows]
    assert all(float(value) == 0 for pair in counted for value in pair)  # all hold objects


def test_steps_count_optimizer_updates(finished: Path) -> None:
    """Five pictures in batches of two, two batches per update: two updates make an epoch."""
    last = rows(finished)[-1]
    assert (last["step"], float(last["epoch"])) == ("6", 3.0)


def test_the_stored_settings_are_the_settings_of_the_run(finished: Path, pictures: Path) -> None:
    cfg = parse(Config, ["--config", str(run_folder(finished) / "config.yaml")], prog="t")
    assert (cfg.steps, cfg.correction_clicks, cfg.lora_dropout) == (6, 1, 0.1)
    assert cfg.data_root == str(pictures)


def test_adapter_and_merged_file_give_the_same_masks(finished: Path, pictures: Path) -> None:
    folder = run_folder(finished)
    summary = json.loads((folder / "training_summary.json").read_text())
    (merged,) = folder.glob(f"best_merged_step{summary['best_step']}_*.torch")
    (single,) = folder.glob(f"best_lora_step{summary['best_step']}_*.torch")
    rgb = np.asarray(Image.open(pictures / "test" / "images" / "7.png").convert("RGB"))
    answers = []
    for predictor in (
        Predictor.load(demo.base_checkpoint(), adapter=folder / "adapter"),
        Predictor.load(demo.base_checkpoint(), adapter=single),
        Predictor.load(merged, image_size=(SIDE, SIDE)),
    ):
        predictor.set_image(rgb)
        answers.append(predictor.predict(points=[[40, 42]]).logits)
    np.testing.assert_array_equal(answers[0], answers[1])
    np.testing.assert_allclose(answers[0], answers[2], atol=1e-4)


def test_training_beats_the_base(pictures: Path, tmp_path: Path) -> None:
    argv = command(
        pictures, tmp_path, steps=40, eval_steps=40, batch_size=4, learning_rate=3e-3, log_steps=10
    )
    assert main(argv) == 0
    losses = [float(row["loss"]) for row in rows(tmp_path) if row["split"] == "train"]
    base, trained = [float(row["iou"]) for row in rows(tmp_path) if row["split"] == "val"]
    assert losses[-1] < 0.7 * losses[0]
    assert trained > base + 0.05


def test_a_resumed_run_ends_with_the_same_bits(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished, tmp_path / "copy")
    folder = run_folder(tmp_path / "copy")
    whole = tensors(folder / "final_lora_step6.torch")
    before = [{**row, "seconds": ""} for row in rows(tmp_path / "copy")]
    shutil.rmtree(folder / "state" / "checkpoint-6")  # as if it had been killed after step 3
    for path in (*folder.glob("*step6*"), folder / "training_summary.json"):
        path.unlink()
    logs = ["--logs_dir", str(tmp_path / "copy" / "logs")]
    assert main(["--resume", str(folder), *logs]) == 0
    assert "continuing at step 3" in capsys.readouterr().out
    again = tensors(folder / "final_lora_step6.torch")
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert [{**row, "seconds": ""} for row in rows(tmp_path / "copy")] == before


@pytest.mark.fault("K13")
def test_resuming_a_finished_run_changes_nothing(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def content() -> dict[Path, tuple[bytes, int]]:
        files = [path for path in finished.rglob("*") if path.is_file()]
        return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}

    before = content()
    assert main(["--resume", str(run_folder(finished))]) == 0
    out = capsys.readouterr().out
    assert "already finished" in out
    assert "continuing" not in out, "nothing is"
    assert "resume None" not in out, "--resume is no setting that has changed"
    assert content() == before


def unfinished(finished: Path, folder: Path) -> Path:
    """A copy of the run's output as a kill after step 3 had left it; gives the run's folder."""
    shutil.copytree(finished, folder)
    run = run_folder(folder)
    shutil.rmtree(run / "state" / "checkpoint-6")
    for path in (*run.glob("*step6*"), run / "training_summary.json"):
        path.unlink()
    return run


@pytest.mark.fault("K15")
def test_a_resume_with_other_settings_is_refused_with_then_and_now(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = unfinished(finished, tmp_path / "copy")
    changes = {
        "lora_rank": ("8", "4"),
        "lora_alpha": ("16", "32"),
        "targets": ("default", "decoder"),
        "seed": ("42", "7"),
        "prompts": ("mixed", "box"),
        "max_objects": ("8", "1"),
        "image_size": ("128", "64"),
    }
    argv = [word for name, (_, now) in changes.items() for word in (f"--{name}", now)]
    assert main(["--resume", str(run), "--learning_rate", "1e-5", *argv]) == 2
    error = capsys.readouterr().err
    assert "the run cannot be continued, these have changed" in error
    table = {line.split()[0]: tuple(line.split()[1:]) for line in error.splitlines() if line}
    assert changes.items() <= table.items()
    assert "learning_rate" not in table
    assert "Traceback" not in error
    assert not (run / "training_summary.json").exists()


@pytest.mark.fault("K15")
def test_a_resume_on_other_pictures_is_refused(
    finished: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = unfinished(finished, tmp_path / "copy")
    shutil.copytree(pictures, tmp_path / "data")
    mask = tmp_path / "data" / "train" / "masks" / "0.png"
    ids = np.asarray(Image.open(mask)).copy()
    ids[:40, :40] = 0
    Image.fromarray(ids).save(mask)
    logs = ["--logs_dir", str(tmp_path / "copy" / "logs")]
    assert main(["--resume", str(run), "--data_root", str(tmp_path / "data"), *logs]) == 2
    error = capsys.readouterr().err
    assert "training data" in error
    assert "the run cannot be continued" in error


@pytest.mark.fault("K15", "K51", "K56")
def test_a_resume_may_change_what_does_not_make_another_run(
    finished: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where things are: the run, the pictures, and the base were moved."""
    run = unfinished(finished, tmp_path / "a copy")
    shutil.copytree(pictures, tmp_path / "other place")
    argv = ["--resume", str(run), "--data_root", str(tmp_path / "other place")]
    argv += ["--logs_dir", str(tmp_path / "a copy" / "logs"), "--learning_rate", "1e-5"]
    assert main([*argv, "--log_steps", "1", "--num_workers", "1"]) == 0
    out = capsys.readouterr().out
    assert out.count("changed for the rest of the run: ") == 1
    assert "learning_rate 0.001 -> 1e-05" in out
    assert [row["step"] for row in rows(tmp_path / "a copy") if row["split"] == "train"] == [
        "2", "4", "5", "6",
    ]  # fmt: skip


@pytest.mark.fault("K04")
def test_a_named_file_is_continued_exactly_and_a_run_from_its_last_whole_state(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished, tmp_path / "copy")
    run = run_folder(tmp_path / "copy")
    (run / "training_summary.json").unlink()
    broken = run / "state" / "checkpoint-6" / "state.safetensors"
    broken.write_bytes(broken.read_bytes()[:-1])
    logs = ["--logs_dir", str(tmp_path / "copy" / "logs")]
    assert main(["--resume", str(run / "latest_lora_step6.torch"), *logs]) == 2
    error = capsys.readouterr().err
    assert "checkpoint-6 is damaged: state.safetensors" in error
    assert "Traceback" not in error
    assert main(["--resume", str(run), *logs]) == 0
    out = capsys.readouterr().out
    assert "checkpoint-6 is damaged" in out
    assert "continuing at step 3" in out
    whole = tensors(run_folder(finished) / "final_lora_step6.torch")
    again = tensors(run / "final_lora_step6.torch")
    assert all(torch.equal(whole[name], again[name]) for name in whole)


# -- what goes wrong on the way --------------------------------------------------------------------


def disturb(monkeypatch: pytest.MonkeyPatch, at: int, what: object) -> None:
    """Change the loss of this batch, counted from 1, or do something while it is computed."""
    original = losses.loss
    calls = iter(range(1, 10**9))

    def loss(net: object, batch: object, cfg: object) -> object:
        value, parts = original(net, batch, cfg)
        if net.training and next(calls) == at:
            value = what(value)
        return value, parts

    monkeypatch.setattr(losses, "loss", loss)


@pytest.mark.fault("K23", "K24")
@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_run_that_a_signal_stops_says_how_it_goes_on_and_ends_with_the_same_bits(
    finished: Path,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    name: str,
    status: int,
) -> None:
    def send(value: object) -> object:
        os.kill(os.getpid(), getattr(signal, name))
        return value

    argv = command(
        pictures, tmp_path, steps=6, eval_steps=3, batch_size=2, correction_clicks=1,
        gradient_accumulation_steps=2, lora_dropout=0.1, tensorboard=False,
    )  # fmt: skip
    with monkeypatch.context() as patch:
        disturb(patch, 6, send)  # in the fourth update: three batches make an epoch, in two updates
        assert main(argv) == status
    run = run_folder(tmp_path)
    error = capfd.readouterr().err
    assert (
        f"stopped by {name} after step 4 of 6; saved in {run / 'state' / 'checkpoint-4'}" in error
    )
    assert f"continue with: sam2-lora train --resume {run}" in error
    assert "Traceback" not in error
    assert (run / "latest_lora_step4.torch").is_file()
    assert not (run / "training_summary.json").exists()
    assert main(["--resume", str(run), "--logs_dir", str(tmp_path / "logs")]) == 0
    whole = tensors(run_folder(finished) / "final_lora_step6.torch")
    again = tensors(run / "final_lora_step6.torch")
    assert all(torch.equal(whole[each], again[each]) for each in whole)
    expected = [{**row, "seconds": ""} for row in rows(finished)]
    assert [{**row, "seconds": ""} for row in rows(tmp_path)] == expected


@pytest.mark.fault("R01", "R03")
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_names_the_pictures_and_can_be_left_out(
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    bad: float,
) -> None:
    with monkeypatch.context() as patch:
        disturb(patch, 2, lambda value: value * bad)
        assert main(command(pictures, tmp_path / "a", steps=3, eval_steps=3)) == 2
    error = capsys.readouterr().err
    bundle = run_folder(tmp_path / "a") / "state" / "nonfinite-step2"
    about = json.loads((bundle / "nonfinite.json").read_text())["about"]
    (names,) = about["samples"]
    assert "step 2: the loss is not finite: " in error
    assert f"samples: {names[0]}" in error
    assert str(bundle) in error
    assert "--skip_nonfinite" in error
    assert "Traceback" not in error
    assert (bundle / "adapter" / "adapter_config.json").is_file()
    with monkeypatch.context() as patch:
        disturb(patch, 2, lambda value: value * bad)
        argv = command(pictures, tmp_path / "b", steps=3, eval_steps=3, skip_nonfinite=True)
        assert main(argv) == 0
    summary = json.loads((run_folder(tmp_path / "b") / "training_summary.json").read_text())
    assert summary["dropped_updates"] == [2]
    assert "1 update dropped" in capsys.readouterr().out


@pytest.mark.fault("R11")
def test_validation_is_the_same_whatever_was_drawn_before(pictures: Path) -> None:
    cfg = parse(Config, command(pictures, Path("unused")), prog="t")
    val = data.load(cfg).val
    network = model.build(cfg).eval()
    figures = []
    for seed in (1, 2):
        torch.manual_seed(seed), np.random.seed(seed)  # noqa: NPY002
        figures.append(metrics.evaluate(network, val, cfg))
    assert figures[0] == figures[1]
    assert set(figures[0]) >= {"iou", "click3_iou", "box_iou"}


def test_a_lone_adapter_cannot_be_resumed_but_can_be_continued(
    finished: Path, pictures: Path, tmp_path: Path
) -> None:
    (single,) = run_folder(finished).glob("latest_lora_step6.torch")
    lone = tmp_path / "lone.torch"
    shutil.copy(single, lone)
    with pytest.raises(CheckpointError, match=f"--adapter {lone}"):
        train(command(pictures, tmp_path, resume=lone))
    argv = command(pictures, tmp_path / "warm", adapter=lone, steps=1, learning_rate=1e-9)
    assert main(argv) == 0
    warm = tensors(run_folder(tmp_path / "warm") / "final_lora_step1.torch")
    for name, tensor in tensors(lone).items():
        torch.testing.assert_close(warm[name], tensor, atol=1e-6, rtol=0)


def test_a_run_continues_from_its_last_step_only(finished: Path) -> None:
    folder = run_folder(finished)
    (latest,) = folder.glob("latest_*.torch")
    assert find_run(str(latest)).folder == folder
    others = set(folder.glob("*.torch")) - {latest}
    assert {path.name.partition("_")[0] for path in others} == {"best", "final"}
    for path in others:
        with pytest.raises(CheckpointError, match="or its latest_lora_step file") as caught:
            find_run(str(path))
        assert ("--adapter" in str(caught.value)) == ("_lora_" in path.name), "a merged one is none"
    with pytest.raises(CheckpointError, match="no such file or folder"):
        find_run(str(finished / "gone.torch"))


def test_only_the_best_pairs_are_kept_and_one_latest(pictures: Path, tmp_path: Path) -> None:
    argv = command(pictures, tmp_path, steps=6, eval_steps=1, keep_best=1, learning_rate=3e-3)
    assert main(argv) == 0
    folder = run_folder(tmp_path)
    (best,) = folder.glob("best_lora_*.torch")
    assert len(list(folder.glob("best_merged_*.torch"))) == 1
    assert [path.name for path in folder.glob("latest_*")] == ["latest_lora_step6.torch"]
    scores = [float(row["iou"]) for row in rows(tmp_path) if row["split"] == "val"][1:]
    assert best.name.startswith(
        f"best_lora_step{scores.index(max(scores)) + 1}_iou{max(scores):.4f}"
    )


def test_training_stops_when_the_metric_stays(pictures: Path, tmp_path: Path) -> None:
    argv = command(
        pictures, tmp_path, steps=20, eval_steps=1, patience=2, learning_rate=1e-12, min_delta=0.5
    )
    assert main(argv) == 0
    summary = json.loads((run_folder(tmp_path) / "training_summary.json").read_text())
    assert summary["early_stopping_triggered"] is True
    assert summary["actual_steps"] == 3  # the first validation is the best, two more are not
    assert (run_folder(tmp_path) / "final_lora_step3.torch").exists()


@pytest.mark.parametrize(
    "more", [{"hflip": False}, {"hflip": True, "num_workers": 1, "correction_clicks": 1}]
)
def test_cached_embeddings_train_the_same_bits(
    pictures: Path, tmp_path: Path, more: dict[str, Any]
) -> None:
    settings = {"targets": "decoder", "steps": 6, "eval_steps": 3, "batch_size": 2, **more}
    assert main(command(pictures, tmp_path / "plain", **settings)) == 0
    cache, counts = tmp_path / "cache", []
    for name in ("filling", "filled"):
        assert main(command(pictures, tmp_path / name, cache_dir=cache, **settings)) == 0
        counts.append(len(list(cache.rglob("*.features"))))
    files = len(list(pictures.glob("*/images/*.png")))  # those of validation and test, too
    assert counts[0] == counts[1]
    assert counts[0] > files if more["hflip"] else counts[0] == files
    plain_run = tensors(run_folder(tmp_path / "plain") / "final_lora_step6.torch")
    for name in ("filling", "filled"):
        cached = tensors(run_folder(tmp_path / name) / "final_lora_step6.torch")
        assert all(torch.equal(plain_run[key], cached[key]) for key in plain_run)
        same = [[{**row, "seconds": ""} for row in rows(tmp_path / run)] for run in ("plain", name)]
        assert same[0] == same[1]


def test_a_filled_cache_runs_no_encoder(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither in training nor in validation nor in the test at the end."""
    from sam2_lora import frozen, metrics

    settings = {"targets": "decoder", "hflip": False, "steps": 3, "eval_steps": 1}
    settings |= {"cache_dir": tmp_path / "cache", "tensorboard": False}
    assert main(command(pictures, tmp_path / "first", **settings)) == 0

    def refuse(*args: Any) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(frozen, "encode_pictures", refuse)
    monkeypatch.setattr(metrics, "encode_pictures", refuse)
    assert main(command(pictures, tmp_path / "second", **settings)) == 0


def test_an_adapter_of_the_encoder_refuses_cached_embeddings(
    finished: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = run_folder(finished) / "adapter"
    settings = {"targets": "decoder", "hflip": False, "cache_dir": tmp_path / "cache"}
    assert main(command(pictures, tmp_path / "out", adapter=adapter, **settings)) == 2
    assert "--cache_dir needs an unchanged encoder" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_legacy_loss_trains_where_most_pictures_hold_nothing(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(pictures, tmp_path / "data")
    for number in (0, 1, 3, 4):
        empty = np.zeros((SIDE, SIDE), np.uint8)
        Image.fromarray(empty).save(tmp_path / "data" / "train" / "masks" / f"{number}.png")
    assert main(command(tmp_path / "data", tmp_path / "out", loss="legacy")) == 0
    assert "--loss legacy trains on the 1 picture with objects" in capsys.readouterr().out


def test_without_a_val_folder_a_part_validates_and_the_best_is_exported(
    pictures: Path, tmp_path: Path
) -> None:
    shutil.copytree(pictures / "train", tmp_path / "data" / "train")
    argv = command(tmp_path / "data", tmp_path / "out", steps=2, val_fraction=0.2)
    assert main(argv) == 0  # split by name: one picture of five validates
    assert [row["step"] for row in rows(tmp_path / "out") if row["split"] == "val"] == ["0", "2"]
    assert list(run_folder(tmp_path / "out").glob("best_merged_*.torch"))


def test_bad_input_ends_with_one_message_and_no_folder(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(pictures, tmp_path / "data")
    (tmp_path / "data" / "train" / "images" / "0.png").write_bytes(b"<html>not found</html>")
    assert main(command(tmp_path / "data", tmp_path / "out")) == 2
    error = capsys.readouterr().err
    assert "0.png" in error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()
    assert main([*command(pictures, tmp_path / "out"), "--lora_rnk", "4"]) == 2
    assert "lora_rank" in capsys.readouterr().err
    wrong = {"precision": "bf16", "device": "cpu"}
    assert main(command(tmp_path / "nowhere", tmp_path / "out", **wrong)) == 2
    assert "bf16 does not run on cpu: use auto or fp32" in capsys.readouterr().err


@pytest.mark.parametrize(("value", "text"), [(1e-3, "1e-3"), (1e-5, "1e-5"), (2.5e-4, "2.5e-4")])
def test_learning_rates_are_written_as_people_do(value: float, text: str) -> None:
    assert plain(value) == text


@pytest.mark.fault("C28")
def test_a_place_inside_a_run_leads_to_the_run(finished: Path, tmp_path: Path) -> None:
    folder = run_folder(finished)
    inside = ["adapter", "state", "state/checkpoint-6", "state/checkpoint-6/manifest.json"]
    for name in inside:
        with pytest.raises(CheckpointError, match=rf"It lies in one: --resume {folder}($|\.)"):
            find_run(str(folder / name))
    with pytest.raises(CheckpointError, match="weights alone: --adapter"):
        find_run(str(folder / "adapter"))
    for name in ("config.yaml", "training_summary.json"):
        with pytest.raises(CheckpointError, match=f"give its folder {folder}") as caught:
            find_run(str(folder / name))
        assert "--adapter" not in str(caught.value), "it cannot be one"
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(CheckpointError, match=r"no run of sam2-lora train\.$"):
        find_run(str(tmp_path / "notes.txt"))


def test_a_folder_of_another_kind_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no run of sam2-lora train\."):
        find_run(str(tmp_path))
