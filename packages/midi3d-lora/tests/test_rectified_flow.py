"""The scheduler: recorded official values, exact inversion, and refusals."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from lora_core.errors import ConfigError
from lora_core.testing import load_golden
from lora_core.testing.goldens import assert_close_golden
from midi3d_lora.flow.rectified_flow import RectifiedFlowScheduler, interpolate

GOLDEN = load_golden(Path(__file__).parent / "goldens" / "scheduler")
CASES = list(GOLDEN.config["cases"])
ROUNDING = 5e-7  # a few last places of float32: the official code rounds in between


def scheduler_of(case: str) -> tuple[RectifiedFlowScheduler, float | None]:
    settings = dict(GOLDEN.config["cases"][case])
    mu = settings.pop("mu", None)
    return RectifiedFlowScheduler(**settings), mu


@pytest.mark.parametrize("case", CASES)
def test_levels_after_construction_are_the_official_ones(case: str) -> None:
    scheduler, _ = scheduler_of(case)
    for name in ("sigmas", "timesteps"):
        recorded = GOLDEN.io[f"{case}.init_{name}"]
        torch.testing.assert_close(getattr(scheduler, name), recorded, rtol=ROUNDING, atol=0)
    assert len(scheduler) == 1000


@pytest.mark.parametrize("steps", GOLDEN.config["steps"])
@pytest.mark.parametrize("case", CASES)
def test_steps_are_placed_as_officially(case: str, steps: int) -> None:
    scheduler, mu = scheduler_of(case)
    scheduler.set_timesteps(steps, mu=mu)
    for name in ("sigmas", "timesteps"):
        recorded = GOLDEN.io[f"{case}.{steps}.{name}"]
        torch.testing.assert_close(getattr(scheduler, name), recorded, rtol=ROUNDING, atol=0)


@pytest.mark.parametrize("case", CASES)
def test_euler_steps_are_the_official_ones(case: str) -> None:
    scheduler, mu = scheduler_of(case)
    outputs = GOLDEN.io[f"{case}.step.model_output"]
    scheduler.set_timesteps(len(outputs), mu=mu)
    x = GOLDEN.io[f"{case}.step.initial"]
    for i, t in enumerate(scheduler.timesteps):
        x = scheduler.step(outputs[i], t, x, return_dict=False)[0]
        assert_close_golden(x, GOLDEN.io[f"{case}.step.trajectory"][i], 1e-6, 1e-6)
    assert scheduler.step_index == len(outputs)


@pytest.mark.parametrize("case", CASES)
def test_forward_process_and_time_shift_are_the_official_ones(case: str) -> None:
    scheduler, mu = scheduler_of(case)
    x0, noise, t, noisy = (
        GOLDEN.io[f"{case}.noise.{name}"] for name in ("x0", "noise", "timesteps", "noisy")
    )
    assert_close_golden(scheduler.scale_noise(x0, t, noise), noisy, 1e-6, 1e-6)
    shifted = scheduler.time_shift(GOLDEN.io[f"{case}.time_shift.in"], mu)
    assert_close_golden(shifted, GOLDEN.io[f"{case}.time_shift.out"], 1e-6, 1e-6)


def test_dynamic_shift_has_no_division_by_zero_at_the_data() -> None:
    scheduler = RectifiedFlowScheduler(use_dynamic_shifting=True)
    assert scheduler.time_shift(torch.tensor([0.0, 1.0]), 0.8).tolist() == [0.0, 1.0]


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_exact_velocity_lands_on_the_data_and_the_opposite_sign_far_away(shift: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 3, 8, 4, generator=generator)
    landed = {}
    for sign in (1, -1):
        scheduler = RectifiedFlowScheduler(shift=shift)
        scheduler.set_timesteps(50)
        x = noise
        for t in scheduler.timesteps:
            x = scheduler.step(sign * (x0 - noise), t, x).prev_sample
        landed[sign] = x
    assert (landed[1] - x0).abs().max() < 5e-6
    torch.testing.assert_close(landed[-1] - x0, 2 * (noise - x0), rtol=1e-4, atol=1e-4)


def test_steps_may_start_in_the_middle() -> None:
    x0, noise = torch.full((1, 2), 3.0), torch.full((1, 2), -1.0)
    for by_index in (True, False):
        scheduler = RectifiedFlowScheduler()
        scheduler.set_timesteps(10)
        if by_index:
            scheduler.set_begin_index(6)
        x = scheduler.scale_noise(x0, scheduler.timesteps[6:7], noise)
        for t in scheduler.timesteps[6:]:
            x = scheduler.step(x0 - noise, t, x).prev_sample
        torch.testing.assert_close(x, x0)


def test_own_levels_are_shifted_and_end_at_zero() -> None:
    scheduler = RectifiedFlowScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=[0.5, 0.25])
    assert scheduler.sigmas.tolist() == [0.75, 0.5, 0.0]
    assert scheduler.num_inference_steps == 2


def test_a_step_computes_in_float32_and_answers_in_the_dtype_of_the_model() -> None:
    scheduler = RectifiedFlowScheduler()
    scheduler.set_timesteps(50)
    velocity = torch.full((1, 1), 1.0, dtype=torch.bfloat16)
    sample = torch.full((1, 1), 4.0, dtype=torch.bfloat16)
    (moved,) = scheduler.step(velocity, scheduler.timesteps[0], sample, return_dict=False)
    assert moved.dtype == torch.bfloat16
    scheduler.set_timesteps(50)
    (exact,) = scheduler.step(velocity.float(), scheduler.timesteps[0], sample, return_dict=False)
    assert exact.item() == pytest.approx(4.02, abs=1e-6)


def test_save_and_load_as_diffusers_does(tmp_path: Path) -> None:
    scheduler = RectifiedFlowScheduler(shift=2.5, use_dynamic_shifting=False)
    assert isinstance(scheduler, SchedulerMixin)
    scheduler.save_pretrained(tmp_path / "scheduler")
    again = RectifiedFlowScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    assert again.config.shift == 2.5
    assert torch.equal(again.sigmas, scheduler.sigmas)
    written = json.loads((tmp_path / "scheduler" / "scheduler_config.json").read_text())
    assert written["_class_name"] == "RectifiedFlowScheduler"
    assert RectifiedFlowScheduler.from_config(again.config).config.shift == 2.5


def test_configuration_of_another_scheduler_is_refused() -> None:
    other = FlowMatchEulerDiscreteScheduler().config
    with pytest.raises(ConfigError, match=r"base_shift.*not of a RectifiedFlowScheduler"):
        RectifiedFlowScheduler.from_config(other)
    with pytest.raises(ConfigError, match="did you mean 'shift'"):
        RectifiedFlowScheduler.from_config({"shiftt": 1.0})


def test_wrong_calls_say_what_is_expected() -> None:
    x = torch.zeros(1, 2)
    scheduler = RectifiedFlowScheduler()
    with pytest.raises(ConfigError, match="set_timesteps first"):
        scheduler.step(x, 1000.0, x)
    scheduler.set_timesteps(2)
    for integer in (1000, torch.tensor(1000)):
        with pytest.raises(ConfigError, match="looks like an index"):
            scheduler.step(x, integer, x)
    with pytest.raises(ConfigError, match="none of the 2"):
        scheduler.step(x, 999.0, x)
    for t in scheduler.timesteps:
        scheduler.step(x, t, x)
    with pytest.raises(ConfigError, match="all 2 steps are done"):
        scheduler.step(x, scheduler.timesteps[1], x)


@pytest.mark.parametrize(
    "settings", [{"shift": 0.0}, {"shift": float("nan")}, {"num_train_timesteps": 0}]
)
def test_impossible_settings_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        RectifiedFlowScheduler(**settings)


def test_impossible_steps_are_refused() -> None:
    scheduler, dynamic = RectifiedFlowScheduler(), RectifiedFlowScheduler(use_dynamic_shifting=True)
    with pytest.raises(ConfigError, match="num_inference_steps: 0"):
        scheduler.set_timesteps(0)
    with pytest.raises(ConfigError, match="mu: the scheduler has use_dynamic_shifting"):
        dynamic.set_timesteps(3)
    with pytest.raises(ConfigError, match="fixed shift"):
        scheduler.set_timesteps(3, mu=0.5)
    for levels in ([0.2, 0.5], [1.5, 0.5], [0.5, 0.0], []):
        with pytest.raises(ConfigError, match="sigmas:"):
            scheduler.set_timesteps(sigmas=levels)


def test_noise_of_another_shape_is_refused_instead_of_broadcast() -> None:
    x0 = torch.zeros(3, 2)
    for noise, sigmas in ((torch.zeros(1, 2), torch.ones(3)), (x0, torch.ones(1))):
        with pytest.raises(ConfigError, match="one sigma per row"):
            interpolate(x0, noise, sigmas)
