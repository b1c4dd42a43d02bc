"""From an adapter to a merged checkpoint: exact names, untouched tensors, verified outputs."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_base
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_core.errors import CheckpointError, ConfigError, NumericError
from lora_core.injection import adapters_off, lora_layers
from lora_core.merged_file import same_bits
from sam3_lora import __main__ as program
from sam3_lora import export as x
from sam3_lora import model as m
from sam3_lora import names, official


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny_base.write(tmp_path / "base.pt", tiny_base.content())


def entries(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def changed(found: dict[str, Tensor], before: dict[str, Tensor]) -> set[str]:
    return {name for name, tensor in found.items() if not same_bits(tensor, before[name])}


def targets(network: Any) -> set[str]:
    """Official names of the tensors that the adapters of a network change."""
    found = {names.official_name(f"{path}.weight") for path in lora_layers(network)}
    assert None not in found
    return {f"detector.{name}" for name in found}


# -- the official file ---------------------------------------------------------------------------


@pytest.mark.fault("K42")
@pytest.mark.parametrize("prefix", tiny_base.PREFIXES)
@pytest.mark.parametrize("container", tiny_base.CONTAINERS)
def test_every_packing_becomes_a_file_with_the_published_names(
    tmp_path: Path, prefix: str, container: str
) -> None:
    path = tiny_base.packed(tmp_path, prefix, container)
    live = tiny_base.adapted(path, target_modules=["k_proj", "linear2"])
    merged = x.export(live, tmp_path / "merged.pt")
    assert set(merged.difference) == {"phrase", "box", "other phrase"}
    assert max(merged.difference.values()) <= 1e-5
    assert merged.has_tracker
    content = torch.load(tmp_path / "merged.pt", weights_only=True)
    assert ("model" in content) == (container == "wrapped.pt")
    tensors = content.get("model", content)
    published = tiny_base.content()
    assert tensors.keys() == published.keys()
    if container != "flat.safetensors":  # which has an order of its own
        assert list(tensors) == list(published)
    assert changed(tensors, published) == targets(live)
    assert (merged.tensors, merged.changed) == (len(published), len(targets(live)))


@pytest.mark.fault("K36")
def test_the_merged_file_does_what_the_live_model_did_which_stays_as_it_was(base: Path) -> None:
    live = tiny_base.adapted(base).train()
    before = {name: tensor.clone() for name, tensor in live.state_dict().items()}
    x.export(live, base.parent / "merged.pt")
    assert live.training
    after = live.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    with adapters_off(live):
        plain = x.probe(live)
    adapted, again = x.probe(live), x.probe(m.load(base.parent / "merged.pt"))
    for kind in plain:
        for off, on, merged in zip(plain[kind], adapted[kind], again[kind], strict=True):
            assert (on - off).abs().max() > 1e-3, "the adapter does nothing: this shows nothing"
            assert (merged - on).abs().max() <= 1e-5 * max(1, on.abs().max().item())


def test_an_adapter_on_q_changes_the_first_third_of_fused_weights_alone(base: Path) -> None:
    live = tiny_base.adapted(base, target_modules=["q_proj"])
    x.export(live, base.parent / "merged.pt")
    tensors = torch.load(base.parent / "merged.pt", weights_only=True)
    published = tiny_base.content()
    fused = targets(live)
    assert changed(tensors, published) == fused
    kinds = {name.rpartition(".")[2] for name in fused}
    assert kinds == {"weight", "in_proj_weight"}  # of qkv, and of nn.MultiheadAttention
    for name in fused:
        ours, theirs = tensors[name].chunk(3), published[name].chunk(3)
        assert [same_bits(a, b) for a, b in zip(ours, theirs, strict=True)] == [False, True, True]
    for path, layer in lora_layers(live).items():
        name = f"detector.{names.official_name(f'{path}.weight')}"
        A, B = (factor.detach().double() for factor in layer.lora_factors("default"))
        exact = published[name].chunk(3)[0].double() + 16 / 8 * B @ A
        torch.testing.assert_close(tensors[name].chunk(3)[0].double(), exact, rtol=0, atol=1e-6)


def test_the_official_loader_finds_every_tensor(base: Path) -> None:
    """Its rule: take "model" if it is there, keep the names with "detector.", which it cuts out."""
    x.export(tiny_base.adapted(base), base.parent / "merged.pt")
    content = torch.load(base.parent / "merged.pt", weights_only=True)
    content = content["model"] if isinstance(content.get("model"), dict) else content
    kept = {n.replace("detector.", ""): t for n, t in content.items() if "detector" in n}
    expected = tiny_base.detector()
    assert {n: t.shape for n, t in kept.items()} == {n: t.shape for n, t in expected.items()}


def test_a_safetensors_file_holds_the_complex_tables_too(base: Path) -> None:
    x.export(tiny_base.adapted(base), base.parent / "merged.safetensors", "official")
    found = load_file(base.parent / "merged.safetensors")
    assert found["tracker.freqs_cis"].dtype == torch.complex64
    assert found.keys() == tiny_base.content().keys()


@pytest.mark.parametrize("dtype", ["fp32", "keep"])
def test_a_half_precision_base_is_merged_exactly_or_kept_small(base: Path, dtype: Any) -> None:
    half = {k: t.half() if t.is_floating_point() else t for k, t in tiny_base.content().items()}
    torch.save(half, base)
    live = tiny_base.adapted(base)
    merged = x.export(live, base.parent / "merged.pt", dtype=dtype)
    tensors = torch.load(base.parent / "merged.pt", weights_only=True)
    for name, tensor in tensors.items():
        used = not official.of_tracker(name) and not names.is_unused(name.removeprefix("detector."))
        assert tensor.dtype == (torch.float32 if used and dtype == "fp32" else half[name].dtype)
    worst = max(merged.difference.values())
    assert worst <= 1e-5 if dtype == "fp32" else 1e-4 < worst < 1e-1


# -- the transformers folder ---------------------------------------------------------------------


@pytest.mark.fault("K42")
def test_an_official_base_becomes_a_transformers_folder(base: Path) -> None:
    from transformers import Sam3Model

    (base.parent / "merges.txt").write_text("#version: 0.2\n")
    (base.parent / "notes.json").write_text("{}")
    live = tiny_base.adapted(base)
    merged = x.export(live, base.parent / "runs-v1.0")
    folder = base.parent / "runs-v1.0"
    assert entries(folder) == ["config.json", "merges.txt", "model.safetensors"]
    assert (merged.format, merged.has_tracker) == ("transformers", False)
    assert merged.changed == len(lora_layers(live))
    again, info = Sam3Model.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert again.config.architectures == ["Sam3Model"]
    eps = {layer.layer_norm1.eps for layer in again.vision_encoder.backbone.layers}
    assert eps == {1e-5}, "the library's default is not the official model's"
    assert max(x.compare(live, again.eval()).values()) <= 1e-5
    assert max(x.compare(live, m.load(folder)).values()) <= 1e-5


@pytest.fixture
def video_folder(base: Path) -> Path:
    """As the published one: the detector inside a video model, and the tokenizer's files."""
    folder = base.parent / "published"
    folder.mkdir()
    config = {"model_type": "sam3_video", "detector_config": tiny_base.settings()}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text('{"size": 84}')
    (folder / "merges.txt").write_text("#version: 0.2\n")
    state = {f"detector_model.{name}": t for name, t in m.load(base).state_dict().items()}
    state["tracker_model.x"] = torch.tensor([-0.0, 1.0])
    save_file(state, folder / "model.safetensors")
    return folder


@pytest.mark.fault("K42")
def test_a_video_folder_stays_a_video_folder(video_folder: Path) -> None:
    live = tiny_base.adapted(video_folder)
    merged = x.export(live, video_folder.parent / "merged")
    folder = video_folder.parent / "merged"
    assert entries(folder) == entries(video_folder)
    for name in ("config.json", "preprocessor_config.json", "merges.txt"):
        assert (folder / name).read_bytes() == (video_folder / name).read_bytes()
    before, after = (load_file(p / "model.safetensors") for p in (video_folder, folder))
    expected = {f"detector_model.{path}.weight" for path in lora_layers(live)}
    assert changed(after, before) == expected
    assert (merged.changed, merged.has_tracker) == (len(expected), True)


def test_a_transformers_base_becomes_an_official_file(video_folder: Path) -> None:
    live = tiny_base.adapted(video_folder)
    merged = x.export(live, video_folder.parent / "merged.pt", "official")
    tensors = torch.load(video_folder.parent / "merged.pt", weights_only=True)
    published = tiny_base.content()
    used = {
        name
        for name in published
        if name.startswith("detector.") and not names.is_unused(name.removeprefix("detector."))
    }
    assert tensors.keys() == used
    assert not merged.has_tracker
    position = f"detector.{names.POSITIONS[0]}"  # whose first entry nothing reads or keeps
    assert changed(tensors, published) - {position} == targets(live)
    assert torch.equal(tensors[position][:, 1:], published[position][:, 1:])


# -- what is refused -----------------------------------------------------------------------------


def test_nothing_is_overwritten_unasked_and_no_other_folder_ever(base: Path) -> None:
    live, work = tiny_base.adapted(base, target_modules=["q_proj"]), base.parent
    (work / "out.pt").write_text("precious")
    with pytest.raises(ConfigError, match=r"out\.pt exists"):
        x.export(live, work / "out.pt")
    assert (work / "out.pt").read_text() == "precious"
    x.export(live, work / "out.pt", overwrite=True)
    assert official.read_official(work / "out.pt").format == "flat"
    x.export(live, work / "folder")
    with pytest.raises(ConfigError, match="folder exists"):
        x.export(live, work / "folder")
    x.export(live, work / "folder", overwrite=True)
    (work / "folder" / "thesis.tex").write_text("precious")
    with pytest.raises(ConfigError, match=r"holds 'thesis\.tex', which is not replaced"):
        x.export(live, work / "folder", overwrite=True)
    assert (work / "folder" / "thesis.tex").read_text() == "precious"


def test_the_base_is_never_written_over(base: Path) -> None:
    live, work = tiny_base.adapted(base, target_modules=["q_proj"]), base.parent
    before = {path: path.read_bytes() for path in work.iterdir()}
    for name in ("base.pt", "base.safetensors"):  # the second shares its settings' file
        with pytest.raises(ConfigError, match="is the base itself, or belongs to it"):
            x.export(live, work / name, overwrite=True)
    folder = work / "model"
    m.load(base).save_pretrained(folder)
    live = tiny_base.adapted(folder, target_modules=["q_proj"])
    with pytest.raises(ConfigError, match="is the base itself"):
        x.export(live, folder, overwrite=True)
    assert {path: path.read_bytes() for path in before} == before


def test_a_name_that_contradicts_the_format_is_refused(base: Path) -> None:
    live = tiny_base.adapted(base, target_modules=["q_proj"])
    with pytest.raises(ConfigError, match=r"is a file: end it in \.pt"):
        x.export(live, base.parent / "merged", "official")
    with pytest.raises(ConfigError, match="is a folder: leave out the ending"):
        x.export(live, base.parent / "merged.pt", "transformers")


def test_a_file_that_gives_other_outputs_is_not_kept(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = tiny_base.adapted(base, target_modules=["q_proj"])
    monkeypatch.setattr(x, "TOLERANCE", -1.0)
    before = entries(base.parent)
    for name in ("out.pt", "folder"):
        with pytest.raises(NumericError, match="other outputs than the adapted model"):
            x.export(live, base.parent / name)
        assert entries(base.parent) == before


@pytest.mark.fault("K36")
@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("backbone.vision_backbone.trunk.blocks.2.attn.proj.bias", ["phrase", "box"]),
        ("segmentation_head.cross_attend_prompt.out_proj.bias", ["phrase", "box"]),
        ("geometry_encoder.boxes_direct_project.bias", ["box"]),
    ],
)
def test_the_check_notices_a_single_changed_value(base: Path, name: str, kinds: list[str]) -> None:
    live = tiny_base.adapted(base)
    tensors = tiny_base.content()
    tensors[f"detector.{name}"] = tensors[f"detector.{name}"].clone()
    tensors[f"detector.{name}"][0] += 0.1
    other = tiny_base.write(base.parent / "other.pt", tensors)
    with adapters_off(live):
        found = x.compare(live, m.load(other))
    assert {kind: value > 1e-4 for kind, value in found.items()} == {
        kind: kind in kinds or "phrase" in kinds for kind in found
    }


def test_a_changed_base_file_is_noticed(base: Path) -> None:
    live = tiny_base.adapted(base, target_modules=["q_proj"])
    tensors = tiny_base.content()
    name = "detector.transformer.decoder.presence_token.weight"
    tensors[name] = tensors[name] + 1
    torch.save(tensors, base)
    with pytest.raises(CheckpointError, match="has changed since"):
        x.export(live, base.parent / "out.pt")


@pytest.mark.fault("K38")
def test_values_that_are_not_finite_leave_no_file(base: Path) -> None:
    live = tiny_base.adapted(base)
    with torch.no_grad():
        layer = lora_layers(live)["detr_decoder.layers.1.mlp.fc1"]
        layer.lora_factors("default")[1][0, 0] = float("nan")
    before = entries(base.parent)
    with pytest.raises(NumericError, match="adapter holds NaN"):
        x.export(live, base.parent / "out.pt")
    assert entries(base.parent) == before


def test_a_network_without_its_text_encoder_is_not_merged(base: Path) -> None:
    from sam3_lora.network import drop_text_encoder

    live = tiny_base.adapted(base, apply_to_text_encoder=False)
    drop_text_encoder(live)
    with pytest.raises(ConfigError, match="text encoder was dropped"):
        x.export(live, base.parent / "out.pt")


# -- the command ---------------------------------------------------------------------------------


def run(*words: object) -> int:
    return program.main(["merge", *map(str, words)])


@pytest.mark.parametrize("name", ["best.pt", "adapter"])
def test_the_command_merges_both_kinds_of_adapter(
    base: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    live, work = tiny_base.adapted(base), base.parent
    m.set_image_size(live, (84, 112))
    m.save_adapter(live, work / name)
    words = ("--adapter", work / name, "--checkpoint", base, "--output", work / "merged.pt")
    assert run(*words, "--format", "official") == 0
    text = capsys.readouterr().out
    assert f"{len(targets(live))} of them changed" in text
    assert "other phrase" in text
    assert "Trained at 84x112 pixels, while the model is made for 84x84" in text
    assert "The video tracker is the base's" in text
    assert max(x.compare(live, m.load(work / "merged.pt")).values()) <= 1e-5
    assert run(*words) == 2
    assert "merged.pt exists: choose another --output or add --overwrite" in capsys.readouterr().err


def test_the_command_finds_the_base_by_the_name_in_the_adapter(
    base: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(base.parent)
    live = tiny_base.adapted(base, target_modules=["q_proj"])
    m.save_adapter(live, "best.pt")
    Path("folder").mkdir()
    words = ("--adapter", "best.pt", "--output", "folder", "--format", "transformers")
    assert run(*words, "--overwrite") == 0
    assert "The video tracker is left out" in capsys.readouterr().out
    assert entries(Path("folder")) == ["config.json", "model.safetensors"]


def test_the_command_says_what_is_missing(
    base: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(base.parent)
    live = tiny_base.adapted(base, target_modules=["q_proj"])
    m.save_adapter(live, "best.pt")
    base.rename("moved.pt")
    for words, part in (
        (("--output", "out.pt"), "--adapter is missing"),
        (("--adapter", "best.pt", "--output", "out.pt"), "was trained on it: add --checkpoint"),
        (("--adapter", "moved.pt", "--output", "out.pt"), "moved.pt"),
        (("--adapter", "best.pt", "--output", "out", "--format", "official"), "end it in .pt"),
    ):
        assert run(*words) == 2
        text = capsys.readouterr().err
        assert part in text
        assert "Traceback" not in text
    assert entries(base.parent) == ["base.json", "best.pt", "moved.pt"]
