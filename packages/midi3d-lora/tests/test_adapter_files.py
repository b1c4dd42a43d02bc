"""Adapters as files: every form says all, files of others are read, and nothing is guessed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from adapted_models import MIDDLE, adapted, base, outputs, plain_tensors
from torch import Tensor

from lora_core.errors import CheckpointError, ConfigError
from midi3d_lora.__main__ import main
from midi3d_lora.adapter_files import find_adapter, load_adapter, read_adapter, save_adapter
from midi3d_lora.export import convert
from midi3d_lora.lora import LoraChoice, inject, lora_parameters

TOLERANCE: dict[str, Any] = {"rtol": 0.0, "atol": 2e-6}
FORMS = ("lora_weights.pth", "adapter", "pytorch_lora_weights.safetensors")


def written(tmp_path: Path, form: str, **settings: Any) -> tuple[Path, Tensor]:
    """(an adapter in this form, the outputs of the model that it comes from)."""
    model = adapted(**settings)
    path = save_adapter(model, tmp_path / "trained" / "lora_weights.pth", {"epoch": 7})
    if form != path.name:
        path = convert(read_adapter(path), tmp_path / form)
    return path, outputs(model)


def bare(tmp_path: Path, rename: Callable[[str], str] = str, suffix: str = ".pth") -> Path:
    """A file of tensors alone, as scripts for this model wrote it."""
    path = tmp_path / f"foreign{suffix}"
    tensors = {rename(name): t for name, t in plain_tensors(adapted()).items()}
    if suffix == ".pth":
        torch.save(tensors, path)
    else:
        safetensors.torch.save_file(tensors, path)
    return path


# -- there and back ------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_every_form_comes_back_with_all_that_it_needs(tmp_path: Path, form: str) -> None:
    path, wanted = written(tmp_path, form)
    model = base()
    model.set_multi_instance_blocks([])
    adapter = load_adapter(model, path)
    assert torch.equal(outputs(model), wanted)
    assert adapter.alpha == (4 if path.suffix == ".safetensors" else 8)
    assert (adapter.rank, adapter.multi_instance_blocks) == (4, MIDDLE)
    assert adapter.file.metadata["epoch"] == 7
    assert adapter.file.extra["lora_dropout"] == 0.1
    assert not lora_parameters(model)


def test_the_same_adapter_gives_the_same_bytes(tmp_path: Path) -> None:
    for form in FORMS:
        first, _ = written(tmp_path / "a", form)
        second, _ = written(tmp_path / "b", form)
        pairs = [(first, second)]
        if first.is_dir():
            pairs = [(file, second / file.name) for file in first.iterdir()]
        for one, two in pairs:
            assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize("form", FORMS)
def test_forms_are_made_from_each_other(tmp_path: Path, form: str) -> None:
    path, wanted = written(tmp_path, form)
    for number, other in enumerate(FORMS):
        model = base()
        load_adapter(model, convert(read_adapter(path), tmp_path / str(number) / other))
        assert torch.equal(outputs(model), wanted)


def test_training_goes_on_from_a_file(tmp_path: Path) -> None:
    path, _ = written(tmp_path, "lora_weights.pth")
    model = base()
    load_adapter(model, path, trainable=True)
    assert sum(p.numel() for p in lora_parameters(model)) == 14080 - 5 * 4 * 64


# -- other programs ------------------------------------------------------------------------------


@pytest.mark.fault("K34")
def test_peft_computes_the_same_with_our_folder(tmp_path: Path) -> None:
    path, wanted = written(tmp_path, "adapter")
    model = peft.PeftModel.from_pretrained(base(), str(path)).eval()
    torch.testing.assert_close(outputs(model), wanted, **TOLERANCE)


@pytest.mark.parametrize("with_settings", [True, False])
def test_diffusers_computes_the_same_with_our_file(tmp_path: Path, with_settings: bool) -> None:
    path, wanted = written(tmp_path, "pytorch_lora_weights.safetensors", alpha=10)
    model = base()
    if with_settings:
        model.load_lora_adapter(str(tmp_path), weight_name=path.name)
    else:  # it does not read the settings then, and takes alpha to be the rank
        model.load_lora_adapter(str(path))
    model.eval()  # the adapters come with dropout
    torch.testing.assert_close(outputs(model), wanted, **TOLERANCE)


def test_what_peft_saves_is_read(tmp_path: Path) -> None:
    config = peft.LoraConfig(
        r=4, lora_alpha=2, target_modules=["to_q", "to_out.0"], init_lora_weights=False
    )
    model = peft.get_peft_model(base(), config).eval()
    model.save_pretrained(str(tmp_path))
    mine = base()
    adapter = load_adapter(mine, tmp_path)
    torch.testing.assert_close(outputs(mine), outputs(model), **TOLERANCE)
    assert (adapter.rank, adapter.alpha, adapter.multi_instance_blocks) == (4, 2, None)
    assert mine.multi_instance_blocks == MIDDLE  # as they were


def test_what_diffusers_saves_is_read(tmp_path: Path) -> None:
    model = base()
    config = peft.LoraConfig(
        r=4, lora_alpha=2, target_modules=["to_k", "to_v"], init_lora_weights=False
    )
    model.add_adapter(config)
    model.save_lora_adapter(str(tmp_path))
    mine = base()
    adapter = load_adapter(mine, tmp_path)  # the folder in place of the file
    torch.testing.assert_close(outputs(mine), outputs(model.eval()), **TOLERANCE)
    assert adapter.alpha == 2


@pytest.mark.fault("K35")
@pytest.mark.parametrize(
    "rename",
    [
        str,
        lambda name: f"transformer.{name}",
        lambda name: f"base_model.model.{name}",
        lambda name: f"base_model.model.transformer.{name}",
        lambda name: f"module.{name}",
        lambda name: name.replace(".weight", ".default.weight"),
        lambda name: f"transformer.{name}".replace(".weight", ".default.weight"),
    ],
    ids=["bare", "transformer", "peft", "both", "ddp", "default", "official"],
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_names_of_all_scripts_are_understood(
    tmp_path: Path, rename: Callable[[str], str], suffix: str
) -> None:
    model = base()
    adapter = load_adapter(model, bare(tmp_path, rename, suffix), alpha=8)
    assert torch.equal(outputs(model), outputs(adapted()))
    assert adapter.alpha == 8


def test_a_file_of_tensors_alone_has_the_alpha_of_the_guide(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, model = bare(tmp_path), base()
    load_adapter(model, path)
    assert "its lora_alpha is taken to be 16" in capsys.readouterr().out
    assert torch.equal(outputs(model), outputs(adapted(alpha=16)))


def test_a_file_with_the_layers_without_effect_loads_and_trains_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """252 modules of the released model: those of `attn2.to_q` are among them."""
    tensors, width = plain_tensors(adapted()), base().config.width
    for index in range(5):
        name = f"blocks.{index}.attn2.to_q"
        tensors[f"{name}.lora_A.weight"] = torch.randn(4, width)
        tensors[f"{name}.lora_B.weight"] = torch.randn(width, 4)
    torch.save(tensors, tmp_path / "lora.pth")
    model = base()
    adapter = load_adapter(model, tmp_path / "lora.pth", alpha=8, trainable=True)
    assert len(adapter.file.tensors) == 2 * 60
    assert torch.equal(outputs(model), outputs(adapted()))
    assert "5 layers of" in capsys.readouterr().out
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert not any("attn2.to_q" in name for name in trained)
    save_adapter(model, tmp_path / "again.pth")
    assert len(read_adapter(tmp_path / "again.pth").file.tensors) == 2 * 60


# -- where it is ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "place",
    ["lora_weights.pth", "lora-final/lora_weights.pth", "adapter", ""],
)
def test_a_folder_means_the_adapter_in_it(tmp_path: Path, place: str) -> None:
    save_adapter(adapted(), tmp_path / place)
    assert read_adapter(tmp_path).rank == 4


def test_a_folder_without_an_adapter_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no adapter: looked for lora_weights\.pth, "):
        find_adapter(tmp_path)
    save_adapter(adapted(), tmp_path / "lora-epoch-10" / "lora_weights.pth")
    with pytest.raises(CheckpointError, match=r"; there is lora-epoch-10/lora_weights\.pth$"):
        find_adapter(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        read_adapter(tmp_path / "lora_weights.pth")


# -- what is refused -----------------------------------------------------------------------------


def test_what_the_user_says_is_checked(tmp_path: Path) -> None:
    path, wanted = written(tmp_path, "lora_weights.pth")
    model = base()
    with pytest.raises(ConfigError) as caught:
        load_adapter(model, path, rank=8, alpha=16, multi_instance_blocks=["blocks.1"])
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert "--lora_rank 8" in lines[0]
    assert "trained with 4" in lines[0]
    assert "--mi_attention_blocks blocks.1: " in lines[2]
    assert "blocks.1 blocks.2 blocks.3" in lines[2]
    load_adapter(model, path, rank=4, alpha=8, multi_instance_blocks=reversed(MIDDLE))
    assert torch.equal(outputs(model), wanted)


@pytest.mark.fault("K27")
def test_the_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    path = bare(tmp_path, lambda name: f"unet.{name}")
    with pytest.raises(CheckpointError, match="0 of 110 adapter tensors match this model"):
        load_adapter(base(), path)


def test_an_adapted_model_is_not_saved_as_a_base(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="save_adapter"):
        adapted().save_pretrained(tmp_path / "transformer")
    assert not (tmp_path / "transformer").exists()


@pytest.mark.fault("K28")
def test_an_incomplete_adapter_is_refused_unless_asked_for(tmp_path: Path) -> None:
    tensors = plain_tensors(adapted())
    del tensors["blocks.3.attn1.to_v.lora_B.weight"]
    tensors["image_encoder_2.layer.lora_A.weight"] = torch.randn(4, 8)
    tensors["image_encoder_2.layer.lora_B.weight"] = torch.randn(8, 4)
    torch.save(tensors, tmp_path / "lora.pth")
    model = base()
    before = outputs(model)
    with pytest.raises(CheckpointError, match=r"image_encoder_2\.layer: no such module"):
        load_adapter(model, tmp_path / "lora.pth", alpha=8)
    assert torch.equal(outputs(model), before)
    with pytest.warns(UserWarning, match="loaded in part, on 54 layers"):
        load_adapter(model, tmp_path / "lora.pth", alpha=8, allow_partial=True)


@pytest.mark.fault("K32")
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "holds no tensors"),
        ({"weight": torch.zeros(2)}, "is no LoRA adapter: expected tensors"),
        ({"blocks.0.attn1.to_q.lora_A.weight": torch.zeros(2)}, "expected two axes"),
        ([1, 2], "holds a list, not an adapter"),
    ],
)
def test_files_that_are_no_adapters_are_told(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "lora.pth")
    with pytest.raises(CheckpointError, match=message):
        read_adapter(tmp_path / "lora.pth")


class Program:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("ran",))


@pytest.mark.fault("H35")
def test_nothing_in_a_file_is_executed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"blocks.0.attn1.to_q.lora_A.weight": Program()}, tmp_path / "lora_weights.pth")
    with pytest.raises(CheckpointError, match="could run a program"):
        read_adapter(tmp_path)
    assert "ran" not in capsys.readouterr().out


@pytest.mark.parametrize("form", FORMS)
def test_a_flipped_bit_is_found(tmp_path: Path, form: str) -> None:
    path, _ = written(tmp_path, form)
    file = path / "adapter_model.safetensors" if path.is_dir() else path
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="damaged"):
        read_adapter(path)


def test_unreadable_blocks_or_settings_are_told(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_lora_weights.safetensors"
    tensors = {f"transformer.{name}": t for name, t in plain_tensors(adapted()).items()}
    safetensors.torch.save_file(tensors, path, {"lora_adapter_metadata": "{"})
    with pytest.raises(CheckpointError, match="no readable settings"):
        read_adapter(path)


def test_blocks_that_the_model_lacks_are_refused_before_anything_changes(tmp_path: Path) -> None:
    model = base()
    with pytest.raises(ConfigError, match=r"no blocks 'blocks\.8'"):
        load_adapter(model, bare(tmp_path), alpha=8, multi_instance_blocks=["blocks.8"])
    inject(model, LoraChoice(4, multi_instance_blocks=MIDDLE))  # there is none yet


# -- the command ---------------------------------------------------------------------------------


def test_export_writes_other_forms(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["export", "--lora_path", str(bare(tmp_path)), "--lora_alpha", "8"]
    words += ["--mi_attention_blocks", *MIDDLE]
    for form in FORMS:
        assert main([*words, "--output", str(tmp_path / "new" / form)]) == 0
        adapter = read_adapter(tmp_path / "new" / form)
        assert adapter.multi_instance_blocks == MIDDLE
        assert "110 tensors, rank 4" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("output", "more", "message"),
    [
        ("foreign.pth", ["--overwrite"], "is the adapter itself"),
        ("other.pth", [], "exists"),
        ("full", ["--overwrite"], "holds 'thesis.txt', which is not replaced"),
        ("new.bin", [], "end it in .pth"),
        ("new.pth", ["--mi_attention_blocks", "8"], "write blocks.8"),
    ],
)
def test_export_never_destroys(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    output: str,
    more: list[str],
    message: str,
) -> None:
    path = bare(tmp_path)
    (tmp_path / "other.pth").write_text("precious")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("precious")
    before = path.read_bytes()
    words = ["export", "--lora_path", str(path), "--output", str(tmp_path / output), *more]
    assert main(words) == 2
    assert message in capsys.readouterr().err
    assert path.read_bytes() == before
    assert (tmp_path / "other.pth").read_text() == "precious"
