"""What a run takes: the largest batch, what helps when memory runs out, and files on the disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_isaac_run
import torch
from torch import Tensor, nn

from isaac_lora import data, memory, model, objective
from isaac_lora.config import Config
from isaac_lora.frozen_features import features_of
from isaac_lora.processing import IsaacProcessor
from lora_core.errors import ConfigError


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_isaac_run.write_all(tmp_path_factory.mktemp("data"))


def config(root: Path, **given: object) -> Config:
    settings = tiny_isaac_run.settings(root, root / "run", **given)
    plain = {name: str(v) if isinstance(v, Path) else v for name, v in settings.items()}
    return Config(**plain | {"tensorboard": False, "use_cpu": True})


# -- the largest batch -----------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [False, True])
@pytest.mark.parametrize("packing", [False, True])
def test_the_largest_batch_has_the_shapes_of_a_real_one(
    root: Path, depth: bool, packing: bool
) -> None:
    given = tiny_isaac_run.depth(root) | {"use_depth": True} if depth else {}
    cfg = config(root, packing=packing, max_seq_length=200, **given)
    processor = IsaacProcessor.from_pretrained(cfg.model_path)
    rows = data.training_rows(cfg, data.load(cfg, processor))
    made = memory.largest_batch(cfg, rows, processor)(2)
    longest = sorted(rows, key=lambda row: -row.tokens)[:2]
    depths = model.depths_of(cfg)
    samples = data.TrainSet(longest, processor, 0, None, depths)
    real = data.collate([samples[0], samples[1]], processor, cfg.packing)
    assert made["keys"] == real["keys"]
    tensors = {name for name, value in real.items() if isinstance(value, Tensor)}
    assert {name: made[name].shape for name in tensors} == {n: real[n].shape for n in tensors}
    if depth:
        net = model.adapted(model.build(cfg, torch.float32, depths), cfg)
        features = features_of(cfg, net, processor.rules, depths, "fp32")
        ours, theirs = features.inputs(made), features.inputs(real)
        assert ours["depth_encoding"].shape == theirs["depth_encoding"].shape
        loss, _ = objective.loss_of(cfg, features)(net, made)
        assert torch.isfinite(loss)


def test_a_batch_is_described(root: Path) -> None:
    cfg = config(root)
    processor = IsaacProcessor.from_pretrained(cfg.model_path)
    rows = data.training_rows(cfg, data.load(cfg, processor))
    batch = memory.largest_batch(cfg, rows, processor)(5)
    said = memory.describe(batch)
    length = batch["input_ids"].shape[1]
    assert said.startswith(f"5 x {length} tokens, {len(batch['grids'])} pictures, of train_")
    assert said.endswith(", ...")


# -- when memory runs out --------------------------------------------------------------------------


class Small(nn.Module):
    """A network on a device that holds so many rows."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))


def loss_that_holds(most: int) -> Any:
    def loss(net: Small, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        if len(batch["input_ids"]) > most:
            raise torch.OutOfMemoryError("Tried to allocate 3.00 GiB")
        return net.weight.sum(), {}

    return loss


def made(count: int) -> dict[str, Any]:
    return {"input_ids": torch.zeros(count, 7, dtype=torch.long), "keys": ["a"] * count}


def test_auto_batch_takes_a_part_and_accumulates(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = config(root, per_device_train_batch_size=8, auto_batch=True)
    net: Any = Small()
    fitted = memory.fitted(net, loss_that_holds(3), made, cfg, "fp32")
    assert (fitted.per_device_train_batch_size, fitted.gradient_accumulation_steps) == (2, 4)
    said = capsys.readouterr().out
    assert "--per_device_train_batch_size 2 and --gradient_accumulation_steps 4 make" in said
    with pytest.raises(ConfigError) as told:
        memory.fitted(net, loss_that_holds(0), made, cfg, "fp32")
    assert "1 x 7 tokens, 0 pictures, of a" in str(told.value)
    assert "1. --gradient_checkpointing True" in str(told.value)


def test_a_resumed_run_keeps_its_batch(root: Path) -> None:
    cfg = config(root, auto_batch=True, resume=str(root / "run"))
    net: Any = Small()
    fitted = memory.fitted(net, loss_that_holds(1), made, cfg, "fp32")
    assert (fitted.per_device_train_batch_size, fitted.gradient_accumulation_steps) == (2, 1)


@pytest.mark.parametrize(
    ("given", "missing"),
    [
        ({"gradient_checkpointing": True}, "--gradient_checkpointing"),
        ({"per_device_train_batch_size": 1}, "--auto_batch"),
        ({"bf16": True}, "--bf16"),
        ({}, "--bf16"),  # on a CPU it would not help
    ],
)
def test_advice_is_what_is_not_done_yet(root: Path, given: dict[str, Any], missing: str) -> None:
    remedies = memory.advice(config(root, **given)).remedies
    assert remedies
    assert not any(remedy.startswith(missing) for remedy in remedies)
    assert any("--max_seq_length" in remedy for remedy in remedies)


# -- the disk --------------------------------------------------------------------------------------


def test_the_disk_is_enough_for_what_a_run_writes(root: Path, tmp_path: Path) -> None:
    cfg = config(root, keep_last=2, save_steps=2, logging_steps=1, eval_steps=3)
    net = model.adapted(model.build(cfg), cfg)
    use = memory.disk_use(net, cfg, 6, True)
    adapter = 4 * sum(p.numel() for p in net.parameters() if p.requires_grad)
    assert use["adapters"] == 2 * adapter
    assert use["training checkpoints"] > 4 * 4 * adapter
    assert use["figures"] == (6 + 3) * memory.ROW_BYTES
    more = memory.disk_use(net, config(root, save_total_limit=5), 6, False)
    assert more["training checkpoints"] == 7 * use["training checkpoints"] // 4
