"""Learning rates over time: the recorded official cycle, torch's own, and the LoRA cosine."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

from lora_core.errors import ConfigError
from lora_core.testing import load_golden
from scenesplat_lora.schedule import OneCycle, keyword_groups, set_one_cycle, warmup_cosine

GOLDEN = load_golden(Path(__file__).parent / "goldens" / "schedule")


def blocks() -> nn.Module:
    model = nn.Module()
    model.stem = nn.Linear(3, 4)
    model.block0 = nn.Linear(4, 4)
    return model


def test_one_cycle_is_the_official_one() -> None:
    settings = GOLDEN.config
    schedule = OneCycle(
        settings["total_steps"],
        settings["pct_start"],
        settings["div_factor"],
        settings["final_div_factor"],
    )
    fast, slow = settings["max_lr"]
    groups = keyword_groups(blocks().named_parameters(), fast, [{"keyword": "block", "lr": slow}])
    optimizer = torch.optim.AdamW(groups)
    for update, expected in enumerate(GOLDEN.io["lr_and_beta1"].tolist()):
        set_one_cycle(optimizer, schedule, update, settings["max_lr"])
        first, second = optimizer.param_groups
        found = [first["lr"], second["lr"], first["betas"][0]]
        assert found == pytest.approx(expected, rel=0, abs=1e-9)
        assert second["betas"] == first["betas"]
        assert first["betas"][1] == 0.999


@pytest.mark.parametrize(("total", "pct_start"), [(1, 0.3), (3, 0.3), (10, 0.25), (40, 1.0)])
def test_one_cycle_is_that_of_torch_for_short_runs_too(total: int, pct_start: float) -> None:
    optimizer = torch.optim.AdamW(blocks().parameters(), lr=1.0)
    theirs = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 1.0, total_steps=total, pct_start=pct_start
    )
    ours = OneCycle(total, pct_start, 25, 1e4)
    for update in range(total):
        assert ours.lr_factor(update) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
        assert ours.beta1(update) == pytest.approx(optimizer.param_groups[0]["betas"][0])
        optimizer.step()
        if update + 1 < total:
            theirs.step()


def test_impossible_cycles_are_named_together() -> None:
    with pytest.raises(ConfigError, match=r"(?s)0 updates.*pct_start.*div_factor.*betas"):
        OneCycle(0, 1.5, 0, 1, 0.8, 0.9)


def test_the_lora_schedule_passes_through_its_three_rates() -> None:
    rates = [warmup_cosine(u, 101, 20, 1e-4, 1e-5, 1e-6) for u in range(101)]
    assert rates[0] == 1e-5
    assert rates[20] == pytest.approx(1e-4)
    assert rates[-1] == pytest.approx(1e-6)
    assert rates[60] == pytest.approx((1e-4 + 1e-6) / 2)
    assert all(a < b for a, b in pairwise(rates[:21]))
    assert all(a > b for a, b in pairwise(rates[20:]))


def test_each_parameter_is_in_the_first_group_that_names_it() -> None:
    model = blocks()
    model.stem.bias.requires_grad_(False)
    entries = [{"keyword": "block0.w", "lr": 2.0}, {"keyword": "block", "weight_decay": 0.0}]
    groups = keyword_groups(model.named_parameters(), 1.0, entries)
    assert [(g["name"], g["lr"], len(g["params"])) for g in groups] == [
        ("default", 1.0, 1),
        ("block0.w", 2.0, 1),
        ("block", 1.0, 1),
    ]
    assert groups[2]["weight_decay"] == 0.0


def test_a_keyword_that_names_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="'blok'"):
        keyword_groups(blocks().named_parameters(), 1.0, [{"keyword": "blok", "lr": 1.0}])
    with pytest.raises(ConfigError, match="no keyword"):
        keyword_groups(blocks().named_parameters(), 1.0, [{"lr": 1.0}])
