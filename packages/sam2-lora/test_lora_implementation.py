"""Is LoRA what it should be here? `python3 test_lora_implementation.py`, or through pytest."""

import torch
from torch import nn

import lora_core
from lora_core import LoraConfig
from lora_core.report import say


def test_lora_layer_forward_pass() -> None:
    """y = x W^T + b + (alpha / r) (x A^T) B^T."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 40))
    x = torch.randn(5, 24)
    base = model(x)
    lora_core.inject(model, LoraConfig(target_modules=["0"], r=4, lora_alpha=8))
    assert torch.equal(model(x), base), "a new adapter must not change the output"
    layer = model[0]
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    nn.init.normal_(B)
    torch.testing.assert_close(model(x), base + 8 / 4 * (x @ A.T) @ B.T)


def test_lora_linear_wrapper() -> None:
    """The adapted layer is still the base's Linear; merging keeps the output, removal the base."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 40)).eval()  # training a merged layer is an error
    layer, weight = model[0], model[0].weight
    lora_core.inject(model, LoraConfig(target_modules=["0"], r=4))
    nn.init.normal_(layer.lora_B["default"].weight)
    assert model[0] is layer
    assert isinstance(layer, nn.Linear)
    assert layer.weight is weight
    x = torch.randn(5, 24)
    adapted = model(x)
    lora_core.merge(model)
    torch.testing.assert_close(model(x), adapted)
    lora_core.unmerge(model)
    lora_core.remove(model)
    assert list(model.state_dict()) == ["0.weight", "0.bias"]


def test_parameter_counting_and_freezing() -> None:
    """SAM 2 large at rank 8: 1,473,152 of 218 million parameters train, the base is frozen."""
    from sam2_lora.config import Config
    from sam2_lora.model import network
    from sam2_lora.official import published
    from sam2_lora.placement import adapt

    model = network(published("sam2_hiera_large"))  # on the meta device: no memory, no download
    total = sum(p.numel() for p in model.parameters())
    adapt(model, Config())
    trainable = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    assert sum(trainable.values()) == 1_473_152
    assert sum(trainable.values()) / total < 0.01
    assert all(".lora_A." in name or ".lora_B." in name for name in trainable)
    assert not any(name.startswith("prompt_encoder") for name in trainable)


if __name__ == "__main__":
    for test in (
        test_lora_layer_forward_pass,
        test_lora_linear_wrapper,
        test_parameter_counting_and_freezing,
    ):
        test()
        say(f"{test.__name__}: passed")
