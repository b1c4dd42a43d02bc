"""Official names to transformers' and back: every tensor of the published model, exactly."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_core.testing import load_golden
from sam3_lora import names

GOLDENS = Path(__file__).parent / "goldens"


@pytest.fixture(scope="module")
def facts() -> dict[str, Any]:
    return json.loads(gzip.decompress((GOLDENS / "names" / "names.json.gz").read_bytes()))


def meta(shape: list[int], dtype: str = "float32") -> torch.Tensor:
    return torch.empty(shape, dtype=getattr(torch, dtype), device="meta")


def test_every_tensor_of_the_published_model_has_its_place(facts: dict[str, Any]) -> None:
    official = {name: meta(*entry) for name, entry in facts["official"].items()}
    state = names.to_transformers(official)
    assert {n: list(t.shape) for n, t in state.items()} == facts["transformers"]
    assert len(state) == facts["counts"]["transformers_keys"]
    assert {n for n in official if names.is_unused(n)} == set(facts["official_only"])
    back = names.to_official(state)
    used = {n: e[0] for n, e in facts["official"].items() if n not in facts["official_only"]}
    assert {n: list(t.shape) for n, t in back.items()} == used


def test_every_row_of_the_recorded_map(facts: dict[str, Any]) -> None:
    for transformers, official, operation in facts["map"]:
        found = names.transformers_names(official)
        place = int(operation[-1]) if operation.startswith("chunk3") else 0
        assert found[place] == transformers
        assert len(found) == (3 if operation.startswith("chunk3") else 1)
        assert names.official_name(transformers) == official
    assert set(names.key_map(facts["official"])) == {row[1] for row in facts["map"]}


def test_golden_weights_convert_exactly_both_ways() -> None:
    official = load_golden(GOLDENS / "official_model").weights
    library = load_golden(GOLDENS / "transformers_model").weights
    state = names.to_transformers(official)
    assert state.keys() == library.keys()
    assert all(torch.equal(state[name], library[name]) for name in library)
    back = names.to_official(library)
    assert set(official) - set(back) == {n for n in official if "points_" in n}
    position = names.POSITIONS[0]
    assert torch.equal(back.pop(position)[:, 1:], official[position][:, 1:])
    assert all(torch.equal(tensor, official[name]) for name, tensor in back.items())


def test_names_out_of_the_table_stay_for_the_check_to_report() -> None:
    odd = torch.zeros(3)
    assert names.to_transformers({"new_head.weight": odd}) == {"new_head.weight": odd}
    half = {"mask_decoder.prompt_cross_attn.q_proj.bias": odd}  # without k and v
    assert names.to_official({"new_head.weight": odd, **half}).keys() == {"new_head.weight", *half}
    assert names.transformers_names("transformer.encoder.layers.x.norm1.weight") == ()
    assert names.official_name("other.attention.q_proj.weight") is None
