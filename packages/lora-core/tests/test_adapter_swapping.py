"""Several adapters on one model, and adapters that are replaced while others read them."""

import gc
import multiprocessing
import time

import pytest
import torch
from tiny_blocks import FORMS, PLAIN, Net, X, trained

from lora_core.adapters.file import load_adapter, read_adapter, save_adapter
from lora_core.config import LoraConfig
from lora_core.injection import adapters_off, set_adapters


@pytest.mark.fault("K44")
def test_a_hundred_swaps_change_no_bit_and_grow_nothing(tmp_path):
    model = trained(PLAIN)
    paths = [save_adapter(model, tmp_path / form) for form in FORMS]
    second = trained(LoraConfig(["qkv"], r=2))
    paths.append(save_adapter(second, tmp_path / "second"))
    model = Net().eval()
    load_adapter(model, paths[0], "one")
    load_adapter(model, paths[2], "two")
    layer = model.blocks[0]["qkv"]

    def outputs():
        found = []
        for names in (["one"], ["two"], ["one", "two"], []):
            set_adapters(model, names)
            found.append(layer(X).detach().clone())
        with adapters_off(model):
            found.append(layer(X).detach().clone())
        return found

    def tensors():
        gc.collect()
        return sum(issubclass(type(found), torch.Tensor) for found in gc.get_objects())

    first, keys = outputs(), list(model.state_dict())
    before = tensors()
    for i in range(100):
        load_adapter(model, paths[i % 2], "one")
        last = outputs()
    assert all(torch.equal(a, b) for a, b in zip(first, last, strict=True))
    assert torch.equal(last[3], Net().blocks[0]["qkv"](X))
    assert list(model.state_dict()) == keys
    del last
    assert tensors() <= before


def rewrite(paths, target, stop):
    """A process that replaces an adapter by one and the other until it is told to end."""
    torch.set_num_threads(1)
    models = [Net() for _ in paths]
    for model, path in zip(models, paths, strict=True):
        load_adapter(model, path)
    facts = [read_adapter(path).metadata for path in paths]
    while not stop.is_set():
        for model, fact in zip(models, facts, strict=True):
            save_adapter(model, target, metadata=fact)


@pytest.mark.fault("K54")
@pytest.mark.parametrize("form", FORMS)
def test_an_adapter_that_is_replaced_meanwhile_is_the_old_or_the_new_one(tmp_path, form):
    configs = [PLAIN, LoraConfig(["proj"], r=2, lora_alpha=99)]
    paths = [
        save_adapter(trained(config), tmp_path / str(i) / form, metadata={"number": i})
        for i, config in enumerate(configs)
    ]
    whole = [read_adapter(path) for path in paths]
    target = save_adapter(trained(PLAIN), tmp_path / form, metadata={"number": 0})
    context = multiprocessing.get_context("fork")
    stop = context.Event()
    writer = context.Process(target=rewrite, args=(paths, target, stop), daemon=True)
    writer.start()
    seen = set()
    try:
        end = time.monotonic() + 20
        while time.monotonic() < end and (len(seen) < 2 or end - time.monotonic() > 19):
            found = read_adapter(target)
            one = whole[found.metadata["number"]]
            seen.add(found.metadata["number"])
            assert (found.config, found.extra) == (one.config, one.extra)
            assert found.tensors.keys() == one.tensors.keys()
            assert all(torch.equal(found.tensors[k], t) for k, t in one.tensors.items())
    finally:
        stop.set()
        writer.join(10)
    assert seen == {0, 1}
