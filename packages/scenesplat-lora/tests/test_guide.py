"""The guide of LoRA for SceneSplat, as it was first published: its commands and its Python run.

Where the guide has `build_model(cfg.model)`, `load_state_dict` and `load_pretrained_model`, here is
`load_official`; names come from `scenesplat_lora` instead of `pointcept.models.utils`.
"""

from __future__ import annotations

import copy
import re
import shlex
from pathlib import Path

import lora_models
import pytest
import torch
from torch import Tensor, nn

from lora_core.config import parse
from lora_core.errors import ConfigError
from scenesplat_lora import (
    LangPretrainer,
    PTv3Config,
    get_lora_parameters,
    inject_lora_to_ptv3,
    inject_lora_with_preset,
    load_lora_checkpoint,
    load_official,
    mark_only_lora_as_trainable,
    merge_lora_weights,
    print_lora_summary,
    save_lora_checkpoint,
)
from scenesplat_lora.config import Config
from scenesplat_lora.network.description import Description
from scenesplat_lora.network.official import write_official
from scenesplat_lora.network.ptv3_config import CURVES
from scenesplat_lora.settings.words import for_parser

COMMANDS = [
    r"""
python tools/train_lora.py \
    --config-file configs/scannet/lora-finetune-scannet-mcmc.py \
    --options save_path=exp_runs/lora_finetune_scannet \
                lora.r=8 \
                lora_training.pretrained_path=checkpoints/pretrained.pth
""",
    r"""
python tools/train_lora.py \
    --config-file configs/scannet/lora-finetune-scannet-mcmc.py \
    --options save_path=exp_runs/lora_minimal \
                lora.preset=minimal
""",
    r"""
python tools/train_lora.py \
    --config-file configs/scannet/lora-finetune-scannet-mcmc.py \
    --options save_path=exp_runs/lora_full \
                lora.preset=full
""",
]
FIVE_STAGES = PTv3Config(
    in_channels=5, order=CURVES, stride=(2,) * 4,
    enc_depths=(1,) * 5, enc_channels=(16,) * 5, enc_num_head=(2,) * 5,
    enc_patch_size=(32,) * 5,
    dec_depths=(1,) * 4, dec_channels=(16,) * 4, dec_num_head=(2,) * 4, dec_patch_size=(32,) * 4,
    drop_path=0.0,
)  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with checkpoints/pretrained.pth, a small model of five stages."""
    torch.manual_seed(0)
    net = LangPretrainer(FIVE_STAGES)
    (tmp_path / "checkpoints").mkdir()
    path = tmp_path / "checkpoints" / "pretrained.pth"
    write_official(path, net.state_dict(), 1, Description(FIVE_STAGES))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def base() -> nn.Module:
    return load_official("checkpoints/pretrained.pth")


def run(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(lora_models.tiny_batch())


# -- commands --------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_parsed_as_they_are_written(command: str, folder: Path) -> None:
    words = shlex.split(command.replace("\\\n", " "))  # as a shell joins the lines
    assert words[:2] == ["python", "tools/train_lora.py"]
    with for_parser(words[2:]) as usual:
        cfg = parse(Config, usual, prog="train")
    preset = re.search(r"preset=(\w+)", command)
    choice = cfg.lora.choice(0)
    assert cfg.save_path in command
    assert cfg.lora_training.pretrained_path == "checkpoints/pretrained.pth"
    assert choice.r == ({"minimal": 4, "full": 16}[preset[1]] if preset else 8)


@pytest.mark.parametrize("words", [["--num-gpus", "1"], ["--num-machines=1"], ["--dist-url=auto"]])
def test_the_official_launchers_flags_are_taken_for_one_gpu(words: list[str]) -> None:
    with for_parser([*words, "--options", "epoch=3"]) as usual:
        assert parse(Config, usual, prog="train").epoch == 3


def test_several_gpus_are_started_by_torchrun() -> None:
    with (
        pytest.raises(ConfigError, match="torchrun --nproc_per_node 4"),
        for_parser(["--num-gpus", "4"]),
    ):
        pass


# -- Python ----------------------------------------------------------------------------------------


def test_custom_configuration(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = base()
    checkpoint = torch.load("checkpoints/pretrained.pth")
    model.load_state_dict(checkpoint["state_dict"], strict=False)
    model = inject_lora_to_ptv3(
        model,
        r=8,
        lora_alpha=8,
        target_modules=["attn"],
        encoder_only=True,
        target_stages=[3, 4],
    )
    mark_only_lora_as_trainable(model)
    print_lora_summary(model)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == lines[2] == lines[-1] == "=" * 60
    assert lines[1] == "LoRA Parameter Summary"
    lora = 2 * 8 * (16 + 48 + 16 + 16)  # two stages of one block
    assert lines[4:6] == [f"LoRA parameters: {lora:,}", f"Trainable parameters: {lora:,}"]
    assert re.fullmatch(r"LoRA ratio: \d+\.\d\d%", lines[6])
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(re.search(r"enc[34]\.block0\.attn\.(qkv|proj)\.lora_", name) for name in trained)


@pytest.mark.parametrize("preset", ["minimal", "standard", "full", "decoder_only"])
def test_presets(folder: Path, preset: str) -> None:
    model, before = base(), run(base())
    model = inject_lora_with_preset(model, preset=preset)
    assert torch.equal(run(model), before)  # nothing changes before it is trained
    mark_only_lora_as_trainable(model, bias="none")
    optimizer = torch.optim.AdamW(get_lora_parameters(model), lr=1e-4, weight_decay=0.01)
    model.train()(lora_models.tiny_batch()).sum().backward()
    optimizer.step()
    assert not torch.equal(run(model), before)


def test_checkpoint_functions(folder: Path) -> None:
    model = inject_lora_to_ptv3(base(), r=8, lora_alpha=8, target_modules=["attn"])
    lora_models.perturb(model)
    save_lora_checkpoint(
        model,
        path="checkpoints/lora_adapter.pth",
        metadata={"r": 8, "lora_alpha": 8, "target_modules": ["attn"]},
    )
    expected = run(model)
    other = inject_lora_to_ptv3(base())
    load_lora_checkpoint(other, "checkpoints/lora_adapter.pth")  # a model with LoRA
    assert torch.equal(run(other), expected)
    base_model = base()
    load_lora_checkpoint(base_model, "checkpoints/lora_adapter.pth")  # a plain one
    assert torch.equal(run(base_model), expected)
    merge_lora_weights(model)
    torch.save(model.state_dict(), "checkpoints/merged_model.pth")
    plain = LangPretrainer(FIVE_STAGES)
    plain.load_state_dict(torch.load("checkpoints/merged_model.pth"))  # every name is the base's
    torch.testing.assert_close(run(plain), expected, atol=1e-5, rtol=1e-4)


def test_domain_adaptation_with_prompts(folder: Path) -> None:
    model = inject_lora_to_ptv3(
        base(),
        r=16,
        lora_alpha=16,
        target_modules=["attn", "mlp"],
        enable_prompt=True,
    )
    mark_only_lora_as_trainable(model)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert any("mlp.0.fc2.lora_A" in name for name in names)
    assert any("prompt_mlp" in name for name in names)
    assert {id(p) for p in get_lora_parameters(model)} == {
        id(p) for p in model.parameters() if p.requires_grad
    }


def test_one_adapter_for_each_task(folder: Path) -> None:
    base_model = base()
    before, models = run(base_model), {}
    for seed, task in enumerate(["segmentation", "detection", "classification"]):
        model = copy.deepcopy(base_model)
        model = inject_lora_to_ptv3(
            model,
            r=8,
            lora_alpha=8,
            target_modules=["attn"],
        )
        lora_models.perturb(model, seed=seed)
        models[task] = run(model)
    assert torch.equal(run(base_model), before)
    assert not any(".lora_" in name for name in base_model.state_dict())
    assert len({feat.sum().item() for feat in models.values()}) == 3


@pytest.mark.parametrize(
    "given", [{"r": 16, "target_stages": [2, 3, 4]}, {"r": 4, "target_stages": [4]}]
)
def test_troubleshooting(folder: Path, given: dict) -> None:
    model = inject_lora_to_ptv3(base(), **given)
    held = {int(re.search(r"enc(\d)", n)[1]) for n, _ in model.named_parameters() if "lora_A" in n}
    assert held == set(given["target_stages"])


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_train_on_request(folder: Path, bias: str) -> None:
    model = inject_lora_to_ptv3(base(), target_stages=[4])
    mark_only_lora_as_trainable(model, bias)
    biases = {n for n, p in model.named_parameters() if p.requires_grad and n.endswith("bias")}
    assert "backbone.enc.enc4.block0.attn.qkv.bias" in biases
    assert ("backbone.enc.enc0.block0.attn.qkv.bias" in biases) == (bias == "all")
    assert not any(
        p.requires_grad for n, p in model.named_parameters() if n.endswith("cpe.0.weight")
    )
