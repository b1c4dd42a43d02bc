"""The guided Euler loop: the recorded official trajectory, guidance, precision, refusals."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from lora_core.errors import ConfigError, NumericError
from lora_core.testing import load_golden
from lora_core.testing.goldens import assert_close_golden
from midi3d_lora.flow.rectified_flow import RectifiedFlowScheduler
from midi3d_lora.flow.sampling import guided_velocity, initial_noise, sample_latents
from midi3d_lora.transformer.dit import TripoSGDiTModel

GOLDENS = Path(__file__).parent / "goldens"
GOLDEN = load_golden(GOLDENS / "sampling")


def embeds(rows: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(rows, 1, 4, generator=generator), torch.randn(
        rows, 3, 4, generator=generator
    )


def toy(x: Tensor, t: Tensor, first: Tensor, second: Tensor, groups: Tensor) -> Tensor:
    """A velocity that depends on everything it is given, groups by the mean of their rows."""
    same = (groups[:, None] == groups[None]).float()
    joint = (same / same.sum(1, keepdim=True)) @ x.flatten(1)
    condition = first.sum((1, 2)) + second.square().sum((1, 2))
    return joint.reshape(x.shape) * (1 + t / 1000 + condition)[:, None, None]


def test_recorded_velocities_give_the_recorded_trajectory() -> None:
    io, seen = GOLDEN.io, []
    velocities = iter(io["guided_velocity"])

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        assert t.shape == x.shape[:1]
        seen.append(t[0])
        return next(velocities)

    steps = GOLDEN.config["num_inference_steps"]
    trajectory: list[Tensor] = []
    scheduler = RectifiedFlowScheduler(shift=GOLDEN.config["shift"])
    latents = sample_latents(
        velocity,
        io["latents"],
        scheduler,
        steps,
        on_step=lambda number, x: trajectory.append(x.clone()),
    )
    assert_close_golden(torch.stack(trajectory), io["trajectory"], 0, 1e-6)
    assert torch.equal(latents, trajectory[-1])
    assert_close_golden(torch.stack(seen), io["timesteps"], 1e-6, 0)


@pytest.mark.parametrize("one_pass", [True, False])
def test_the_transformer_with_guidance_follows_the_official_trajectory(one_pass: bool) -> None:
    io, config = GOLDEN.io, GOLDEN.config
    model = TripoSGDiTModel(**config["model"])
    model.load_state_dict(load_golden(GOLDENS / "dit_5_layers").weights)
    model.eval()
    model.set_multi_instance_blocks(config["multi_instance_blocks"])

    def velocity(x: Tensor, t: Tensor, first: Tensor, second: Tensor, groups: Tensor) -> Tensor:
        return model(x, t, first, second, return_dict=False, instance_groups=groups)[0]

    groups = torch.zeros(config["num_instances"], dtype=torch.int64)
    guided = guided_velocity(
        velocity,
        io["image_embeds_1"],
        io["image_embeds_2"],
        groups,
        config["guidance_scale"],
        one_pass,
    )
    trajectory: list[Tensor] = []
    sample_latents(
        guided,
        io["latents"],
        RectifiedFlowScheduler(),
        config["num_inference_steps"],
        on_step=lambda number, x: trajectory.append(x),
    )
    assert (torch.stack(trajectory) - io["trajectory"]).abs().max() < 1e-4


def test_guidance_is_the_formula_with_zeros_as_the_unconditional_embedding() -> None:
    x, t, groups = initial_noise(2, 3, 4, seed=1), torch.full((2,), 400.0), torch.tensor([7, 7])
    first, second = embeds()
    conditional = toy(x, t, first, second, groups)
    unconditional = toy(x, t, first * 0, second * 0, groups)
    expected = unconditional + 3.5 * (conditional - unconditional)
    for one_pass in (True, False):
        guided = guided_velocity(toy, first, second, groups, 3.5, one_pass)
        torch.testing.assert_close(guided(x, t), expected, rtol=1e-5, atol=1e-5)


def test_halves_of_the_doubled_batch_are_groups_of_their_own() -> None:
    first, second = embeds(4)
    asked: list[Tensor] = []

    def velocity(x: Tensor, t: Tensor, a: Tensor, b: Tensor, groups: Tensor) -> Tensor:
        asked.append(groups)
        return x

    groups = torch.tensor([-1, -1, 5, 5])
    guided = guided_velocity(velocity, first, second, groups, 7.0)
    guided(torch.zeros(4, 2, 3), torch.ones(4))
    unconditional, conditional = asked[0].chunk(2)
    for half in (unconditional, conditional):
        assert torch.equal(half[:, None] == half[None], groups[:, None] == groups[None])
    assert not set(unconditional.tolist()) & set(conditional.tolist())


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_without_guidance_only_the_conditional_branch_is_computed(scale: float) -> None:
    first, second = embeds()
    calls: list[int] = []

    def velocity(x: Tensor, t: Tensor, a: Tensor, b: Tensor, groups: Tensor) -> Tensor:
        calls.append(len(x))
        assert torch.equal(a, first)
        assert torch.equal(b, second)
        return x * 2

    x = torch.ones(2, 1, 1)
    velocity_only = guided_velocity(velocity, first, second, torch.zeros(2), scale)
    assert torch.equal(velocity_only(x, torch.ones(2)), x * 2)
    assert calls == [2]


def test_latents_stay_float32_where_the_network_answers_in_half_precision() -> None:
    noise, target = initial_noise(2, 8, 4, seed=3), torch.full((2, 8, 4), 1000.1)
    dtypes: set[torch.dtype] = set()

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        dtypes.add(x.dtype)
        return (target - noise).bfloat16()

    latents = sample_latents(velocity, noise, RectifiedFlowScheduler(), 50)
    expected = noise + (target - noise).bfloat16().float()
    assert dtypes == {torch.float32}
    torch.testing.assert_close(latents, expected, rtol=1e-6, atol=5e-3)


def test_a_seed_is_a_draw_of_its_own() -> None:
    noise = initial_noise(3, 5, 2, seed=42)
    torch.manual_seed(1)
    torch.rand(7)
    assert torch.equal(noise, initial_noise(3, 5, 2, seed=42))
    assert not torch.equal(noise, initial_noise(3, 5, 2, seed=43))
    assert torch.equal(
        noise, torch.randn(3, 5, 2, generator=torch.Generator("cpu").manual_seed(42))
    )


def test_no_gradient_is_kept() -> None:
    weight = torch.ones((), requires_grad=True)
    latents = sample_latents(
        lambda x, t: x * weight, initial_noise(1, 2, 2, 0), RectifiedFlowScheduler(), 3
    )
    assert not latents.requires_grad


def test_nan_is_told_with_its_step() -> None:
    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return x if t[0] > 500 else x / 0

    with pytest.raises(NumericError, match=r"step 6 of 10 \(t = 500.0\)"):
        sample_latents(velocity, initial_noise(1, 2, 2, 0), RectifiedFlowScheduler(), 10)


def test_wrong_calls_are_refused() -> None:
    first, second = embeds()
    groups = torch.zeros(2, dtype=torch.int64)
    for scale in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="guidance_scale"):
            guided_velocity(toy, first, second, groups, scale)
    with pytest.raises(ConfigError, match="2 rows of embeds_1, 2 of embeds_2, 3 groups"):
        guided_velocity(toy, first, second, torch.zeros(3))
    with pytest.raises(ConfigError, match="velocity"):
        sample_latents(lambda x, t: x[:1], torch.zeros(2, 1, 1), RectifiedFlowScheduler(), 2)
