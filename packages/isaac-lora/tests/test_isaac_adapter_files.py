"""Adapters as files: PEFT reads ours, we read PEFT's, and the depth of the training is not lost."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from recorded_isaac import GOLDENS, recorded_model, sample
from torch import Tensor

from isaac_lora.adapter_files import find_adapter, load_adapter, read_adapter, save_adapter
from isaac_lora.depth.settings import DepthSettings
from isaac_lora.lora import LoraChoice, inject, lora_parameters
from isaac_lora.network.isaac import IsaacForConditionalGeneration
from lora_core.errors import CheckpointError, ConfigError
from lora_core.merging import merge

TOLERANCE: dict[str, Any] = {"rtol": 0.0, "atol": 1e-5}
RECORDED = GOLDENS / "lora_step"
DEPTH = DepthSettings("vits", "depth_anything_v2_vits.pth", "f" * 64, 50.0, 392)


def adapted(**settings: Any) -> IsaacForConditionalGeneration:
    """The recorded model with LoRA whose B is not zero."""
    model = recorded_model()
    inject(model, LoraChoice(**({"r": 4, "alpha": 8} | settings)))
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".lora_B." in name or ".lora_embedding_B." in name:
                weight.normal_(0, 0.1, generator=draw)
    return model


@torch.no_grad()
def logits(model: Any) -> Tensor:
    out: Tensor = model(**sample("image1")).logits
    return out


def of_peft(folder: Path) -> Any:
    return peft.PeftModel.from_pretrained(recorded_model(), str(folder)).eval()


# -- PEFT ----------------------------------------------------------------------------------------


@pytest.mark.fault("K34")
@pytest.mark.parametrize("names", ["auto", "q_proj,vision", "down_proj,lm_head,embed_tokens"])
def test_peft_computes_and_merges_the_same(tmp_path: Path, names: str) -> None:
    model = adapted(target_modules=names)
    wanted = logits(model)
    assert (wanted - logits(recorded_model())).abs().max() > 0.01
    theirs = of_peft(save_adapter(model, tmp_path / "adapter"))
    torch.testing.assert_close(logits(theirs), wanted, **TOLERANCE)
    torch.testing.assert_close(logits(theirs.merge_and_unload()), wanted, **TOLERANCE)


def test_peft_generates_with_our_adapter_as_we_do(tmp_path: Path) -> None:
    model = adapted()
    theirs = of_peft(save_adapter(model, tmp_path / "adapter"))
    assert isinstance(theirs, peft.PeftModelForCausalLM)
    settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    ours = model.generate(**sample("image1"), **settings)
    assert torch.equal(theirs.generate(**sample("image1"), **settings), ours)


def test_merging_in_our_own_layers_is_the_same_model() -> None:
    model = adapted()
    wanted = logits(model)
    merge(model)
    torch.testing.assert_close(logits(model), wanted, **TOLERANCE)


def test_what_peft_saves_is_read(tmp_path: Path) -> None:
    pattern = json.loads((RECORDED / "adapter_config.json").read_text())["target_modules"]
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=pattern, init_lora_weights=False, task_type="CAUSAL_LM"
    )
    theirs = peft.get_peft_model(recorded_model(), config).eval()
    theirs.save_pretrained(tmp_path)
    model = recorded_model()
    adapter = load_adapter(model, tmp_path)
    assert (adapter.r, adapter.alpha, adapter.depth) == (3, 5.0, None)
    torch.testing.assert_close(logits(model), logits(theirs), **TOLERANCE)


def test_the_folder_is_what_peft_writes(tmp_path: Path) -> None:
    model = adapted(dropout=0.1)
    folder = save_adapter(model, tmp_path, {"step": 7})
    config = json.loads((folder / "adapter_config.json").read_text())
    recorded = json.loads((RECORDED / "adapter_config.json").read_text())
    same = ("peft_type", "task_type", "r", "lora_alpha", "bias", "fan_in_fan_out", "use_rslora")
    assert {name: config[name] for name in same} == {name: recorded[name] for name in same}
    assert config["lora_dropout"] == 0.1
    assert all(name.startswith("model.") for name in config["target_modules"])
    tensors = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    assert (
        tensors.keys() == safetensors.torch.load_file(RECORDED / "adapter_model.safetensors").keys()
    )
    assert read_adapter(folder).file.metadata == {"step": 7}
    assert "non-production licence" in (folder / "README.md").read_text("utf-8")


# -- there and back ------------------------------------------------------------------------------


def test_an_adapter_comes_back_bit_for_bit(tmp_path: Path) -> None:
    wanted = logits(model := adapted(bias="lora_only", target_modules="vision,q_proj"))
    folder = save_adapter(model, tmp_path / "run" / "adapter")
    again = recorded_model()
    adapter = load_adapter(again, find_adapter(tmp_path / "run"), trainable=True)
    assert torch.equal(logits(again), wanted)
    assert adapter.path == folder
    assert sum(p.numel() for p in lora_parameters(again)) == sum(
        p.numel() for p in lora_parameters(model)
    )


def test_writing_again_replaces_all_of_it(tmp_path: Path) -> None:
    first, second = adapted(), adapted(r=2)
    save_adapter(first, tmp_path, depth=DEPTH)
    save_adapter(second, tmp_path)
    assert read_adapter(tmp_path).depth is None
    again = recorded_model()
    load_adapter(again, tmp_path)
    assert torch.equal(logits(again), logits(second))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_the_same_adapter_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_adapter(adapted(), tmp_path / name, {"step": 7}, DEPTH)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


# -- depth ---------------------------------------------------------------------------------------


def test_the_depth_of_the_training_lies_beside_the_weights(tmp_path: Path) -> None:
    save_adapter(adapted(), tmp_path, depth=DEPTH)
    assert read_adapter(tmp_path).depth == DEPTH
    card = (tmp_path / "README.md").read_text("utf-8")
    assert "depth_alpha=50, depth_input_size=392" in card
    assert "CC-BY-NC-4.0" in card
    assert torch.isfinite(logits(of_peft(tmp_path))).all()


def test_other_depth_than_in_the_training_is_refused_and_none_is_said(tmp_path: Path) -> None:
    save_adapter(adapted(), tmp_path, depth=DEPTH)
    model = recorded_model()
    other = DepthSettings("vits", "other.pth", "0" * 64, 50.0, 392)
    with pytest.raises(CheckpointError, match="other depth"):
        load_adapter(model, tmp_path, depth=other)
    assert not any("lora_" in name for name, _ in model.named_parameters())
    with pytest.warns(UserWarning, match="was trained with depth"):
        load_adapter(model, tmp_path)
    save_adapter(adapted(), tmp_path / "without")
    with pytest.warns(UserWarning, match="was trained without depth"):
        load_adapter(recorded_model(), tmp_path / "without", depth=DEPTH)


# -- what is refused -----------------------------------------------------------------------------


def test_a_file_name_is_no_place_for_an_adapter(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="name a folder"):
        save_adapter(adapted(), tmp_path / "a.safetensors")


def test_a_folder_without_an_adapter_is_told(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no adapter"):
        read_adapter(tmp_path)


def test_an_adapter_without_its_scale_is_refused(tmp_path: Path) -> None:
    tensors = safetensors.torch.load_file(RECORDED / "adapter_model.safetensors")
    safetensors.torch.save_file(tensors, tmp_path / "bare.safetensors")
    with pytest.raises(CheckpointError, match="does not say its lora_alpha"):
        read_adapter(tmp_path / "bare.safetensors")


def test_tensors_that_are_no_adapter_are_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "lora_alpha": 8}')
    safetensors.torch.save_file({"a.weight": torch.ones(2)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="no LoRA adapter"):
        read_adapter(tmp_path)


@pytest.mark.fault("K27")
def test_the_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    tensors = {
        key.replace("model.layers", "model.language_model.layers"): tensor
        for key, tensor in safetensors.torch.load_file(
            RECORDED / "adapter_model.safetensors"
        ).items()
    }
    (tmp_path / "adapter_config.json").write_text((RECORDED / "adapter_config.json").read_text())
    safetensors.torch.save_file(tensors, tmp_path / "adapter_model.safetensors")
    model = recorded_model()
    with pytest.raises(CheckpointError, match="no such module"):
        load_adapter(model, tmp_path)
    assert not any("lora_" in name for name, _ in model.named_parameters())
