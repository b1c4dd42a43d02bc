"""Files of LoRA: what was trained comes back exactly, and nothing else is accepted."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lora_models
import pytest
import torch
from torch import Tensor, nn

from lora_core import load_adapter, save_adapter
from lora_core.errors import CheckpointError, ConfigError
from lora_core.injection import lora_layers
from scenesplat_lora.lora import (
    get_lora_parameters,
    inject_lora_to_ptv3,
    inject_lora_with_preset,
    load_lora_checkpoint,
    mark_only_lora_as_trainable,
    save_lora_checkpoint,
)

README = {"r": 4, "lora_alpha": 8, "target_modules": ["attn"]}  # the guide's example of metadata


def trained(**options: Any) -> nn.Module:
    model = inject_lora_to_ptv3(lora_models.tiny_model(), **({"r": 4, "lora_alpha": 8} | options))
    lora_models.perturb(model)
    return model


def run(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(lora_models.tiny_batch())


def content(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def old_file(path: Path, model: nn.Module, change: Callable[[str], str] = str) -> Path:
    """A file as the first code wrote it: factors, and metadata of the caller alone."""
    save_lora_checkpoint(model, path)
    held = content(path)["lora_state_dict"]
    torch.save({"lora_state_dict": {change(k): v for k, v in held.items()}, "metadata": {}}, path)
    return path


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"target_modules": ["attn", "mlp"], "encoder_only": False},
        {"enable_prompt": True, "target_stages": [0, 2]},
    ],
)
def test_a_saved_adapter_acts_the_same_on_a_fresh_base(options: dict, tmp_path: Path) -> None:
    model = trained(**options)
    path = save_lora_checkpoint(model, tmp_path / "lora_adapter.pth")
    fresh = lora_models.tiny_model()
    facts = load_lora_checkpoint(fresh, path)
    assert torch.equal(run(fresh), run(model))
    assert facts["r"] == 4
    assert facts["enable_prompt"] == options.get("enable_prompt", False)
    for one, other in zip(get_lora_parameters(model), get_lora_parameters(fresh), strict=True):
        assert torch.equal(one, other)
        assert other.requires_grad
    again = save_lora_checkpoint(fresh, tmp_path / "again.pth")
    assert content(again)["metadata"] == facts


def test_names_shapes_and_metadata_are_those_of_the_guide(tmp_path: Path) -> None:
    model = trained(enable_prompt=True, target_stages=[0])
    path = save_lora_checkpoint(model, tmp_path / "a.pth", {**README, "note": "room 7"})
    held, facts = content(path)["lora_state_dict"], content(path)["metadata"]
    layer = "backbone.enc.enc0.block0.attn.qkv"
    assert {name: tuple(value.shape) for name, value in held.items() if layer in name} == {
        f"{layer}.lora_A": (4, 16),
        f"{layer}.lora_B": (48, 4),
        f"{layer}.prompt_mlp.0.weight": (4, 16),
        f"{layer}.prompt_mlp.0.bias": (4,),
        f"{layer}.prompt_mlp.2.weight": (48, 4),
        f"{layer}.prompt_mlp.2.bias": (48,),
        f"{layer}.prompt_weight": (),
    }
    expected = README | {"note": "room 7", "encoder_only": True, "target_stages": [0]}
    assert {key: facts[key] for key in expected} == expected
    assert not any(value.requires_grad for value in held.values())


def test_metadata_that_contradict_the_adapter_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"(?s)r = 16, the adapter 4.*lora_alpha = 16"):
        save_lora_checkpoint(trained(), tmp_path / "a.pth", {"r": 16, "lora_alpha": 16})
    with pytest.raises(ConfigError, match="plain values"):
        save_lora_checkpoint(trained(), tmp_path / "a.pth", {"model": object()})
    with pytest.raises(ConfigError, match=r"ending in \.pth"):
        save_lora_checkpoint(trained(), tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_that_were_trained_are_part_of_the_adapter(bias: str, tmp_path: Path) -> None:
    model = inject_lora_to_ptv3(lora_models.tiny_model(), 4, 8)
    mark_only_lora_as_trainable(model, bias)
    lora_models.perturb(model)
    path = save_lora_checkpoint(model, tmp_path / "a.pth")
    fresh = lora_models.tiny_model()
    load_lora_checkpoint(fresh, path)
    assert torch.equal(run(fresh), run(model))
    inside = lora_models.tiny_model().backbone
    load_lora_checkpoint(inside, path)
    torch.testing.assert_close(inside.state_dict(), model.backbone.state_dict())


# -- names -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["module.backbone.", "", "module.", "student."])
def test_the_names_in_front_of_the_backbone_do_not_matter(start: str, tmp_path: Path) -> None:
    model = trained(enable_prompt=True)
    path = save_lora_checkpoint(model, tmp_path / "a.pth", README)
    held = content(path)
    held["lora_state_dict"] = {
        name.replace("backbone.", start): value for name, value in held["lora_state_dict"].items()
    }
    layers = held["metadata"]["layers"]
    held["metadata"]["layers"] = {k.replace("backbone.", start): v for k, v in layers.items()}
    torch.save(held, path)
    whole, part = lora_models.tiny_model(), lora_models.tiny_model()
    load_lora_checkpoint(whole, path)
    load_lora_checkpoint(part.backbone, path)
    assert torch.equal(run(whole), run(model))
    assert torch.equal(run(part), run(model))


def test_lora_core_s_own_files_load_too(tmp_path: Path) -> None:
    model = trained(enable_prompt=True, target_modules=["attn", "mlp"])
    for name in ("adapter", "single.pth"):
        save_adapter(model, tmp_path / name)
        fresh = lora_models.tiny_model()
        load_lora_checkpoint(fresh, tmp_path / name)
        assert torch.equal(run(fresh), run(model))
        inside = lora_models.tiny_model()
        load_lora_checkpoint(inside.backbone, tmp_path / name)
        assert torch.equal(run(inside), run(model))


def test_lora_core_reads_what_has_no_prompts(tmp_path: Path) -> None:
    model = trained()
    save_lora_checkpoint(model, tmp_path / "a.pth")
    torch.save(content(tmp_path / "a.pth")["lora_state_dict"], tmp_path / "bare.pth")
    fresh = lora_models.tiny_model()
    load_adapter(fresh, tmp_path / "bare.pth", lora_alpha=8)
    assert torch.equal(run(fresh), run(model))


# -- files of the first code -----------------------------------------------------------------------


def test_a_file_with_the_guide_s_metadata_alone_loads_into_a_base(tmp_path: Path) -> None:
    model = trained()
    path = old_file(tmp_path / "a.pth", model)
    held = content(path) | {"metadata": README}
    torch.save(held, path)
    fresh = lora_models.tiny_model()
    assert load_lora_checkpoint(fresh, path) == README
    assert torch.equal(run(fresh), run(model))
    assert set(lora_layers(fresh)) == set(lora_layers(model))


def test_without_an_alpha_it_is_the_rank_with_a_warning(tmp_path: Path) -> None:
    model = trained(lora_alpha=4)
    path = old_file(tmp_path / "a.pth", model)
    fresh = lora_models.tiny_model()
    with pytest.warns(UserWarning, match="taken to be its rank, 4"):
        load_lora_checkpoint(fresh, path)
    assert torch.equal(run(fresh), run(model))
    other = trained(lora_alpha=12)
    told = lora_models.tiny_model()
    load_lora_checkpoint(told, old_file(tmp_path / "b.pth", other), lora_alpha=12)
    assert torch.equal(run(told), run(other))
    live = trained(lora_alpha=12, seed=5)  # its alpha is known
    load_lora_checkpoint(live, tmp_path / "b.pth")
    assert torch.equal(run(live), run(other))


def test_a_prompt_weight_that_was_never_saved_is_the_one_it_always_had(tmp_path: Path) -> None:
    model = trained(enable_prompt=True, target_stages=[0])
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.prompt_mlp.prompt_weight.fill_(0.1)
    path = save_lora_checkpoint(model, tmp_path / "a.pth")
    held = content(path)["lora_state_dict"]
    held = {name: value for name, value in held.items() if "prompt_weight" not in name}
    torch.save({"lora_state_dict": held, "metadata": README}, path)
    fresh = lora_models.tiny_model()
    load_lora_checkpoint(fresh, path)
    assert torch.equal(run(fresh), run(model))


# -- what does not fit -----------------------------------------------------------------------------


def drop(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda held: held["lora_state_dict"].pop(f"backbone.enc.enc0.block0.attn.{name}")


def put(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda held: held["lora_state_dict"].update({f"backbone.enc.{name}": value})


MISFITS = {
    "missing factor": (drop("qkv.lora_B"), r"qkv\.lora_B\.weight is missing"),
    "missing prompt": (drop("qkv.prompt_mlp.0.bias"), r"qkv\.prompt_mlp\.0\.bias is missing"),
    "shape": (put("enc0.block0.attn.qkv.lora_A", torch.ones(4, 9)), r"lora_A.weight has shape"),
    "unknown layer": (
        put("enc9.block0.attn.qkv.lora_A", torch.ones(4, 16)), r"enc9\.block0.*no such module"
    ),
    "unknown tensor": (put("enc0.extra", torch.ones(1)), r"enc0\.extra is unexpected"),
    "not finite": (
        put("enc0.block0.attn.proj.lora_A", torch.full((4, 16), torch.nan)), "NaN or infinite"
    ),
    "no tensor": (put("enc0.block0.attn.qkv.lora_A", 3), "must hold tensors"),
    "no factors": (lambda held: held.update(lora_state_dict={}), "must hold tensors"),
    "later format": (lambda held: held["metadata"].update(format=2), "reads up to 1"),
    "broken notes": (lambda held: held["metadata"].update(layers={"a": 3}), "unreadable"),
    "broken metadata": (lambda held: held.update(metadata=[1]), "metadata is no dictionary"),
}  # fmt: skip


@pytest.mark.parametrize("fault", MISFITS)
def test_what_does_not_fit_is_named_and_the_base_stays_as_it_is(fault: str, tmp_path: Path) -> None:
    path = save_lora_checkpoint(trained(enable_prompt=True), tmp_path / "a.pth")
    held = content(path)
    change, message = MISFITS[fault]
    change(held)
    torch.save(held, path)
    base = lora_models.tiny_model()
    before, flags = base.state_dict(), [p.requires_grad for p in base.parameters()]
    with pytest.raises(CheckpointError, match=message):
        load_lora_checkpoint(base, path)
    assert list(base.state_dict()) == list(before)
    assert [p.requires_grad for p in base.parameters()] == flags
    assert not any(module._forward_hooks for module in base.modules())


def test_ranks_that_contradict_the_metadata_are_refused(tmp_path: Path) -> None:
    path = old_file(tmp_path / "a.pth", trained())
    torch.save(content(path) | {"metadata": README | {"r": 8}}, path)
    with pytest.raises(CheckpointError, match=r"say r = 8, its tensors r = 4"):
        load_lora_checkpoint(lora_models.tiny_model(), path)
    with pytest.raises(CheckpointError, match="has lora_alpha 8, not 2"):
        load_lora_checkpoint(lora_models.tiny_model(), path, lora_alpha=2)


def test_lora_of_another_layout_is_not_overwritten(tmp_path: Path) -> None:
    path = save_lora_checkpoint(trained(), tmp_path / "a.pth")
    other = inject_lora_with_preset(lora_models.tiny_model(), "standard")
    expected = run(other)
    with pytest.raises(CheckpointError, match="another layout"):
        load_lora_checkpoint(other, path)
    assert torch.equal(run(other), expected)
    alike = trained(seed=7)
    load_lora_checkpoint(alike, path)
    assert torch.equal(run(alike), run(trained()))


@pytest.mark.fault("K31")
def test_another_base_is_told_wherever_the_backbone_lies(tmp_path: Path) -> None:
    path = save_lora_checkpoint(trained(), tmp_path / "a.pth")
    for model in (lora_models.tiny_model(seed=1), lora_models.tiny_model(seed=1).backbone):
        with pytest.warns(UserWarning, match="trained on another base"):
            load_lora_checkpoint(model, path)


@pytest.mark.fault("K28")
def test_incomplete_layers_can_be_left_out_on_request(tmp_path: Path) -> None:
    path = save_lora_checkpoint(trained(), tmp_path / "a.pth")
    held = content(path)
    drop("qkv.lora_B")(held)
    torch.save(held, path)
    model = lora_models.tiny_model()
    with pytest.warns(UserWarning, match="loaded in part") as told:
        load_lora_checkpoint(model, path, allow_partial=True)
    assert len(told) == 1
    assert "backbone.enc.enc0.block0.attn.qkv" not in lora_layers(model)
    assert len(lora_layers(model)) == 7
