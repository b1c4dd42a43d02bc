"""`isaac-lora train --dry_run`: the data, the layers, the memory and the files, without weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_isaac_run

from isaac_lora import data, dry_run, memory, model, objective
from isaac_lora.config import Config
from isaac_lora.frozen_features import FrozenFeatures
from isaac_lora.processing import IsaacProcessor
from lora_core.errors import DataError
from lora_core.memory import estimate, saved_bytes

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_isaac_run.write_all(tmp_path_factory.mktemp("data"))


def config(root: Path, output: Path, **given: object) -> Config:
    settings = tiny_isaac_run.settings(root, output, **given)
    plain = {name: str(v) if isinstance(v, Path) else v for name, v in settings.items()}
    return Config(**plain | {"tensorboard": False, "use_cpu": True, "dry_run": True})


def content(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}


@pytest.mark.fault("C43")
@pytest.mark.parametrize("depth", [False, True])
def test_a_dry_run_says_what_a_run_would_take_and_writes_nothing(
    root: Path, tmp_path: Path, capsys: Capture, depth: bool
) -> None:
    before = content(root)
    given = tiny_isaac_run.depth(root) | {"use_depth": True} if depth else {}
    assert dry_run.run(config(root, tmp_path / "run", **given)) == 0
    said = capsys.readouterr().out
    for part in (
        "train              5",
        "adapted layers: decoder 14, projector 2",
        "largest batch: 2 x ",
        "memory of a step on a CPU  fp32",
        "training checkpoints",
        "dry run: settings and data are fine",
    ):
        assert part in said
    assert content(root) == before
    assert not list(tmp_path.iterdir())


def test_the_precision_of_a_gpu_is_estimated_without_one(
    root: Path, tmp_path: Path, capsys: Capture
) -> None:
    cfg = config(root, tmp_path / "run")
    cfg.use_cpu = False
    assert dry_run.run(cfg) == 0
    assert "memory of a step on a GPU or CPU  bf16" in capsys.readouterr().out


def test_less_is_foreseen_where_activations_are_computed_again(
    root: Path, tmp_path: Path, capsys: Capture
) -> None:
    found = []
    for again in (None, True):
        assert dry_run.run(config(root, tmp_path / "run", gradient_checkpointing=again)) == 0
        lines = capsys.readouterr().out.splitlines()
        number, unit = next(x.split()[-2:] for x in lines if x.startswith("activations"))
        found.append(float(number) * {"kB": 1e3, "MB": 1e6}[unit])
    assert found[1] < 0.7 * found[0]


@pytest.mark.parametrize("packing", [False, True])
def test_the_estimate_is_what_a_step_takes(root: Path, tmp_path: Path, packing: bool) -> None:
    cfg = config(root, tmp_path / "run", packing=packing, max_seq_length=200)
    processor = IsaacProcessor.from_pretrained(cfg.model_path)
    rows = data.training_rows(cfg, data.load(cfg, processor))
    batch = memory.largest_batch(cfg, rows, processor)(2)
    loss = objective.loss_of(cfg, FrozenFeatures())
    found = estimate(model.adapted(model.skeleton(cfg), cfg).train(), loss, batch)
    net = model.adapted(model.build(cfg), cfg).train()
    parameters = [*net.parameters(), *net.buffers()]
    kept, _ = saved_bytes(lambda: loss(net, batch)[0], parameters)
    assert found.activations == pytest.approx(kept, rel=0.02)
    assert found.adapters == 4 * sum(p.numel() for p in net.parameters() if p.requires_grad)


@pytest.mark.fault("C43")
def test_faults_in_the_data_are_told(root: Path, tmp_path: Path) -> None:
    faulty = tiny_isaac_run.write_conversations(tmp_path / "data")
    (faulty / "images" / "train1_0.png").unlink()
    cfg = config(root, tmp_path / "run", data_path=faulty / "train.json",
                 image_folder=faulty / "images", val_data_path=None)  # fmt: skip
    with pytest.raises(DataError, match="image not found"):
        dry_run.run(cfg)
    assert not (tmp_path / "run").exists()
