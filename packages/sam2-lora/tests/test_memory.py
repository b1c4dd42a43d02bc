"""A run says what it takes before it takes it, and what helps when that is too much."""

from __future__ import annotations

import csv
import os
import shutil
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_core import disk
from lora_core.config import parse
from lora_core.memory import estimate, saved_bytes
from lora_core.testing import hostile
from lora_core.testing.no_device import no_device
from sam2_lora import __main__, data, demo, losses, memory, model, placement
from sam2_lora.config import Config
from sam2_lora.train import settings

SIDE = 64


@pytest.fixture(scope="module")
def demo_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's photographs and the tiny base."""
    folder = tmp_path_factory.mktemp("demo")
    demo.write(folder)
    return folder


def configuration(folder: Path, **settings: object) -> Config:
    words = {
        "data_root": str(folder / "photos"),
        "checkpoint": str(folder / "sam2_demo.safetensors"),
        "image_size": str(SIDE),
        "num_workers": 0,
        "tensorboard": False,
    }
    return Config(**(words | settings))  # type: ignore[arg-type]


def command(folder: Path, output: Path, *words: str) -> list[str]:
    return [
        "--data_root", str(folder / "photos"),
        "--checkpoint", str(folder / "sam2_demo.safetensors"),
        "--image_size", str(SIDE), "--num_workers", "0", "--tensorboard", "false",
        "--output_dir", str(output / "runs"), "--logs_dir", str(output / "logs"), *words,
    ]  # fmt: skip


# -- the estimate ----------------------------------------------------------------------------------


@pytest.mark.fault("C43")
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"precision": "bf16"},
        {"gradient_checkpointing": True},
        {"targets": "decoder+heads", "prompts": "box", "lora_rank": 1},
        {"correction_clicks": 2, "lora_dropout": 0.0},
        {"loss": "legacy", "lora_rank": 2},
    ],
    ids=str,
)
def test_the_estimate_of_activations_is_what_the_real_step_keeps(
    demo_data: Path, settings: dict[str, object]
) -> None:
    half = settings.get("precision") == "bf16"
    cfg = configuration(demo_data, batch_size=2, **settings)
    batch = memory.largest_batch(data.load(cfg).train, 2)

    def loss(network: torch.nn.Module, inputs: dict[str, object]) -> tuple[torch.Tensor, object]:
        return losses.loss(network, inputs, cfg)  # type: ignore[arg-type]

    real = model.build(cfg)
    placement.adapt(real, cfg)
    real.train()
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        known = [*real.parameters(), *real.buffers()]
        kept, _ = saved_bytes(lambda: loss(real, batch), known)
    shape = model.skeleton(cfg)
    placement.adapt(shape, cfg)
    found = estimate(shape.train(), loss, batch, "bf16" if half else "fp32")
    assert found.activations == pytest.approx(kept, rel=0.03 if half else 1e-9)
    assert found.weights + found.adapters == sum(t.nbytes for t in known)


@pytest.mark.fault("R13")
def test_the_largest_samples_are_those_with_most_objects(demo_data: Path) -> None:
    train = data.load(configuration(demo_data)).train
    numbers = memory.largest(train, 3)
    counts = [len(train[number].targets) for number in range(len(train))]
    assert min(counts[number] for number in numbers) == sorted(counts)[-3]
    unknown = data.TrainSet(train.records, train.cfg)
    assert memory.largest(unknown, 3) == numbers
    batch = memory.largest_batch(train, 3)
    assert len(batch["buckets"]) == 1, "clicks, which take more than boxes"
    assert losses.object_count(batch) == sum(counts[number] for number in numbers)
    assert len(memory.largest_batch(train, 30)["keys"]) == 30, "more than there are pictures"


def test_advice_names_what_is_left_to_do_and_best_first(demo_data: Path) -> None:
    cfg = configuration(demo_data, image_size="256x1600", batch_size=4, correction_clicks=3)
    flags = [remedy.split()[0] for remedy in memory.remedies(cfg)]
    assert flags == [
        "--gradient_checkpointing", "--targets", "--max_objects", "--correction_clicks",
        "--auto_batch",
    ]  # fmt: skip
    cfg = replace(cfg, image_size="1024", gradient_checkpointing=True, targets="decoder")
    assert memory.remedies(cfg)[:2] == ["--image_size 768", "--max_objects 4"]
    assert not any("rank" in remedy for remedy in memory.remedies(cfg))
    for remedy in memory.remedies(cfg):  # every one is a flag that the command takes
        parse(Config, remedy.partition(" (")[0].split(), prog="test")
    done = {"max_objects": 1, "correction_clicks": 0, "batch_size": 1, "image_size": "256"}
    assert memory.remedies(replace(cfg, **done)) == []


# -- dry run ---------------------------------------------------------------------------------------


def files(*folders: Path) -> dict[Path, int]:
    every = [path for folder in folders for path in folder.rglob("*")]
    return {path: path.stat().st_mtime_ns for path in every}


@pytest.mark.fault("C43")
@pytest.mark.parametrize("kind", ["published", "demo"])
def test_a_dry_run_prints_what_a_run_takes_and_touches_nothing(
    demo_data: Path,
    tiny_checkpoint: Path,
    kind: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    before = files(tmp_path, demo_data, tiny_checkpoint.parent)
    words = ["--dry_run", "--batch_size", "2", "--precision", "bf16"]
    if kind == "published":
        words += ["--checkpoint", str(tiny_checkpoint)]
    with no_device():
        assert __main__.main(["train", *command(demo_data, tmp_path, *words)]) == 0
    assert files(tmp_path, demo_data, tiny_checkpoint.parent) == before
    said = capsys.readouterr().out
    for part in (
        "adapted modules", "parameters train", "weights", "activations", "moments", "bf16",
        "training checkpoints", "merged models", f"free at {tmp_path / 'runs'}", "dry run:",
    ):  # fmt: skip
        assert part in said
    assert "fp32" not in said, "the precision is given"
    if kind == "published":
        assert "vision_encoder.backbone.blocks.{0..11}.attn.{qkv,proj} x 24" in said


@pytest.mark.fault("C43")
@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda root: (root / "photos" / "train").rename(root / "gone"), "training split"),
        (lambda root: (root / "sam2_demo.safetensors").write_bytes(b"<html>"), "web page"),
        (lambda root: (root / "sam2_demo.json").unlink(), "sam2_demo.json"),
    ],
    ids=["no pictures", "no checkpoint", "no config"],
)
def test_a_dry_run_finds_what_is_wrong(
    demo_data: Path,
    spoil: Callable[[Path], object],
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(demo_data, tmp_path / "data")
    spoil(tmp_path / "data")
    argv = ["train", *command(tmp_path / "data", tmp_path / "out", "--dry_run")]
    assert __main__.main(argv) == 2
    message = capsys.readouterr().err
    assert said in message
    assert "Traceback" not in message
    assert not (tmp_path / "out").exists()


@pytest.mark.fault("C43")
def test_a_dry_run_checks_the_trainers_settings_and_an_adapter(
    demo_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--dry_run", "--trainer.optimm", "sgd")
    assert __main__.main(["train", *command(demo_data, tmp_path, *words)]) == 2
    assert "--trainer.optimm" in capsys.readouterr().err
    cfg = configuration(demo_data, lora_rank=3)
    network = model.build(cfg)
    placement.adapt(network, cfg)
    adapter = model.save_adapter(network, tmp_path / "adapter")
    words = ("--dry_run", "--adapter", str(adapter))
    assert __main__.main(["train", *command(demo_data, tmp_path, *words)]) == 0
    assert "46 adapted modules" in capsys.readouterr().out


@pytest.mark.fault("R37")
def test_a_run_without_room_on_the_disk_stops_before_it_makes_a_folder(
    demo_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    used = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: used._replace(free=10**6))
    assert __main__.main(["train", *command(demo_data, tmp_path, "--steps", "1")]) == 2
    message = capsys.readouterr().err
    for part in ("1.00 MB free", "the run will write up to", "merged models", "make room"):
        assert part in message
    assert not (tmp_path / "runs").exists()


# -- a smaller batch -------------------------------------------------------------------------------


@pytest.mark.fault("R13")
def test_auto_batch_is_recorded_and_the_run_is_the_one_with_these_values(
    demo_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = losses.loss

    def limited(network: object, batch: dict[str, list[str]], cfg: Config) -> object:
        if len(batch["keys"]) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")
        return whole(network, batch, cfg)  # type: ignore[arg-type]

    monkeypatch.setattr(losses, "loss", limited)
    shutil.copytree(demo_data, tmp_path / "data", ignore=shutil.ignore_patterns("test"))
    demo_data = tmp_path / "data"
    words = ("--steps", "2", "--eval_steps", "9", "--log_steps", "1", "--max_val_images", "1")
    found, asked = tmp_path / "found", tmp_path / "asked"
    first = command(demo_data, found, *words, "--batch_size", "2", "--auto_batch")
    assert __main__.main(["train", *first]) == 0
    argv = command(demo_data, asked, *words, "--gradient_accumulation_steps", "2")
    assert __main__.main(["train", *argv]) == 0
    (run,) = (found / "runs").glob("sam2_*")
    cfg = parse(Config, ["--config", str(run / "config.yaml")], prog="test")
    assert (cfg.batch_size, cfg.gradient_accumulation_steps, cfg.auto_batch) == (1, 2, True)
    (run / "training_summary.json").rename(run / "aside")
    latest, same = settings([*first, "--resume", "latest"])  # as torchrun starts it again
    assert same is not None
    assert same.folder == run
    assert latest == replace(cfg, resume=str(run))
    assert settings([*first, "--resume", "latest", "--lora_rank", "4"])[1] is None
    (run / "aside").rename(run / "training_summary.json")
    for folder in (found, asked):  # a resumed run keeps what was found
        (run,) = (folder / "runs").glob("sam2_*")
        assert __main__.main(["train", "--resume", str(run), "--steps", "3"]) == 0
    logs = [sorted((folder / "logs").glob("*.csv"))[0] for folder in (found, asked)]
    one, other = (list(csv.DictReader(path.open(newline=""))) for path in logs)
    for row in [*one, *other]:
        del row["seconds"]
    assert one == other


@pytest.mark.fault("R13", "R14")
@pytest.mark.parametrize("phase", ["training", "validation", "the test at the end"])
def test_running_out_of_memory_is_told_with_pictures_and_objects(
    demo_data: Path,
    phase: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = losses.loss
    calls: list[int] = []

    def fails(*arguments: object, **settings: object) -> object:
        calls.append(1)
        if phase == "training" and len(calls) < 2:
            return whole(*arguments, **settings)  # type: ignore[arg-type]
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")

    names = {
        "training": "sam2_lora.losses.loss",
        "validation": "sam2_lora.metrics.evaluate",
        "the test at the end": "sam2_lora.train.score_test",
    }
    monkeypatch.setattr(names[phase], fails)
    argv = command(demo_data, tmp_path, "--steps", "2", "--batch_size", "2")
    assert __main__.main(["train", *argv]) == 2
    message = capsys.readouterr().err
    assert f"out of memory in {phase}" in message
    if phase == "training":
        assert f"2 pictures of {SIDE}x{SIDE} with" in message
    for part in ("1.00 GiB more", "free", "--gradient_checkpointing", "A lower rank does not"):
        assert part in message
    assert message.index("--gradient_checkpointing") < message.index("--auto_batch")
    assert "Traceback" not in message


# -- a long run ------------------------------------------------------------------------------------


def resident() -> int:
    """Bytes of memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.fault("H32")
def test_names_of_pictures_are_one_line_of_a_message() -> None:
    text = memory.describe({"keys": [hostile.CONTROL_NAME], "buckets": []}, Config())
    assert not set(text) & set("\x1b\x07\r\n")


@pytest.mark.slow
@pytest.mark.fault("R15")
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
def test_memory_stays_flat_over_a_thousand_steps(demo_data: Path, tmp_path: Path) -> None:
    """Validation, pictures, checkpoints, merged files, log, dropout, flips and clicks: all is on.

    The encoder is left as it is, which halves the time.
    """
    words = (
        "--steps", "1000", "--batch_size", "1", "--eval_steps", "100", "--log_steps", "10",
        "--max_val_images", "2", "--correction_clicks", "1", "--max_objects", "1",
        "--tensorboard", "true", "--targets", "decoder", "--patience", "100",
    )  # fmt: skip
    seen: list[int] = []
    whole = losses.loss

    def watched(*arguments: Any) -> Any:
        seen.append(resident())
        return whole(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(losses, "loss", watched)
        assert __main__.main(["train", *command(demo_data, tmp_path, *words)]) == 0
    assert len(seen) >= 1000
    early, late = (statistics.median(seen[part]) for part in (slice(200, 300), slice(-100, None)))
    assert late < 1.05 * early, f"{early / 1e6:.0f} MB after 250 steps, {late / 1e6:.0f} MB at last"


# -- find-lr ---------------------------------------------------------------------------------------


def test_find_lr_suggests_a_rate_and_draws_it(
    demo_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--ramp_dir", str(tmp_path / "ramp"), "--ramp_steps", "30", "--batch_size", "2")
    argv = ["find-lr", *command(demo_data, tmp_path, *words)]
    assert __main__.main(argv) == 0
    said = capsys.readouterr().out
    rate = float(said.strip().rpartition("--learning_rate ")[2])
    assert 1e-4 <= rate <= 3e-3
    names = sorted(path.name for path in tmp_path.rglob("*") if path.is_file())
    assert names == ["find_lr.csv", "find_lr.png"], "no run, no checkpoint"
    first = (tmp_path / "ramp" / "find_lr.csv").read_bytes()
    assert __main__.main(argv) == 0
    assert (tmp_path / "ramp" / "find_lr.csv").read_bytes() == first
