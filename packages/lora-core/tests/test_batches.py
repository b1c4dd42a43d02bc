"""Batches of every size: an update is the mean over its samples, and none is lost or hangs."""

import itertools

import pytest
import torch
from tiny_training import Points, assert_same_bits, collate, network, train
from torch import nn

from lora_core.config import LoraConfig
from lora_core.errors import ConfigError, DataError
from lora_core.injection import inject
from lora_core.training.schedule import EpochSampler


def weights(folder, size, batch, accumulation, steps=6, count=None, loss=None, **settings):
    made = train(
        folder,
        model=network(dropout=0.0),
        data=Points(size),
        batch_size=batch,
        gradient_accumulation_steps=accumulation,
        steps=steps,
        measure=None,
        log=False,
        **({"loss": loss, "count": count} if loss else {}),
        **settings,
    )
    return {n: p.detach().clone() for n, p in made.network.named_parameters() if p.requires_grad}


def assert_close(one, other):
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-5, atol=1e-6)


@pytest.mark.fault("R08", "R09")
@pytest.mark.parametrize(
    ("size", "parts"),
    [
        (16, (2, 4)),  # nothing left over
        (22, (2, 4)),  # a last window of 6: 3 batches
        (21, (2, 4)),  # of 5: its last batch has one sample
        (17, (2, 4)),  # of 1
        (11, (4, 2)),  # of 3, in one batch
        (5, (2, 4)),  # no window is ever whole
    ],
)
def test_accumulated_batches_equal_one_big_batch(tmp_path, size, parts):
    assert_close(weights(tmp_path / "one", size, 8, 1), weights(tmp_path / "parts", size, *parts))


@pytest.mark.fault("R08")
def test_items_count_and_not_the_batches_that_they_come_in(tmp_path):
    """Samples have 1 to 5 items, and the loss of a batch is the mean over its items."""

    def items(batch):
        return torch.tensor([1 + index % 5 for _, index in batch["ids"]])

    def loss(model, batch):
        per_sample = (model(batch["inputs"]["x"]) - batch["y"]).square().mean(1)
        return (per_sample * items(batch)).sum() / items(batch).sum(), {}

    settings = {"loss": loss, "count": lambda batch: float(items(batch).sum())}
    one = weights(tmp_path / "one", 21, 8, 1, **settings)
    assert_close(one, weights(tmp_path / "parts", 21, 2, 4, **settings))
    blind = weights(tmp_path / "blind", 21, 2, 4, loss=loss, count=None)
    far = max((one[name] - blind[name]).abs().max().item() for name in one)
    assert far > 1e-4, "without counting it would be another training"


@pytest.mark.fault("R09")
@pytest.mark.parametrize("drop", [False, True])
def test_an_epoch_shows_each_sample_once_but_a_dropped_rest(tmp_path, drop):
    seen = []

    def recorded(samples):
        seen.append([sample["id"] for sample in samples])
        return collate(samples)

    from lora_core.trainer import LoraTrainer, training_arguments

    args = training_arguments(
        tmp_path, learning_rate=1e-3, epochs=2, batch_size=4, device="cpu",
        trainer={"dataloader_drop_last": drop},
    )  # fmt: skip
    model = nn.Sequential(nn.Linear(8, 3))
    inject(model, LoraConfig(["0"], r=2))
    LoraTrainer(
        model, args, Points(10), recorded,
        lambda net, batch: ((net(batch["inputs"]["x"]) - batch["y"]).square().mean(), {}),
    ).train()  # fmt: skip
    assert [len(batch) for batch in seen] == ([4, 4] if drop else [4, 4, 2]) * 2
    ids = [one for batch in seen for one in batch]
    assert len(set(ids)) == len(ids) == (16 if drop else 20)


@pytest.mark.fault("R09")
@pytest.mark.parametrize("size", [0, 3])
def test_no_batch_per_epoch_stops_the_run(tmp_path, size):
    with pytest.raises(DataError) as caught:
        weights(tmp_path, size, 4, 1, trainer={"dataloader_drop_last": True})
    for part in ("0 batches per epoch", f"{size} training samples", "at least 4", "batch size"):
        assert part in str(caught.value)
    with pytest.raises(DataError, match="0 batches per epoch: 0 training samples"):
        weights(tmp_path, 0, 4, 1)


def test_an_order_of_more_or_fewer_samples_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="order has 9 indices and there are 10 training samples"):
        weights(tmp_path, 10, 4, 1, order=EpochSampler(9, 0))


# -- parts of the network that a batch does not use ------------------------------------------------


class Branches(nn.Module):
    """`rare` is for samples with an odd index, as a prompt encoder's part for boxes."""

    def __init__(self):
        super().__init__()
        self.often, self.rare, self.never = (nn.Linear(8, 3) for _ in range(3))

    def forward(self, x, use_rare):
        return self.often(x) + (self.rare(x) if use_rare else 0)


def branching(model, batch):
    odd = batch["ids"][0][1] % 2 == 1
    return (model(batch["inputs"]["x"], odd) - batch["y"]).square().mean(), {}


@pytest.mark.fault("R23")
@pytest.mark.parametrize("accumulation", [1, 2])
def test_parts_that_some_batches_do_not_use_learn_from_the_others(tmp_path, accumulation):
    def trained(name):
        torch.manual_seed(0)
        model = Branches()
        inject(model, LoraConfig(["often", "rare", "never"], r=2))
        train(
            tmp_path / name, model=model, loss=branching, batch_size=1, measure=None, steps=12,
            gradient_accumulation_steps=accumulation, log=False,
        )  # fmt: skip
        return model

    model = trained("one")
    moved = {path: bool(model.get_submodule(path).lora_B.default.weight.any())
             for path in ("often", "rare", "never")}  # fmt: skip
    assert moved == {"often": True, "rare": True, "never": False}
    assert_same_bits(model, trained("again"))


@pytest.mark.fault("R23")
def test_an_update_without_a_gradient_for_a_part_leaves_it_alone(tmp_path):
    """AdamW would decay, and move by its moments, what has a gradient of zero."""
    torch.manual_seed(0)
    model = Branches()
    inject(model, LoraConfig(["often", "rare"], r=2))
    seen = []

    def watching(net, batch):
        if net.training:
            seen.append((batch["ids"][0][1] % 2, net.rare.lora_A.default.weight.detach().clone()))
        return branching(net, batch)

    train(
        tmp_path, model=model, loss=watching, batch_size=1, measure=None, steps=12, log=False,
        gradient_accumulation_steps=1, weight_decay=0.1,
    )  # fmt: skip
    pairs = itertools.pairwise(seen)
    changed = [(odd, not torch.equal(before, after)) for (odd, before), (_, after) in pairs]
    assert changed.count((0, True)) == 0
    assert changed.count((1, True)) > 2
