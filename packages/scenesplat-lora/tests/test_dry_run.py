"""`train --dry_run`: what a run takes is known before the weights are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_scenes
import torch

from lora_core.config import parse
from lora_core.disk import folder_bytes
from lora_core.memory import saved_bytes, simulate
from scenesplat_lora import data, dry_run, memory, model, objective
from scenesplat_lora.config import Config
from scenesplat_lora.train import main

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    tiny_scenes.write_base(folder / "base.pth")
    tiny_scenes.write_base(folder / "segmentation.pth", classes=5)
    tiny_scenes.write_scenes(folder / "data")
    return folder


def command(files: Path, output: Path, base: str = "base.pth", **given: Any) -> list[str]:
    return tiny_scenes.command(files / base, files / "data", output, **given)


@pytest.mark.fault("C43")
@pytest.mark.parametrize(
    "given",
    [{}, {"lora__target_modules": "mlp", "lora__enable_prompt": "true"},
     {"model__criteria": '[{"type": "AggregatedContrastiveLoss"}, {"type": "L2Loss"}]'},
     {"base": "segmentation.pth"}],
    ids=["attention", "mlp and prompts", "contrastive", "segmentation"],
)  # fmt: skip
def test_the_estimate_without_values_is_what_a_step_keeps(files: Path, given: Any) -> None:
    """Of the very batch: its neighbours and patches are found as in a run."""
    cfg = parse(Config, command(files, Path("unused"), lora__lora_dropout=0, **given), prog="t")
    needs = objective.needs_of(model.skeleton(cfg), None)
    loss = objective.loss_of(cfg, needs)
    batch = data.largest_batch(data.load(cfg, needs), 2)
    net = model.adapted(model.build(cfg), cfg).train()
    torch.manual_seed(0)  # the curves are permuted
    kept, _ = saved_bytes(lambda: loss(net, batch), [*net.parameters(), *net.buffers()])
    torch.manual_seed(0)
    step = simulate(model.adapted(model.skeleton(cfg), cfg).train(), loss, batch)
    assert step.saved == kept
    assert step.peak > kept


@pytest.mark.fault("C43")
def test_a_dry_run_tells_what_is_trained_and_what_it_takes_and_writes_nothing(
    files: Path, tmp_path: Path, capsys: Capture
) -> None:
    run = tmp_path / "run"
    assert main([*command(files, run, batch_size=3), "--dry_run"]) == 0
    out = capsys.readouterr().out
    for part in (
        "room_0", "Trainable parameters:", "voxels of train/room_",
        "memory of a step on a CPU  fp32", "activations", "training checkpoints",
        "no results written",
    ):  # fmt: skip
        assert part in out, part
    assert not run.exists()


def test_an_adapter_to_go_on_from_is_looked_at_too(
    files: Path, tmp_path: Path, capsys: Capture
) -> None:
    run = tmp_path / "run"
    assert main(command(files, run, epoch=1)) == 0
    adapter = run / "model" / "lora_epoch_1.pth"
    capsys.readouterr()
    assert main([*command(files, tmp_path / "next", adapter=adapter), "--dry_run"]) == 0
    assert f"starting from {adapter}" in capsys.readouterr().out
    assert not (tmp_path / "next").exists()


@pytest.mark.fault("R37")
def test_a_run_writes_no_more_than_was_foreseen(files: Path, tmp_path: Path) -> None:
    given = {"keep_last": 1, "lora_training__merge_on_end": "true"}
    argv = command(files, tmp_path, **given)
    assert main(argv) == 0
    cfg = parse(Config, argv, prog="t")
    net = model.adapted(model.build(cfg), cfg)
    foreseen = memory.disk_use(net, cfg, updates=2, validated=True)
    written = folder_bytes(tmp_path)
    assert written <= sum(foreseen.values()) <= 8 * written


def test_the_precisions_are_those_that_a_run_may_have() -> None:
    def found(**given: Any) -> list[str]:
        return dry_run.precisions(Config(**given))

    assert found() == found(enable_amp=True, device="cpu") == ["fp32"]
    assert found(enable_amp=True) == ["bf16", "fp32"]
    assert found(enable_amp=True, amp_dtype="float16", device="cuda") == ["fp16"]
