"""A training run from its command line to the adapter that plain PEFT loads."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_isaac_run
import torch
import yaml
from isaac_texts import record, write_picture, write_records
from recorded_isaac import sample
from tiny_isaac_run import rows

from isaac_lora import IsaacForConditionalGeneration, official
from isaac_lora.adapter_files import load_adapter, read_adapter
from isaac_lora.artifacts import refuse_existing
from isaac_lora.config import Config
from isaac_lora.official import load_model
from isaac_lora.train import main
from lora_core.errors import ConfigError

PACKAGE = Path(__file__).parents[1]
LOSS = ("step", "split", "loss")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_isaac_run.write_all(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two epochs."""
    return run(data, tmp_path_factory.mktemp("trained") / "run")


@pytest.fixture(scope="module")
def deep(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with depth, a tower that computes each time, and no validation."""
    output = tmp_path_factory.mktemp("deep") / "run"
    return run(data, output, val_data_path=None, **tiny_isaac_run.depth(data))


def run(data: Path, output: Path, **given: Any) -> Path:
    assert main(tiny_isaac_run.command(data, output, **given)) == 0
    return output


def refused(capsys: pytest.CaptureFixture[str], data: Path, output: Path, **given: Any) -> str:
    """What a run says that ends before it begins."""
    assert main(tiny_isaac_run.command(data, output, **given)) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert "Traceback" not in said
    assert not (output / "config.yaml").exists()
    return said


def losses(output: Path) -> list[list[str]]:
    return [[row[name] for name in LOSS] for row in rows(output)]


def tensors(output: Path) -> dict[str, torch.Tensor]:
    return dict(read_adapter(output).file.tensors)


def same(first: Path, second: Path) -> bool:
    """Whether two adapters are the same bits."""
    a, b = tensors(first), tensors(second)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# -- what it learns, and where it is ---------------------------------------------------------------


def test_a_small_set_is_learned_by_heart(data: Path, tmp_path: Path) -> None:
    output = run(
        data, tmp_path / "run", val_data_path=None, lora_r=16, lora_alpha=32, num_train_epochs=40,
        learning_rate=1e-2, lora_dropout=0, per_device_train_batch_size=5, save_steps=100,
    )  # fmt: skip
    found = [float(row["loss"]) for row in rows(output, "train")]
    assert len(found) == 40
    assert found[0] > 5
    assert found[-1] < 0.5


@pytest.mark.fault("R49")
def test_the_output_folder_is_the_adapter(trained: Path) -> None:
    names = {path.name for path in trained.iterdir()}
    assert names >= {
        "adapter_model.safetensors", "adapter_config.json", "README.md", "tokenizer_config.json",
        "vocab.json", "merges.txt", "config.yaml", "metrics.csv", "train.log", "state",
        "training_summary.json",
    }  # fmt: skip
    assert "depth.json" not in names
    assert "non-production" in (trained / "README.md").read_text("utf-8")
    summary = json.loads((trained / "training_summary.json").read_text())
    validation = {int(row["step"]): float(row["loss"]) for row in rows(trained, "val")}
    assert sorted(validation) == [0, 3, 6]
    assert summary["best_step"] == min((3, 6), key=validation.__getitem__)
    best = trained / "state" / f"checkpoint-{summary['best_step']}" / "adapter"
    assert same(trained, best)
    assert "loss" in summary["best"]
    for name in ("training_summary.json", "README.md"):
        assert "minus_loss" not in (trained / name).read_text("utf-8")
    assert "minus_loss" not in json.dumps(read_adapter(trained).file.metadata)


def test_the_snippet_of_the_guide_loads_it(
    trained: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import PeftModel

    monkeypatch.syspath_prepend(str(PACKAGE))
    from src.depth_isaac import IsaacForConditionalGeneration as OfTheGuide

    assert OfTheGuide is IsaacForConditionalGeneration
    ours = load_model(data / "isaac_model")
    load_adapter(ours, trained)
    model: Any = PeftModel.from_pretrained(
        OfTheGuide.from_pretrained(str(data / "isaac_model")), str(trained)
    ).eval()
    with torch.no_grad():
        wanted = ours(**sample("image1")).logits
        base = load_model(data / "isaac_model")(**sample("image1")).logits
        torch.testing.assert_close(model(**sample("image1")).logits, wanted, atol=1e-5, rtol=1e-5)
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(**sample("image1")).logits, wanted, atol=1e-4, rtol=1e-4)
    assert (wanted - base).abs().max() > 0.01


def test_without_validation_the_last_step_is_the_result(deep: Path) -> None:
    assert json.loads((deep / "training_summary.json").read_text())["best_step"] is None
    assert same(deep, deep / "state" / "checkpoint-6" / "adapter")


# -- frozen networks -------------------------------------------------------------------------------


def test_depth_trains_another_adapter_which_says_so(deep: Path, data: Path, tmp_path: Path) -> None:
    plain = run(data, tmp_path / "run", val_data_path=None)
    with_depth, without = losses(deep), losses(plain)
    assert len(with_depth) == len(without) == 6
    assert all(a != b for a, b in zip(with_depth, without, strict=True))
    for folder in (deep, deep / "state" / "checkpoint-6" / "adapter"):
        depth = json.loads((folder / "depth.json").read_text())
        assert (depth["depth_checkpoint"], depth["depth_alpha"]) == ("depth", 100.0)
        assert "CC-BY-NC" in (folder / "README.md").read_text("utf-8")
    model = IsaacForConditionalGeneration.from_pretrained(
        str(data / "isaac_model"),
        use_depth=True,
        depth_checkpoint_path=str(data / "depth"),
        depth_input_size=depth["depth_input_size"],
    )
    load_adapter(model, deep)
    with pytest.warns(UserWarning, match="trained with depth"):
        load_adapter(load_model(data / "isaac_model"), deep)


def test_kept_vision_features_change_no_bit(deep: Path, data: Path, tmp_path: Path) -> None:
    """Also with a worker, and from the cache of another run."""
    more = {"cache_vision": "true", "val_data_path": None} | tiny_isaac_run.depth(data)
    for name, workers in (("first", 0), ("second", 1)):
        output = run(data, tmp_path / name, dataloader_num_workers=workers, **more)
        assert losses(output) == losses(deep)
        assert same(output, deep)


def test_a_trained_tower_is_run_with_its_adapters(data: Path, tmp_path: Path) -> None:
    output = run(data, tmp_path / "run", target_modules="vision", max_steps=2)
    found = tensors(output)
    assert all("vision_embedding.0" in name for name in found)
    assert any(value.abs().max() > 0 for name, value in found.items() if "lora_B" in name)


# -- batches and updates ---------------------------------------------------------------------------


def test_packed_rows_are_trained_with_the_same_first_loss(data: Path, tmp_path: Path) -> None:
    """All conversations in one row, and all in one padded batch."""
    more = {"val_data_path": None, "max_steps": 2, "lora_dropout": 0}
    packed = run(data, tmp_path / "packed", packing="true", max_seq_length=2000, **more)
    padded = run(data, tmp_path / "padded", per_device_train_batch_size=5, **more)
    for a, b in zip(rows(packed), rows(padded), strict=True):
        assert float(a["loss"]) == pytest.approx(float(b["loss"]), rel=1e-5)


def test_batches_of_similar_length_see_every_conversation(data: Path, tmp_path: Path) -> None:
    more = {"val_data_path": None, "num_train_epochs": 1}
    by_length = run(data, tmp_path / "run", train_sampling_strategy="group_by_length", **more)
    again = run(data, tmp_path / "again", group_by_length="true", **more)
    assert len(losses(by_length)) == 3
    assert losses(by_length) == losses(again)


def test_the_learning_rate_is_that_of_transformers(data: Path, tmp_path: Path) -> None:
    """Half of the run is warm-up, which no other program's tenth cuts off."""
    output = run(
        data, tmp_path / "run", val_data_path=None, warmup_ratio=0.5, lr_scheduler_type="cosine",
        num_train_epochs=None, max_steps=4,
    )  # fmt: skip
    found = [float(row["lr"]) for row in rows(output)]
    cosine = [0.5 * (1 + np.cos(np.pi * t)) for t in (0, 0.5)]
    assert found == pytest.approx([0.0, 0.5e-2, *(1e-2 * share for share in cosine)], rel=1e-6)


def test_a_batch_that_is_not_full_may_be_left_out(data: Path, tmp_path: Path) -> None:
    more = {"val_data_path": None, "num_train_epochs": 1}
    assert len(losses(run(data, tmp_path / "run", dataloader_drop_last="true", **more))) == 2


@pytest.mark.fault("R08", "R45")
def test_accumulated_batches_equal_one_of_their_size(data: Path, tmp_path: Path) -> None:
    """Answers differ in length: the mean is over tokens, not over batches."""
    same_size = {"lora_dropout": 0, "val_data_path": None, "num_train_epochs": 1}
    large = run(data, tmp_path / "large", per_device_train_batch_size=4, **same_size)
    small = run(
        data, tmp_path / "small", per_device_train_batch_size=1, gradient_accumulation_steps=4,
        **same_size,
    )  # fmt: skip
    found = [rows(output) for output in (large, small)]
    assert [len(one) for one in found] == [2, 2]
    for a, b in zip(*found, strict=True):
        for name in ("loss", "grad_norm"):
            assert float(a[name]) == pytest.approx(float(b[name]), rel=2e-4), name


def test_conversations_without_pictures_train(data: Path, tmp_path: Path) -> None:
    path = write_records(tmp_path / "text.json", [record("Who?", "He.", id=str(n)) for n in "ab"])
    output = run(data, tmp_path / "run", data_path=path, val_data_path=None, max_steps=2)
    assert float(rows(output)[-1]["loss"]) < float(rows(output)[0]["loss"])


# -- continuing ------------------------------------------------------------------------------------


def test_a_run_goes_on_from_an_earlier_checkpoint(trained: Path, tmp_path: Path) -> None:
    """As scripts of transformers name it, without `state`, and in a folder that was moved."""
    moved = Path(shutil.copytree(trained, tmp_path / "moved" / "run"))
    assert sorted(path.name for path in (moved / "state").iterdir())[-1] == "checkpoint-6"
    first = sorted((moved / "state").iterdir(), key=lambda path: int(path.name.split("-")[1]))[0]
    (moved / "training_summary.json").unlink()
    words = ["--resume_from_checkpoint", str(moved / first.name), "--output_dir", str(moved)]
    assert main(words) == 0
    assert losses(moved) == losses(trained)
    assert same(moved, trained)


def test_a_checkpoint_that_is_gone_is_told_with_those_that_are_there(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--resume", str(trained / "checkpoint-99")]) == 2
    said = capsys.readouterr().err
    assert "checkpoint-99 is not there" in said
    assert "checkpoint-6" in said
    assert main(["--resume", str(trained.parent)]) == 2
    assert "no run of isaac-lora train" in capsys.readouterr().err


def test_true_continues_the_run_in_the_output_folder(
    trained: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = tiny_isaac_run.command(data, trained, cache_dir=None)
    assert main([*words, "--resume_from_checkpoint", "True"]) == 0
    assert "already finished" in capsys.readouterr().out


@pytest.mark.fault("K31")
def test_other_data_or_settings_do_not_continue_a_run(
    trained: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tiny_isaac_run.write_conversations(tmp_path / "other", train=4)
    words = ["--resume", str(trained), "--data_path", str(other / "train.json")]
    assert main([*words, "--image_folder", str(other / "images")]) == 2
    assert "training data" in capsys.readouterr().err
    assert main(["--resume", str(trained), "--lora_dropout", "0.5"]) == 2
    assert "lora_dropout" in capsys.readouterr().err


def test_a_warm_start_says_and_keeps_the_figures_of_its_adapter(
    trained: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = {"lora_r": 3, "lora_alpha": 9, "max_steps": 1, "val_data_path": None}
    output = run(data, tmp_path / "run", adapter=trained, **more)
    said = capsys.readouterr().out
    assert "adapted layers: decoder 14, projector 2" in said
    assert f"starting from {trained}: its rank 2, alpha 4" in said
    assert "lora_r: 2\n" in (output / "config.yaml").read_text()
    assert read_adapter(output).r == 2
    assert main(["--resume", str(output), "--max_steps", "2"]) == 0
    assert len(rows(output)) == 2


@pytest.mark.parametrize("of_adapter", ["q_proj,vision", None])
def test_the_settings_of_a_warm_start_are_those_of_its_adapter(
    data: Path, tmp_path: Path, of_adapter: str | None
) -> None:
    """Another run with them, without the adapter, has the same layers and trains the same."""
    short = {"max_steps": 1, "val_data_path": None}
    bias = "lora_only" if of_adapter else "none"
    first = run(data, tmp_path / "a", target_modules=of_adapter, lora_bias=bias, **short)
    other = {"adapter": first, "target_modules": "v_proj", "lora_bias": "all"}
    warm = run(data, tmp_path / "b", **other, **short)
    kept = yaml.safe_load((warm / "config.yaml").read_text())
    assert kept["lora_bias"] == bias
    assert (kept["target_modules"] is None) == (of_adapter is None)
    output = tmp_path / "c"
    words = ["--config", str(warm / "config.yaml"), "--adapter", "null"]
    assert main([*words, "--output_dir", str(output)]) == 0
    assert tensors(output).keys() == tensors(warm).keys() == tensors(first).keys()
    assert any(name.endswith(".bias") for name in tensors(warm)) == (of_adapter is not None)


# -- what is refused before the weights are read ---------------------------------------------------


@pytest.mark.fault("C23")
def test_a_run_never_replaces_what_is_there(
    trained: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(path.name for path in (data / "isaac_model").iterdir())
    assert "is a model folder" in refused(capsys, data, data / "isaac_model")
    assert sorted(path.name for path in (data / "isaac_model").iterdir()) == before
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "adapter_model.safetensors").write_bytes(b"mine")
    assert "no run of isaac-lora" in refused(capsys, data, foreign)
    assert main(tiny_isaac_run.command(data, trained)) == 2
    assert "a finished run" in capsys.readouterr().err


def test_all_problems_are_told_together(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(
        capsys, data, tmp_path / "run", data_path=tmp_path / "no.json", model_path=tmp_path / "no",
        lr_scheduler_kwargs='{"cycles": 2}', lr_scheduler_type="cosine_with_restarts",
    )  # fmt: skip
    for part in ("no.json: no such file", "no checkpoint", "lr_scheduler_kwargs"):
        assert part in said, said


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"fp16": "true"}, "--fp16 True needs a GPU, and this run is on the CPU: leave it out"),
        ({"image_folder": "nowhere"}, "nowhere is not there"),
    ],
)
def test_a_mistake_of_the_command_line_is_one_line(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: Any, said: str
) -> None:
    found = refused(capsys, data, tmp_path / "run", **more)
    assert said in found
    assert found.count("\n") == 1


@pytest.mark.parametrize("dry", ["true", "false"])
def test_an_adapter_of_other_depth_is_told_before_weights_are_read(
    deep: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    dry: str,
) -> None:
    monkeypatch.setattr(official, "load_model", lambda *_: pytest.fail("weights were read"))
    more = tiny_isaac_run.depth(data) | {"depth_alpha": 7, "adapter": deep, "dry_run": dry}
    assert "depth_alpha: trained with 100, used with 7" in refused(
        capsys, data, tmp_path / "run", **more
    )


@pytest.mark.fault("C29")
def test_a_depth_model_that_is_not_used_is_a_warning(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(data, tmp_path / "run", depth_checkpoint_path=data / "depth", dry_run=True)
    assert (
        "warning: --depth_checkpoint_path is given, but without --use_depth True images have no "
        "depth\n"
    ) in capsys.readouterr().out


@pytest.mark.fault("C23")
def test_files_that_no_run_has_written_stay(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    for name in ("README.md", "config.yaml"):
        (mine / name).write_text("mine")
    for words in ([], ["--overwrite"]):
        assert main([*tiny_isaac_run.command(data, mine), *words]) == 2
        said = capsys.readouterr().err
        assert "holds README.md, config.yaml, which no run of isaac-lora has written" in said
        assert {path.read_text() for path in mine.iterdir()} == {"mine"}
    before = sorted((data / "images").iterdir())
    said = refused(capsys, data, data / "images")
    assert f"{before[2].name} and {len(before) - 3} more, which no run of isaac-lora" in said
    assert sorted((data / "images").iterdir()) == before


def test_what_may_be_there_before_a_run_is_no_reason_to_refuse_it(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (folder / "cache").mkdir(parents=True)
    for name in ("slurm-7.out", "job.log", ".hidden", "bad_samples.jsonl"):
        (folder / name).touch()
    refuse_existing(Config(model_path="m", data_path="d", output_dir=str(folder)))
    (folder / "photo.jpg").touch()
    with pytest.raises(ConfigError, match=r"holds photo\.jpg, which no run"):
        refuse_existing(Config(model_path="m", data_path="d", output_dir=str(folder)))


@pytest.mark.fault("R37")
def test_a_full_disk_is_told_before_weights_are_read(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    monkeypatch.setattr(official, "load_model", lambda *_: pytest.fail("weights were read"))
    assert "the run will write up to" in refused(capsys, data, tmp_path / "run")


def test_a_setting_of_transformers_is_named_by_its_own_flag(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "--tf32 is for NVIDIA GPUs" in refused(capsys, data, tmp_path / "run", tf32="true")


@pytest.mark.fault("R09")
def test_no_full_batch_is_an_error(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = {"per_device_train_batch_size": 8, "dataloader_drop_last": "true"}
    assert "0 batches per epoch" in refused(capsys, data, tmp_path / "run", **more)


def test_a_depth_model_that_is_missing_is_an_error(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = tiny_isaac_run.depth(data) | {"depth_checkpoint_path": tmp_path / "vitl.pth"}
    assert "vitl.pth" in refused(capsys, data, tmp_path / "run", **more)
    said = refused(capsys, data, tmp_path / "run", use_depth="true")
    assert "nothing is trained without the depth" in said


def test_a_picture_that_changes_during_the_run_ends_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tiny_isaac_run.write_all(tmp_path / "data", train=2, val=0)
    output = run(root, tmp_path / "run", val_data_path=None, num_train_epochs=1, save_steps=1)
    for path in (root / "images").iterdir():
        write_picture(path, 20, 20, seed=99)
    words = ["--resume", str(output), "--num_train_epochs", "2"]
    assert main(words) == 2
    assert "training data" in capsys.readouterr().err


# -- the guide's commands --------------------------------------------------------------------------


@pytest.mark.slow
def test_the_script_of_the_guide_trains_from_a_json_file(data: Path, tmp_path: Path) -> None:
    found = tiny_isaac_run.settings(data, tmp_path / "run", max_steps=1, val_data_path=None)
    found |= {"use_cpu": True, "tensorboard": False}
    plain = {name: str(v) if isinstance(v, Path) else v for name, v in found.items()}
    (tmp_path / "config.json").write_text(json.dumps(plain))
    for words in ([str(tmp_path / "config.json")], ["--help"]):
        script = [sys.executable, "src/train_lora.py", *words]
        done = subprocess.run(script, cwd=PACKAGE, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()
