"""What a step takes of memory is known before it is tried."""

from functools import partial

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lora_core import disk, dropout
from lora_core.config import LoraConfig
from lora_core.errors import ConfigError
from lora_core.injection import inject
from lora_core.memory import adapter_bytes, estimate, memory_table, saved_bytes, simulate, size


class Attention(nn.Module):
    """Linear, fused attention, norm and convolution, as transformers have them."""

    def __init__(self, again=False):
        super().__init__()
        self.again = again  # activation checkpointing
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.norm, self.mlp = nn.LayerNorm(32), nn.Sequential(nn.Linear(32, 128), nn.GELU())
        self.down, self.conv = nn.Linear(128, 32), nn.Conv1d(32, 8, 3)

    def block(self, x):
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(self.mlp(x))

    def forward(self, x):
        for _ in range(2):
            x = checkpoint(self.block, x, use_reentrant=False) if self.again else self.block(x)
        return self.conv(x.transpose(1, 2))


def loss(model, batch):
    return model(batch["x"]).square().mean(), {}


BATCH = {"x": torch.randn(3, 50, 32, generator=torch.Generator().manual_seed(0))}
ADAPTERS = {
    "plain": {},
    "dropout": {"lora_dropout": 0.1},
    "dora": {"use_dora": True},
    "rslora, biases": {"use_rslora": True, "bias": "all"},
    "frozen A": {"freeze_A": True},
}


def adapted(device, again=False, **settings):
    with torch.device(device):
        model = Attention(again)
    inject(model, LoraConfig(["qkv", "out", "mlp.0", "down", "conv"], r=4, **settings))
    return model.train()


@pytest.mark.fault("C43")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("again", [False, True], ids=["whole", "checkpointed"])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_what_is_kept_for_the_backward_pass_is_counted_without_any_values(kind, again, precision):
    real = adapted("cpu", again, **ADAPTERS[kind])
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        known = [*real.parameters(), *real.buffers()]
        expected, _ = saved_bytes(lambda: loss(real, BATCH), known)
    step = simulate(adapted("meta", again, **ADAPTERS[kind]), loss, BATCH, precision)
    assert step.saved == pytest.approx(expected, rel=0 if precision == "fp32" else 0.03)
    assert step.peak > step.saved + adapter_bytes(real)


@pytest.mark.fault("C43")
def test_a_second_estimate_of_the_same_network_is_as_the_first():
    model = adapted("meta")
    found = [estimate(model, loss, BATCH, precision) for precision in ("bf16", "fp32", "bf16")]
    assert found[0] == found[2]
    assert found[1] == estimate(adapted("meta"), loss, BATCH)


def test_what_ends_with_the_forward_pass_is_not_kept():
    """torch's checkpointing saves its input, also where nothing behind it needs a gradient."""
    frozen, trained = nn.Linear(8, 8).requires_grad_(False), nn.Linear(8, 8)
    x = torch.ones(3, 8)

    def run():
        hidden = checkpoint(frozen, x * 2, use_reentrant=False)
        return trained(hidden), hidden.shape

    kept, _ = saved_bytes(run, trained.parameters())
    assert kept == x.numel() * x.element_size(), "the input of the trained layer alone"


def test_what_no_result_follows_from_is_not_kept():
    x = torch.randn(50, 10, requires_grad=True)

    def run():
        for operation in (torch.sigmoid, torch.exp, partial(torch.softmax, dim=-1)):
            operation(x * 2)  # each keeps its result
        return x.exp()

    kept, y = saved_bytes(run)
    assert kept == y.numel() * y.element_size()
    y.sum().backward()
    torch.testing.assert_close(x.grad, y.detach())


def test_checkpointing_keeps_less_but_computes_again_at_the_peak():
    whole, again = (simulate(adapted("meta", a), loss, BATCH) for a in (False, True))
    assert again.saved < 0.5 * whole.saved
    assert again.saved < again.peak < whole.peak


def test_a_step_without_values_takes_no_memory_however_large_it_is():
    batch = {"x": torch.empty(1).expand(10**6, 50, 32)}  # 6.4 GB, if it were there
    assert simulate(adapted("meta"), loss, batch).saved > 100e9


def test_masks_of_large_inputs_take_few_operations_where_there_are_no_values():
    with FakeTensorMode():
        blocks = list(dropout.random_bits(0, 10**5, 2048, torch.device("cpu")))
    assert len(blocks) == 7  # and not 1563, each of them as slow


def test_a_loss_may_read_values():
    def reading(model, batch):
        found = model(batch["x"])
        rows = found.detach().flatten(1)[:, 0]
        chosen = found[rows > 0]  # nobody knows how many
        assert len(rows.tolist()) == len(rows.numpy()) == 3
        scale = 2.0 if bool(rows.sum() > 0) else float(batch["x"].sum())  # of the batch: known
        assert int(rows.argmax().item()) == 0
        assert scale == pytest.approx(float(BATCH["x"].sum()))
        return scale * chosen.square().mean(), {"first": rows[0].item()}

    assert simulate(adapted("meta"), reading, BATCH).saved > 0


def test_shapes_that_follow_from_the_batch_are_known():
    """As where neighbours are looked for, or what has no label is left out."""
    labels = torch.tensor([[0, 3, -1, 3, 0, 1]]).repeat(3, 8)[:, :50]
    batch = BATCH | {"labels": torch.cat([labels, labels[:, :2]], 1)}

    def chosen(model, batch):
        found, valid = model(batch["x"]), batch["labels"] >= 0
        classes, sizes = batch["labels"][valid].unique(return_counts=True)
        rows = torch.arange(int(sizes.max())).unsqueeze(0).nonzero()
        assert classes.tolist() == [0, 1, 3]
        assert len(rows) == int(sizes.max()) - 1
        picked = found.transpose(1, 2).repeat(1, 2, 1)[:, : valid.shape[1]][valid]
        assert len(picked) == int(sizes.sum())
        return picked.square().mean(), {}

    real = adapted("cpu")
    expected, _ = saved_bytes(lambda: chosen(real, batch), [*real.parameters()])
    assert simulate(adapted("meta"), chosen, batch).saved == expected


def test_an_estimate_adds_up_all_that_lives_on_the_device():
    network = adapted("meta")
    found = estimate(network, loss, BATCH)
    trained = adapter_bytes(network)
    assert found.adapters == found.gradients == trained
    assert found.moments == 2 * trained
    assert found.weights == 4 * sum(p.numel() for p in Attention().parameters())
    parts = (found.weights, 4 * trained, found.activations, found.workspace)
    assert found.total == sum(parts)
    text = memory_table({"fp32": found})
    for name in ("weights", "adapters", "gradients", "moments", "activations", "workspace"):
        assert name in text
    assert size(found.total) in text.splitlines()[-1]


def test_weights_are_counted_once_and_not_as_what_operations_make_of_them():
    """A layer's product takes a view of its weight; the step here needs a few rows beside it."""
    with torch.device("meta"):
        network = nn.Sequential(*[nn.Linear(500, 500) for _ in range(6)]).requires_grad_(False)
        network[0].bias.requires_grad_(True)
    found = estimate(network, loss, {"x": torch.zeros(2, 500)})
    assert found.workspace < 6 * 2 * 500 * 4


def test_sizes_are_written_as_people_read_them():
    texts = {0: "0 B", 999: "999 B", 1000: "1.00 kB", 23_450_000: "23.4 MB", 999_800: "1.00 MB"}
    texts |= {80_000_000_000: "80.0 GB", 140_500_000_000: "140 GB", 2e12: "2.00 TB"}
    assert {count: size(count) for count in texts} == texts


# -- disk ------------------------------------------------------------------------------------------


@pytest.mark.fault("R37")
def test_a_run_that_the_disk_has_no_room_for_does_not_start(tmp_path):
    free = disk.free_space(tmp_path / "not" / "there" / "yet")
    parts = {"training checkpoints": free, "merged models": 10**9}
    with pytest.raises(ConfigError) as caught:
        disk.check_space(parts, tmp_path / "out")
    message = str(caught.value)
    for part in (str(tmp_path / "out"), size(free), "merged models 1.00 GB", "make room"):
        assert part in message
    disk.check_space(parts, tmp_path, written=2 * 10**9)  # most is there already
    disk.check_space({"adapters": 1000}, tmp_path)


@pytest.mark.fault("R37")
def test_no_free_space_at_all_stops_the_run(tmp_path, monkeypatch):
    used = disk.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: used._replace(free=0))
    with pytest.raises(ConfigError, match=r"0 B free, but the run will write up to 1\.00 kB"):
        disk.check_space({"adapters": 1000}, tmp_path)


def test_a_folder_is_measured_without_following_links(tmp_path):
    (tmp_path / "run" / "state").mkdir(parents=True)
    (tmp_path / "run" / "state" / "a").write_bytes(bytes(1000))
    (tmp_path / "large").write_bytes(bytes(10**6))
    (tmp_path / "run" / "link").symlink_to(tmp_path / "large")
    assert 1000 <= disk.folder_bytes(tmp_path / "run") < 2000
    assert disk.folder_bytes(tmp_path / "nothing") == 0
