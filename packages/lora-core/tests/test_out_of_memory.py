"""Memory runs out: one message that helps, before the first step if possible, or a smaller batch.

Faults are injected into the loss, which raises what torch raises.
"""

import random

import numpy as np
import pytest
import torch
from tiny_training import (
    Points,
    assert_same_bits,
    collate,
    loss,
    network,
    rows,
    train,
    trainer,
)

from lora_core.checkpoint import state as checkpoint_state
from lora_core.errors import ConfigError, run
from lora_core.training.out_of_memory import Advice, explained, fit_batch, is_out_of_memory, trial

CUDA_SAYS = (
    "CUDA out of memory. Tried to allocate 2.25 GiB. GPU 0 has a total capacity of 79.10 GiB of "
    "which 1.06 GiB is free."
)
ADVICE = Advice(
    ["--gradient_checkpointing", "--targets decoder", "--image_size 768", "--max_objects 4"],
    lambda batch: f"{len(batch['y'])} points: {batch['ids'][0]}",
)


def limited(most, counted=None):
    """The loss on a device that holds `most` samples."""

    def guarded(model, batch):
        if counted is not None:
            counted.append(len(batch["y"]))
        if len(batch["y"]) > most:
            raise torch.OutOfMemoryError(CUDA_SAYS)
        return loss(model, batch)

    return guarded


def make(count):
    return collate([Points()[i] for i in range(count)])


# -- the message -----------------------------------------------------------------------------------


def assert_helpful(message, *parts):
    remedies = [message.index(remedy) for remedy in ADVICE.remedies]
    assert remedies == sorted(remedies), "what helps most comes first"
    for part in (*parts, "2.25 GiB", "free", "A lower rank does not", "the adapters are only"):
        assert part in message
    assert len(message.splitlines()) == 3
    assert "Traceback" not in message


@pytest.mark.fault("R13")
@pytest.mark.parametrize("step", [1, 9])
def test_the_message_names_step_batch_numbers_and_what_helps(tmp_path, step, capsys):
    calls = []

    def late(model, batch):
        if model.training:
            calls.append(1)
        if len(calls) == 2 * step:  # the second of two accumulated batches
            raise torch.OutOfMemoryError(CUDA_SAYS)
        return loss(model, batch)

    made = trainer(tmp_path, loss=late, data=Points(48), advice=ADVICE)
    assert run(lambda argv: made.train(), []) == 2
    assert_helpful(capsys.readouterr().err, f"training at step {step}, 4 points: (")


@pytest.mark.fault("R14")
def test_running_out_in_validation_says_so(tmp_path, capsys):
    def measure(model):
        if made.state.global_step == 5:
            raise torch.OutOfMemoryError(CUDA_SAYS)
        return {"score": 0.0}

    made = trainer(tmp_path, measure=measure, advice=ADVICE)
    assert run(lambda argv: made.train(), []) == 2
    assert_helpful(capsys.readouterr().err, "out of memory in validation at step 5")


@pytest.mark.fault("R14")
@pytest.mark.parametrize("error", [torch.OutOfMemoryError(CUDA_SAYS), MemoryError()])
def test_running_out_while_saving_says_so(tmp_path, error, capsys):
    def save(path):
        raise error

    made = trainer(tmp_path, save_adapter=save, advice=ADVICE)
    assert run(lambda argv: made.train(), []) == 2
    message = capsys.readouterr().err
    assert "out of memory in saving at step 5" in message
    assert "A lower rank does not" in message


@pytest.mark.fault("R13")
def test_the_system_allocator_is_understood_too():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(10**16)
    assert is_out_of_memory(caught.value)
    says = r"out of memory in a test: .* more were asked for, .* free on the host"
    with pytest.raises(ConfigError, match=says), explained(network(), lambda: "a test"):
        torch.empty(10**16)


@pytest.mark.parametrize(
    "error", [RuntimeError("shape '[2]' is invalid"), ValueError("out of memory"), KeyError("x")]
)
def test_other_errors_stay_what_they_are(error):
    assert not is_out_of_memory(error)
    with pytest.raises(type(error)) as caught, explained(network(), lambda: "a test"):
        raise error
    assert caught.value is error


# -- the largest batch first -----------------------------------------------------------------------


@pytest.mark.fault("R13")
def test_a_trial_leaves_everything_as_it_was():
    model = network(modules_to_save=["1"])
    model.train()
    model[3].eval()
    modes = [module.training for module in model.modules()]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    randoms = checkpoint_state.random_state()
    seen = []

    def spoiling(net, batch):
        torch.rand(3), np.random.rand(3), random.random()  # noqa: NPY002 - must not be felt
        value, parts = loss(net, batch)
        value.register_hook(seen.append)
        return value, parts

    trial(model, spoiling, make(8))
    assert len(seen) == 1, "the backward pass ran"
    after = model.state_dict()  # batch norm counts its batches, if it trains
    assert not [name for name in before if not torch.equal(before[name], after[name])]
    assert all(p.grad is None for p in model.parameters())
    assert [module.training for module in model.modules()] == modes
    now = checkpoint_state.random_state()
    assert str(now["python"]) == str(randoms["python"])
    assert str(now["numpy"]) == str(randoms["numpy"])
    assert torch.equal(now["torch"], randoms["torch"])


@pytest.mark.fault("R13")
def test_a_trial_that_fails_leaves_everything_as_it_was_too():
    model = network(modules_to_save=["1"])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def late(net, batch):
        loss(net, batch)
        raise torch.OutOfMemoryError(CUDA_SAYS)

    with pytest.raises(torch.OutOfMemoryError):
        trial(model, late, make(4))
    after = model.state_dict()
    assert not [name for name in before if not torch.equal(before[name], after[name])]


@pytest.mark.fault("R13")
@pytest.mark.parametrize(
    ("batch", "most", "expected"),
    [(8, 8, (8, 1)), (8, 7, (4, 2)), (8, 3, (2, 4)), (12, 3, (3, 4)), (5, 4, (1, 5))],
)
def test_auto_batch_keeps_the_effective_batch_and_says_so_once(batch, most, expected, capsys):
    assert fit_batch(network(), limited(most), make, batch, 1, auto=True) == expected
    said = capsys.readouterr().out
    assert said.count("--auto_batch") == (expected[0] < batch)
    if expected[0] < batch:
        flags = f"--batch_size {expected[0]} and --gradient_accumulation_steps {expected[1]}"
        assert flags in said


@pytest.mark.fault("R13")
def test_auto_batch_says_it_in_the_names_that_a_package_has(capsys):
    names = ("per_device_train_batch_size", "accumulation")
    assert fit_batch(network(), limited(2), make, 4, 3, auto=True, settings=names) == (2, 6)
    said = capsys.readouterr().out
    assert "so --per_device_train_batch_size 2 and --accumulation 6 make updates" in said


@pytest.mark.fault("R13")
def test_one_sample_that_does_not_fit_stops_the_run_even_with_auto_batch():
    with pytest.raises(ConfigError) as caught:
        fit_batch(network(), limited(0), make, 4, 1, auto=True, advice=ADVICE)
    assert_helpful(str(caught.value), "largest batch before step 1 (1 points: (0, 0))")


def test_on_the_cpu_nothing_is_tried_unless_asked_for():
    counted = []
    assert fit_batch(network(), limited(1, counted), make, 4, 2) == (4, 2)
    assert counted == []


def test_other_errors_of_a_trial_are_not_taken_for_missing_memory():
    def broken(model, batch):
        raise RuntimeError("a fault of ours")

    with pytest.raises(RuntimeError, match="a fault of ours"):
        fit_batch(network(), broken, make, 4, 1, auto=True)


@pytest.mark.fault("R13")
def test_a_run_with_the_batch_that_was_found_is_the_run_that_was_asked_for_with_it(tmp_path):
    model = network()
    batch, accumulation = fit_batch(model, limited(2), make, 8, 1, auto=True)
    settings = {"batch_size": batch, "gradient_accumulation_steps": accumulation, "steps": 8}
    found = train(tmp_path / "found", model=model, loss=limited(2), **settings)
    asked = train(tmp_path / "asked", batch_size=2, gradient_accumulation_steps=4, steps=8)
    assert_same_bits(found.network, asked.network)
    assert rows(tmp_path / "found") == rows(tmp_path / "asked")
