"""Worker processes live through all epochs and change nothing: samples, random numbers, order."""

import os

import pytest
import tiny_training
import torch
from torch import nn
from torch.utils.data import Dataset, default_collate

from lora_core.config import LoraConfig
from lora_core.injection import inject
from lora_core.trainer import LoraTrainer, training_arguments
from lora_core.training.loading import Watched, data_loader
from lora_core.training.schedule import EpochSampler
from lora_core.training.shares import RankBatches

SIZE, BATCH, EPOCHS = 10, 3, 3


class Told(Dataset):
    """(epoch, index, process) of each sample; the epoch is a plain attribute, which is copied."""

    def __init__(self):
        self.epoch = -1

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return SIZE

    def __getitem__(self, index):
        return self.epoch, index, os.getpid()


class Loading:
    """What a trainer does with its data loader, epoch after epoch."""

    def __init__(self, workers, data=None, **more):
        self.order = EpochSampler(SIZE, seed=5)
        batches = RankBatches(self.order, BATCH, 0, 1)
        self.loader = data_loader(Watched(data or Told()), batches, list, workers=workers, **more)

    def epoch(self, number):
        """The batches of an epoch, and a random number drawn after each."""
        self.order.set_epoch(number)
        self.loader.dataset.set_epoch(number)
        return [(batch, torch.rand(()).item()) for batch in self.loader]


def without_processes(epochs):
    return [[([s[:2] for s in batch], drawn) for batch, drawn in one] for one in epochs]


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_and_random_numbers_are_those_without_workers(workers):
    runs = []
    for count in (0, workers):
        torch.manual_seed(0)
        loading = Loading(count)
        runs.append([loading.epoch(number) for number in range(EPOCHS)])
    alone, together = map(without_processes, runs)
    assert together == alone
    seen = [[sample for batch, _ in one for sample in batch] for one in alone]
    assert [sorted(one) for one in seen] == [
        [(epoch, index) for index in range(SIZE)] for epoch in range(EPOCHS)
    ]
    assert [i for _, i in seen[0]] != [i for _, i in seen[1]], "another order in each epoch"


def test_workers_are_started_once():
    loading = Loading(2)
    processes = [
        {sample[2] for batch, _ in loading.epoch(number) for sample in batch}
        for number in range(EPOCHS)
    ]
    assert len(processes[0]) == 2
    assert os.getpid() not in processes[0]
    assert processes == [processes[0]] * EPOCHS


def test_a_later_epoch_has_the_same_random_numbers_if_a_run_begins_with_it():
    """As a resumed run does: its workers start with that epoch."""
    torch.manual_seed(0)
    whole = Loading(2)
    whole.epoch(0)
    state = torch.get_rng_state()
    expected = without_processes([whole.epoch(1), whole.epoch(2)])
    torch.set_rng_state(state)
    resumed = Loading(1)
    assert without_processes([resumed.epoch(1), resumed.epoch(2)]) == expected


def test_an_epoch_that_is_broken_off_leaves_nothing_in_the_next_one():
    loading = Loading(1, prefetch=1)
    loading.order.set_epoch(0)
    loading.loader.dataset.set_epoch(0)
    next(iter(loading.loader))
    found = [sample for batch, _ in loading.epoch(1) for sample in batch]
    assert sorted(sample[:2] for sample in found) == [(1, index) for index in range(SIZE)]


@pytest.mark.slow
def test_spawned_workers_hear_of_each_epoch():
    # A module that another process can import: it pickles the data set by its name.
    loading = Loading(1, tiny_training.Points(SIZE), start_method="spawn")
    for number in range(2):
        found = [sample["id"] for batch, _ in loading.epoch(number) for sample in batch]
        assert sorted(found) == [(number, index) for index in range(SIZE)]


class Points(Dataset):
    """A point, what is to be learned of it, and the process that gave it."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return torch.full((8,), index / 8), torch.full((3,), 1.0), os.getpid()


def test_a_training_keeps_its_workers(tmp_path):
    processes = []

    def error(model, batch):
        processes.append(batch[2].tolist())
        return (model(batch[0]) - batch[1]).square().mean(), {}

    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 3))
    inject(model, LoraConfig(["0", "1"], r=2))
    args = training_arguments(
        tmp_path, learning_rate=1e-2, steps=6, batch_size=4, device="cpu", num_workers=2
    )
    LoraTrainer(model, args, Points(), default_collate, error).train()
    assert len(processes) >= 6, "three epochs of two batches"
    assert len({process for batch in processes for process in batch}) == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_pinned_batches_arrive_on_the_device_as_they_are(tmp_path):
    model = nn.Sequential(nn.Linear(8, 3))
    inject(model, LoraConfig(["0"], r=2))
    args = training_arguments(tmp_path, learning_rate=1e-2, steps=1, device="cuda")
    trainer = LoraTrainer(model, args, Points(), default_collate, lambda model, batch: None)
    batches = [{"x": [torch.randn(2**22).pin_memory()]} for _ in range(4)]
    moved = [trainer._prepare_input(batch) for batch in batches]
    for batch, there in zip(batches, moved, strict=True):
        assert batch["x"][0].is_pinned()
        assert there["x"][0].is_cuda
        assert torch.equal(there["x"][0].cpu(), batch["x"][0])
