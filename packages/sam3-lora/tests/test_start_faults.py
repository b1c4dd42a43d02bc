"""Faults of settings, files and folders: one message, exit status 2, and nothing is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_run
import torch

from lora_core.testing.no_device import no_device
from sam3_lora.train import main

Refuse = Callable[..., str]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def refuse(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refuse:
    """Call the command, and give its message after checking what every message must be.

    Neither weights nor a GPU are touched before it.
    """

    def call(*words: object, lines: int = 2, **given: object) -> str:
        argv = tiny_run.command(base, tmp_path / "out", **given)
        capsys.readouterr()
        with no_device():
            status = main([*argv, *map(str, words)])
        message = capsys.readouterr().err
        assert status == 2, message
        assert message.startswith("error: ")
        assert "Traceback" not in message
        assert len(message.splitlines()) <= lines, message
        assert not (tmp_path / "out").exists(), "something was written"
        return message

    return call


# -- settings --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ("--lora.rnk 4", ["--lora.rnk", "--lora.rank"]),
        ("--training.max_epoch 4", ["--training.max_epochs"]),
        ("--traning.batch_size 4", ["--training.batch_size"]),
        ("--rank 4", ["--rank"]),
        ("--lora.rank 0", ["--lora.rank is 0", "1 to 65536"]),
        ("--lora.rank 4.5", ["--lora.rank", "4.5"]),
        ("--lora.alpha nan", ["--lora.alpha", "nan"]),
        ("--lora.dropout 1", ["--lora.dropout is 1.0"]),
        ("--lora.target_modules q_prj", ["q_prj", "q_proj"]),
        ("--lora.target_modules []", ["--lora.target_modules is empty"]),
        ("--lora 8", ["--lora is a section", "--lora.NAME"]),
        ("--training.learning_rate -1", ["--training.learning_rate is -1.0"]),
        ("--training.batch_size 0", ["--training.batch_size is 0", "at least 1"]),
        ("--training.amp_dtype bf16", ["--training.amp_dtype", "bfloat16"]),
        ("--training.scheduler linear", ["--training.scheduler", "inverse_sqrt"]),
        ("--training.best_metric iou", ["--training.best_metric", "bbox_mAP"]),
        ("--training.enable_segmentation maybe", ["enable_segmentation", "maybe"]),
        ("--dataset.resolution 1000", ["--dataset.resolution 1000", "14", "try 994"]),
        ("--dataset.resolution 84x", ["--dataset.resolution", "HEIGHTxWIDTH"]),
        ("--dataset.resolution 14000", ["8192"]),
        ("--dataset.max_ann_per_img 0", ["--dataset.max_ann_per_img is 0"]),
        ("--dataset.exemplars 2", ["--dataset.exemplars is 2.0", "0 to 1"]),
        ("--dataset.prompts bolt", ["--dataset.prompts", "id=phrase"]),
        ("--checkpoint.save_freq 0", ["--checkpoint.save_freq is 0"]),
        ("--logging.log_steps 0", ["--logging.log_steps is 0"]),
        ("--seed -1", ["--seed is -1"]),
        ("--device cuda:7", ["--device", "cuda:7"]),
        ("--device cuda", ["cuda"]),
        ("--trainer.learning_rate 1", ["--trainer.learning_rate"]),
        ("--trainer.lerning_rate 1", ["lerning_rate"]),
    ],
)
def test_a_wrong_setting_is_named_with_what_would_be_right(
    refuse: Refuse, words: str, parts: list[str]
) -> None:
    if words == "--device cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    message = refuse(*words.split())
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ("--lora.freeze_backbone true --lora.apply_to_vision_encoder true",
         ["--lora.freeze_backbone and --lora.apply_to_vision_encoder: give one"]),
        ("--lora.apply_to_mask_decoder true", ["--training.enable_segmentation true"]),
        ("--lora.freeze_backbone true --lora.freeze_encoder true --lora.freeze_decoder true",
         ["nothing to train"]),
        ("--training.best_metric segm_mAP", ["--training.enable_segmentation true"]),
        ("--dataset.val_img_folder null", ["give both, or neither"]),
        ("--dataset.val_img_folder null --dataset.val_ann_file null --training.best_metric loss",
         ["--training.best_metric needs validation data"]),
        ("--resume a --adapter b", ["--resume continues a run", "--adapter starts a new run"]),
        ("--lora.target_modules text_encoder.text_model.encoder.layers.0.mlp.fc1",
         ["is in a component that is off", "apply_to_text_encoder"]),
    ],
)  # fmt: skip
def test_switches_that_contradict_each_other_are_refused(
    refuse: Refuse, words: str, parts: list[str]
) -> None:
    message = refuse(*words.split())
    for part in parts:
        assert part in message


def test_all_faults_of_the_settings_come_together(refuse: Refuse) -> None:
    message = refuse("--lora.rank", 0, "--training.batch_size", 0, "--seed", -1, lines=4)
    for part in ("--lora.rank is 0", "--training.batch_size is 0", "--seed is -1"):
        assert part in message


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("lora:\n  rnk: 8\n", ["run.yaml", "line 2", "lora.rnk", "lora.rank"]),
        ("training:\n  batch_size: two\n", ["run.yaml", "line 2", "training.batch_size", "two"]),
        ("lora:\n  rank: 8\n  rank: 16\n", ["run.yaml", "rank"]),
        ("loar:\n  rank: 8\n", ["run.yaml", "loar", "lora"]),
        ("lora: 8\n", ["run.yaml", "lora"]),
        ("- lora\n", ["run.yaml"]),
        ("lora: {rank: 8\n", ["run.yaml"]),
        ("model:\n  name: sam3\n", ["run.yaml", "model"]),
        ("lora: !!python/object/apply:os.system ['touch canary']\n", ["run.yaml"]),
    ],
)
def test_a_wrong_file_is_named_with_its_line(
    refuse: Refuse, tmp_path: Path, text: str, parts: list[str]
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    message = refuse("--config", path)
    for part in parts:
        assert part in message
    assert not Path("canary").exists()


# -- files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "setting",
    ["config", "resume", "adapter", "paths.sam3_checkpoint", "paths.bpe_path",
     "dataset.train_img_folder", "dataset.train_ann_file", "dataset.val_img_folder",
     "dataset.val_ann_file"],
)  # fmt: skip
def test_a_missing_file_is_named_with_its_whole_path(
    refuse: Refuse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert str(tmp_path / "gone.x") in refuse(f"--{setting}", "gone.x", lines=4)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "Git LFS pointer"),
        (b"<!DOCTYPE html>\n<html></html>", "is a web page"),
        (b"\x80\x04garbage" * 50, "base.pt"),
    ],
    ids=["empty", "pointer", "page", "garbage"],
)
def test_what_is_no_checkpoint_is_called_what_it_is(
    refuse: Refuse, tmp_path: Path, content: bytes, part: str
) -> None:
    path = tmp_path / "base.pt"
    path.write_bytes(content)
    message = refuse("--paths.sam3_checkpoint", path)
    assert str(path) in message
    assert part in message


def test_a_checkpoint_of_another_model_is_refused_with_its_first_names(
    refuse: Refuse, tmp_path: Path
) -> None:
    path = tmp_path / "other.pt"
    torch.save({"model": {"layer1.weight": torch.zeros(3)}}, path)
    assert "layer1.weight" in refuse("--paths.sam3_checkpoint", path, lines=4)


def test_a_base_without_a_vocabulary_says_where_to_get_it(
    refuse: Refuse, base: Path, tmp_path: Path
) -> None:
    for name in ("base.pt", "base.json"):
        shutil.copy(base.parent / name, tmp_path / name)
    message = refuse("--paths.sam3_checkpoint", tmp_path / "base.pt", lines=4)
    assert "bpe_simple_vocab_16e6.txt.gz" in message


def test_faults_of_the_data_come_together_with_their_places(refuse: Refuse, tmp_path: Path) -> None:
    pictures = tiny_run.write_pictures(tmp_path / "p", 3)
    file = pictures / "_annotations.coco.json"
    content = json.loads(file.read_text())
    content["annotations"][0]["bbox"] = [1, 2, 3]
    content["annotations"][2]["category_id"] = 99
    file.write_text(json.dumps(content))
    message = refuse(
        "--dataset.train_img_folder", pictures, "--dataset.train_ann_file", file, lines=5
    )
    for part in (str(file), "bbox", "99"):
        assert part in message


# -- folders of the run ----------------------------------------------------------------------------


@pytest.mark.parametrize("setting", ["checkpoint.save_dir", "logging.log_dir"])
def test_a_folder_that_cannot_be_made_is_refused_before_anything_is_read(
    refuse: Refuse, tmp_path: Path, setting: str
) -> None:
    (tmp_path / "file").write_text("x")
    message = refuse(f"--{setting}", tmp_path / "file" / "x")
    assert f"--{setting} {tmp_path}" in message
    assert "is not a folder" in message
    assert "at most 255 bytes" in refuse(f"--{setting}", tmp_path / ("n" * 256))


def test_a_folder_that_is_no_run_cannot_be_resumed(refuse: Refuse, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    message = refuse("--resume", tmp_path / "other")
    assert "no run of sam3-lora train" in message
    assert "config.yaml" in message
    lone = tmp_path / "other" / "best.pt"
    lone.write_bytes(b"x")
    assert f"--adapter {lone}" in refuse("--resume", lone)


def test_two_faults_of_different_kinds_come_in_one_message(refuse: Refuse, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    message = refuse(
        "--checkpoint.save_dir", tmp_path / "file", "--paths.sam3_checkpoint", "gone.pt", lines=5
    )
    assert "--checkpoint.save_dir" in message
    assert "gone.pt" in message
