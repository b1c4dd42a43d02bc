"""Whole runs: the same bits again, whatever a validation does; nothing that grows."""

from __future__ import annotations

import random
import statistics
import warnings
from pathlib import Path
from typing import Any

import pytest
import tiny_isaac_run
import torch
from isaac_texts import record, write_records
from tiny_isaac_run import rows

from isaac_lora import objective
from isaac_lora.adapter_files import read_adapter
from isaac_lora.train import main
from lora_core.testing.no_device import no_device

LOSS = ("step", "loss", "lr", "grad_norm")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_isaac_run.write_all(tmp_path_factory.mktemp("data"))


def run(data: Path, output: Path, **given: Any) -> Path:
    """A run of four updates; the network is cut off."""
    given = {"max_steps": 4, "save_steps": 4, "eval_steps": 2, "lora_dropout": 0.1} | given
    with no_device(weights=True):
        assert main(tiny_isaac_run.command(data, output, **given)) == 0
    return output


def last(output: Path) -> dict[str, torch.Tensor]:
    """The adapter after the last update."""
    return dict(read_adapter(output / "state" / "checkpoint-4" / "adapter").file.tensors)


def figures(output: Path, split: str = "train") -> list[list[str]]:
    return [[row[name] for name in LOSS] for row in rows(output, split)]


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


@pytest.fixture(scope="module")
def validated(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two validations, in which answers are generated."""
    return run(data, tmp_path_factory.mktemp("validated") / "run")


@pytest.mark.fault("R10", "H40")
def test_training_is_bit_equal_with_validation_on_or_off(
    validated: Path, data: Path, tmp_path: Path
) -> None:
    plain = run(data, tmp_path / "run", val_data_path=None)
    assert len(figures(validated, "val")) == 3
    assert not figures(plain, "val")
    assert figures(plain) == figures(validated)
    assert same(last(plain), last(validated))


@pytest.mark.fault("R11", "R17")
def test_the_same_seed_gives_the_same_bits_and_validations_and_another_does_not(
    validated: Path, data: Path, tmp_path: Path
) -> None:
    random.seed(99)
    torch.manual_seed(99)
    again = run(data, tmp_path / "again")
    assert rows(again) == rows(validated)
    assert same(last(again), last(validated))
    other = run(data, tmp_path / "other", seed=7)
    assert figures(other, "val")[0] == figures(validated, "val")[0]  # of the base: not drawn
    assert figures(other) != figures(validated)


@pytest.mark.fault("C42")
def test_recomputed_activations_change_no_bit_and_warn_of_nothing(
    validated: Path, data: Path, tmp_path: Path
) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="None of the inputs")
        output = run(data, tmp_path / "run", gradient_checkpointing="true")
    assert figures(output) == figures(validated)
    tensors = last(output)
    assert same(tensors, last(validated))
    moved = [tensor.any() for name, tensor in tensors.items() if "lora_B" in name]
    assert len(moved) == 16
    assert all(moved)


def resident() -> int:
    """Bytes of memory that this process has now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.slow
@pytest.mark.fault("R15")
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
def test_memory_stays_flat_over_a_thousand_updates(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Validation with answers and pictures, checkpoints, depth, kept features: all is on."""
    seen: list[int] = []
    whole = objective.loss_of

    def watched(*arguments: Any) -> Any:
        loss = whole(*arguments)

        def call(*inner: Any, **more: Any) -> Any:
            seen.append(resident())
            return loss(*inner, **more)

        return call

    monkeypatch.setattr(objective, "loss_of", watched)
    records = [record("Who?", "He.", id="t")]
    write_records(tmp_path / "val.json", records)
    run(
        data, tmp_path / "run", max_steps=1000, eval_steps=100, save_steps=100, logging_steps=10,
        per_device_train_batch_size=1, tensorboard="true", cache_vision="true",
        **tiny_isaac_run.depth(data),
    )  # fmt: skip
    assert len(seen) >= 1000
    early, late = (statistics.median(seen[part]) for part in (slice(200, 300), slice(-100, None)))
    assert late < 1.05 * early, f"{early / 1e6:.0f} MB after 250 updates, {late / 1e6:.0f} at last"
