"""Tiny trainings, seconds together."""

import json
import math
import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_training import (
    Points,
    X,
    assert_same_bits,
    loss,
    network,
    rows,
    train,
    trainer,
)
from torch import nn
from transformers import TrainingArguments

from lora_core import checkpoint
from lora_core.config import LoraConfig
from lora_core.errors import CheckpointError, ConfigError, DataError, NumericError
from lora_core.guards import Guards
from lora_core.injection import inject
from lora_core.testing import processes
from lora_core.trainer import choose_device, choose_precision, training_arguments
from lora_core.training.arguments import check_device
from lora_core.training.fields import REFUSED, SET_BY_US
from lora_core.training.schedule import FLOOR, EpochSampler, lr_factor


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run that others are compared with."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, train(folder)


# -- schedule and order ----------------------------------------------------------------------------


def test_the_rate_warms_up_and_ends_in_one_cosine_at_its_floor():
    factors = [lr_factor(update, 10, 100) for update in range(100)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert factors[9] == 1
    assert factors[9:] == sorted(factors[9:], reverse=True)
    assert factors[-1] == pytest.approx(FLOOR)
    middle = 9 + 45
    assert factors[middle] == pytest.approx((1 + FLOOR) / 2)


@pytest.mark.parametrize(("warmup", "total"), [(0, 1), (0, 2), (1, 1), (5, 5), (1, 3)])
def test_short_schedules_train_and_never_pass_the_peak(warmup, total):
    factors = [lr_factor(update, warmup, total) for update in range(total)]
    assert max(factors) == 1
    assert min(factors) > 0


@pytest.mark.fault("K09")
def test_the_order_is_a_function_of_seed_and_epoch():
    def order(seed, epoch):
        sampler = EpochSampler(40, seed)
        sampler.set_epoch(epoch)
        torch.rand(7)
        return list(sampler)

    assert sorted(order(1, 0)) == list(range(40))
    assert order(1, 2) == order(1, 2)
    different = [order(1, 0), order(1, 1), order(2, 0), order(-1, 0)]
    assert len({tuple(o) for o in different}) == 4


# -- settings --------------------------------------------------------------------------------------


def test_precision_follows_the_device_and_names_what_works():
    assert choose_precision("auto", "cpu") == "fp32"
    assert choose_precision("fp32", "cpu") == "fp32"
    for name in ("bf16", "fp16"):
        with pytest.raises(ConfigError, match=f"precision {name} does not run on cpu: .*fp32"):
            choose_precision(name, "cpu")
    with pytest.raises(ConfigError, match="'half' is not one of"):
        choose_precision("half", "cpu")


def test_a_missing_device_is_refused_before_anything_else():
    assert choose_device("cpu").type == "cpu"
    if not torch.cuda.is_available():
        assert choose_device("auto").type == "cpu"
        with pytest.raises(ConfigError, match="use auto or cpu"):
            choose_device("cuda")


@pytest.mark.parametrize(
    ("name", "value", "part"),
    [
        ("adam_bta1", 0.8, "did you mean 'adam_beta1'"),
        ("zzz", 1, "unknown --trainer.zzz; see TrainingArguments"),
        ("learning_rate", 1, "the command has its own setting"),
        ("fsdp", "full_shard", "start with torchrun"),
        ("push_to_hub", True, "nothing is uploaded"),
        ("dataloader_persistent_workers", True, "workers always live through all epochs"),
        ("lr_scheduler_type", "reduce_lr_on_plateau", "could not continue it exactly"),
        ("lr_scheduler_type", "cosin", "cosin"),
        ("adam_beta1", "x", "--trainer.adam_beta1: expected a number, not 'x'"),
        ("torch_compile", 3, "--trainer.torch_compile: expected true or false"),
    ],
)
def test_a_trainer_setting_that_cannot_be_is_refused_with_the_reason(tmp_path, name, value, part):
    with pytest.raises(ConfigError) as caught:
        training_arguments(
            tmp_path, learning_rate=1e-3, steps=3, device="cpu", trainer={name: value}
        )
    assert part in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("adam_beta1", "x", "--adam_beta1: expected a number, not 'x'"),
        ("log_level", "loud", "--log_level: unknown 'loud'; expected one of"),
        ("optim_args", "a=b=c", "--optim, optim_args and adam_... do not go together"),
        ("optimm", "sgd", "unknown --optimm; did you mean 'optim'"),
    ],
)
def test_messages_have_the_names_that_a_command_gives_these_settings(tmp_path, name, value, said):
    wrong = {"optim": "sgd", name: value}
    for check in (
        lambda: training_arguments(
            tmp_path, learning_rate=1e-3, steps=3, device="cpu", trainer=wrong, section=""
        ),
        lambda: check_device("cpu", "fp32", wrong, section=""),
    ):
        with pytest.raises(ConfigError) as caught:
            check()
        assert said in str(caught.value)
        assert "--trainer" not in str(caught.value)


def test_all_wrong_trainer_settings_are_reported_together(tmp_path):
    wrong = {"fsdp": "x", "adam_bta1": 1, "seed": 2}
    with pytest.raises(ConfigError) as caught:
        training_arguments(tmp_path, learning_rate=1, steps=3, device="cpu", trainer=wrong)
    assert len(str(caught.value).splitlines()) == 3


def test_every_other_field_of_training_arguments_is_passed_on(tmp_path):
    passed = {"adam_beta1": 0.8, "run_name": "7", "ddp_timeout": 60.0}
    args = training_arguments(
        tmp_path, learning_rate=1e-3, steps=30, warmup_steps=6, device="cpu", trainer=passed
    )
    assert (args.adam_beta1, args.run_name, args.ddp_timeout) == (0.8, "7", 60)
    assert (args.max_steps, args.warmup_steps) == (30, 6)
    assert args.report_to == []


def test_the_lists_of_settings_name_real_fields_and_do_not_overlap():
    fields = set(TrainingArguments.__dataclass_fields__)
    newer_or_older = {"activation_checkpointing", "activation_checkpointing_kwargs"}
    assert set(SET_BY_US) - fields <= newer_or_older
    assert set(REFUSED) - fields == {"compute_loss_func"} - fields
    assert not set(SET_BY_US) & set(REFUSED)


def test_the_length_is_given_once(tmp_path):
    for length in ({}, {"steps": 3, "epochs": 1.0}):
        with pytest.raises(ConfigError, match="as steps or as epochs"):
            training_arguments(tmp_path, learning_rate=1e-3, device="cpu", **length)


# -- training --------------------------------------------------------------------------------------


def test_training_learns_and_leaves_the_base_as_it_was(tmp_path, capsys):
    model = network()
    model.eval()
    before = {name: p.clone() for name, p in model.state_dict().items() if "lora_" not in name}
    made = train(tmp_path, model=model, steps=60, learning_rate=3e-2)
    assert made.best["value"] > float(rows(tmp_path, "val")[0]["score"]) + 0.1
    now = model.state_dict()
    assert not [name for name in before if not torch.equal(before[name], now[name])]
    assert not any(module.training for module in model.modules())  # as it was given
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("before training  score ")
    assert out[1].startswith("step 4/60  loss ")
    assert all(line.startswith("step ") for line in out[1:])  # transformers says nothing


def test_evaluation_runs_before_training_at_its_interval_and_at_the_end(whole):
    folder, _ = whole
    assert [row["step"] for row in rows(folder, "val")] == ["0", "5", "10", "15", "20", "23"]
    assert [row["step"] for row in rows(folder, "train")] == ["4", "8", "12", "16", "20", "23"]


def test_logged_losses_are_means_over_all_micro_batches_since_the_last_row(tmp_path):
    seen = []

    def recorded(model, batch):
        value, parts = loss(model, batch)
        if model.training:  # not the comparison with the base at the start
            seen.append(value.item())
        return value, parts

    train(tmp_path, data=Points(48), loss=recorded, measure=None, steps=10)
    assert len(seen) == 20
    expected = [np.mean(seen[0:8]), np.mean(seen[8:16]), np.mean(seen[16:20])]
    assert [float(row["loss"]) for row in rows(tmp_path)] == pytest.approx(expected, rel=1e-6)
    assert [row["mse"] for row in rows(tmp_path)] == [row["loss"] for row in rows(tmp_path)]
    rates = [1e-2 * lr_factor(step - 1, 1, 10) for step in (4, 8, 10)]
    assert [float(row["lr"]) for row in rows(tmp_path)] == pytest.approx(rates)


@pytest.mark.fault("R10")
def test_training_is_bit_equal_with_evaluation_on_or_off(tmp_path, whole):
    _, evaluated = whole
    assert_same_bits(train(tmp_path, measure=None).network, evaluated.network)


@pytest.mark.fault("R10")
def test_what_is_done_with_a_checkpoint_does_not_touch_training(tmp_path, whole):
    model = network()

    def draw(step, metrics=None):
        torch.rand(3), model.eval()

    train(tmp_path, model=model, on_latest=draw, on_best=draw)
    assert_same_bits(model, whole[1].network)


@pytest.mark.fault("R17")
def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not(tmp_path, whole):
    _, first = whole
    torch.rand(5), np.random.rand(5)  # noqa: NPY002 - what ran before has no say
    assert_same_bits(train(tmp_path / "a").network, first.network)
    other = train(tmp_path / "b", seed=4).network
    assert not torch.equal(other[0].lora_B.default.weight, first.network[0].lora_B.default.weight)


@pytest.mark.fault("R16", "K11")
def test_workers_change_no_bit(tmp_path, whole):
    _, first = whole
    assert_same_bits(train(tmp_path, num_workers=2).network, first.network)


@pytest.mark.fault("K09", "R16")
def test_the_data_set_knows_the_epoch_and_every_sample_comes_once(tmp_path):
    data, seen = Points(10), []

    def recorded(model, batch):
        if model.training:
            seen.extend(batch["ids"])
        return loss(model, batch)

    train(tmp_path, data=data, loss=recorded, steps=6, measure=None, num_workers=1)
    assert data.told == sorted(data.told)
    assert set(data.told) == {0, 1, 2}
    assert Counter(seen) == Counter((epoch, i) for epoch in range(3) for i in range(10))


def test_an_incomplete_accumulation_window_equals_one_big_batch(tmp_path):
    def run(name, batch_size, accumulation):
        return train(
            tmp_path / name,
            model=network(dropout=0.0),
            data=Points(10),
            batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            steps=8,
            measure=None,
        ).network.state_dict()

    # 10 samples: windows of 8 and 2
    one, parts = run("a", 8, 1), run("b", 2, 4)
    for name in one:
        torch.testing.assert_close(one[name], parts[name], rtol=0, atol=1e-6)


def test_gradients_are_clipped_to_the_norm(tmp_path):
    made = train(tmp_path, max_grad_norm=1e-3, steps=1, learning_rate=1.0, trainer=None)
    norm = math.sqrt(
        sum(
            state["exp_avg"].square().sum().item()
            for state in made.plain_optimizer().state.values()
        )
    )
    assert norm == pytest.approx((1 - 0.9) * 1e-3, rel=1e-3)  # first moment: (1 - beta1) g


def test_b_may_learn_faster_than_a(tmp_path):
    made = trainer(tmp_path, b_lr_ratio=16.0)
    rates = {group["name"]: group["lr"] for group in made.create_optimizer().param_groups}
    assert rates["B"] == 16 * rates["A"] == 16e-2


def test_other_optimizers_and_schedules_of_transformers_work(tmp_path):
    settings = {"optim": "sgd", "lr_scheduler_type": "linear"}
    made = train(tmp_path, steps=4, log_steps=1, measure=None, trainer=settings)
    assert type(made.plain_optimizer()) is torch.optim.SGD
    assert [float(row["lr"]) for row in rows(tmp_path)] == pytest.approx(
        [0.01, 0.0075, 0.005, 0.0025]
    )


@pytest.mark.fault("R05")
def test_half_precision_adapters_are_trained_in_fp32(tmp_path):
    model = network().bfloat16()
    trainer(tmp_path, model=model)
    kinds = {p.requires_grad: p.dtype for p in model.parameters()}
    assert kinds == {False: torch.bfloat16, True: torch.float32}


def test_trained_norms_learn_their_statistics_and_resume_them(tmp_path):
    def model():
        torch.manual_seed(1)
        made = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 3))
        inject(made, LoraConfig(["0", "2"], r=2, modules_to_save=["1"]))
        return made

    first = train(tmp_path, model=model()).network
    assert first[1].running_mean.abs().max() > 0
    again = train(tmp_path, model=model(), resume=str(tmp_path / "checkpoint-10")).network
    assert_same_bits(first, again)


# -- best, early stopping, checkpoints -------------------------------------------------------------


def scripted(values):
    """An evaluation that gives the values in turn, the baseline first."""
    rest = iter(values)
    return lambda model: {"score": next(rest)}


@pytest.mark.fault("K20", "R36")
@pytest.mark.parametrize(
    ("values", "stop", "best"),
    [
        ([0.9, 0.5, 0.6, 0.6, 0.59, 9], 20, 10),  # the baseline is no best; a tie is no gain
        ([0.0, 0.5, math.nan, math.nan, 9], 15, 5),
        ([0.0, math.nan, math.nan, 9], 10, None),
        ([0.0, 0.5, 0.5005, 0.5009, 9], 15, 15),  # better by less than min_delta: best, no gain
        ([0.0, 0.5, 0.4, 0.6, 0.5, 0.4, 9], 25, 15),
    ],
)
def test_patience_counts_validations_without_a_real_gain(tmp_path, values, stop, best):
    made = train(
        tmp_path, measure=scripted(values), patience=2, min_delta=1e-3, steps=100, log_steps=7
    )
    assert made.state.global_step == stop
    assert (made.best["step"] if made.best else None) == best
    assert checkpoint.steps(tmp_path)[-1] == stop
    assert rows(tmp_path, "train")[-1]["step"] == str(stop)


def test_best_and_latest_are_told_after_their_checkpoint_is_complete(tmp_path):
    told = []

    def on_best(step, metrics):
        assert (tmp_path / f"checkpoint-{step}" / "manifest.json").is_file()
        told.append(("best", step, metrics["score"]))

    def on_latest(step):
        told.append(("latest", step))

    train(
        tmp_path,
        measure=scripted([0, 0.1, 0.3, 0.2]),
        eval_steps=4,
        steps=12,
        on_best=on_best,
        on_latest=on_latest,
        trainer={"save_steps": 6},
    )
    assert told == [
        ("best", 4, 0.1),
        ("latest", 4),
        ("latest", 6),
        ("best", 8, 0.3),
        ("latest", 8),
        ("latest", 12),
    ]


@pytest.mark.fault("K18", "K19")
def test_old_checkpoints_go_but_not_the_best_nor_those_that_others_need(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoint-1").symlink_to(elsewhere)
    (run / "checkpoint-2; rm -rf x").mkdir()
    train(
        run,
        measure=scripted([0, 0.1, 0.9, 0.2, 0.3, 0.4]),
        steps=25,
        referenced=lambda: {5},
        guards=Guards(keep_last=1),
    )
    assert checkpoint.steps(run) == [5, 10, 25]
    assert elsewhere.is_dir()
    assert (run / "checkpoint-1").is_symlink()
    assert (run / "checkpoint-2; rm -rf x").is_dir()


def test_a_checkpoint_holds_nothing_of_the_base_and_loads_safely(whole):
    folder, made = whole
    state = checkpoint.load(folder / "checkpoint-10")
    assert set(state["tensors"]) == {name for name in made.network.state_dict() if "lora_" in name}
    assert set(state["optimizer"]) == set(state["tensors"])
    assert json.loads((folder / "checkpoint-10" / "trainer_state.json").read_text())
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("freeze_A", [False, True])
def test_a_checkpoint_holds_the_pair_that_pissa_subtracts(freeze_A):
    model = network(init_lora_weights="pissa", freeze_A=freeze_A)
    names = checkpoint.tensors(model)
    assert {name for name in model.state_dict() if "lora_" in name} == {*names}
    assert sum("initial_" in name for name in names) == 4


def test_the_adapter_of_a_checkpoint_loads_into_a_plain_model(tmp_path):
    from lora_core.adapters.file import load_adapter

    made = train(tmp_path, steps=5, save_adapter=None)
    torch.manual_seed(1)
    plain = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.2), nn.Linear(16, 3))
    load_adapter(plain, tmp_path / "checkpoint-5" / "adapter")
    assert torch.equal(plain.eval()(X), made.network.eval()(X))


# -- resume ----------------------------------------------------------------------------------------


@pytest.mark.fault("K08", "K10", "K11")
@pytest.mark.parametrize(
    ("step", "workers"),
    [(5, 0), (10, 2), (14, 0), (15, 0), (20, 0), (21, 2)],
)
def test_resume_is_bit_equal_to_the_run_without_interruption(tmp_path, step, workers):
    """7 updates per epoch: inside an epoch, at its border, and inside a log window."""
    saves = {"save_steps": 7 if step % 7 == 0 else 5}
    first = train(tmp_path / "a", trainer=saves)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    again = train(
        tmp_path / "b",
        resume=str(tmp_path / "b" / f"checkpoint-{step}"),
        num_workers=workers,
        trainer=saves,
    )
    assert_same_bits(first.network, again.network)
    assert rows(tmp_path / "a") == rows(tmp_path / "b")
    assert first.best == again.best


def test_resuming_again_and_again_inside_one_epoch_is_bit_equal(tmp_path, whole):
    class Stop(Exception):
        pass

    def dies_at(step):
        def on_latest(done):
            if done >= step:
                raise Stop

        return on_latest

    saves = {"trainer": {"save_steps": 1}, "guards": Guards(keep_last=2)}
    for step in (2, 3, 5, 6, 17):
        made = trainer(tmp_path, on_latest=dies_at(step), **saves)
        with pytest.raises(Stop):
            made.train(step > 2)
        assert checkpoint.latest(tmp_path).name == f"checkpoint-{step}"
    made = trainer(tmp_path, **saves)
    made.train(True)
    folder, first = whole
    assert_same_bits(first.network, made.network)
    assert rows(tmp_path) == rows(folder)


@pytest.mark.fault("K17")
def test_early_stopping_counts_on_after_a_resume(tmp_path):
    values = [0.0, 0.5, 0.4, 0.4, 0.4, 0.4]
    first = train(tmp_path / "a", measure=scripted(values), patience=3, steps=100)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    again = train(
        tmp_path / "b",
        resume=str(tmp_path / "b" / "checkpoint-10"),
        measure=scripted(values[3:]),
        patience=3,
        steps=100,
    )
    assert first.state.global_step == again.state.global_step == 20
    assert rows(tmp_path / "a") == rows(tmp_path / "b")


def test_a_finished_run_is_not_trained_on(tmp_path, whole, capsys):
    folder, first = whole
    shutil.copytree(folder, tmp_path / "b")
    again = train(tmp_path / "b", resume=True)
    assert_same_bits(first.network, again.network)
    assert rows(tmp_path / "b") == rows(folder)
    assert "already finished" in capsys.readouterr().out


def test_resume_with_more_steps_rebuilds_the_schedule(tmp_path):
    train(tmp_path, steps=10, measure=None, log_steps=1, trainer={"save_steps": 5})
    resume = str(tmp_path / "checkpoint-5")
    train(tmp_path, resume=resume, steps=40, measure=None, log_steps=1, learning_rate=2e-2)
    rates = [float(row["lr"]) for row in rows(tmp_path)]
    assert rates[:5] == pytest.approx([1e-2 * lr_factor(i, 1, 10) for i in range(5)])
    assert rates[5:] == pytest.approx([2e-2 * lr_factor(i, 3, 40) for i in range(5, 40)])


@pytest.mark.fault("K16")
def test_optimizer_state_follows_parameter_names_not_their_order(tmp_path):
    made = train(tmp_path, steps=5)
    state = checkpoint.load(tmp_path / "checkpoint-5")["optimizer"]
    parameters = dict(made.network.named_parameters())
    names = {id(parameter): name for name, parameter in parameters.items()}
    turned = torch.optim.AdamW([parameters[name] for name in reversed(list(state))])
    checkpoint.load_optimizer_state(turned, names, state)
    for name, moments in state.items():
        assert torch.equal(turned.state[parameters[name]]["exp_avg"], moments["exp_avg"])


def test_a_run_without_checkpoint_cannot_be_resumed(tmp_path):
    with pytest.raises(CheckpointError, match="holds no training checkpoint"):
        train(tmp_path, resume=True)


@pytest.mark.parametrize(
    ("spoil", "part"),
    [
        (lambda file: file.unlink(), "state.safetensors is missing"),
        (lambda file: file.write_bytes(b""), "state.safetensors has 0 bytes instead of"),
        (lambda file: file.write_bytes(file.read_bytes()[:1000]), "has 1,000 bytes instead of"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_changes_nothing(tmp_path, whole, spoil, part):
    folder, _ = whole
    shutil.copytree(folder / "checkpoint-10", tmp_path / "checkpoint-10")
    spoil(tmp_path / "checkpoint-10" / "state.safetensors")
    made = trainer(tmp_path)
    before = {name: p.clone() for name, p in made.network.state_dict().items()}
    with pytest.raises(CheckpointError, match=part) as caught:
        made.train(str(tmp_path / "checkpoint-10"))
    assert str(tmp_path / "checkpoint-10") in str(caught.value)
    now = made.network.state_dict()
    assert not [name for name in before if not torch.equal(before[name], now[name])]


def test_a_checkpoint_of_another_adapter_is_refused_with_its_differences(tmp_path, whole):
    folder, _ = whole
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.2), nn.Linear(16, 3))
    inject(model, LoraConfig(["0"], r=4))
    made = trainer(tmp_path, model=model)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        made.train(str(folder / "checkpoint-10"))
    assert "0.lora_A.default.weight: shape (2, 8) in the checkpoint, (4, 8)" in str(caught.value)
    assert "3.lora_A.default.weight: not in this model" in str(caught.value)
    assert not [name for name in before if not torch.equal(before[name], model.state_dict()[name])]


# -- checks ----------------------------------------------------------------------------------------


@pytest.mark.fault("R06")
def test_a_model_without_trainable_parameters_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="nothing to train"):
        trainer(tmp_path, model=nn.Linear(2, 2).requires_grad_(False))


@pytest.mark.fault("R09", "D09")
def test_too_few_samples_are_refused(tmp_path):
    with pytest.raises(DataError, match="0 training samples"):
        trainer(tmp_path, data=Points(0))
    with pytest.raises(DataError, match="at least 4"):
        trainer(tmp_path, data=Points(3), trainer={"dataloader_drop_last": True})


@pytest.mark.fault("R09", "D09")
def test_fewer_samples_than_a_batch_are_fine(tmp_path):
    assert train(tmp_path, data=Points(3), steps=4).state.global_step == 4


@pytest.mark.fault("R07")
def test_adapters_that_do_not_move_are_an_error(tmp_path):
    def cut(model, batch):
        return 0 * sum(p.sum() for p in model.parameters() if p.requires_grad), {}

    with pytest.raises(NumericError, match="no adapter moved in the first update"):
        train(tmp_path, loss=cut)


def test_some_adapters_that_do_not_move_are_named(tmp_path, capsys):
    def half(model, batch):
        return model[0](batch["inputs"]["x"]).square().mean(), {}

    train(tmp_path, loss=half, steps=2)
    out = capsys.readouterr().out
    assert "1 of 2 adapters did not move in the first update:\n  3.lora_B.default.weight" in out


def test_an_evaluation_without_metrics_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="gave no metric"):
        train(tmp_path, measure=lambda model: {})


@pytest.mark.fault("C40")
def test_a_reporting_tool_that_is_missing_is_named(tmp_path):
    with pytest.raises(ConfigError, match="wandb"):
        trainer(tmp_path, trainer={"report_to": "wandb"})


# -- precision -------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_mixed_precision_trains_and_resumes_on_a_gpu(tmp_path, precision):
    settings = {"device": "cuda", "precision": precision, "steps": 40, "learning_rate": 3e-2}
    first = train(tmp_path, **settings)
    scores = [float(row["score"]) for row in rows(tmp_path, "val")]
    assert scores[-1] > scores[0] + 0.1
    assert {p.dtype for p in first.network.parameters()} == {torch.float32}
    again = train(tmp_path, resume=str(tmp_path / "checkpoint-20"), **settings)
    for name, value in first.network.state_dict().items():
        torch.testing.assert_close(again.network.state_dict()[name], value, rtol=1e-3, atol=1e-4)


# -- several processes -----------------------------------------------------------------------------


def distributed_run(folder, batch_size):
    """Train with the processes that there are; every rank writes its weights."""
    made = train(
        folder,
        model=network(dropout=0.0),
        data=Points(40),
        batch_size=batch_size,
        gradient_accumulation_steps=1,
        steps=12,
        log=True,
    )
    rank = os.environ.get("RANK", "0")
    torch.save(made.network.state_dict(), Path(folder) / f"weights-{rank}.pt")
    facts = {
        "processes": made.accelerator.num_processes,
        "told": made.train_dataset.samples.told,
        "best": made.best,
    }
    (Path(folder) / f"facts-{rank}.json").write_text(json.dumps(facts))


def test_two_processes_equal_one_with_twice_the_batch(tmp_path):
    ended = processes.run(lambda rank: distributed_run(tmp_path / "two", 4))
    assert [process.status for process in ended] == [0, 0], ended
    distributed_run(tmp_path / "one", 8)

    def weights(name, rank):
        return torch.load(tmp_path / name / f"weights-{rank}.pt", weights_only=True)

    def facts(name, rank):
        return json.loads((tmp_path / name / f"facts-{rank}.json").read_text())

    first, second, alone = weights("two", 0), weights("two", 1), weights("one", 0)
    for name in alone:
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], alone[name], rtol=1e-6, atol=1e-6)
    assert facts("two", 0) == facts("two", 1)
    assert facts("two", 0)["processes"] == 2
    assert set(facts("two", 0)["told"]) == {0, 1, 2}
    assert ["before training" in process.output for process in ended] == [True, False]
    for one, two in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        assert (one["step"], one["split"]) == (two["step"], two["split"])
        if one["loss"]:
            assert float(one["loss"]) == pytest.approx(float(two["loss"]), rel=1e-6)
