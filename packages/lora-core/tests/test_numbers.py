"""Losses and gradients that are not finite, and the checks that the adapters really learn."""

import json
import math
import os

import numpy as np
import pytest
import torch
from tiny_training import (
    Points,
    X,
    assert_same_bits,
    collate,
    evaluate,
    loss,
    network,
    rows,
    train,
    trainer,
)
from torch import nn

from lora_core import checkpoint, errors
from lora_core.adapters.file import load_adapter
from lora_core.config import LoraConfig
from lora_core.errors import ConfigError, NumericError
from lora_core.guards import Guards
from lora_core.injection import inject, lora_layers
from lora_core.merging import merge
from lora_core.testing import hostile, processes
from lora_core.training.checks import is_initial
from lora_core.training.numerics import read_bundle, replay


class Poison(torch.autograd.Function):
    """Leaves the value and gives one element of the gradient another value."""

    @staticmethod
    def forward(ctx, x, bad):
        ctx.bad = bad
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        g = g.clone()
        g.view(-1)[0] = ctx.bad
        return g, None


def named(samples):
    batch = collate(samples)
    batch["keys"] = [f"picture {i}.png" for _, i in batch["ids"]]
    return batch


def poisoned(where, bad, at):
    """A loss that is bad in these micro-batches, counted from 1.

    where: the "loss", one "part" of it, or the "gradient" of one parameter, the loss being fine.
    """

    def bad_loss(model, batch):
        if not model.training:
            return loss(model, batch)
        bad_loss.calls += 1
        now = bad_loss.calls in at
        if now and where == "gradient":
            original = model[3].lora_B["default"].weight
            return loss_with(model, batch, Poison.apply(original, bad))
        value, parts = loss(model, batch)
        if now and where == "part":
            parts["mse"] = parts["mse"] * bad
        return (value * bad if now and where in ("loss", "part") else value), parts

    bad_loss.calls = 0
    return bad_loss


def loss_with(model, batch, weight):
    """The loss with another tensor in the place of B of the last layer."""
    factor = model[3].lora_B["default"]
    parameter = factor._parameters.pop("weight")
    factor.weight = weight
    try:
        return loss(model, batch)
    finally:
        del factor.weight
        factor._parameters["weight"] = parameter


def snapshot(made):
    return {name: value.clone() for name, value in made.network.state_dict().items()}


@pytest.mark.fault("R01", "R02", "R03")
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("at", [1, 5, 6])
def test_what_is_not_finite_stops_before_any_weight_or_moment_is_touched(
    tmp_path, where, bad, at, capsys
):
    """Two micro-batches make an update: the 5th and 6th are those of the third."""
    kept = {}

    def noted(model, batch):
        step = made.state.global_step
        if model.training and step == (at - 1) // 2 and not kept:
            kept.update(snapshot(made))
            moments = made.plain_optimizer().state
            kept["moments"] = [m.clone() for s in moments.values() for m in s.values()]
        return broken(model, batch)

    broken = poisoned(where, bad, {at})
    made = trainer(tmp_path, loss=noted)
    made.data_collator = named

    def command(argv):
        made.train()

    assert errors.run(command, []) == 2
    text = capsys.readouterr().err
    step = (at + 1) // 2
    assert f"error: step {step}: " in text
    assert "No weight was changed" in text
    assert "picture " in text
    assert f"{tmp_path / f'nonfinite-step{step}'}" in text
    assert "--skip_nonfinite" in text
    assert "Traceback" not in text
    assert len(text.splitlines()) <= 3
    expected = "the loss is not finite" if where == "loss" else "the loss is finite, its gradient"
    assert expected in text
    if where == "gradient":
        assert "1 gradient not finite: 3.lora_B.default.weight" in text
    moments = kept.pop("moments")
    now = [m for s in made.plain_optimizer().state.values() for m in s.values()]
    assert all(torch.equal(a, b) for a, b in zip(moments, now, strict=True))
    assert not [n for n, v in made.network.state_dict().items() if not torch.equal(v, kept[n])]


@pytest.mark.fault("R01")
def test_the_message_names_the_samples_and_the_parts_of_the_bad_batch_only(tmp_path):
    made = trainer(tmp_path, loss=poisoned("part", math.nan, {4}), data=Points(16))
    made.data_collator = named
    seen = []
    made.model.loss = spied(made.model.loss, seen)
    with pytest.raises(NumericError) as caught:
        made.train()
    text = str(caught.value)
    assert "mse nan, loss nan" in text
    for key in seen[-1]:
        assert key in text
    assert not [key for key in seen[-2] if f"{key}," in text or f"{key};" in text]


@pytest.mark.fault("H32")
@pytest.mark.parametrize("skip", [False, True])
def test_names_of_samples_cannot_forge_output(tmp_path, skip, capsys):
    def hostile_names(samples):
        batch = collate(samples)
        return batch | {"keys": [hostile.CONTROL_NAME for _ in samples]}

    guards = Guards(skip_nonfinite=skip)
    made = trainer(
        tmp_path, loss=poisoned("loss", math.nan, {3}), guards=guards, measure=None, steps=3
    )
    made.data_collator = hostile_names
    assert errors.run(lambda argv: made.train() and None, []) == (0 if skip else 2)
    captured = capsys.readouterr()
    said = captured.out if skip else captured.err
    assert "a\\x1b[2J" in said
    assert not set(said) & set("\x1b\x07\r")
    assert not [line for line in said.splitlines() if line.startswith("error: all is well")]


def spied(original, seen):
    def spy(model, batch):
        if model.training:
            seen.append(batch["keys"])
        return original(model, batch)

    return spy


@pytest.mark.fault("R01")
def test_the_bundle_holds_the_update_and_replays_it_bit_for_bit(tmp_path):
    values = []

    def noted(model, batch):
        value, parts = broken(model, batch)
        if model.training:
            values.append(parts["mse"].item())
        return value, parts

    broken = poisoned("loss", math.nan, {6})
    made = trainer(tmp_path, loss=noted, save_adapter=None)
    made.data_collator = named
    with pytest.raises(NumericError):
        made.train()
    folder = tmp_path / "nonfinite-step3"
    assert {path.name for path in folder.iterdir()} == {
        "adapter", "nonfinite.json", "nonfinite.safetensors",
    }  # fmt: skip
    about = json.loads((folder / "nonfinite.json").read_text())["about"]
    assert about["step"] == 3
    assert len(about["samples"]) == 2
    assert about["samples"][0][0].startswith("picture ")
    assert about["bad_batches"] == [1]
    assert about["parts"][0]["mse"] == pytest.approx(values[4])
    batches, _ = read_bundle(folder)
    assert [list(batch["ids"]) for batch in batches] == [
        [(0, int(key.split()[1].split(".")[0])) for key in batch["keys"]] for batch in batches
    ]
    torch.manual_seed(1)
    layers = [nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.2), nn.Linear(16, 3)]
    model = nn.Sequential(*layers)
    load_adapter(model, folder / "adapter", trainable=True)
    model.train()
    model[1].eval()  # frozen statistics
    again = [parts["mse"].item() for _, parts in replay(folder, model, loss)]
    assert again == values[4:6]


@pytest.mark.fault("R01")
def test_a_bundle_of_an_earlier_attempt_is_replaced_and_nothing_else(tmp_path):
    for _ in range(2):
        with pytest.raises(NumericError, match="nonfinite-step3"):
            train(tmp_path, loss=poisoned("loss", math.nan, {6}))
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".non")]
    (tmp_path / "b" / "nonfinite-step3").mkdir(parents=True)
    (tmp_path / "b" / "nonfinite-step3" / "mine.txt").write_text("mine")
    with pytest.raises(NumericError, match="could not be written"):
        train(tmp_path / "b", loss=poisoned("loss", math.nan, {6}))
    assert (tmp_path / "b" / "nonfinite-step3" / "mine.txt").read_text() == "mine"


def test_a_bundle_takes_whatever_a_batch_holds(tmp_path):
    class Odd:
        def __repr__(self):
            return "<odd>"

    def odd(samples):
        batch = collate(samples)
        extra = [np.float32(2), np.arange(3), Odd(), None, (1, math.inf), {"b": X[:2].t()}]
        return {**batch, "extra": extra}

    made = trainer(tmp_path, loss=poisoned("loss", math.inf, {2}))
    made.data_collator = odd
    with pytest.raises(NumericError):
        made.train()
    batches, _ = read_bundle(tmp_path / "nonfinite-step1")
    two, numbers, text, none, pair, inner = batches[0]["extra"]
    assert (two, text, none, pair) == (2.0, "<odd>", None, (1, math.inf))
    assert numbers.tolist() == [0, 1, 2]
    assert torch.equal(inner["b"], X[:2].t())


# -- leaving such updates out ----------------------------------------------------------------------


@pytest.mark.fault("R01", "R02")
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_dropped_updates_leave_weights_and_moments_and_are_counted(tmp_path, where, capsys):
    states = []

    def noted(model, batch):
        if model.training:
            moments = [m.clone() for s in made.plain_optimizer().state.values() for m in s.values()]
            states.append([*snapshot(made).values(), *moments])
        return broken(model, batch)

    broken = poisoned(where, math.nan, {6, 20})
    made = trainer(tmp_path, loss=noted, guards=Guards(skip_nonfinite=True), measure=None)
    made.data_collator = named
    made.train()
    assert made.state.global_step == 23
    assert made.dropped == [3, 11]
    before, after, later = states[4], states[6], states[8]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(after, later, strict=True))
    out = capsys.readouterr().out
    assert "step 3: the loss is" in out
    assert "Update dropped (1 of at most 10)" in out
    assert "2 updates dropped, as the loss or its gradient was not finite: 3, 11" in out
    assert all(math.isfinite(float(row["loss"])) for row in rows(tmp_path))
    assert [row["step"] for row in rows(tmp_path)] == ["4", "8", "12", "16", "20", "23"]


@pytest.mark.fault("R01")
def test_a_dropped_update_counts_as_a_step_of_schedule_and_data(tmp_path):
    """Every other update sees the samples and the learning rate that it would have seen."""
    rates, seen = [], []

    def noted(model, batch):
        if model.training:
            rates.append(made.lr_scheduler.get_last_lr()[0])
            seen.append(tuple(batch["ids"]))
        return broken(model, batch)

    runs = []
    for at in (set(), {6}):
        broken = poisoned("loss", math.nan, at)
        made = trainer(
            tmp_path / str(len(at)), loss=noted, guards=Guards(skip_nonfinite=True), measure=None
        )
        made.train()
        runs.append((list(rates), list(seen)))
        rates.clear(), seen.clear()
    assert runs[0] == runs[1]


@pytest.mark.fault("R01", "K08")
@pytest.mark.parametrize("step", [1, 2, 3, 4])
def test_a_run_with_dropped_updates_resumes_bit_equal(tmp_path, step):
    settings = {"guards": Guards(skip_nonfinite=True, keep_last=99), "trainer": {"save_steps": 1}}
    settings |= {"steps": 8, "log_steps": 2}
    bad = {3, 8}  # micro-batches of the updates 2 and 4
    first = train(tmp_path / "a", loss=poisoned("loss", math.nan, bad), **settings)
    assert first.dropped == [2, 4]
    with pytest.raises(NumericError):
        train(tmp_path / "b", loss=poisoned("loss", math.nan, {2 * step + 1}), **(
            settings | {"guards": Guards(keep_last=99)}
        ))  # fmt: skip
    again = train(
        tmp_path / "a",
        resume=str(tmp_path / "a" / f"checkpoint-{step}"),
        loss=poisoned("loss", math.nan, {each - 2 * step for each in bad}),
        **settings,
    )
    assert_same_bits(first.network, again.network)
    assert again.dropped == [2, 4]


@pytest.mark.fault("R01")
def test_too_many_dropped_updates_end_the_run(tmp_path):
    guards = Guards(skip_nonfinite=True, max_nonfinite=2)
    made = trainer(tmp_path, loss=poisoned("loss", math.nan, {2, 4, 8}), guards=guards)
    with pytest.raises(NumericError, match="--max_nonfinite 2 updates were dropped before"):
        made.train()
    assert made.dropped == [1, 2]
    assert made.state.global_step == 3
    assert (tmp_path / "nonfinite-step4").is_dir()


@pytest.mark.fault("R01")
def test_the_limit_counts_over_resumes(tmp_path):
    settings = {"guards": Guards(skip_nonfinite=True, max_nonfinite=1, keep_last=9)}
    first = train(tmp_path, loss=poisoned("loss", math.nan, {2}), steps=5, **settings)
    assert first.dropped == [1]
    with pytest.raises(NumericError, match="--max_nonfinite 1 updates"):
        train(tmp_path, resume=True, loss=poisoned("loss", math.nan, {2}), steps=10, **settings)


@pytest.mark.fault("R01", "R07")
def test_a_first_update_that_is_dropped_is_no_adapter_that_does_not_move(tmp_path):
    guards = Guards(skip_nonfinite=True)
    made = train(tmp_path, loss=poisoned("loss", math.nan, {1}), guards=guards)
    assert made.dropped == [1]

    def cut(model, batch):
        cut.calls += model.training
        value = 0 * sum(p.sum() for p in model.parameters() if p.requires_grad)
        return (value * math.nan if model.training and cut.calls == 1 else value), {}

    cut.calls = 0
    with pytest.raises(NumericError, match="no adapter moved"):
        train(tmp_path / "b", loss=cut, guards=guards)


@pytest.mark.fault("R02", "R03")
def test_without_clipping_gradients_are_looked_at_too(tmp_path):
    with pytest.raises(NumericError, match=r"step 3: the loss is finite, its gradient is not"):
        train(tmp_path, loss=poisoned("gradient", math.nan, {6}), max_grad_norm=0.0)


def test_clipping_is_that_of_transformers(tmp_path, monkeypatch):
    """The same norm in the log, and the same weights, as with Trainer's own clipping."""
    own = train(tmp_path / "a", max_grad_norm=0.05)
    from transformers import Trainer

    from lora_core.trainer import LoraTrainer

    def theirs(self, model):
        self.means.accept()
        self._batches.clear()
        return Trainer._clip_grad_norm(self, model)

    monkeypatch.setattr(LoraTrainer, "_clip_grad_norm", theirs)
    other = train(tmp_path / "b", max_grad_norm=0.05)
    for name, value in own.network.state_dict().items():
        torch.testing.assert_close(other.network.state_dict()[name], value, rtol=1e-5, atol=1e-7)
    for one, two in zip(rows(tmp_path / "a", "train"), rows(tmp_path / "b", "train"), strict=True):
        assert float(one["grad_norm"]) == pytest.approx(float(two["grad_norm"]), rel=1e-5)


# -- the gradient scaler of fp16 -------------------------------------------------------------------


def with_scaler(folder, scale, **settings):
    """A training whose gradients are scaled, as with fp16; the CPU has the same scaler."""
    made = trainer(folder, **settings)
    made.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    return made


@pytest.mark.fault("R04")
def test_a_scaler_that_only_halves_ends_with_advice(tmp_path):
    made = with_scaler(
        tmp_path, 3e-4, loss=poisoned("gradient", math.inf, set(range(99))), measure=None
    )
    with pytest.raises(NumericError) as caught:
        made.train()
    text = str(caught.value)
    assert "step 2: the fp16 gradients overflow even when scaled by 7.5e-05" in text
    assert "compute in bf16 or fp32" in text


@pytest.mark.fault("R01", "R03", "K17")
def test_an_overflow_is_the_scalers_business_and_is_resumed_exactly(tmp_path):
    settings = {"measure": None, "trainer": {"save_steps": 2}, "steps": 8}
    made = with_scaler(tmp_path, 1024.0, loss=poisoned("gradient", math.inf, {6}), **settings)
    made.train()
    assert made.dropped == []
    assert made.scaler.get_scale() == 512
    again = with_scaler(tmp_path, 1.0, loss=loss, **settings)
    again.train(str(tmp_path / "checkpoint-4"))
    assert again.scaler.get_scale() == 512
    assert_same_bits(made.network, again.network)


@pytest.mark.fault("R01")
def test_with_a_scaler_a_loss_that_is_not_finite_still_stops(tmp_path):
    made = with_scaler(tmp_path, 1024.0, loss=poisoned("loss", math.nan, {6}))
    with pytest.raises(NumericError, match="step 3: the loss is not finite"):
        made.train()
    guards = Guards(skip_nonfinite=True)
    made = with_scaler(tmp_path, 1024.0, loss=poisoned("loss", math.nan, {6}), guards=guards)
    made.train()
    assert made.dropped == [3]
    assert all(torch.isfinite(value).all() for value in made.network.state_dict().values())


@pytest.mark.fault("R05")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_trained_weights_are_fp32_whatever_the_model_is(tmp_path, dtype):
    model = network().to(dtype)
    trainer(tmp_path, model=model)
    kinds = {p.requires_grad: p.dtype for p in model.parameters()}
    assert kinds == {False: dtype, True: torch.float32}


# -- nothing to learn from -------------------------------------------------------------------------


@pytest.mark.fault("R06")
def test_nothing_to_train_is_said_before_the_first_batch(tmp_path):
    data = Points()
    data.__class__ = type("Unread", (Points,), {"__getitem__": None})
    with pytest.raises(ConfigError, match="nothing to train: no parameter of the model requires"):
        trainer(tmp_path, model=nn.Linear(8, 3).requires_grad_(False), data=data)


@pytest.mark.fault("R06", "R07")
@pytest.mark.parametrize(
    ("cut", "part"),
    [
        (lambda model, batch: (loss(model, batch)[0].detach(), {}), "the loss has no gradient"),
        (lambda model, batch: (torch.zeros(()), {}), "the loss has no gradient"),
        (
            lambda model, batch: (0 * sum(p.sum() for p in model.parameters()), {}),
            "no adapter moved in the first update",
        ),
    ],
)
def test_a_loss_without_a_way_to_the_adapters_stops_at_once(tmp_path, cut, part):
    with pytest.raises(NumericError, match=part):
        train(tmp_path, loss=cut)


@pytest.mark.fault("R07")
def test_reentrant_checkpointing_over_a_frozen_stem_is_found(tmp_path):
    from torch.utils.checkpoint import checkpoint as recompute

    def reentrant(model, batch):
        out = recompute(model, batch["inputs"]["x"], use_reentrant=True)
        return (out - batch["y"]).square().mean(), {}

    with pytest.warns(UserWarning, match="None of the inputs"), pytest.raises(NumericError) as e:
        train(tmp_path, loss=reentrant, measure=None)
    assert "the loss has no gradient" in str(e.value)


# -- the adapted model is its base at the start ----------------------------------------------------


def base():
    torch.manual_seed(1)
    layers = [nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.2), nn.Linear(16, 3)]
    return nn.Sequential(*layers)


@pytest.mark.fault("K33")
@pytest.mark.parametrize(
    "settings",
    [{}, {"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}, {"use_dora": True}],
)
def test_every_initialisation_starts_as_the_base_and_trains(tmp_path, settings):
    model = network(**settings)
    assert is_initial(model)
    train(tmp_path, model=model, steps=2, measure=None)
    assert not is_initial(model)


@pytest.mark.fault("K33")
@pytest.mark.parametrize("settings", [{}, {"use_dora": True}])
def test_a_layer_that_computes_something_else_is_found_before_step_1(tmp_path, settings):
    model = network(**settings)
    layer = model[3]
    before = layer.forward
    layer.forward = lambda x: before(x) + 1.0 * bool(layer.lora_active)
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(NumericError, match="must equal its base") as caught:
        train(tmp_path, model=model, measure=None)
    assert "with adapters" in str(caught.value)
    assert all(torch.equal(kept[name], value) for name, value in model.state_dict().items())


def test_a_warm_start_may_differ_from_the_base(tmp_path):
    model = network()
    with torch.no_grad():
        model[3].lora_B["default"].weight.add_(1.0)
    assert train(tmp_path, model=model, steps=2).state.global_step == 2


def test_the_comparison_with_the_base_leaves_no_trace(tmp_path, monkeypatch):
    first = train(tmp_path / "a")
    monkeypatch.setattr("lora_core.trainer.check_identity", lambda *args: None)
    assert_same_bits(first.network, train(tmp_path / "b").network)


# -- merged models ---------------------------------------------------------------------------------


@pytest.mark.fault("K39")
def test_training_a_merged_model_is_an_error(tmp_path):
    model = network()
    with torch.no_grad():
        model[3].lora_B["default"].weight.add_(1.0)
    merge(model)
    with pytest.raises(ConfigError, match="merged"):
        trainer(tmp_path, model=model)
    with pytest.raises(errors.UserError, match="merged"):
        merge(model)
    with pytest.raises(errors.UserError, match="merged"):
        inject(model, LoraConfig(["0"], r=2), "second")
    with pytest.raises(errors.UserError, match="merged"):
        load_adapter(model, _saved(tmp_path))
    assert lora_layers(model)


def _saved(folder):
    from lora_core.adapters.file import save_adapter

    save_adapter(network(), folder / "other")
    return folder / "other"


def test_evaluation_and_numbers_are_independent(tmp_path):
    """A metric that is not finite is no reason to stop."""
    made = train(tmp_path, measure=lambda model: {**evaluate(model), "extra": math.nan})
    assert made.state.global_step == 23
    assert checkpoint.load(checkpoint.latest(tmp_path))["best"]["step"] > 0


# -- two processes ---------------------------------------------------------------------------------


def only_on_rank(rank, at):
    """A loss whose value is infinite in one process, while its gradient is fine."""

    def one_sided(model, batch):
        value, parts = loss(model, batch)
        if model.training:
            one_sided.calls += 1
            if one_sided.calls == at and os.environ["RANK"] == str(rank):
                value = value + math.inf
        return value, parts

    one_sided.calls = 0
    return one_sided


@pytest.mark.fault("R01", "R20", "R22")
def test_a_loss_that_is_not_finite_on_one_process_stops_both_and_names_its_samples(tmp_path):
    def rank(number):
        made = trainer(tmp_path, loss=only_on_rank(1, 6), log=False, measure=None)
        made.data_collator = named
        made.train()
        return 0

    ended = processes.run(rank, limit=40)
    assert [each.status for each in ended] == [2, 2]
    assert "step 3: the loss is not finite (process 1): " in ended[0].output
    assert "Traceback" not in ended[0].output + ended[1].output
    folders = {path.name for path in tmp_path.glob("nonfinite-*")}
    assert folders == {"nonfinite-step3-rank0", "nonfinite-step3-rank1"}
    about = json.loads((tmp_path / "nonfinite-step3-rank1" / "nonfinite.json").read_text())["about"]
    assert about["bad_batches"] == [1]
    assert about["samples"][1][0] in ended[0].output


@pytest.mark.fault("R01", "R20", "R22")
def test_an_update_is_dropped_on_both_processes_alike(tmp_path):
    def rank(number):
        guards = Guards(skip_nonfinite=True)
        made = trainer(tmp_path, loss=only_on_rank(1, 6), guards=guards, log=False)
        made.train()
        torch.save(made.network.state_dict(), tmp_path / f"weights-{number}.pt")
        return 0 if made.dropped == [3] else 7

    ended = processes.run(rank, limit=40)
    assert [each.status for each in ended] == [0, 0], ended[0].output
    assert ended[0].output.count("Update dropped (1 of at most 10)") == 1
    one, other = (
        torch.load(tmp_path / f"weights-{number}.pt", weights_only=True) for number in range(2)
    )
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert all(torch.isfinite(value).all() for value in one.values())
