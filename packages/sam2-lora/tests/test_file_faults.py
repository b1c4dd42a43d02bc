"""Damaged, wrong and hostile bases and adapters, met by the commands as a user runs them.

Every command ends with status 2 and a message of its own, and leaves no output behind.
"""

import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from lora_core.testing import corrupt
from lora_core.testing.foreign import WEIGHTS, rewrite
from sam2_lora import __main__ as program
from sam2_lora import model as m
from sam2_lora import names, official, placement
from sam2_lora.config import Config

ADAPTERS = ["adapter", "adapter.torch", "adapter.pth", "adapter.pt"]
COMMANDS = ["merge", "predict", "evaluate", "train"]
Refused = Callable[..., str]
Words = Callable[..., list[str]]


# -- the base --------------------------------------------------------------------------------------

REASONS = {
    "empty": "is empty: copy or download it again",
    "web_page": "is a web page, not a checkpoint: the download failed or needs a login",
    "lfs_pointer": "is a Git LFS pointer, not the file itself: run `git lfs pull` there",
    "text": "it does not begin as one",
    "zeros": "it does not begin as one",
    "last_byte_missing": "cut off",
}


@pytest.mark.fault("C25", "K29")
@pytest.mark.parametrize(
    ("damage", "suffix"),
    [
        *((damage, ".pt") for damage in corrupt.DAMAGE),
        *((damage, ".safetensors") for damage in ("empty", "lfs_pointer", "cut_after_7_of_8")),
    ],
)
def test_a_damaged_base_is_named_with_its_reason(
    work: Path, refused: Refused, damage: str, suffix: str
) -> None:
    path = work / f"other{suffix}"
    official.write_official(path, official.read_official("base.safetensors").tensors)
    corrupt.DAMAGE[damage](path)
    text = refused("predict", "other", base=path.name, adapter=None)
    if damage == "folder":
        assert "here is: nothing" in text
    else:
        assert REASONS.get(damage, "is damaged or no") in text


@pytest.mark.fault("C25")
@pytest.mark.parametrize("command", ["predict", "evaluate", "train"])
@pytest.mark.parametrize("damage", ["lfs_pointer", "web_page", "empty"])
def test_a_failed_download_is_named_by_every_command(
    work: Path, refused: Refused, damage: str, command: str
) -> None:
    path = work / "sam2.1_hiera_tiny.pt"
    path.write_text("x")
    corrupt.DAMAGE[damage](path)
    refused(command, "sam2.1_hiera_tiny.pt", REASONS[damage], base=path.name, adapter=None)


@pytest.mark.fault("C25")
def test_missing_bases_say_where_was_looked_and_where_to_get_it(refused: Refused) -> None:
    for command in ("predict", "evaluate", "train"):
        refused(
            command, "no checkpoint sam2.1_hiera_tiny.pt: looked at",
            "/092824/sam2.1_hiera_tiny.pt", base="sam2.1_hiera_tiny.pt", adapter=None,
        )  # fmt: skip


@pytest.mark.fault("C25", "H28", "H44", "H45")
@pytest.mark.parametrize(
    ("files", "part"),
    [
        ([], "here is: nothing"),
        (["config.json"], "needs config.json and model.safetensors; here is: config.json"),
        (["config.json", "model.safetensors.index.json"], "Models in several shards are not read"),
        (["config.json", "pytorch_model.bin"], "Pickled weights are not read"),
        (["adapter_config.json", WEIGHTS], "This is a LoRA adapter: pass it as --adapter"),
    ],
)
def test_a_folder_that_is_no_model_says_what_is_in_it(
    work: Path, refused: Refused, files: list[str], part: str
) -> None:
    (work / "folder").mkdir()
    index = {"weight_map": {"x": "../../outside", **{str(i): f"{i}.bin" for i in range(100_000)}}}
    for name in files:
        (work / "folder" / name).write_text(json.dumps(index))
    if "pytorch_model.bin" in files:
        (work / "folder" / "pytorch_model.bin").write_bytes(pickle.dumps(Hostile()))
    refused("predict", part, base="folder", adapter=None)


@pytest.mark.fault("C26")
@pytest.mark.parametrize("other", ["custom", "sam2.1_hiera_large"])
def test_weights_of_another_variant_list_names_and_the_variant_that_fits(
    work: Path, refused: Refused, tiny_checkpoint: Path, other: str
) -> None:
    """A folder with the weights of sam2.1_hiera_tiny and the settings of another model."""
    state = names.to_transformers(official.read_official(tiny_checkpoint).image)
    (work / "folder").mkdir()
    safetensors.torch.save_file(
        {k: t.clone() for k, t in state.items()}, work / "folder/model.safetensors"
    )
    if other == "custom":
        shutil.copy("base.json", "folder/config.json")
    else:
        (work / "folder/config.json").write_text(json.dumps(official.published(other).config))
    text = refused("predict", "the tensors look like hiera_tiny", base="folder", adapter=None)
    assert re.search(r"\d+ of \d+ tensors matched", text)
    for kind in ("missing|unexpected", "other shape"):
        listed = re.search(rf"\d+ (?:{kind}): (.*)", text)
        assert listed
        assert 1 <= len(re.findall(r"(?:image_encoder|sam_\w+)\.", listed[1])) <= 5
    assert re.search(r"other shape: \S+ \[[\d, ]+\] instead of \[[\d, ]+\]", text)


@pytest.mark.fault("C27")
@pytest.mark.parametrize(
    ("command", "suffix"), [("predict", ".pt"), ("evaluate", ".safetensors"), ("train", ".pt")]
)
def test_a_base_of_which_nothing_matches_never_runs(
    work: Path, refused: Refused, command: str, suffix: str
) -> None:
    tensors = official.read_official("base.safetensors").tensors
    official.write_official(work / f"other{suffix}", {f"net.{k}": t for k, t in tensors.items()})
    refused(command, f"0 of {len(tensors)} tensors matched", base=f"other{suffix}", adapter=None)


@pytest.mark.fault("C27")
def test_a_base_with_a_missing_or_broken_tensor_never_runs(work: Path, refused: Refused) -> None:
    tensors = official.read_official("base.safetensors").tensors
    name = "sam_mask_decoder.conv_s0.bias"
    kept = {key: tensor for key, tensor in tensors.items() if key != name}
    official.write_official("other.safetensors", kept)
    refused("predict", f"1 missing: {name}", base="other.safetensors", adapter=None)
    for value in (float("nan"), float("inf")):
        broken = tensors | {name: torch.full_like(tensors[name], value)}
        official.write_official("other.safetensors", broken)
        text = f"NaN or infinite values in 1 tensor ({name})"
        refused("predict", text, base="other.safetensors", adapter=None)


@pytest.mark.fault("C25")
@pytest.mark.parametrize("damage", ["lfs_pointer", "web_page", "empty", "text", "cut_after_4_of_8"])
def test_a_damaged_config_of_the_base_is_named(work: Path, refused: Refused, damage: str) -> None:
    corrupt.DAMAGE[damage](work / "base.json")
    part = REASONS[damage] if damage in ("lfs_pointer", "web_page", "empty") else "no readable JSON"
    refused("predict", "base.json", part, adapter=None)


@pytest.mark.fault("K31")
def test_a_flipped_bit_in_a_pt_base_is_noticed(work: Path, refused: Refused) -> None:
    """torch does not look at the checksums that it writes; we do."""
    tensors = official.read_official("base.safetensors").tensors
    path = official.write_official("other.pt", tensors)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    refused("predict", "other.pt", "the checksum of its part", base="other.pt", adapter=None)


@pytest.mark.fault("K31")
@pytest.mark.parametrize("command", COMMANDS)
def test_a_flipped_bit_in_a_safetensors_base_is_noticed_by_its_adapters(
    work: Path, refused: Refused, command: str
) -> None:
    data = bytearray((work / "base.safetensors").read_bytes())
    data[len(data) // 2] ^= 1
    (work / "base.safetensors").write_bytes(data)
    refused(command, "whose weights differ from those of", adapter="adapter")


# -- the adapter -----------------------------------------------------------------------------------


@pytest.mark.fault("K29", "K30", "K45")
@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("damage", ["empty", "web_page", "lfs_pointer", "text", "cut_after_4_of_8"])
def test_a_damaged_adapter_is_refused_by_the_commands(
    work: Path, refused: Refused, damage: str, name: str
) -> None:
    if name == "adapter":
        (work / name / "adapter_config.json").unlink()  # our record has all of it
        name = f"adapter/{WEIGHTS}"
    corrupt.DAMAGE[damage](work / name)
    adapter = "adapter" if name.startswith("adapter/") else name
    refused("merge", Path(name).name, adapter=adapter)


@pytest.mark.fault("K29")
@pytest.mark.parametrize(
    ("command", "name"), [*zip(COMMANDS, ["adapter", "adapter.torch"] * 2, strict=True)]
)
def test_a_flipped_bit_in_an_adapter_is_refused_by_every_command(
    work: Path, refused: Refused, command: str, name: str
) -> None:
    path = work / name / WEIGHTS if name == "adapter" else work / name
    data = bytearray(path.read_bytes())
    data[-len(data) // 3] ^= 1
    path.write_bytes(data)
    refused(command, "SHA-256" if name == "adapter" else "checksum", adapter=name)


def first(tensors: dict[str, Tensor], part: str = "lora_A") -> str:
    return next(key for key in sorted(tensors) if part in key)


FAULTS: dict[str, tuple[Callable[[dict[str, Any], dict[str, Tensor]], object], list[str]]] = {
    "renamed": (
        lambda _, t: [t.update({f"net.{k}": t.pop(k)}) for k in list(t)],
        ["0 of 92 adapter tensors match this model"],
    ),
    "of_another_size": (
        lambda _, t: t.update({k: torch.cat([v, v], -1) for k, v in t.items() if "lora_A" in k}),
        ["has shape (4,", "rank 4 on this layer needs (4,"],
    ),
    "a_tensor_missing": (lambda _, t: t.pop(first(t)), ["lora_A.weight is missing"]),
    "a_tensor_too_many": (
        lambda _, t: t.update({"net.lora_A.weight": torch.ones(4, 4)}),
        ["net: no such module"],
    ),
    "nothing_left": (lambda _, t: t.clear(), ["holds no tensors at all"]),
    "nan": (lambda _, t: t[first(t)].fill_(float("nan")), ["NaN or infinite"]),
    "inf_in_b": (lambda _, t: t[first(t, "lora_B")].fill_(float("inf")), ["NaN or infinite"]),
    "another_rank": (lambda c, _: c.update(r=8), ["rank 8"]),
    "alpha_zero": (lambda c, _: c.update(lora_alpha=0), ["alpha"]),
    "another_method": (lambda c, _: c.update(peft_type="LOKR"), ["type 'LOKR'", "PEFT 0.21.2"]),
    "of_a_newer_peft": (
        lambda c, _: c.update(peft_version="1.9.0", use_quantum=True),
        ["use_quantum", "written by PEFT 1.9.0"],
    ),
}


@pytest.mark.fault("K27", "K28", "K29", "K30", "K32", "K38", "H35")
@pytest.mark.parametrize("name", ["adapter", "adapter.torch"])
@pytest.mark.parametrize("fault", FAULTS)
def test_an_adapter_that_does_not_fit_is_refused_by_name(
    work: Path, refused: Refused, fault: str, name: str
) -> None:
    change, parts = FAULTS[fault]
    rewrite(work / name, change)
    refused("merge", name, *parts, adapter=name)


@pytest.mark.fault("K27", "K28", "K29")
@pytest.mark.parametrize("command", ["predict", "evaluate", "train"])
@pytest.mark.parametrize("fault", ["renamed", "a_tensor_missing", "nan"])
def test_no_command_goes_on_without_its_adapter(
    work: Path, refused: Refused, command: str, fault: str
) -> None:
    change, parts = FAULTS[fault]
    rewrite(work / "adapter.torch", change)
    refused(command, "adapter.torch", *parts, adapter="adapter.torch")


@pytest.mark.fault("K28")
@pytest.mark.filterwarnings("default::UserWarning")
@pytest.mark.parametrize(
    ("command", "name"), [*zip(COMMANDS, ["adapter", "adapter.torch"] * 2, strict=True)]
)
def test_on_request_the_layers_that_fit_are_used(
    work: Path,
    command: str,
    name: str,
    refused: Refused,
    capsys: pytest.CaptureFixture[str],
    words: Words,
) -> None:
    rewrite(work / name, lambda _, t: t.pop(first(t)))
    refused(command, "--allow_partial", adapter=name)
    flags = [*words(command, "base.safetensors", name), "--allow_partial", "true"]
    assert program.main(flags) == 0
    text = capsys.readouterr().err
    assert re.search(r"warning: .* in part, on 45 layers:\n.*lora_A\.weight is missing\n", text)
    assert text.count("in part") == 1


@pytest.mark.fault("K31")
@pytest.mark.parametrize(("command", "name"), [*zip(COMMANDS, ADAPTERS, strict=True)])
def test_an_adapter_of_another_base_is_refused(
    work: Path, refused: Refused, command: str, name: str
) -> None:
    tensors = official.read_official("base.safetensors").tensors
    tensors["no_mem_embed"] = tensors["no_mem_embed"] + 1
    official.write_official("other.safetensors", tensors)
    parts = ("was trained on base.safetensors (custom)", "pass its own base as --checkpoint")
    refused(command, name, *parts, base="other.safetensors", adapter=name)


@pytest.mark.fault("K31", "K34")
def test_where_an_adapter_has_lost_its_record_another_base_is_not_noticed_but_its_own_is(
    work: Path, adapted: Any, masks: Any
) -> None:
    """What PEFT saves again has no record: it loads, and gives the same masks."""
    rewrite(work / "adapter", lambda config, tensors: None)
    network = m.load("base.safetensors", adapter="adapter")
    torch.testing.assert_close(masks(network), masks(adapted(work / "base.safetensors")))


@pytest.mark.fault("K29")
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("adapter", torch.float16),
        ("adapter.torch", torch.bfloat16),
        ("adapter", torch.float64),
    ],
)
def test_adapters_in_any_precision_work(
    work: Path,
    name: str,
    dtype: torch.dtype,
    words: Words,
    adapted: Any,
    masks: Any,
) -> None:
    rewrite(work / name, lambda _, t: t.update({k: v.to(dtype) for k, v in t.items()}))
    assert program.main(words("predict", "base.safetensors", name)) == 0
    found = masks(m.load("base.safetensors", adapter=name))
    expected = masks(adapted(work / "base.safetensors"))
    torch.testing.assert_close(found, expected, rtol=0, atol=0.5 if dtype.itemsize < 4 else 1e-4)


@pytest.mark.fault("K33")
@pytest.mark.parametrize("name", ["adapter", "adapter.torch"])
def test_an_adapter_saved_before_the_first_step_gives_the_bases_masks(
    work: Path, name: str, masks: Any
) -> None:
    network = m.load("base.safetensors")
    placement.adapt(network, Config(lora_dropout=0.5))
    shutil.rmtree(name) if (work / name).is_dir() else (work / name).unlink()
    m.save_adapter(network, name)
    loaded = m.load("base.safetensors", adapter=name)
    assert torch.equal(masks(loaded), masks(m.load("base.safetensors")))


# -- hostile files ---------------------------------------------------------------------------------


class Hostile:
    """Its pickle makes a folder when it is loaded without care."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, ("canary",)


@pytest.mark.fault("H01", "H02", "K45", "K46")
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".torch", ".bin", ".ckpt"])
@pytest.mark.parametrize("legacy", [False, True])
def test_no_command_runs_what_is_in_a_file(
    work: Path, refused: Refused, suffix: str, legacy: bool
) -> None:
    tensors = official.read_official("base.safetensors").tensors
    content = {"model": tensors, "args": Hostile(), "optimizer": {"state": {0: Hostile()}}}
    path = work / f"hostile{suffix}"
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    named = ("holds objects of class posix.mkdir", "could run a program")
    commands = COMMANDS if suffix == ".torch" else ["predict"]
    for command in commands:
        refused(command, path.name, *named, base=path.name, adapter=None)
    torch.save({"format": 1, "config": {}, "tensors": {}, "rng": Hostile()}, path)
    for command in commands:
        refused(command, path.name, *named, adapter=path.name)
