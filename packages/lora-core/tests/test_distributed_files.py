"""Two processes with sharded parameters (FSDP2, gloo): files hold whole tensors."""

from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from lora_core.adapters.file import load_adapter, read_adapter, save_adapter
from lora_core.config import LoraConfig, Slices
from lora_core.errors import CheckpointError
from lora_core.injection import inject
from lora_core.testing import disturb
from lora_core.testing.processes import run

FORMS = ["adapter", "adapter.pt"]


class Net(nn.Module):
    def __init__(self):
        torch.manual_seed(0)
        super().__init__()
        self.qkv, self.out, self.head = nn.Linear(8, 24), nn.Linear(24, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.out(self.qkv(x)))


def adapted():
    model = Net()
    config = LoraConfig(["qkv", "out"], r=3, slices={"qkv": Slices()}, modules_to_save=["head"])
    inject(model, config)
    disturb(model)
    return model.eval()


@torch.no_grad()
def out(model):
    return model(torch.linspace(-1, 1, 16).reshape(2, 8))


def write(folder, rank):
    store, wait = f"file://{folder}/store", timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=wait)
    model = adapted()
    expected = out(model)
    for module in (model.qkv, model.out, model):
        fully_shard(module)
    A = model.qkv.lora_A["default"].weight
    assert A.to_local().numel() < A.numel(), "not sharded"
    for form in FORMS:
        save_adapter(model, Path(folder) / form, metadata={"step": 1})
    assert model.qkv.lora_A["default"].weight is A, "other parameters after saving"
    torch.testing.assert_close(out(model), expected)
    try:
        save_adapter(model, Path(folder) / "adapter.pt" / "below.pt")
    except CheckpointError as error:
        print(f"rank {rank} was told: {error}", flush=True)
    dist.barrier()


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """What two processes wrote, and what each of them said."""
    folder = tmp_path_factory.mktemp("sharded")
    ended = run(lambda rank: write(folder, rank))
    for process in ended:
        assert process.status == 0, process.output
    outputs = [process.output for process in ended]
    return folder, outputs


@pytest.mark.parametrize("form", FORMS)
def test_sharded_parameters_are_saved_whole(sharded, form, tmp_path):
    folder, _ = sharded
    model = adapted()
    whole = read_adapter(save_adapter(model, tmp_path / form, metadata={"step": 1}))
    file = read_adapter(folder / form)
    assert file.tensors.keys() == whole.tensors.keys()
    assert all(torch.equal(file.tensors[key], value) for key, value in whole.tensors.items())
    assert (file.config, file.extra, file.metadata) == (whole.config, whole.extra, whole.metadata)
    loaded = Net()
    load_adapter(loaded, folder / form)
    assert torch.equal(out(loaded), out(model))


def test_a_failure_of_the_writing_rank_is_raised_on_both(sharded):
    for rank, output in enumerate(sharded[1]):
        assert f"rank {rank} was told: cannot write" in output
