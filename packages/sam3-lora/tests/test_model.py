"""From files to a network and back: bases in every packing, vocabularies, adapters."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import tiny_base
import torch

from lora_core.errors import CheckpointError, ConfigError
from lora_core.injection import lora_layers
from lora_core.testing import load_golden
from lora_core.testing.hub import write_model
from sam3_lora import export as x
from sam3_lora import model as m
from sam3_lora import network, official, tokenizer

GOLDENS = tiny_base.GOLDENS


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base.write(tmp_path_factory.mktemp("base") / "base.pt", tiny_base.content())


def assert_alike(one: Any, other: Any) -> None:
    """The same outputs, bit for bit."""
    assert max(x.compare(one, other).values()) == 0


# -- bases ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fingerprint(base: Path) -> str:
    found = m.load(base).sam3_base.fingerprint
    assert isinstance(found, str)
    return found


@pytest.mark.parametrize("prefix", tiny_base.PREFIXES)
@pytest.mark.parametrize("container", tiny_base.CONTAINERS)
def test_every_packing_gives_the_same_network(
    tmp_path: Path, fingerprint: str, prefix: str, container: str
) -> None:
    path = tiny_base.packed(tmp_path, prefix, container)
    model = m.load(path)
    found = model.sam3_base
    assert (found.path, found.name, found.variant) == (path, path.name, "custom")
    assert (found.fingerprint, found.has_tracker) == (fingerprint, True)
    assert m.base_fingerprint(official.read_official(path)) == fingerprint
    state = load_golden(GOLDENS / "transformers_model").weights
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert not model.training
    assert not any(p.requires_grad or p.is_meta for p in model.parameters())


def test_a_folder_of_transformers_gives_the_same_network(
    base: Path, tmp_path: Path, fingerprint: str
) -> None:
    m.load(base).save_pretrained(tmp_path / "folder")
    found = m.load(tmp_path / "folder").sam3_base
    assert (found.format, found.fingerprint, found.has_tracker) == ("folder", fingerprint, False)


def test_a_loaded_network_gives_the_official_numbers(base: Path) -> None:
    io = load_golden(GOLDENS / "official_model").io
    batch = {name: io[name] for name in ("pixel_values", "input_ids", "text_ids")}
    batch |= {"attention_mask": io["input_ids"].ne(0).long(), "image_ids": io["img_ids"]}
    with torch.no_grad():
        out = network.forward(m.load(base), batch, masks=False, one_to_many=False)
    logits = io["text.pred_logits"][..., 0]
    torch.testing.assert_close(out.one_to_one[-1].logits, logits, rtol=0, atol=1e-4)


def test_every_weight_has_memory_of_its_own_size(base: Path) -> None:
    """q, k and v come from one tensor, which a change in place of one must not reach."""
    for name, parameter in m.load(base).named_parameters():
        assert parameter.untyped_storage().nbytes() == parameter.nbytes, name
        assert parameter.is_contiguous(), name


def test_half_precision_files_become_float32_networks(tmp_path: Path) -> None:
    half = {k: t.half() if t.is_floating_point() else t for k, t in tiny_base.content().items()}
    model = m.load(tiny_base.write(tmp_path / "half.safetensors", half))
    weight = model.vision_encoder.backbone.layers[0].attention.k_proj.weight
    fused = half["detector.backbone.vision_backbone.trunk.blocks.0.attn.qkv.weight"]
    assert weight.dtype == torch.float32
    assert torch.equal(weight, fused.chunk(3)[1].float())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused_by_name(tmp_path: Path, value: float) -> None:
    tensors = tiny_base.content()
    name = "detector.transformer.encoder.layers.0.norm1.weight"
    tensors[name] = tensors[name].clone()
    tensors[name][3] = value
    path = tiny_base.write(tmp_path / "bad.pt", tensors)
    with pytest.raises(
        CheckpointError, match=r"NaN or infinite values in 1 tensor .*detr_encoder\.layers\.0"
    ):
        m.load(path)
    tensors["tracker.mask_decoder.weight"] = torch.tensor([value])
    tensors[name] = tiny_base.content()[name]
    m.load(tiny_base.write(path, tensors))  # nothing of the tracker is used


def test_build_follows_the_configuration(base: Path) -> None:
    cfg = tiny_base.config(base)
    cfg.dataset.resolution, cfg.training.gradient_checkpointing = "84x112", True
    model = m.build(cfg)
    assert m.image_size(model) == (84, 112)
    assert model.sam3_checkpointing
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert m.image_size(m.load(base)) == (84, 84)
    with pytest.raises(ConfigError, match="multiples of 14"):
        m.load(base, (84, 100))


@pytest.fixture
def hub(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two revisions of one model in the hub's cache, main is the second."""
    from huggingface_hub import constants

    cache, name = tmp_path / "cache", "detr_decoder.presence_token.weight"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    state = m.load(base).state_dict()
    weights = [safetensors.torch.save(state | {name: state[name] + n}) for n in range(2)]
    settings = json.dumps(tiny_base.settings()).encode()
    return write_model(cache, "nobody/sam3-small", settings, weights)


@pytest.mark.fault("H28")
def test_a_model_of_the_hub_is_that_of_its_revision_and_the_adapter_remembers_it(
    hub: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pinned = m.load(f"nobody/sam3-small@{'a' * 40}")
    assert "with this name" not in capsys.readouterr().out
    newest = m.load("nobody/sam3-small")
    name = f"nobody/sam3-small@{'b' * 40}"
    assert f"{name}: with this name it stays the same model" in capsys.readouterr().out
    assert pinned.sam3_base.fingerprint != newest.sam3_base.fingerprint
    assert m.adapter_metadata(newest)["base"]["file"] == name
    blob = (hub / "snapshots" / ("b" * 40) / "model.safetensors").resolve()
    blob.write_bytes(blob.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="is not what the hub has: its SHA-256 is"):
        m.load("nobody/sam3-small")


# -- before data and weights ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def merges() -> list[tuple[str, str]]:
    return tokenizer.learn_merges(["red circle", "small square"])


@pytest.fixture
def whole(tmp_path: Path, merges: list[tuple[str, str]]) -> Path:
    """A base whose text encoder has a row for each token of the vocabulary beside it."""
    tokenizer.write_vocabulary(tmp_path / "vocabulary.txt", merges)
    words = tokenizer.load_tokenizer(tmp_path).size
    return tiny_base.write(tmp_path / "base.pt", tiny_base.content(words=words), words)


def test_a_glance_reads_no_values_and_accepts_what_fits(whole: Path) -> None:
    cfg = tiny_base.config(whole)
    m.glance(cfg)
    model = m.skeleton(cfg)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model.sam3_base.fingerprint is None
    assert m.image_size(model) == (84, 84)


def test_a_glance_reports_the_adapter_and_the_base_together(whole: Path) -> None:
    tensors = tiny_base.content()  # other words than the config says
    torch.save(tensors, whole)
    cfg = tiny_base.config(whole)
    cfg.adapter = "no/such/adapter"
    with pytest.raises(CheckpointError) as error:
        m.glance(cfg)
    assert "--adapter" in str(error.value)
    assert "token_embedding.weight [64, 32] instead of" in str(error.value)


def test_a_glance_downloads_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    m.glance(tiny_base.config(Path("nobody/no-such-model")))
    with pytest.raises(CheckpointError, match="the hub gave none"):
        m.load("nobody/no-such-model")


def test_the_vocabulary_lies_beside_the_file_in_the_folder_or_where_it_is_said(
    whole: Path, tmp_path: Path, merges: list[tuple[str, str]]
) -> None:
    model = m.load(whole)
    ids, mask = m.tokenizer(model)(["red circle"])
    assert mask.sum() == 4
    model.save_pretrained(tmp_path / "folder")
    with pytest.raises(ConfigError, match=r"has no tokenizer\.json.*bpe_simple_vocab_16e6"):
        m.tokenizer(m.load(tmp_path / "folder"))
    text = (tmp_path / "vocabulary.txt").read_bytes()
    given = tmp_path / "words.txt.gz"
    given.write_bytes(gzip.compress(text))
    assert torch.equal(m.tokenizer(m.load(tmp_path / "folder"), given)(["red circle"])[0], ids)
    (tmp_path / "folder" / "vocabulary.txt").write_bytes(text)
    assert torch.equal(m.tokenizer(m.load(tmp_path / "folder"))(["red circle"])[0], ids)


def test_the_vocabulary_of_another_model_is_refused_before_the_weights(
    whole: Path, merges: list[tuple[str, str]]
) -> None:
    tokenizer.write_vocabulary(whole.parent / "vocabulary.txt", merges[:-1])
    rows = m.load(whole).config.text_config.vocab_size
    with pytest.raises(ConfigError, match=f"has {rows - 1} tokens, while .* knows {rows}"):
        m.glance(tiny_base.config(whole))


# -- adapters ------------------------------------------------------------------------------------


def test_an_adapter_comes_back_from_both_kinds_of_file(base: Path, tmp_path: Path) -> None:
    live = tiny_base.adapted(base)
    m.set_image_size(live, (84, 112))
    for name in ("best.pt", "adapter"):
        m.save_adapter(live, tmp_path / name, {"epoch": 5})
        loaded = m.load(base, adapter=tmp_path / name)
        assert m.image_size(loaded) == (84, 112)
        assert not loaded.training
        assert_alike(live, loaded)
    assert m.image_size(m.load(base, (84, 84), tmp_path / "best.pt")) == (84, 84)


def test_a_single_file_has_the_promised_parts_and_the_names_of_transformers(
    base: Path, tmp_path: Path
) -> None:
    live = tiny_base.adapted(base)
    m.save_adapter(live, tmp_path / "best.pt", {"epoch": 5})
    content = torch.load(tmp_path / "best.pt", weights_only=True)
    assert set(content) == {"format", "config", "metadata", "tensors"}
    expected = {f"{p}.lora_{letter}.weight" for p in lora_layers(live) for letter in "AB"}
    assert set(content["tensors"]) == expected
    base_facts = content["metadata"].pop("base")
    assert content["metadata"] == {"epoch": 5, "image_size": [84, 84]}
    assert base_facts == {
        "file": "base.pt",
        "variant": "custom",
        "fingerprint": live.sam3_base.fingerprint,
    }


@pytest.mark.fault("K34")
def test_plain_peft_and_transformers_load_the_folder(base: Path, tmp_path: Path) -> None:
    """None of our code: the library's class and its own forward, PEFT, and its own merge."""
    from peft import PeftModel
    from transformers import Sam3Model

    live = tiny_base.adapted(base)
    m.save_adapter(live, tmp_path / "adapter")
    m.load(base).save_pretrained(tmp_path / "base")
    x.export(live, tmp_path / "merged")
    io = load_golden(GOLDENS / "official_model").io
    given = {"pixel_values": io["pixel_values"], "input_ids": io["input_ids"]}
    given["attention_mask"] = io["input_ids"].ne(0).long()
    plain = Sam3Model.from_pretrained(tmp_path / "base").eval()
    merged = Sam3Model.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        before = plain(**given).pred_logits
        theirs = PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
        after = theirs(**given)
        again = theirs.merge_and_unload()(**given)
        ours = merged(**given)
    assert (after.pred_logits - before).abs().max() > 0.05, "the adapter does nothing"
    for name in ("pred_logits", "pred_boxes", "presence_logits"):
        torch.testing.assert_close(getattr(after, name), getattr(ours, name), rtol=0, atol=1e-4)
        torch.testing.assert_close(getattr(again, name), getattr(ours, name), rtol=0, atol=1e-4)


@pytest.mark.fault("K31")
def test_an_adapter_of_another_base_is_refused(base: Path, tmp_path: Path) -> None:
    m.save_adapter(tiny_base.adapted(base), tmp_path / "best.pt")
    tensors = tiny_base.content()
    name = "detector.transformer.decoder.presence_token.weight"
    tensors[name] = tensors[name] + 1
    other = tiny_base.write(tmp_path / "other.pt", tensors)
    with pytest.raises(CheckpointError, match=r"trained on base\.pt .*other\.pt"):
        m.load(other, adapter=tmp_path / "best.pt")


def test_bare_tensors_load_with_the_default_alpha(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    live = tiny_base.adapted(base)
    bare = {
        f"{path}.lora_{letter}.weight": factor.detach()
        for path, layer in lora_layers(live).items()
        for letter, factor in zip("AB", layer.lora_factors("default"), strict=True)
    }
    torch.save(bare, tmp_path / "bare.pt")
    assert_alike(live, m.load(base, adapter=tmp_path / "bare.pt"))
    assert "lora_alpha is taken to be 16.0" in capsys.readouterr().out


def test_a_partial_adapter_loads_on_request_only(base: Path, tmp_path: Path) -> None:
    live = tiny_base.adapted(base, target_modules=["q_proj"])
    m.save_adapter(live, tmp_path / "best.pt")
    content = torch.load(tmp_path / "best.pt", weights_only=True)
    gone = "mask_decoder.prompt_cross_attn.q_proj.lora_A.weight"
    del content["tensors"][gone]
    del content["config"]["lora_core"]["sha256"]
    torch.save(content, tmp_path / "part.pt")
    with pytest.raises(CheckpointError, match="is missing"):
        m.load(base, adapter=tmp_path / "part.pt")
    with pytest.warns(UserWarning, match="loaded in part"):
        found = m.load(base, adapter=tmp_path / "part.pt", allow_partial=True)
    assert len(lora_layers(found)) == len(lora_layers(live)) - 1
