"""Whole runs on the small random SAM 3: what they leave, and that they resume to the same bits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch
from tiny_run import command, rows, same, summary, tensors

from lora_core.config import dump, parse
from lora_core.errors import ConfigError
from sam3_lora import data, model, scoring, validation
from sam3_lora.config import Config
from sam3_lora.train import main

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def finished(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with `same.yaml` and the `experiments` of its three epochs with masks."""
    folder = tmp_path_factory.mktemp("finished")
    argv = command(base, Path("experiments"), training__max_epochs=3, tensorboard=True,
                   training__enable_segmentation=True, training__mask_points=100)  # fmt: skip
    dump(parse(Config, argv, prog="t"), folder / "same.yaml")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["--config", "same.yaml"]) == 0
    return folder


@pytest.fixture
def copy(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: a copy of `finished`."""
    shutil.copytree(finished, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"


def kill_after_epoch_2(folder: Path) -> None:
    """Leave what a run leaves that was killed in its third epoch."""
    checkpoints = folder / "experiments" / "checkpoints"
    shutil.rmtree(checkpoints / "state" / "checkpoint-6")
    for name in ("epoch_3.pt", "training_summary.json"):
        (checkpoints / name).unlink()


# -- what a run leaves -----------------------------------------------------------------------------


def test_a_run_leaves_the_tree_that_the_guide_promises(finished: Path) -> None:
    experiments = finished / "experiments"
    assert {path.name for path in (experiments / "checkpoints").iterdir()} == {
        "best.pt", "epoch_1.pt", "epoch_2.pt", "epoch_3.pt",
        "adapter", "config.yaml", "state", "training_summary.json",
    }  # fmt: skip
    logs = {path.name for path in (experiments / "logs").iterdir()}
    events = {name for name in logs if name.startswith("events.out.tfevents.")}
    assert logs - events == {"training.log", "metrics.csv"}
    assert events


def test_the_log_has_what_the_terminal_showed(finished: Path) -> None:
    log = (finished / "experiments" / "logs" / "training.log").read_text()
    assert "phrase  train  val" in log
    assert "adapted modules" in log
    assert "before training  segm_mAP" in log
    assert "step 6  validation  segm_mAP" in log
    assert "step 1/6  loss " in log
    assert "absent concepts found: base " in log


def test_the_figures_begin_with_the_base_and_have_every_epoch(finished: Path) -> None:
    val = rows(finished / "experiments", "val")
    assert [row["step"] for row in val] == ["0", "2", "4", "6"]
    assert all(0 <= float(row["segm_mAP"]) <= 1 and float(row["loss"]) > 0 for row in val)
    train = rows(finished / "experiments", "train")
    assert [row["step"] for row in train] == ["1", "2", "3", "4", "5", "6"]
    assert all(float(row[name]) > 0 for row in train for name in ("presence_loss", "lr"))
    # A batch may be the picture without objects.
    parts = ("loss_bbox", "loss_mask", "loss_semantic_dice", "loss_o2m")
    assert all(sum(float(row[name]) for row in train) > 0 for name in parts)
    assert float(train[-1]["epoch"]) == 3


def test_tensorboard_gets_curves_and_overlays(finished: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = events.EventAccumulator(str(finished / "experiments" / "logs"), {"images": 0})
    found.Reload()
    tags = found.Tags()
    assert {"train/loss", "val/segm_mAP", "val/cgF1"} <= set(tags["scalars"])
    assert set(tags["images"]) == {"img_0.png", "img_1.png"}  # the third has no objects
    assert [picture.step for picture in found.Images("img_0.png")] == [2, 4, 6]


def test_the_summary_names_the_best_step_and_the_absent_concepts(finished: Path) -> None:
    found = summary(finished / "experiments")
    assert (found["steps"], found["best_step"]) == (6, 2)
    assert found["phrases"] == ["bolt", "nut", "washer"]
    assert set(found["absent_concepts_found"]) == {"base", "lora"}
    assert next(iter(found["best"])) == "segm_mAP"


def test_best_is_the_adapter_of_its_epoch_in_both_forms(finished: Path) -> None:
    from safetensors.torch import load_file

    checkpoints = finished / "experiments" / "checkpoints"
    assert same(checkpoints / "best.pt", checkpoints / "epoch_1.pt")
    assert not same(checkpoints / "best.pt", checkpoints / "epoch_2.pt")
    peft = load_file(checkpoints / "adapter" / "adapter_model.safetensors")
    single = tensors(checkpoints / "best.pt")
    assert sorted(map(torch.Tensor.sum, peft.values())) == sorted(
        map(torch.Tensor.sum, single.values())
    )


def test_files_that_travel_do_not_tell_where_they_were_made(finished: Path, base: Path) -> None:
    checkpoints = finished / "experiments" / "checkpoints"
    files = [*checkpoints.glob("*.pt"), *checkpoints.glob("adapter/*")]
    files += [path for path in checkpoints.glob("state/**/*") if path.is_file()]
    assert len(files) > 10
    places = (base.parent, finished, tiny_run.PICTURES)
    told = [
        (path, place)
        for path in files
        for place in places
        if str(place).encode() in path.read_bytes()
    ]
    assert not told
    metadata = torch.load(checkpoints / "best.pt", weights_only=True)["metadata"]
    assert metadata["settings"]["lora.rank"] == 8
    assert "paths.sam3_checkpoint" not in metadata["settings"]
    assert metadata["state"] == "state/checkpoint-2"


def test_the_stored_settings_are_those_of_the_run(finished: Path) -> None:
    stored = finished / "experiments" / "checkpoints" / "config.yaml"
    read = [parse(Config, ["--config", str(path)], prog="t")
            for path in (stored, finished / "same.yaml")]  # fmt: skip
    assert read[0] == read[1]


# -- resuming --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "step"), [("best.pt", 2), ("epoch_2.pt", 4), ("", 4)])
def test_a_resumed_run_ends_with_the_same_bits(
    name: str, step: int, copy: Path, finished: Path, capsys: Capture
) -> None:
    """The guide's line: the same configuration file, and where to continue."""
    kill_after_epoch_2(copy)
    place = f"experiments/checkpoints/{name}"
    assert main(["--config", "same.yaml", "--resume", place]) == 0
    assert f"continuing at step {step} " in capsys.readouterr().out
    now, then = copy / "experiments", finished / "experiments"
    for file in ("best.pt", "epoch_2.pt", "epoch_3.pt"):
        assert same(now / "checkpoints" / file, then / "checkpoints" / file), file
    assert rows(now) == rows(then)
    assert summary(now) == summary(then)


def test_going_back_gives_the_best_its_adapter_of_then(base: Path, tmp_path: Path) -> None:
    """The later one, whose checkpoint is set aside, is no result of the run any more."""
    checkpoints = tmp_path / "checkpoints"
    assert main(command(base, tmp_path, training__best_metric="loss",
                        training__learning_rate=1e-3)) == 0  # fmt: skip
    assert same(checkpoints / "best.pt", checkpoints / "epoch_2.pt")
    # So small a step changes no weight, and what is only as good is not the best.
    no_better = ["--resume", str(checkpoints / "epoch_1.pt"), "--training.learning_rate", "1e-20"]
    assert main(no_better) == 0
    assert summary(tmp_path)["best_step"] == 2
    assert same(checkpoints / "best.pt", checkpoints / "epoch_1.pt")


def test_resuming_a_finished_run_changes_nothing(copy: Path, capsys: Capture) -> None:
    before = {path: path.read_bytes() for path in copy.rglob("*.pt")}
    assert main(["--config", "same.yaml", "--resume", "experiments/checkpoints"]) == 0
    assert "already finished" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in copy.rglob("*.pt")} == before


def test_a_resume_with_another_adapter_is_refused_with_then_and_now(
    copy: Path, capsys: Capture
) -> None:
    kill_after_epoch_2(copy)
    changes = {"lora.rank": ("8", "4"), "dataset.max_negatives": ("10", "3"), "seed": ("123", "7")}
    words = [word for name, (_, now) in changes.items() for word in (f"--{name}", now)]
    words += ["--training.learning_rate", "1e-5"]  # which may change
    assert main(["--resume", "experiments/checkpoints/best.pt", *words]) == 2
    error = capsys.readouterr().err
    table = {line.split()[0]: tuple(line.split()[1:]) for line in error.splitlines() if line}
    assert changes.items() <= table.items()
    assert "learning_rate" not in error


def test_a_resume_finds_base_and_pictures_elsewhere(
    copy: Path, base: Path, tmp_path: Path, capsys: Capture
) -> None:
    kill_after_epoch_2(copy)
    shutil.copytree(base.parent, tmp_path / "other base")
    pictures = shutil.copytree(tiny_run.PICTURES, tmp_path / "other pictures")
    words = ["--paths.sam3_checkpoint", str(tmp_path / "other base" / base.name)]
    for split in ("train", "val"):
        words += [f"--dataset.{split}_img_folder", str(pictures)]
        words += [f"--dataset.{split}_ann_file", str(pictures / "_annotations.coco.json")]
    argv = ["--resume", "experiments/checkpoints/epoch_2.pt", "--training.learning_rate", "1e-5"]
    assert main([*argv, *words]) == 0
    changed = "changed for the rest of the run: training.learning_rate 0.01 -> 1e-05\n"
    assert changed in capsys.readouterr().out


def test_other_pictures_than_those_of_the_run_are_refused(
    copy: Path, tmp_path: Path, capsys: Capture
) -> None:
    kill_after_epoch_2(copy)
    pictures = shutil.copytree(tiny_run.PICTURES, tmp_path / "pictures")
    file = pictures / "_annotations.coco.json"
    content = json.loads(file.read_text())
    content["annotations"][0]["bbox"][0] += 1
    file.write_text(json.dumps(content))
    words = ["--dataset.train_img_folder", str(pictures), "--dataset.train_ann_file", str(file)]
    assert main(["--resume", "experiments/checkpoints/best.pt", *words]) == 2
    assert "training data" in capsys.readouterr().err


def test_a_file_without_its_state_says_what_else_can_be_done(
    copy: Path, tmp_path: Path, capsys: Capture
) -> None:
    lone = shutil.copy(copy / "experiments" / "checkpoints" / "best.pt", tmp_path / "best.pt")
    assert main(["--config", "same.yaml", "--resume", str(lone)]) == 2
    assert f"--adapter {lone}" in capsys.readouterr().err
    shutil.rmtree(copy / "experiments" / "checkpoints" / "state" / "checkpoint-2")
    assert main(["--resume", "experiments/checkpoints/best.pt"]) == 2
    error = capsys.readouterr().err
    assert "its state" in error
    assert "--resume experiments/checkpoints." in error


# -- a folder that is taken ------------------------------------------------------------------------


def test_a_finished_run_is_not_trained_over(copy: Path, capsys: Capture) -> None:
    assert main(["--config", "same.yaml"]) == 2
    error = capsys.readouterr().err
    assert "holds a finished run with these settings" in error
    assert "--resume" in error
    assert "--overwrite" in error
    kill_after_epoch_2(copy)
    assert main(["--config", "same.yaml"]) == 2
    assert "holds an unfinished run with these settings" in capsys.readouterr().err
    assert main(["--config", "same.yaml", "--lora.rank", "4"]) == 2
    error = capsys.readouterr().err
    assert "other settings" in error
    assert "lora.rank" in error


def test_the_figures_of_two_runs_do_not_mix(copy: Path, capsys: Capture) -> None:
    assert main(["--config", "same.yaml", "--checkpoint.save_dir", "other"]) == 2
    error = capsys.readouterr().err
    assert "holds the figures of another run" in error
    assert "--logging.log_dir" in error
    assert not (copy / "other").exists()


def test_overwriting_replaces_what_runs_write_and_nothing_else(
    copy: Path, base: Path, capsys: Capture
) -> None:
    checkpoints = copy / "experiments" / "checkpoints"
    (checkpoints / "notes.txt").write_text("mine")
    (checkpoints / "bad_samples.jsonl").write_text("{}")
    argv = command(base, Path("experiments"), training__max_epochs=1, overwrite=True)
    assert main(argv) == 0
    assert (checkpoints / "notes.txt").read_text() == "mine"
    assert {path.name for path in checkpoints.glob("*.pt")} == {"best.pt", "epoch_1.pt"}
    assert not (checkpoints / "bad_samples.jsonl").exists()
    assert [row["step"] for row in rows(copy / "experiments", "val")] == ["0", "2"]


# -- warm start, other data, other parts -----------------------------------------------------------


def test_a_warm_start_begins_with_the_weights_of_an_adapter(
    finished: Path, base: Path, tmp_path: Path
) -> None:
    adapter = finished / "experiments" / "checkpoints" / "epoch_3.pt"
    argv = command(
        base, tmp_path, adapter=adapter, training__max_epochs=1, training__learning_rate=1e-9,
        training__enable_segmentation=True, training__mask_points=100,
    )  # fmt: skip
    assert main(argv) == 0
    now = tensors(tmp_path / "checkpoints" / "epoch_1.pt")
    for name, tensor in tensors(adapter).items():
        torch.testing.assert_close(now[name], tensor, atol=1e-6, rtol=0)


def test_without_validation_data_best_is_the_last_epoch_and_says_so(
    base: Path, tmp_path: Path, capsys: Capture
) -> None:
    none = {"dataset__val_img_folder": "null", "dataset__val_ann_file": "null"}
    assert main(command(base, tmp_path, **none)) == 0
    assert "no validation data: best.pt is the last epoch" in capsys.readouterr().out
    checkpoints = tmp_path / "checkpoints"
    assert same(checkpoints / "best.pt", checkpoints / "epoch_2.pt")
    assert not same(checkpoints / "best.pt", checkpoints / "epoch_1.pt")
    assert rows(tmp_path, "val") == []
    assert summary(tmp_path)["best"] is None
    assert main(["--resume", str(checkpoints / "best.pt")]) == 0
    assert "already finished" in capsys.readouterr().out


def test_example_boxes_train_the_geometry_encoder(base: Path, tmp_path: Path) -> None:
    argv = command(
        base, tmp_path, dataset__exemplars=1.0, lora__apply_to_geometry_encoder=True,
        training__max_epochs=1, training__o2m_weight=0,
    )  # fmt: skip
    assert main(argv) == 0
    found = tensors(tmp_path / "checkpoints" / "best.pt")
    moved = [name for name, tensor in found.items() if "lora_B" in name and tensor.any()]
    assert [name for name in moved if "geometry_encoder" in name]


def test_an_adapted_text_encoder_is_validated_as_it_is_at_that_time(
    base: Path, tmp_path: Path
) -> None:
    argv = command(base, tmp_path, lora__apply_to_text_encoder=True, training__learning_rate=3e-2)
    assert main(argv) == 0
    cfg = parse(Config, argv, prog="t")
    splits = data.load(cfg)
    assert splits.val is not None
    net = model.load(base, (84, 84), tmp_path / "checkpoints" / "epoch_2.pt")
    words = model.tokenizer(net)
    adapted = scoring.EncodedPhrases(net, words, splits.phrases)
    plain = scoring.EncodedPhrases(model.load(base, (84, 84)), words, splits.phrases)
    assert not torch.allclose(adapted.features, plain.features, atol=1e-3)
    last = rows(tmp_path, "val")[-1]
    figures = scoring.score(net, splits.val, adapted, masks=False).figures()
    assert figures["loss"] == pytest.approx(float(last["loss"]), rel=1e-5)
    other = scoring.score(net, splits.val, plain, masks=False).figures()
    assert other["loss"] != pytest.approx(float(last["loss"]), rel=1e-5)


def test_a_bad_picture_may_be_left_out_and_is_listed(base: Path, tmp_path: Path) -> None:
    pictures = tiny_run.write_pictures(tmp_path / "pictures", 3)
    (pictures / "1.png").write_bytes((pictures / "1.png").read_bytes()[:500])
    argv = command(
        base, tmp_path, dataset__train_img_folder=pictures, training__max_epochs=1,
        dataset__train_ann_file=pictures / "_annotations.coco.json",
        on_bad_sample="skip", max_bad_fraction=0.5,
    )  # fmt: skip
    assert main(argv) == 0
    lines = (tmp_path / "checkpoints" / "bad_samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["sample"] for line in lines] == ["1.png"]
    assert summary(tmp_path)["bad_samples"] == 1


# -- what best.pt follows --------------------------------------------------------------------------


def splits_of(base: Path, **given: Any) -> tuple[Config, data.Splits]:
    cfg = parse(Config, command(base, Path("unused"), **given), prog="t")
    return cfg, data.load(cfg)


@pytest.mark.parametrize(
    ("chosen", "masks", "expected"),
    [("auto", False, "bbox_mAP"), ("auto", True, "segm_mAP"), ("loss", False, "minus_loss"),
     ("cgF1", True, "cgF1"), ("bbox_mAP", True, "bbox_mAP")],
)  # fmt: skip
def test_the_first_figure_is_the_one_that_best_follows(
    base: Path, chosen: str, masks: bool, expected: str
) -> None:
    cfg, splits = splits_of(base, training__best_metric=chosen, training__enable_segmentation=masks)
    net = model.build(cfg)
    words = model.tokenizer(net)
    evaluate = validation.evaluation(
        cfg, splits, lambda: scoring.EncodedPhrases(net, words, splits.phrases)
    )
    assert evaluate is not None
    with torch.no_grad():
        figures = evaluate(net)
    assert next(iter(figures)) == expected
    if chosen == "loss":
        assert figures["minus_loss"] == -figures["loss"] < 0


def test_a_metric_that_says_nothing_on_this_data_is_refused(base: Path) -> None:
    cfg, splits = splits_of(base, training__best_metric="cgF1", dataset__max_val_negatives=0)
    with pytest.raises(ConfigError, match="asks for nothing in vain"):
        validation.best_metric(cfg, splits)


# -- absent concepts -------------------------------------------------------------------------------


def test_an_adapter_that_fires_at_anything_is_warned_of(base: Path, capsys: Capture) -> None:
    from lora_core.injection import lora_layers

    cfg, splits = splits_of(base)
    net = model.build(cfg)
    model.adapt(net, cfg)
    with torch.no_grad():  # a base that finds some of them
        net.detr_decoder.presence_head.layer3.bias.fill_(0.8)
    words = model.tokenizer(net)
    phrases = scoring.EncodedPhrases(net, words, scoring.ABSENT)
    rates = validation.absent_concepts(net, splits, lambda: phrases)
    assert 0 < rates["base"] == rates["lora"] < 0.1  # B is zero
    assert "warning" not in capsys.readouterr().out
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in lora_layers(net).values():
            layer.lora_factors("default")[1].normal_(generator=generator)
    after = validation.absent_concepts(net, splits, lambda: phrases)
    assert after["base"] == rates["base"]
    assert after["lora"] > 0.2
    assert "warning: that is more than 0.01 above the base" in capsys.readouterr().out
