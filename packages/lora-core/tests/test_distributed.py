"""Two processes on gloo: gradients are those of one process with the whole batch."""

import copy
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from lora_core.config import LoraConfig, Slices
from lora_core.injection import inject, trainable_parameters
from lora_core.testing.processes import run


class Net(nn.Module):
    """Wrapped, fused and parametrized layers, one block under activation checkpointing."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.qkv = nn.Linear(8, 24)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        x = self.conv(x.transpose(1, 2)).transpose(1, 2)
        x = x + torch.tanh(self.qkv(x)).unflatten(-1, (3, 8)).sum(-2)
        return self.head(checkpoint(self.block, x, use_reentrant=False))


def adapted():
    torch.manual_seed(0)
    model = Net()
    targets = ["conv", "qkv", "self_attn", "linear1", "linear2"]
    config = LoraConfig(targets, r=2, slices={"qkv": Slices()}, modules_to_save=["head"])
    inject(model, config)
    with torch.no_grad():
        for parameter in trainable_parameters(model):
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def gradients(model, x):
    model(x).square().mean().backward()
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            grad = parameter.grad
            grad = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
            found[name.removeprefix("module.")] = grad
    return found


def compare(store, rank, world=2):
    wait = timedelta(seconds=60)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=wait
    )
    model, x = adapted(), torch.randn(8, 5, 8, generator=torch.Generator().manual_seed(1))
    expected = gradients(copy.deepcopy(model), x)
    assert all(grad.abs().max() > 0 for grad in expected.values())

    def check(found):
        assert found.keys() == expected.keys()
        for name, grad in expected.items():
            torch.testing.assert_close(found[name], grad, rtol=1e-5, atol=1e-7, msg=name)

    part = x.chunk(world)[rank]
    check(gradients(DistributedDataParallel(copy.deepcopy(model)), part))
    for module in (model.block, model):
        fully_shard(module)
    check(gradients(model, part))
    dist.barrier()  # a process that leaves early would break the connection of the other


def test_ddp_and_fsdp2_gradients_equal_those_of_one_process(tmp_path):
    for process in run(lambda rank: compare(tmp_path / "store", rank)):
        assert process.status == 0, process.output
