"""The learning rate against recorded rows, and at its borders."""

import json
from pathlib import Path

import pytest

from sam3_lora.schedule import inverse_sqrt_factor

CASE = Path(__file__).parent / "goldens" / "postprocess"
RECORDED = json.loads((CASE / "config.json").read_text())["schedule"]


@pytest.mark.parametrize(("update", "total", "lr"), RECORDED["rows_step_total_lr"])
def test_golden_learning_rates(update: int, total: int, lr: float) -> None:
    factor = inverse_sqrt_factor(
        update,
        total,
        warmup=RECORDED["warmup_steps"],
        timescale=RECORDED["timescale"],
        cooldown=RECORDED["cooldown_steps"],
    )
    assert RECORDED["base_lr"] * factor == pytest.approx(lr, rel=1e-9, abs=0)


def test_without_warmup_the_first_update_has_the_whole_rate() -> None:
    assert inverse_sqrt_factor(0, 100, warmup=0, timescale=10, cooldown=0) == 1.0


def test_without_cooldown_the_last_update_only_decays() -> None:
    factor = inverse_sqrt_factor(99, 100, warmup=0, timescale=33, cooldown=0)
    assert factor == pytest.approx(1 / 2)  # tau * 3 updates after the warm-up


def test_a_run_shorter_than_warmup_and_cooldown_stays_below_the_whole_rate() -> None:
    factors = [inverse_sqrt_factor(s, 10, warmup=20, timescale=20, cooldown=20) for s in range(10)]
    assert factors == pytest.approx([s / 20 * (10 - s) / 20 for s in range(10)])


def test_the_rate_ends_at_zero_and_never_becomes_negative() -> None:
    assert inverse_sqrt_factor(100, 100, warmup=5, timescale=20, cooldown=20) == 0.0
    assert inverse_sqrt_factor(101, 100, warmup=5, timescale=20, cooldown=20) == 0.0
