"""The parts of a training state: exact on their way to the disk and back, and by name."""

import json
import math
import random

import numpy as np
import pytest
import torch
from torch import nn

from lora_core import checkpoint
from lora_core.checkpoint.state import from_json, pack, to_json, unpack
from lora_core.errors import CheckpointError


def there_and_back(value):
    packed, store = pack(value)
    return unpack(from_json(to_json(packed)), {name: t.clone() for name, t in store.items()})


VALUES = [
    None,
    True,
    False,
    0,
    -(2**70),
    "",
    "ü\n\0\ud800 $",
    0.1,
    -0.0,
    5e-324,
    1.7976931348623157e308,
    math.inf,
    -math.inf,
    [],
    (),
    {},
    [1, [2.5, (3, None, ("x",))], {"a": {}}],
    {1: "one", -2: "two", "1": "text", None: 0, (1, 2): [3]},
    {True: 1.5, 0.5: False},
    {"$": 1},
    {"$": ["tensor", "state"], "b": {"$": {"$": (1,)}}},
    {"b": 1, "a": 2},
]


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_plain_values_come_back_exactly(value):
    again = there_and_back(value)
    assert repr(again) == repr(value)  # tells 1 from True and 1.0, -0.0 from 0, and has the order


def test_nan_comes_back_and_the_file_is_standard_json():
    packed, _ = pack({"a": math.nan, "b": [-math.inf]})
    json.loads(to_json(packed), parse_constant=pytest.fail)
    again = unpack(from_json(to_json(packed)), {})
    assert math.isnan(again["a"])
    assert again["b"] == [-math.inf]


@pytest.mark.parametrize("word", [b"NaN", b"[Infinity]", b"[" * 100_000])
def test_what_is_no_standard_json_is_refused(word):
    with pytest.raises(ValueError, match=r"is no JSON|nested too deeply"):
        from_json(word)


TENSORS = {
    "fp32": torch.tensor([0.1, -0.0, math.nan, math.inf, 1e-45]),
    "fp64": torch.tensor([0.1], dtype=torch.float64),
    "bf16": torch.randn(3, 2).bfloat16(),
    "fp16": torch.randn(3).half(),
    "int64": torch.tensor([-(2**63), 2**63 - 1]),
    "int32": torch.arange(4, dtype=torch.int32),
    "uint8": torch.arange(256, dtype=torch.uint8),
    "bool": torch.tensor([[True, False]]),
    "scalar": torch.tensor(3.5),
    "empty": torch.empty(0, 7),
    "turned": torch.arange(6.0).reshape(2, 3).T,
}


def bits(tensor):
    return tensor.dtype, tuple(tensor.shape), tensor.contiguous().flatten().view(torch.uint8)


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_come_back_bit_for_bit(tmp_path, name):
    state = {"deep": [({"x": TENSORS[name]},)]}
    path = checkpoint.save(tmp_path, 1, state, lambda folder: None)
    ((again,),) = checkpoint.load(path)["deep"]
    assert bits(again["x"])[:2] == bits(TENSORS[name])[:2]
    assert torch.equal(bits(again["x"])[2], bits(TENSORS[name])[2])


def test_shared_tensors_stay_shared_and_equal_names_stay_apart(tmp_path):
    one, other, whole = torch.ones(2), torch.zeros(2), torch.arange(4.0)
    state = {"a": {"b": one}, "a.b": other, "c": one, "views": [whole[:2], whole[2:]]}
    again = checkpoint.load(checkpoint.save(tmp_path, 1, state, lambda folder: None))
    assert again["a"]["b"] is again["c"]
    assert again["a"]["b"].tolist() == [1, 1]
    assert again["a.b"].tolist() == [0, 0]
    assert [view.tolist() for view in again["views"]] == [[0, 1], [2, 3]]


@pytest.mark.parametrize(
    ("value", "part"),
    [
        ({"a": [np.float32(1)]}, "state.a.0 is a numpy.float32"),
        ({"a": np.int64(1)}, "numpy.int64"),
        ({"a": np.ones(2)}, "numpy.ndarray"),
        ({"a": {1, 2}}, "builtins.set"),
        ({"a": b"x"}, "builtins.bytes"),
        ({"a": torch.float32}, "torch.dtype"),
        ({("a", len): 1}, "builtin_function_or_method"),
    ],
)
def test_what_a_checkpoint_cannot_hold_is_refused_with_its_place(tmp_path, value, part):
    with pytest.raises(CheckpointError) as caught:
        checkpoint.save(tmp_path, 1, value, lambda folder: None)
    assert part in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_random_states_come_back(tmp_path):
    random.seed(3), np.random.seed(4), torch.manual_seed(5)  # noqa: NPY002
    random.gauss(0, 1), np.random.standard_normal()  # noqa: NPY002 - both keep a second number

    def draw():
        numbers = [random.random(), random.gauss(0, 1), np.random.standard_normal()]  # noqa: NPY002
        return [*numbers, *torch.rand(3).tolist()]

    path = checkpoint.save(tmp_path, 1, {"random": checkpoint.random_state()}, lambda folder: None)
    drawn = draw()
    draw()
    checkpoint.set_random_state(checkpoint.load(path)["random"])
    assert draw() == drawn


# -- the optimizer, by name and shape --------------------------------------------------------------


def trained():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 3), nn.Linear(3, 5))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, 3)).square().sum().backward()
    optimizer.step()
    return model, optimizer, {id(p): name for name, p in model.named_parameters()}


@pytest.mark.fault("K16")
def test_moments_find_their_parameter_in_another_order(tmp_path):
    model, optimizer, names = trained()
    state = {"optimizer": checkpoint.optimizer_state(optimizer, names)}
    stored = checkpoint.load(checkpoint.save(tmp_path, 1, state, lambda f: None))["optimizer"]
    turned = torch.optim.AdamW(list(model.parameters())[::-1])
    checkpoint.load_optimizer_state(turned, names, stored)
    for parameter in model.parameters():  # 0.weight and 2.weight have the same shape
        for kind in ("exp_avg", "exp_avg_sq", "step"):
            assert torch.equal(turned.state[parameter][kind], optimizer.state[parameter][kind])


@pytest.mark.fault("K16")
@pytest.mark.parametrize("spoil", ["renamed", "missing", "more", "reshaped", "swapped"])
def test_moments_of_other_parameters_are_refused(spoil):
    model, optimizer, names = trained()
    stored = checkpoint.optimizer_state(optimizer, names)
    entry = stored["1.weight"]
    if spoil in ("renamed", "missing"):
        del stored["1.weight"]
    if spoil in ("renamed", "more"):
        stored["9.weight"] = entry
    if spoil == "reshaped":
        stored["1.weight"] = {**entry, "exp_avg_sq": torch.zeros(7, 2)}
    if spoil == "swapped":
        stored["0.weight"], stored["1.weight"] = entry, stored["0.weight"]
    fresh = torch.optim.AdamW(model.parameters())
    with pytest.raises(
        CheckpointError, match=r"trained (other parameters|.* of other shapes)"
    ) as e:
        checkpoint.load_optimizer_state(fresh, names, stored)
    assert "9.weight" in str(e.value) or "1.weight" in str(e.value)
    assert not fresh.state


# -- devices ---------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.fault("K47")
def test_a_state_of_a_gpu_loads_on_the_cpu(tmp_path):
    torch.rand(1, device="cuda")
    state = {"x": torch.ones(3, device="cuda"), "random": checkpoint.random_state()}
    again = checkpoint.load(checkpoint.save(tmp_path, 1, state, lambda folder: None))
    assert again["x"].device.type == again["random"]["cuda"].device.type == "cpu"
    assert again["x"].tolist() == [1, 1, 1]


@pytest.mark.fault("K47")
def test_a_state_knows_no_device(tmp_path):
    """Files name no device, and a GPU's random state does not hinder a machine without one."""
    _, optimizer, names = trained()
    state = {"optimizer": checkpoint.optimizer_state(optimizer, names), "t": torch.ones(2)}
    path = checkpoint.save(tmp_path, 1, state, lambda folder: None)
    for file in (path / "state.json", path / "state.safetensors"):
        assert b"cuda" not in file.read_bytes()
        assert b"cpu" not in file.read_bytes()
    state["random"] = {**checkpoint.random_state(), "cuda": torch.zeros(16, dtype=torch.uint8)}
    again = checkpoint.load(checkpoint.save(tmp_path, 2, state, lambda folder: None))
    checkpoint.set_random_state(again["random"])  # left out without a GPU
    assert {t.device.type for t in pack(again)[1].values()} == {"cpu"}
