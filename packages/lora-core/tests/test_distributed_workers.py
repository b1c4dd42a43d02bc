"""The worker processes of a data loader: how they begin, and that they end with the training."""

import gc
import os
import time

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset, default_collate

from lora_core.config import LoraConfig
from lora_core.injection import inject
from lora_core.testing.processes import members, run
from lora_core.trainer import LoraTrainer, training_arguments

X = torch.randn(24, 8, generator=torch.Generator().manual_seed(1))


class Points(Dataset):
    """Points that compute with several threads, or take long after a batch, if asked to."""

    def __init__(self, threads=False, seconds=0.0):
        self.threads, self.seconds, self.given = threads, seconds, 0

    def __len__(self):
        return len(X)

    def __getitem__(self, i):
        self.given += 1
        if self.given > 4:
            time.sleep(self.seconds)
        if self.threads:
            torch.ones(600, 600) @ torch.ones(600, 600)
        return X[i], X[i, :3]


def trainer(folder, data, loss=None, workers=2, **more):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 3))
    inject(model, LoraConfig(["0", "1"], r=2))

    def error(model, batch):
        return (model(batch[0]) - batch[1]).square().mean(), {}

    args = training_arguments(
        folder, learning_rate=1e-2, steps=6, batch_size=4, device="cpu", num_workers=workers,
        trainer=more,
    )  # fmt: skip
    return LoraTrainer(model, args, data, default_collate, loss or error)


@pytest.mark.fault("R34")
@pytest.mark.parametrize("seconds", [0.0, pytest.param(60.0, marks=pytest.mark.slow)])
def test_workers_end_within_seconds_when_the_training_throws(tmp_path, seconds):
    """Also in a process that lives on, and also workers that are in the middle of a sample."""

    def target(rank):
        calls = []

        def broken(model, batch):
            calls.append(time.monotonic())
            assert len(members(os.getpgid(0))) == 3, "two workers at work"
            raise ZeroDivisionError("at the first batch")

        made = trainer(tmp_path, Points(seconds=seconds), broken)
        with pytest.raises(ZeroDivisionError):
            made.train()
        assert len(calls) == 1
        gc.collect()
        deadline = calls[0] + 8  # torch itself waits 5 seconds, for one worker after the other
        while len(members(os.getpgid(0))) > 1 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert len(members(os.getpgid(0))) == 1, "workers live on"
        assert time.monotonic() < deadline, "they were waited for"

    (ended,) = run(target, world=1, limit=40)
    assert ended.status == 0, ended.output
    assert ended.left_behind == ()


@pytest.mark.fault("R32")
def test_workers_forked_from_a_process_with_threads_do_not_deadlock(tmp_path):
    def target(rank):
        torch.set_num_threads(4)
        for _ in range(3):
            torch.ones(900, 900) @ torch.ones(900, 900)  # starts OpenMP's threads
        trainer(tmp_path, Points(threads=True)).train()

    (ended,) = run(target, world=1, limit=40)
    assert (ended.status, ended.in_time) == (0, True), ended.output


@pytest.mark.slow
@pytest.mark.fault("R33")
def test_workers_can_be_spawned(tmp_path):
    """Where processes cannot be forked, all that a worker needs is pickled; same batches."""

    def target(rank):
        data = TensorDataset(X, X[:, :3])
        spawned = trainer(
            tmp_path / "a", data, workers=1, dataloader_multiprocessing_context="spawn"
        )
        spawned.train()
        alone = trainer(tmp_path / "b", data, workers=0)
        alone.train()
        one, other = alone.network.state_dict(), spawned.network.state_dict()
        assert not [name for name in one if not torch.equal(one[name], other[name])]

    (ended,) = run(target, world=1, limit=90)
    assert (ended.status, ended.left_behind) == (0, ()), ended.output
