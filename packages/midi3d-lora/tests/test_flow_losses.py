"""The training loss: recorded official values, its sign, scenes as units, borders."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lora_core.errors import ConfigError, DataError
from lora_core.testing import load_golden
from lora_core.testing.goldens import assert_close_golden
from midi3d_lora.flow.losses import (
    SCHEMES,
    NoisyRows,
    Weighting,
    add_noise,
    draw_dropped_scenes,
    drop_conditioning,
    validation_losses,
    velocity_loss,
)
from midi3d_lora.flow.rectified_flow import RectifiedFlowScheduler

GOLDEN = load_golden(Path(__file__).parent / "goldens" / "loss")
SCHEDULER = load_golden(Path(__file__).parent / "goldens" / "scheduler")
SCENE_OF_ROW = torch.arange(3).repeat_interleave(int(GOLDEN.io["num_instances_per_batch"]))


def recorded_rows() -> NoisyRows:
    io = GOLDEN.io
    scheduler = RectifiedFlowScheduler(shift=GOLDEN.config["shift"])
    return add_noise(io["latents"], io["noise"], io["u"], SCENE_OF_ROW, scheduler)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_noisy_latents_and_target_are_the_official_ones() -> None:
    rows = recorded_rows()
    for name in ("sigmas", "timesteps", "noisy_latents", "target"):
        assert_close_golden(getattr(rows, name), GOLDEN.io[name], 1e-6, 1e-6)


@pytest.mark.parametrize("scheme", ["logit_normal_dist", "sigma_sqrt", "cosmap"])
def test_loss_is_the_official_one(scheme: str) -> None:
    io, rows, weighting = GOLDEN.io, recorded_rows(), Weighting(scheme)
    loss, per_row = velocity_loss(io["model_pred"], rows, weighting)
    real, _ = velocity_loss(io["model_pred"], rows, weighting, io["is_real_row"])
    torch.testing.assert_close(per_row, io[f"loss_per_row.{scheme}"], rtol=1e-5, atol=0)
    torch.testing.assert_close(loss, io[f"loss.{scheme}"], rtol=1e-5, atol=0)
    torch.testing.assert_close(real, io[f"loss_real_rows.{scheme}"], rtol=1e-5, atol=0)


def test_target_is_data_minus_noise_and_not_the_opposite() -> None:
    io, rows = GOLDEN.io, recorded_rows()
    loss, _ = velocity_loss(rows.latents - rows.noise, rows, Weighting())
    wrong, _ = velocity_loss(-io["model_pred"], rows, Weighting())
    assert loss == 0
    torch.testing.assert_close(wrong, io["loss_wrong_sign"], rtol=1e-5, atol=0)


def test_gradient_is_that_of_the_mean_over_real_rows() -> None:
    io, rows = GOLDEN.io, recorded_rows()
    prediction = io["model_pred"].clone().requires_grad_()
    loss, per_row = velocity_loss(prediction, rows, Weighting("cosmap"), io["is_real_row"])
    loss.backward()
    real = io["is_real_row"].float()
    weights = 2 / (torch.pi * (1 - 2 * rows.sigmas + 2 * rows.sigmas**2))
    elements = prediction[0].numel()
    expected = 2 * (io["model_pred"] - io["target"]) / elements
    expected = expected * (weights * real / real.sum())[:, None, None]
    torch.testing.assert_close(prediction.grad, expected, rtol=1e-5, atol=1e-9)
    assert not per_row.requires_grad


def test_loss_of_a_half_precision_prediction_is_computed_in_float32() -> None:
    io, rows = GOLDEN.io, recorded_rows()
    half = io["model_pred"].bfloat16()
    loss, _ = velocity_loss(half, rows, Weighting())
    expected = (half.float() - rows.target).square().mean()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("scheme", ["logit_normal", "logit_normal_dist", "mode", "none"])
def test_draws_are_the_official_ones_from_equal_seeds(scheme: str) -> None:
    settings = SCHEDULER.config["density"]
    weighting = Weighting(scheme, settings["logit_mean"], settings["logit_std"])
    drawn = weighting.draw(settings["batch_size"], seeded(SCHEDULER.config["density_seed"]))
    recorded = SCHEDULER.io[f"density.{'uniform' if scheme == 'none' else scheme}"]
    assert_close_golden(drawn, recorded, 1e-6, 0)


@pytest.mark.parametrize("scheme", ["sigma_sqrt", "cosmap", "logit_normal_dist"])
def test_weights_are_the_official_ones(scheme: str) -> None:
    weights = Weighting(scheme).weights(SCHEDULER.io["weighting.sigmas"])
    assert_close_golden(weights, SCHEDULER.io[f"weighting.{scheme}"], 1e-6, 0)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_draws_levels_and_finite_weights(scheme: str) -> None:
    weighting = Weighting(scheme)
    sigmas = torch.cat([weighting.draw(2000, seeded(0)), torch.tensor([0.0, 1.0])])
    assert ((sigmas >= 0) & (sigmas <= 1)).all()
    assert sigmas[:2000].std() > 0.1
    weights = weighting.weights(sigmas)
    assert torch.isfinite(weights).all()
    assert (weights > 0).all()


def test_levels_are_drawn_per_scene_and_shifted() -> None:
    latents = torch.zeros(5, 2, 3)
    scene_of_row = torch.tensor([0, 0, 1, 1, 1])
    u = torch.tensor([0.5, 0.25])
    rows = add_noise(
        latents, torch.ones_like(latents), u, scene_of_row, RectifiedFlowScheduler(shift=3.0)
    )
    assert rows.sigmas.tolist() == [0.75, 0.75, 0.5, 0.5, 0.5]
    assert rows.timesteps.tolist() == [750.0, 750.0, 500.0, 500.0, 500.0]
    assert rows.noisy_latents[:, 0, 0].tolist() == rows.sigmas.tolist()
    dynamic = RectifiedFlowScheduler(use_dynamic_shifting=True)
    moved = add_noise(latents, torch.ones_like(latents), u, scene_of_row, dynamic, mu=0.8)
    torch.testing.assert_close(moved.sigmas[:1], torch.tensor([0.68997449]))


def test_whole_scenes_lose_both_embeddings() -> None:
    io = GOLDEN.io
    embeds = (io["image_embeds_1"], io["image_embeds_2"])
    dropped = io["drop_scene"]
    for before, after in zip(embeds, drop_conditioning(embeds, dropped, SCENE_OF_ROW), strict=True):
        gone = (after == 0).flatten(1).all(1)
        assert torch.equal(gone, dropped[SCENE_OF_ROW])
        assert torch.equal(after[~gone], before[~gone])


def test_dropped_conditioning_may_be_anything_before() -> None:
    broken = torch.full((2, 1, 3), float("nan"))
    first, second = drop_conditioning(
        (broken, broken), torch.tensor([True]), torch.zeros(2, dtype=torch.int64)
    )
    assert not first.any()
    assert not second.any()


def test_share_of_dropped_scenes() -> None:
    assert not draw_dropped_scenes(100, 0.0, seeded(0)).any()
    assert draw_dropped_scenes(100, 1.0, seeded(0)).all()
    assert 0.09 < draw_dropped_scenes(20000, generator=seeded(0)).float().mean() < 0.11
    with pytest.raises(ConfigError, match="guidance dropout"):
        draw_dropped_scenes(1, 1.5)


def exact(x0: Tensor, noise: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    def velocity(x: Tensor, t: Tensor) -> Tensor:
        sigma = (t / 1000)[:, None, None]
        torch.testing.assert_close(x, (1 - sigma) * x0 + sigma * noise)
        return x0 - noise + sigma  # off by sigma

    return velocity


def test_validation_losses_are_unweighted_errors_of_every_level_and_row() -> None:
    generator = seeded(3)
    x0, noise = torch.randn(2, 4, 5, 6, generator=generator)
    grid = (0.1, 0.5, 0.9)
    losses = validation_losses(exact(x0, noise), x0, noise, RectifiedFlowScheduler(), grid)
    expected = torch.tensor(grid).square()[:, None].expand(3, 4)
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-6)


def test_shapes_that_do_not_belong_together_are_refused() -> None:
    rows, io = recorded_rows(), GOLDEN.io
    with pytest.raises(ConfigError, match="must be equal"):
        velocity_loss(io["model_pred"][:1], rows, Weighting())
    with pytest.raises(ConfigError, match="is_real_row"):
        velocity_loss(io["model_pred"], rows, Weighting(), torch.ones(3, dtype=torch.bool))
    nobody = torch.zeros(len(io["latents"]), dtype=torch.bool)
    with pytest.raises(DataError, match="without any row"):
        velocity_loss(io["model_pred"], rows, Weighting(), nobody)
    scheduler = RectifiedFlowScheduler()
    with pytest.raises(ConfigError, match="0 to 2 for 2 scenes"):
        add_noise(io["latents"], io["noise"], io["u"][:2], SCENE_OF_ROW, scheduler)
    with pytest.raises(ConfigError, match="for 12 rows"):
        add_noise(io["latents"], io["noise"], io["u"], SCENE_OF_ROW[:3], scheduler)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"scheme": "logit_norm"}, "did you mean 'logit_normal'"),
        ({"scheme": "xyz"}, "it is one of logit_normal_dist"),
        ({"logit_std": 0.0}, "logit_std: 0.0"),
        ({"logit_mean": float("inf")}, "logit_mean: inf"),
    ],
)
def test_impossible_weighting_is_refused(settings: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Weighting(**settings)  # type: ignore[arg-type]
