"""Adapters in the last blocks alone: what is adapted, what is kept, and what the dry run says."""

import pytest
import torch
from torch import nn

from lora_core import dry_run
from lora_core.config import LoraConfig
from lora_core.injection import inject, lora_layers
from lora_core.last_blocks import Stack
from lora_core.memory import estimate, size
from lora_core.testing import Case
from lora_core.testing.frozen_start import nothing_is_kept_before_the_last_blocks, weight_gradients

BLOCKS = [f"blocks.{number}" for number in range(8)]
BATCH = {"x": torch.linspace(-1, 1, 960).reshape(2, 30, 16)}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.fc = nn.LayerNorm(16), nn.Linear(16, 16)
        self.conv = nn.Conv1d(16, 16, 1)

    def forward(self, x):
        return self.conv((x + self.fc(self.norm(x)).relu()).transpose(1, 2)).transpose(1, 2)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(16, 16), nn.Linear(16, 4)
        self.blocks = nn.ModuleList(Block() for _ in range(8))

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def plain():
    torch.manual_seed(0)
    return Net()


def adapted(device="cpu", targets=("fc", "head"), **settings):
    with torch.device(device):
        net = plain()
    inject(net, LoraConfig(list(targets), r=2, **settings))
    return net


def loss(model, batch):
    return model(batch["x"]).square().mean(), {}


def stack(net, **given):
    return Stack.of(net, "--last_blocks", "blocks", **given)


@pytest.mark.parametrize("count", [1, 3, 7])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_nothing_is_kept_before_the_last_blocks(count, dropout, tmp_path):
    def case(**given):
        return Case(
            plain,
            lambda net: net(BATCH["x"]),
            LoraConfig(["fc", "head"], r=2, lora_dropout=dropout, **given),
        )

    last = case(last_blocks={"blocks": count})
    nothing_is_kept_before_the_last_blocks(last, case(), BLOCKS, count, tmp_path)


def test_a_gradient_of_a_norm_or_a_convolution_is_noticed():
    assert not weight_gradients(adapted()(BATCH["x"]).sum())
    for name, operation in (("norm", "native_layer_norm"), ("conv", "convolution")):
        net = adapted()
        net.get_submodule(f"blocks.3.{name}").requires_grad_(True)
        found = weight_gradients(net(BATCH["x"]).sum())
        assert len(found) == 1, name
        assert operation in found[0]


@pytest.mark.parametrize(
    ("targets", "settings", "count", "fewer"),
    [
        (["fc", "head"], {}, 8, [4, 2]),
        (["fc"], {"last_blocks": {"blocks": 5}}, 5, [2, 1]),
        (["fc"], {"last_blocks": {"blocks": 1}}, 1, []),
        (["head"], {}, 0, []),
        (["blocks.2.fc"], {}, 6, []),  # in none of the last three
        (["blocks.2.fc", "blocks.6.fc"], {}, 6, [3]),
    ],
)
def test_half_and_a_quarter_of_what_is_adapted_are_tried(targets, settings, count, fewer):
    net = adapted("meta", targets, **settings)
    assert (stack(net).adapted(net), stack(net).fewer(net)) == (count, fewer)


def test_a_network_without_such_blocks_has_no_advice():
    net = adapted("meta")
    other = Stack.of(net, "--last_blocks", "layers")
    assert (other.blocks, other.adapted(net), list(other.remedies(net))) == ([], 0, [])
    assert list(stack(net).remedies(net)) == [
        "--last_blocks 4 (nothing is kept of the 4 blocks before)"
    ]


def test_what_is_left_is_what_would_have_been_adapted():
    net = adapted(targets=("stem", "fc", "head"))
    stack(net, before=["stem"]).keep_last(net, 3)
    own = adapted(last_blocks={"blocks": 3})
    assert list(lora_layers(net)) == list(lora_layers(own))
    trains = [{n for n, p in m.named_parameters() if p.requires_grad} for m in (net, own)]
    assert trains[0] == trains[1]


def test_the_dry_run_has_a_line_for_each(tmp_path, capsys):
    net = adapted("meta")
    dry_run.report(net, loss, BATCH, ["fp32"], {"all": 1}, tmp_path, "cpu", stack(net))
    out = capsys.readouterr().out
    assert "memory of a step on a CPU  fp32" in out
    lines = [line.split() for line in out.splitlines() if line[:2] in ("8,", "4 ", "2 ")]
    assert [line[0] for line in lines] == ["8,", "4", "2"]
    for line, count in zip(lines, (8, 4, 2), strict=True):
        own = estimate(adapted("meta", last_blocks={"blocks": count}).train(), loss, BATCH)
        shown = f"{size(own.adapters)} {size(own.activations)} {size(own.total)}"
        assert " ".join(line).endswith(shown)
    assert estimate(adapted("meta"), loss, BATCH).activations > own.activations > 0


@pytest.mark.parametrize(
    ("device", "words"), [("cuda", "on a GPU bf16"), ("auto", "on a GPU or CPU bf16 fp32")]
)
def test_it_says_for_which_device_and_how_to_ask_where_it_takes_long(
    tmp_path, capsys, monkeypatch, device, words
):
    monkeypatch.setattr(dry_run, "SLOW", 0.0)
    net = adapted("meta")
    columns = [word for word in words.split() if word[:2] in ("bf", "fp")]
    dry_run.report(net, loss, BATCH, columns, {"all": 1}, tmp_path, device, stack(net))
    out = capsys.readouterr().out
    assert f"memory of a step {words}" in " ".join(out.split())
    assert "with --last_blocks 4 --dry_run says" in out
    assert len(lora_layers(net)) == 9, "nothing was taken off"


def test_without_blocks_there_is_nothing_more(tmp_path, capsys):
    dry_run.report(adapted("meta"), loss, BATCH, ["fp32"], {"all": 1}, tmp_path)
    assert "--last_blocks" not in capsys.readouterr().out
