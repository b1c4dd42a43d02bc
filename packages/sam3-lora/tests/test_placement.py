"""Where LoRA goes: exact lists and counts of the published model, switches, globs, refusals."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Sam3Config

from lora_core.config import LoraConfig
from lora_core.errors import ConfigError
from lora_core.injection import lora_layers
from lora_core.targets import resolve
from lora_core.testing import load_golden
from sam3_lora import network, placement
from sam3_lora.config import COMPONENTS, ROLES, Config, Lora, Training

GOLDENS = Path(__file__).parent / "goldens"
TRAINABLE = {  # layers, and parameters at r = 8
    "vision_encoder": (192, 5_046_272),
    "text_encoder": (144, 3_538_944),
    "geometry_encoder": (30, 208_896),
    "detr_encoder": (60, 417_792),
    "detr_decoder": (84, 516_096),
    "mask_decoder": (4, 16_384),
}


@pytest.fixture(scope="module")
def facts() -> dict[str, Any]:
    return json.loads(gzip.decompress((GOLDENS / "names" / "names.json.gz").read_bytes()))


@pytest.fixture(scope="module")
def published() -> Any:
    """The published architecture without values."""
    return network.build_network(Sam3Config(), "meta")


@pytest.fixture
def tiny() -> Any:
    golden = load_golden(GOLDENS / "transformers_model")
    model = network.build_network(Sam3Config(**golden.config["sam3_config"]), "meta")
    model.load_state_dict(golden.weights, assign=True)
    return model


def config(masks: bool = True, **lora: Any) -> Config:
    return Config(lora=Lora(**lora), training=Training(enable_segmentation=masks))


def resolved(model: Any, names: list[str], components: Any = COMPONENTS) -> list[str]:
    return resolve(model, LoraConfig(target_modules=placement.targets(names, components)))


def parameters(model: Any, paths: list[str], rank: int) -> int:
    layers = [model.get_submodule(path) for path in paths]
    return rank * sum(layer.in_features + layer.out_features for layer in layers)


def test_the_published_model_has_the_recorded_tensors(
    published: Any, facts: dict[str, Any]
) -> None:
    shapes = {name: list(t.shape) for name, t in published.state_dict().items()}
    assert shapes == facts["transformers"]
    total = sum(p.numel() for p in published.parameters())
    assert total == facts["counts"]["transformers_parameters"]


@pytest.mark.parametrize("component", COMPONENTS)
def test_components_have_the_recorded_layers_and_counts(
    published: Any, facts: dict[str, Any], component: str
) -> None:
    for role in ROLES:
        recorded = {r[2]: (r[5], r[6]) for r in facts["lora_targets"] if r[:2] == [component, role]}
        if recorded:
            assert set(resolved(published, [role], [component])) == set(recorded)
        found = placement.linears(published.config, component, role)
        assert sorted(found) == sorted(recorded.values())
    paths = resolved(published, ["all"], [component])
    assert (len(paths), parameters(published, paths, 8)) == TRAINABLE[component]
    assert parameters(published, paths, 16) == 2 * TRAINABLE[component][1]


@pytest.mark.parametrize(
    ("names", "without", "layers", "count"),
    [
        (["all"], [], 514, 9_744_384),
        (list(ROLES), [], 514, 9_744_384),
        (["all"], ["text_encoder"], 370, 6_205_440),
        (["q_proj", "v_proj"], [], None, 2_138_112),
        (list(ROLES[:4]), [], None, 4_276_224),
    ],
)
def test_recorded_totals(
    published: Any, names: list[str], without: list[str], layers: int | None, count: int
) -> None:
    paths = resolved(published, names, [name for name in COMPONENTS if name not in without])
    assert parameters(published, paths, 8) == count
    assert layers in (None, len(paths))


@pytest.mark.parametrize(
    ("masks", "layers", "count"), [(True, 340, 5_996_544), (False, 336, 5_980_160)]
)
def test_the_default(published: Any, masks: bool, layers: int, count: int) -> None:
    paths = resolve(published, placement.lora_config(config(masks)))
    assert (len(paths), parameters(published, paths, 8)) == (layers, count)
    assert not any(path.startswith(("text_", "geometry_")) for path in paths)


def test_adapting_leaves_the_function_and_trains_the_adapters_only(tiny: Any) -> None:
    io = load_golden(GOLDENS / "official_model").io
    batch = {
        "pixel_values": io["pixel_values"],
        "input_ids": io["input_ids"],
        "attention_mask": io["language_mask"].long(),
        "image_ids": io["img_ids"],
        "text_ids": io["text_ids"],
    }
    with torch.no_grad():
        before = network.forward(tiny, batch, masks=True, one_to_many=False)
    cfg = config(apply_to_text_encoder=True, apply_to_geometry_encoder=True, rank=2)
    summary = placement.adapt(tiny, cfg)
    with torch.no_grad():
        after = network.forward(tiny, batch, masks=True, one_to_many=False)
    for one, two in zip(before.one_to_one, after.one_to_one, strict=True):
        assert torch.equal(one.logits, two.logits)
        assert torch.equal(one.boxes, two.boxes)
    trained = {name for name, p in tiny.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in tiny.named_parameters() if "lora_" in name}
    assert summary.trainable == sum(p.numel() for p in tiny.parameters() if p.requires_grad)


@pytest.mark.parametrize("component", COMPONENTS)
def test_every_switch_changes_its_component_and_no_other(tiny: Any, component: str) -> None:
    switches = {f"apply_to_{name}": name == component for name in COMPONENTS}
    placement.adapt(tiny, config(rank=2, **switches))
    assert {path.partition(".")[0] for path in lora_layers(tiny)} == {component}


def test_gradients_reach_every_adapter_without_any_box(tiny: Any) -> None:
    """The class token passes the geometry encoder in every batch, so no adapter is left out."""
    everything = {f"apply_to_{name}": True for name in COMPONENTS}
    placement.adapt(tiny, config(rank=2, dropout=0.0, **everything))
    for name, parameter in tiny.named_parameters():
        if ".lora_B." in name:  # B = 0 would leave A without gradient
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
    io = load_golden(GOLDENS / "train_step").io
    batch = {
        "pixel_values": io["pixel_values"],
        "input_ids": io["input_ids"],
        "attention_mask": (io["input_ids"] != 0).long(),
        "image_ids": io["img_ids"],
        "text_ids": io["text_ids"],
    }
    out = network.forward(tiny.train(), batch, masks=True, one_to_many=True)
    assert out.semantic is not None
    total = out.semantic.square().mean() + sum(p.square().mean() for p in out.presence)
    for layer in (*out.one_to_one, *out.one_to_many):
        total = total + layer.boxes.square().mean() + layer.logits.square().mean()
        total = total + (0 if layer.masks is None else layer.masks.all().square().mean())
    total.backward()
    adapters = {n: p.grad for n, p in tiny.named_parameters() if "lora_" in n}
    silent = [n for n, grad in adapters.items() if grad is None or not grad.abs().max() > 0]
    # One token attends to itself alone: q and k of the geometry encoder cannot matter then.
    lone = ("geometry_encoder.layers.0.self_attn.", "geometry_encoder.layers.1.self_attn.")
    assert all(n.startswith(lone) and n.split(".")[4] in ("q_proj", "k_proj") for n in silent)
    assert all(grad is not None for grad in adapters.values())


def test_globs_and_paths(published: Any) -> None:
    off = [name for name in COMPONENTS if name != "text_encoder"]
    assert resolved(published, ["dot_product_scoring.query_proj"], off) == [
        "dot_product_scoring.query_proj"
    ]
    everywhere = resolved(published, ["**.fc1"])
    assert len(resolved(published, ["**.fc1"], off)) == len(everywhere) - 24
    assert len(resolved(published, [r"re:.*\.fc1"], off)) == len(everywhere) - 24
    block = resolved(published, ["vision_encoder.backbone.layers.31.**"], off)
    assert len(block) == 6


@pytest.mark.parametrize(
    ("names", "components", "message"),
    [
        (["q_prj"], COMPONENTS, "'q_prj' is no role; did you mean 'q_proj'"),
        (["o_proj"], COMPONENTS, "'o_proj' is no role"),
        (["linear1"], ["mask_decoder"], "linear1 name no layer of mask_decoder"),
        (["all"], [], "no layer of no component"),
        (
            ["text_encoder.text_model.encoder.layers.0.mlp.fc1"],
            ["vision_encoder"],
            r"component that is off \(apply_to_text_encoder\)",
        ),
    ],
)
def test_names_that_cannot_be(names: list[str], components: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        placement.targets(names, components)


def test_other_names_in_the_library_are_noticed(tiny: Any, monkeypatch: Any) -> None:
    narrow = placement.Site(r"detr_encoder\.layers\.0", "self_attn", 2)
    monkeypatch.setitem(placement.SITES, "detr_encoder", narrow)
    with pytest.raises(RuntimeError, match="trainable parameters instead of"):
        placement.adapt(tiny, config())
