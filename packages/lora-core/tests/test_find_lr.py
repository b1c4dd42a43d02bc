"""The learning-rate finder: a sane suggestion, drawn, and nothing changed."""

import csv
import math
import random

import numpy as np
import pytest
import torch
from tiny_training import Points, collate, loss, network

from lora_core import find_lr
from lora_core.checkpoint import state as checkpoint_state
from lora_core.errors import ConfigError, NumericError
from lora_core.ramp import Ramp
from lora_core.training.out_of_memory import Advice


def ramp(model=None, loss=loss, data=None, *, steps=60, low=1e-5, high=1.0, **updates):
    model = network(dropout=0.1) if model is None else model
    updates = find_lr.Updates(**{"batch_size": 8, **updates})
    return find_lr.ramp(
        model, loss, data or Points(), collate, updates, steps=steps, low=low, high=high
    )


def test_the_suggestion_lies_where_the_loss_falls():
    curve = ramp()
    assert curve.learned
    assert curve.rates[0] == pytest.approx(1e-5)
    assert all(a < b for a, b in zip(curve.rates, curve.rates[1:], strict=False))
    at = curve.rates.index(curve.suggestion)
    lowest = curve.smooth.index(min(curve.smooth))
    assert 0 < at <= lowest
    assert curve.smooth[at] == pytest.approx(math.sqrt(min(curve.smooth)), abs=0.1)
    assert 1e-3 <= curve.suggestion <= 1e-1, "this small network learns at 1e-2"


def test_nothing_is_changed_and_the_same_curve_comes_again():
    model = network(dropout=0.1, modules_to_save=["1"]).eval()
    model[0].train()
    modes = [module.training for module in model.modules()]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    randoms = checkpoint_state.random_state()
    first = ramp(model)
    after = model.state_dict()
    assert not [name for name in before if not torch.equal(before[name], after[name])]
    assert all(p.grad is None for p in model.parameters())
    assert [module.training for module in model.modules()] == modes
    now = checkpoint_state.random_state()
    assert torch.equal(now["torch"], randoms["torch"])
    assert (str(now["numpy"]), str(now["python"])) == (
        str(randoms["numpy"]),
        str(randoms["python"]),
    )
    torch.rand(3), np.random.rand(3), random.random()  # noqa: NPY002 - must not be felt
    assert ramp(model) == first
    assert ramp(model, seed=1) != first


def test_a_batch_is_compared_with_itself():
    """Some points are a thousand times as hard as others: the curve shows no trace of that."""

    class Uneven(Points):
        def __getitem__(self, i):
            sample = super().__getitem__(i)
            return {**sample, "y": sample["y"] * (1 + 30 * (i % 2))}

    curve = ramp(data=Uneven(noise=0.0), batch_size=1, steps=40, high=1e-4)
    assert max(curve.ratios) < 1.1
    assert min(curve.ratios) > 0.5


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e9])
def test_the_ramp_ends_when_the_loss_diverges(bad):
    calls = []

    def falling_then_bad(model, batch):
        value, parts = loss(model, batch)
        if not torch.is_grad_enabled():
            return value, parts
        calls.append(1)
        return value * (bad if len(calls) > 30 else 0.97 ** len(calls)), parts

    curve = ramp(loss=falling_then_bad)
    assert 30 <= len(curve.rates) <= 32
    assert len(curve.rates) == len(curve.ratios) == len(curve.smooth)
    assert all(math.isfinite(value) for value in (*curve.ratios, *curve.smooth))
    assert curve.suggestion < curve.rates[-1]
    assert curve.diverged
    assert curve.end == f"ended after {len(curve.rates)} steps: the loss diverged"
    whole = ramp(high=1e-3, steps=20)
    assert not whole.diverged
    assert whole.end == "all 20 steps done"


def test_what_lies_above_the_picture_is_marked():
    rates, ratios = (1e-4, 1e-3, 1e-2), (1.0, 0.9, 1.9)
    orange = (224, 130, 20)

    def colours(curve):
        return {colour for _, colour in find_lr.draw(curve).getcolors(2**24)}

    assert orange not in colours(find_lr.Curve(rates, ratios, ratios))
    ratios = (1.0, 0.9, 7.0)
    assert orange in colours(find_lr.Curve(rates, ratios, ratios))
    ended = find_lr.Curve(rates, ratios, ratios, diverged=True)
    assert (
        find_lr.draw(ended).tobytes()
        != find_lr.draw(find_lr.Curve(rates, ratios, ratios)).tobytes()
    )


def test_a_loss_that_never_falls_gives_no_suggestion():
    curve = ramp(high=1e-7, low=1e-9)
    assert not curve.learned
    with pytest.raises(NumericError, match="from 1e-09 to 1e-07 made the loss fall"):
        _ = curve.suggestion


@pytest.mark.parametrize("settings", [{"low": 1.0, "high": 1e-3}, {"low": 0.0}, {"steps": 3}])
def test_a_ramp_that_does_not_rise_is_refused(settings):
    with pytest.raises(ConfigError, match="at least 10, rising"):
        ramp(**settings)


def test_a_loss_that_is_not_finite_at_the_start_is_said():
    with pytest.raises(NumericError, match="before any update"):
        ramp(loss=lambda model, batch: (loss(model, batch)[0] * math.nan, {}))


def test_the_curve_is_written_as_numbers_and_drawn(tmp_path):
    image = pytest.importorskip("PIL.Image")
    curve = ramp()
    numbers, picture = find_lr.write(curve, tmp_path / "new" / "folder")
    with numbers.open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [float(row["learning_rate"]) for row in table] == pytest.approx(curve.rates, rel=1e-5)
    assert [float(row["smoothed"]) for row in table] == pytest.approx(curve.smooth, rel=1e-5)
    with image.open(picture) as opened:
        assert opened.size == find_lr.SIZE
        colours = {colour for _, colour in opened.convert("RGB").getcolors(2**24)}
    assert {(31, 119, 180), (214, 39, 40)} <= colours, "the curve, and the suggestion"
    before = picture.read_bytes()
    find_lr.write(curve, tmp_path / "new" / "folder")
    assert picture.read_bytes() == before


def test_rates_are_rounded_to_one_digit():
    assert [find_lr.rounded(rate) for rate in (5.21e-4, 9.6e-4, 0.0149)] == [5e-4, 1e-3, 1e-2]


def test_accumulated_batches_give_the_curve_of_large_ones():
    model = network(dropout=0.0)
    points = Points(48)
    whole = ramp(model, data=points, batch_size=8, steps=12, high=1e-2)
    parts = ramp(model, data=points, batch_size=2, accumulation=4, steps=12, high=1e-2)
    assert parts.ratios == pytest.approx(whole.ratios, rel=1e-4)


# -- what the command does with it -----------------------------------------------------------------


def suggest(folder, loss=loss, **options):
    options = Ramp(**{"ramp_dir": str(folder), "ramp_steps": 20, **options})
    find_lr.suggest(
        network(dropout=0.0),
        loss,
        Points(),
        collate,
        find_lr.Updates(batch_size=8),
        options,
        flag="--optimizer.lr",
        advice=Advice(["--batch_size 4"]),
    )


def test_the_curve_its_end_and_the_suggestion_are_told(tmp_path, capsys):
    suggest(tmp_path / "ramp", ramp_to=0.1)
    lines = capsys.readouterr().out.splitlines()
    curve = ramp(network(dropout=0.0), steps=20, high=0.1)
    assert lines[-4:] == [
        str(tmp_path / "ramp" / "find_lr.png"),
        str(tmp_path / "ramp" / "find_lr.csv"),
        f"all 20 steps done, at learning rate {curve.rates[-1]:.1e}",
        f"suggestion: --optimizer.lr {find_lr.rounded(curve.suggestion):.0e}",
    ]


def test_without_a_suggestion_the_curve_is_there_to_look_at(tmp_path, capsys):
    with pytest.raises(NumericError, match="made the loss fall"):
        suggest(tmp_path, ramp_from=1e-9, ramp_to=1e-7)
    assert {path.name for path in tmp_path.iterdir()} == {"find_lr.csv", "find_lr.png"}
    assert "all 20 steps done" in capsys.readouterr().out


def test_memory_that_runs_out_is_answered_with_what_helps(tmp_path):
    def full(model, batch):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.25 GiB.")

    with pytest.raises(ConfigError, match=r"out of memory in the ramp: .*\n.*1\. --batch_size 4"):
        suggest(tmp_path / "ramp", full)
    assert not (tmp_path / "ramp").exists()
