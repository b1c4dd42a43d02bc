"""The learning rate over a run, its length, and what of a batch the model gets."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from torch import nn

from isaac_lora.config import Config
from isaac_lora.frozen_features import FrozenFeatures
from isaac_lora.objective import precision, schedule, total_updates
from isaac_lora.training_flags import Schedule
from lora_core.errors import ConfigError

MORE: dict[str, dict[str, Any]] = {
    "warmup_stable_decay": {"num_decay_steps": 3},
    "cosine_with_min_lr": {"min_lr": 1e-4},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1},
    "polynomial": {"power": 2.0},
}


def config(**given: Any) -> Config:
    return Config(**({"model_path": "m", "data_path": "d", "output_dir": "o"} | given))


@pytest.mark.parametrize("name", get_args(Schedule))
def test_every_schedule_is_that_of_transformers(name: str) -> None:
    from transformers import get_scheduler

    cfg = config(
        lr_scheduler_type=name, lr_scheduler_kwargs=MORE.get(name), warmup_steps=3,
        learning_rate=0.5,
    )  # fmt: skip
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    theirs = get_scheduler(name, optimizer, 3, 12, MORE.get(name))
    ours = schedule(cfg)
    for update in range(12):
        assert 0.5 * ours(update, 12) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        theirs.step()


def test_settings_that_a_schedule_does_not_know_are_an_error() -> None:
    with pytest.raises(ConfigError, match="lr_scheduler_kwargs do not go together"):
        schedule(config(lr_scheduler_kwargs={"cycles": 2}))(0, 10)


@pytest.mark.parametrize(
    ("given", "updates"),
    [
        ({"num_train_epochs": 3}, 15),
        ({"num_train_epochs": 0.5}, 3),
        ({"num_train_epochs": 0.01}, 1),
        ({"max_steps": 7}, 7),
    ],
)
def test_a_run_has_as_many_updates_as_asked_for(given: dict[str, Any], updates: int) -> None:
    assert total_updates(config(**given), 5) == updates


def test_a_cpu_has_fp32_unless_told_otherwise() -> None:
    assert precision(config(use_cpu=True)) == "fp32"
    assert precision(config()) == "auto"
    assert precision(config(bf16=True)) == "bf16"


def test_the_model_gets_nothing_that_it_does_not_know() -> None:
    ready = torch.ones(2, 8)
    batch = {"keys": ["a"], "vision_parts": [], "depth_parts": [], "input_ids": torch.zeros(1, 3)}
    assert set(FrozenFeatures().inputs(batch)) == {"input_ids"}
    found = FrozenFeatures().inputs(batch | {"depth_encoding": ready})
    assert found["depth_encoding"] is ready
