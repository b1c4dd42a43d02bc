"""A training of seconds: noisy points, a network of two adapted layers.

Not a test: `conftest.py` puts this folder on the path.
"""

import csv
import gc
import random
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

from lora_core.config import LoraConfig
from lora_core.guards import Guards
from lora_core.injection import inject
from lora_core.report import RunLog
from lora_core.trainer import LoraTrainer, training_arguments
from lora_core.training.schedule import EpochSampler

# transformers collects garbage at every start of a training: spare it the imported libraries.
gc.freeze()

COLUMNS = ["step", "epoch", "split", "loss", "mse", "score", "lr", "grad_norm", "seconds"]
X = torch.randn(50, 8, generator=torch.Generator().manual_seed(1))
Y = torch.sin(2 * X[:, :3])


class Points(Dataset):
    """Noisy points; a sample is a function of (epoch, index)."""

    def __init__(self, size=50, noise=0.1):
        self.size, self.noise, self.epoch, self.told = size, noise, 0, []

    def set_epoch(self, epoch):
        self.epoch = epoch
        self.told.append(epoch)

    def __len__(self):
        return self.size

    def __getitem__(self, i):
        noise = torch.randn(8, generator=torch.Generator().manual_seed(1000 * self.epoch + i))
        return {"x": X[i] + self.noise * noise, "y": Y[i], "id": (self.epoch, i)}


class FromOneOn(EpochSampler):
    """All indices in turn, from another one in each epoch."""

    def __iter__(self):
        start = 7 * (self.seed + self.epoch)
        yield from ((start + index) % self.size for index in range(self.size))


def collate(samples):
    return {
        "inputs": {"x": torch.stack([s["x"] for s in samples])},
        "y": torch.stack([s["y"] for s in samples]),
        "ids": [s["id"] for s in samples],
    }


def loss(model, batch):
    value = (model(batch["inputs"]["x"]) - batch["y"]).square().mean()
    return value, {"mse": value.detach()}


def evaluate(model):
    torch.rand(3), np.random.rand(3), random.random()  # noqa: NPY002 - must not be felt
    assert not model.training
    device = model[0].weight.device
    error = (model(X.to(device)).float() - Y.to(device)).square().mean().item()
    return {"score": 1 - error, "error": error}


def network(dropout=0.2, **settings):
    torch.manual_seed(1)
    layers = [nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(dropout), nn.Linear(16, 3)]
    model = nn.Sequential(*layers)
    inject(model, LoraConfig(["0", "3"], r=2, lora_dropout=dropout, **settings))
    return model


def trainer(folder, model=None, data=None, measure=evaluate, loss=loss, log=True, **settings):
    for name in LoraTrainer.__init__.__kwdefaults__:
        settings.setdefault("own", {}).update(
            {name: settings.pop(name)} if name in settings else {}
        )
    own = settings.pop("own", {})
    defaults = {
        "learning_rate": 1e-2,
        "steps": 23,
        "batch_size": 4,
        "warmup_steps": min(3, settings.get("steps", 23) // 10),
        "gradient_accumulation_steps": 2,
        "log_steps": 4,
        "eval_steps": 5,
        "seed": 3,
        "device": "cpu",
    }
    if log:
        own["log"] = RunLog(
            Path(folder) / "tensorboard", Path(folder) / "log.csv", COLUMNS, tensorboard=False
        )
    own.setdefault("save_adapter", Path.mkdir)
    own.setdefault("guards", Guards(keep_last=99))
    return LoraTrainer(
        network() if model is None else model,
        training_arguments(folder, **defaults | settings),
        Points() if data is None else data,
        collate,
        loss,
        measure,
        **own,
    )


def train(folder, resume=None, **settings):
    made = trainer(folder, **settings)
    made.train(resume)
    return made


def rows(folder, split=None):
    with (Path(folder) / "log.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    for row in found:
        del row["seconds"]
    return [row for row in found if split in (None, row["split"])]


def assert_same_bits(one, other):
    one, other = one.state_dict(), other.state_dict()
    assert one.keys() == other.keys()
    assert not [name for name in one if not torch.equal(one[name], other[name])]
