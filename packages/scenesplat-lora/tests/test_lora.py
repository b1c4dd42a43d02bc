"""LoRA on Point Transformer V3: the guide's functions, with numbers recorded from the original."""

import copy
from dataclasses import replace
from pathlib import Path

import lora_models
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lora_core.errors import ConfigError
from lora_core.injection import adapters_off, lora_layers
from lora_core.testing import load_golden
from lora_core.testing.goldens import assert_close_golden
from scenesplat_lora.lora import (
    get_lora_parameters,
    inject_choice,
    inject_lora_to_ptv3,
    inject_lora_to_stage,
    inject_lora_with_preset,
    lora_deltas,
    lora_summary,
    mark_only_lora_as_trainable,
    merge_lora_weights,
    print_lora_summary,
    remove_lora,
)
from scenesplat_lora.network import prompt_mlp
from scenesplat_lora.network.point_batch import PointBatch
from scenesplat_lora.network.ptv3 import PointTransformerV3
from scenesplat_lora.network.ptv3_config import LANGUAGE, PTv3Config
from scenesplat_lora.presets import PRESETS, LoraChoice

GOLDENS = Path(__file__).parent / "goldens"
LINEAR, NETWORK = load_golden(GOLDENS / "lora_linear"), load_golden(GOLDENS / "lora_ptv3")
FIVE = PTv3Config(in_channels=11)


def on_meta(config: PTv3Config) -> PointTransformerV3:
    with torch.device("meta"):
        return PointTransformerV3(config)


def run(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(lora_models.tiny_batch())


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


# -- recorded --------------------------------------------------------------------------------------


class OneLayer(nn.Module):
    """A model in which the one layer that LoRA looks for can be any Linear."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.enc0 = nn.Module()
        self.enc0.block0 = nn.Module()
        self.enc0.block0.attn = nn.Module()
        self.enc0.block0.attn.qkv = nn.Linear(inputs, outputs)


@pytest.mark.parametrize("case", LINEAR.config["cases"], ids=lambda case: case["tag"])
def test_a_layer_computes_what_the_original_did(case: dict) -> None:
    tag, paper = case["tag"], case["tag"] == "paper"
    own = {
        name.removeprefix(f"{tag}."): value
        for name, value in LINEAR.weights.items()
        if name.startswith(f"{tag}.")
    }
    model = OneLayer(case["in_features"], case["out_features"])
    layer = model.enc0.block0.attn.qkv
    layer.load_state_dict({"weight": own["linear.weight"], "bias": own["linear.bias"]})
    alpha = case["r"] if paper else case["lora_alpha"]  # the paper's code has no alpha / r
    prompt = paper or case["enable_prompt"]
    inject_lora_to_ptv3(model, case["r"], alpha, ["attn"], prompt, prompt_width=None)
    if paper:
        prompt_mlp.detach(model)
        prompt_mlp.attach(model, {"enc0.block0.attn.qkv": case["prompt_hidden"]})
        own["prompt_weight"] = own["weight"].squeeze()
    with torch.no_grad():
        layer.lora_A.default.weight.copy_(own["lora_A"])
        layer.lora_B.default.weight.copy_(own["lora_B"])
        if prompt:
            layer.prompt_mlp.prompt_weight.copy_(own["prompt_weight"])
            for key in ("0.weight", "0.bias", "2.weight", "2.bias"):
                layer.prompt_mlp.get_parameter(key).copy_(own[f"prompt_mlp.{key}"])
    assert_close_golden(layer(LINEAR.io[f"{tag}.x"]), LINEAR.io[f"{tag}.y"], 1e-5)
    if not paper:
        merge_lora_weights(model, force=True)
        assert_close_golden(layer.weight, LINEAR.io[f"{tag}.merged_weight"], 1e-5)


@pytest.mark.parametrize("case", NETWORK.config["cases"], ids=lambda case: case["tag"])
def test_a_network_computes_what_the_original_did_merged_or_not(case: dict) -> None:
    model = PointTransformerV3(PTv3Config.from_dict(NETWORK.config["backbone"])).eval()
    model.load_state_dict(load_golden(GOLDENS / "ptv3_tiny").weights)
    names = case["target_modules"]
    inject_lora_to_ptv3(model, case["r"], case["lora_alpha"], names, encoder_only=False)
    assert lora_summary(model).lora == case["n_lora_parameters"]
    layers = lora_layers(model)
    for name, value in NETWORK.weights.items():
        tag, _, path = name.partition(".")
        if tag == case["tag"]:
            layer, _, factor = path.rpartition(".")
            with torch.no_grad():
                getattr(layers[layer], factor).default.weight.copy_(value)
    io = NETWORK.io
    batch = PointBatch(io["feat"], io["grid_coord"], io["offset"], io["coord"])
    expected = io[f"{case['tag']}.out_noshuffle"]
    with torch.no_grad():
        assert_close_golden(model(batch), expected, rtol=0, atol=5e-6)
        merge_lora_weights(model)
        assert_close_golden(model(batch), expected, rtol=0, atol=5e-6)


PARAMETERS = {  # (shape, preset, options) -> layers, LoRA, prompts
    (FIVE, "minimal", ()): (16, 61_440, 0),
    (FIVE, "standard", ()): (28, 144_384, 0),
    (FIVE, "standard", (("encoder_only", False),)): (44, 193_536, 0),
    (FIVE, "full", ()): (56, 770_048, 1_529_352),
    (FIVE, "full", (("prompt_width", None),)): (56, 770_048, 7_476_360),
    (FIVE, "full", (("prompt_width", None), ("encoder_only", False))): (88, 1_032_192, 8_884_136),
    (FIVE, "decoder_only", ()): (16, 49_152, 0),
    (LANGUAGE, "minimal", ()): (16, 43_008, 0),
    (LANGUAGE, "standard", ()): (24, 95_232, 0),
    (LANGUAGE, "standard", (("encoder_only", False),)): (36, 242_688, 0),
    (LANGUAGE, "full", ()): (48, 507_904, 995_584),
    (LANGUAGE, "full", (("encoder_only", False),)): (72, 1_294_336, 2_596_888),
    (LANGUAGE, "full", (("prompt_width", None),)): (48, 507_904, 3_402_112),
    (LANGUAGE, "full", (("prompt_width", None), ("encoder_only", False))):
        (72, 1_294_336, 17_656_472),
    (LANGUAGE, "decoder_only", ()): (12, 147_456, 0),
}  # fmt: skip


@pytest.mark.parametrize("case", PARAMETERS, ids=lambda c: f"{len(c[0].enc_depths)}-{c[1]}-{c[2]}")
def test_presets_have_the_published_numbers_of_parameters(case: tuple) -> None:
    shape, preset, options = case
    model = inject_lora_with_preset(on_meta(shape), preset, **dict(options))
    prompts = sum(p.numel() for key, p in model.named_parameters() if ".prompt_mlp." in key)
    summary = lora_summary(model)
    assert (len(lora_layers(model)), summary.lora - prompts, prompts) == PARAMETERS[case]
    assert summary.trainable == summary.lora
    base = 46_186_272 if shape is FIVE else 91_712_800
    assert summary.total == base + summary.lora


# -- where it goes ---------------------------------------------------------------------------------


def test_only_qkv_proj_fc1_and_fc2_of_the_chosen_part_are_adapted() -> None:
    model = lora_models.tiny_model()
    inject_lora_to_ptv3(model, 2, 2, ["attn", "mlp"])
    paths = list(lora_layers(model))
    assert len(paths) == 4 * 4
    assert all(path.startswith("backbone.enc.enc") for path in paths)
    assert {path.split(".", 4)[4] for path in paths} == {
        "attn.qkv", "attn.proj", "mlp.0.fc1", "mlp.0.fc2"
    }  # fmt: skip


def test_stages_are_those_of_the_names() -> None:
    model = inject_lora_to_stage(lora_models.tiny_model(), [0], 2, 2, encoder=False)
    assert set(lora_layers(model)) == {
        "backbone.dec.dec0.block0.attn.qkv", "backbone.dec.dec0.block0.attn.proj"
    }  # fmt: skip
    both = inject_lora_to_ptv3(
        lora_models.tiny_model(), 2, 2, encoder_only=False, target_stages=[1]
    )
    assert {path.split(".")[2] for path in lora_layers(both)} == {"enc1", "dec1"}


def test_the_stages_of_the_guide_run_on_the_released_model_with_a_warning() -> None:
    with pytest.warns(UserWarning, match=r"no stage 4, only enc0, enc1, enc2, enc3"):
        model = inject_lora_to_ptv3(on_meta(LANGUAGE), 4, 4, target_stages=[3, 4])
    assert lora_summary(model).lora == 36_864


def test_the_deepest_stages_of_minimal_are_those_of_the_model() -> None:
    model = inject_lora_with_preset(lora_models.tiny_model(), "minimal", target_modules=None)
    assert {path.split(".")[2] for path in lora_layers(model)} == {"enc1", "enc2"}


@pytest.mark.fault("C15")
def test_overrides_win_over_a_preset() -> None:
    model = lora_models.tiny_model()
    inject_lora_with_preset(model, "minimal", r=2, target_stages=[0], encoder_only=False)
    layers = lora_layers(model)
    assert {path.split(".")[2] for path in layers} == {"enc0", "dec0"}
    assert {layer.lora_adapters["default"].r for layer in layers.values()} == {2}
    assert {layer.lora_adapters["default"].alpha for layer in layers.values()} == {4}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "rank"),
        ({"lora_alpha": -1}, "alpha"),
        ({"target_modules": ["atn"]}, "did you mean 'attn'"),
        ({"target_modules": []}, "target_modules is empty"),
        ({"target_stages": [7, 8]}, r"none of them, only enc0, enc1, enc2"),
        ({"target_stages": [-1]}, "from 0 on"),
        ({"target_stages": []}, "from 0 on"),
        ({"lora_dropout": 1.0}, "lora_dropout"),
        ({"enable_prompt": True, "prompt_width": 0}, "prompt_width"),
    ],
)
def test_what_cannot_work_is_refused_and_changes_nothing(options: dict, message: str) -> None:
    model = lora_models.tiny_model()
    before, flags = state(model), [p.requires_grad for p in model.parameters()]
    with pytest.raises(ConfigError, match=message):
        inject_lora_to_ptv3(model, **options)
    assert same(state(model), before)
    assert [p.requires_grad for p in model.parameters()] == flags


def test_models_and_presets_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="Linear holds no blocks"):
        inject_lora_to_ptv3(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="minimal, standard, full, decoder_only"):
        inject_lora_with_preset(lora_models.tiny_model(), "tiny")
    with pytest.raises(ConfigError, match="did you mean 'lora_alpha'"):
        inject_lora_with_preset(lora_models.tiny_model(), "minimal", lora_alfa=3)
    with pytest.raises(ConfigError, match="the decoder alone"):
        inject_lora_with_preset(lora_models.tiny_model(), "decoder_only", encoder_only=True)
    model = inject_lora_to_ptv3(lora_models.tiny_model())
    with pytest.raises(ConfigError, match="has LoRA already"):
        inject_lora_to_ptv3(model)
    for call in (mark_only_lora_as_trainable, get_lora_parameters, merge_lora_weights, remove_lora):
        with pytest.raises(ConfigError, match="no LoRA layers"):
            call(lora_models.tiny_model())


# -- what it does ----------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
def test_injection_changes_no_output_and_no_key(preset: str) -> None:
    model = lora_models.tiny_model()
    before, expected = state(model), run(model)
    inject_lora_with_preset(model, preset)
    assert torch.equal(run(model), expected)
    assert before.keys() <= model.state_dict().keys()
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    model.load_state_dict(before)  # a base checkpoint still loads, strictly
    trained = [key for key, p in model.named_parameters() if p.requires_grad]
    assert all(".lora_" in key or ".prompt_mlp." in key for key in trained)


def test_device_dtype_and_mode_of_the_base_stay() -> None:
    model = lora_models.tiny_model().half().train()
    inject_lora_to_ptv3(model, 2, 2, enable_prompt=True)
    layer = model.backbone.enc["enc0"].block0.attn.qkv
    assert layer.weight.dtype == torch.float16
    assert layer.prompt_mlp.prompt_weight.dtype == torch.float32
    assert layer.training
    x = torch.randn(3, 16, dtype=torch.float16)
    assert layer(x).dtype == torch.float16


def test_gradients_reach_every_lora_parameter_and_nothing_else() -> None:
    model = lora_models.tiny_model()
    inject_lora_to_ptv3(model, 2, 2, ["attn", "mlp"], True, encoder_only=False)
    lora_models.perturb(model)
    model(lora_models.tiny_batch()).square().mul(torch.arange(24)).sum().backward()
    parameters = get_lora_parameters(model)
    assert all(p.grad is not None and p.grad.any() for p in parameters)
    mine = {id(p) for p in parameters}
    assert all(p.grad is None for p in model.parameters() if id(p) not in mine)


def test_merging_gives_the_same_output_with_the_base_keys_alone() -> None:
    model = lora_models.tiny_model()
    before, flags = state(model), [p.requires_grad for p in model.parameters()]
    inject_lora_with_preset(model, "full", enable_prompt=False)
    lora_models.perturb(model)
    expected, deltas = run(model), lora_deltas(model)
    merge_lora_weights(model)
    torch.testing.assert_close(run(model), expected, rtol=1e-4, atol=1e-5)
    after = state(model)
    assert list(after) == list(before)
    for key, value in before.items():
        assert torch.equal(after[key], value) == (key not in deltas)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert type(model.backbone.enc["enc0"].block0.attn.qkv) is nn.Linear
    with pytest.raises(ConfigError, match="no LoRA layers"):
        merge_lora_weights(model)


def test_prompts_are_merged_only_by_force() -> None:
    model = inject_lora_to_ptv3(lora_models.tiny_model(), enable_prompt=True)
    keys = list(lora_models.tiny_model().state_dict())
    with pytest.raises(ConfigError, match=r"prompt MLPs.*force=True"):
        merge_lora_weights(model)
    merge_lora_weights(model, force=True)
    assert list(model.state_dict()) == keys
    assert not any(module._forward_hooks for module in model.modules())


def test_removing_gives_the_base_back_bit_for_bit() -> None:
    model = lora_models.tiny_model().train()
    before, expected = state(model), run(model)
    inject_lora_with_preset(model, "full")
    mark_only_lora_as_trainable(model, bias="all")
    lora_models.perturb(model)
    assert not torch.equal(run(model), expected)
    with adapters_off(model):
        assert torch.equal(run(model), expected)
    remove_lora(model)
    assert same(state(model), before)
    assert torch.equal(run(model), expected)
    assert all(p.requires_grad for p in model.parameters())
    hooks = [(m._forward_hooks, m._forward_pre_hooks) for m in model.modules()]
    assert not any(map(any, hooks))


def test_copies_of_a_base_are_adapted_on_their_own() -> None:
    base = lora_models.tiny_model()
    expected = run(base)
    tasks = [inject_lora_with_preset(copy.deepcopy(base), "full") for _ in range(2)]
    lora_models.perturb(tasks[0])
    assert torch.equal(run(tasks[1]), expected)
    assert torch.equal(run(base), expected)
    twin = copy.deepcopy(tasks[0])
    assert torch.equal(run(twin), run(tasks[0]))
    lora_models.perturb(twin, seed=1)
    assert not torch.equal(run(twin), run(tasks[0]))


def test_a_wrapped_model_is_adapted_inside() -> None:
    model = lora_models.tiny_model()
    wrapped = nn.DataParallel(model)
    assert inject_lora_to_ptv3(wrapped, 2, 2) is wrapped
    assert get_lora_parameters(wrapped) == get_lora_parameters(model)
    merge_lora_weights(wrapped)
    assert list(model.state_dict()) == list(lora_models.tiny_model().state_dict())


def test_lora_on_the_backbone_is_found_from_the_whole_model() -> None:
    model = lora_models.tiny_model()
    inject_lora_to_ptv3(model.backbone, 2, 2)
    assert len(get_lora_parameters(model)) == 16
    with pytest.raises(ConfigError, match="has LoRA already"):
        inject_lora_to_ptv3(model)


def test_batch_statistics_stay_those_of_the_base_in_training() -> None:
    model = inject_lora_to_ptv3(lora_models.tiny_model(), 2, 2)
    before = {key: value for key, value in state(model).items() if "running_" in key}
    expected = run(model)
    model.train()
    model.backbone.config = replace(model.backbone.config, shuffle_orders=False)
    with torch.no_grad():
        torch.testing.assert_close(model(lora_models.tiny_batch()), expected)
    after = {key: value for key, value in state(model).items() if "running_" in key}
    assert before
    assert same(before, after)
    merge_lora_weights(model.train())
    model(lora_models.tiny_batch())
    assert not same(after, {k: v for k, v in state(model).items() if "running_" in k})


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
def test_biases_train_as_asked(bias: str) -> None:
    model = lora_models.tiny_model()
    inject_lora_to_ptv3(model, 2, 2, target_stages=[0])
    mark_only_lora_as_trainable(model, "all")
    mark_only_lora_as_trainable(model, bias)
    trained = {key for key, p in model.named_parameters() if p.requires_grad}
    biases = {key for key in trained if ".lora_" not in key}
    every = {key for key, _ in model.named_parameters() if key.endswith("bias")}
    adapted = {f"backbone.enc.enc0.block0.attn.{name}.bias" for name in ("qkv", "proj")}
    assert biases == {"none": set(), "lora_only": adapted, "all": every}[bias]


def test_another_word_for_bias_is_refused() -> None:
    model = inject_lora_to_ptv3(lora_models.tiny_model())
    with pytest.raises(ConfigError, match="did you mean 'lora_only'"):
        mark_only_lora_as_trainable(model, "loraonly")


def test_the_summary_is_printed_as_in_the_guide(capsys: pytest.CaptureFixture[str]) -> None:
    model = inject_lora_with_preset(on_meta(FIVE), "minimal")
    print_lora_summary(model)
    assert capsys.readouterr().out.splitlines() == [
        "=" * 60,
        "LoRA Parameter Summary",
        "=" * 60,
        "Total parameters: 46,247,712",
        "LoRA parameters: 61,440",
        "Trainable parameters: 61,440",
        "LoRA ratio: 0.13%",
        "=" * 60,
    ]


def test_a_few_steps_of_training_bring_the_output_to_its_target() -> None:
    model = lora_models.tiny_model()
    inject_lora_to_ptv3(model, 4, 4, ["attn", "mlp"], encoder_only=False)
    target = F.normalize(torch.randn(24, generator=torch.Generator().manual_seed(0)), dim=0)
    batch = lora_models.tiny_batch()
    optimizer = torch.optim.AdamW(get_lora_parameters(model), lr=1e-2, weight_decay=0.01)
    losses = []
    for _ in range(8):
        loss = (1 - model.train()(batch) @ target).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_choices_are_seeded_layer_by_layer() -> None:
    few = inject_choice(lora_models.tiny_model(), LoraChoice(2, 2, target_stages=(2,), seed=3))
    many = inject_choice(lora_models.tiny_model(), LoraChoice(2, 2, seed=3))
    other = inject_choice(lora_models.tiny_model(), LoraChoice(2, 2, seed=4))
    path = "backbone.enc.enc2.block1.attn.qkv"
    A = [lora_layers(model)[path].lora_A.default.weight for model in (few, many, other)]
    assert torch.equal(A[0], A[1])
    assert not torch.equal(A[1], A[2])
