"""Text embeddings from a SigLIP 2 folder: those of transformers' own model, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import siglip_folders
import torch

from lora_core.errors import CheckpointError, ConfigError, DataError
from scenesplat_lora import prepare
from scenesplat_lora.language.siglip import embed_texts, open_text_tower
from scenesplat_lora.language.text_embeddings import grouped, read_text_embeddings

NAMES = ["chair", "Table lamp", "größe <eos>"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "siglip2-tiny"
    siglip_folders.write_folder(path)
    return path


def damaged(folder: Path, new: Path) -> Path:
    new.mkdir()
    for file in folder.iterdir():
        (new / file.name).write_bytes(file.read_bytes())
    return new


# -- the same numbers ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["siglip", "siglip2"])
def test_embeddings_are_those_of_the_whole_model(tmp_path: Path, kind: str) -> None:
    from transformers import AutoTokenizer

    model = siglip_folders.write_folder(tmp_path / kind, kind)
    texts = ["this is a chair", "this is a " + "long " * 40]
    theirs = AutoTokenizer.from_pretrained(tmp_path / kind, local_files_only=True)
    ids = theirs(
        texts, padding="max_length", max_length=64, truncation=True, return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        pooled = model.get_text_features(input_ids=ids).pooler_output
    with pytest.warns(UserWarning, match="1 texts have more than 63 tokens"):
        found = open_text_tower(tmp_path / kind).embed(texts)
    assert torch.equal(open_text_tower(tmp_path / kind).tokens(texts[:1]), ids[:1])
    assert torch.allclose(found, torch.nn.functional.normalize(pooled, dim=1), atol=1e-6)
    assert found.dtype == torch.float32


def test_texts_are_lower_case_end_with_eos_and_fill_64_positions(folder: Path) -> None:
    tower = open_text_tower(folder)
    ids = tower.tokens(["A Chair", "a chair", "<eos>"])
    assert ids.shape == (3, 64)
    assert torch.equal(ids[0], ids[1])
    length = int((ids[0] != 0).sum())
    assert (ids[0, length - 1], int((ids[0] == 1).sum())) == (1, 1)
    assert int((ids[2] == 1).sum()) == 1, "what looks like a special token in a name is text"


def test_many_texts_are_embedded_as_each_alone(folder: Path) -> None:
    tower = open_text_tower(folder)
    names = [f"thing {number}" for number in range(70)]
    assert torch.allclose(tower.embed(names)[66:67], tower.embed(names[66:67]), atol=1e-6)


def test_a_name_stands_in_the_prompt(folder: Path) -> None:
    text = embed_texts(folder, NAMES)
    tower = open_text_tower(folder)
    assert text.names == tuple(NAMES)
    assert torch.allclose(text.features[0], tower.embed(["this is a chair"])[0], atol=1e-6)
    plain = embed_texts(folder, NAMES, template="{label}")
    assert torch.allclose(plain.features[0], tower.embed(["chair"])[0], atol=1e-6)
    assert not torch.allclose(plain.features, text.features, atol=1e-3)


# -- the step --------------------------------------------------------------------------------------


def test_prepare_text_writes_both_formats(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("chair\nTable lamp\n")
    words = ["text", "--model", str(folder), "--names", str(tmp_path / "names.txt")]
    for name in ("classes.npz", "classes.pt"):
        assert prepare.main([*words, "--output", str(tmp_path / name)]) == 0
        held = read_text_embeddings(tmp_path / name)
        assert held.names == ("chair", "Table lamp")
        assert torch.allclose(held.features, embed_texts(folder, held.names).features, atol=1e-6)
    official = torch.load(tmp_path / "classes.pt", weights_only=True)
    assert (official.shape, official.dtype) == ((2, 16), torch.float32)
    assert (tmp_path / "classes.txt").read_text() == "chair\nTable lamp\n"
    assert np.load(tmp_path / "classes.npz")["embeddings"].dtype == np.float32


def test_names_beside_the_official_file_may_be_the_given_ones(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_bytes(b"chair\r\nlamp")
    words = ["text", "--model", str(folder), "--names", str(tmp_path / "classes.txt")]
    assert prepare.main([*words, "--output", str(tmp_path / "classes.pt")]) == 0
    assert (tmp_path / "classes.txt").read_bytes() == b"chair\r\nlamp"
    assert read_text_embeddings(tmp_path / "classes.pt").names == ("chair", "lamp")
    with pytest.raises(ConfigError, match=r"classes\.pt is there: add --overwrite"):
        prepare.main([*words, "--output", str(tmp_path / "classes.pt")])
    assert prepare.main([*words, "--output", str(tmp_path / "classes.pt"), "--overwrite"]) == 0


def test_several_prompts_may_be_of_one_class(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("chair\nlamp\nseat\n")
    output = tmp_path / "classes.npz"
    words = ["text", "--model", str(folder), "--names", str(tmp_path / "names.txt")]
    prepare.main([*words, "--output", str(output), "--prompt_classes", "0", "1", "0"])
    held = read_text_embeddings(output)
    assert (held.names, held.classes) == (("chair", "lamp"), (0, 1, 0))
    assert len(held.features) == 3
    with pytest.raises(DataError, match="every index from 0 to 1"):
        grouped(embed_texts(folder, ["a", "b"]), [0, 2])


def test_a_model_folder_is_read_where_a_file_of_embeddings_is(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("chair\nlamp\n")
    text = read_text_embeddings(folder, tmp_path / "names.txt")
    assert torch.equal(text.features, embed_texts(folder, ["chair", "lamp"]).features)
    with pytest.raises(DataError, match="give the class names too"):
        read_text_embeddings(folder)


# -- refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--output", "a.txt"], r"must end in \.npz or \.pt"),
        (["--output", "a.pt", "--prompt_classes", "0"], "no place for them"),
        (["--template", "a photo"], "needs {label}"),
        (["--names", ""], "--names is empty"),
    ],
)
def test_settings_that_cannot_work_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        prepare.main(["text", "--model", "m", "--names", "n.txt", *words])


def test_wrong_names_are_told_before_weights_are_read(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("chair\nchair\n")
    words = ["text", "--model", str(tmp_path / "none"), "--names", str(tmp_path / "names.txt")]
    with pytest.raises(DataError, match=r"names\.txt: class names must be different.*chair"):
        prepare.main([*words, "--output", str(tmp_path / "classes.npz")])


def test_folders_that_are_no_siglip_2_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder: give the folder of a SigLIP 2"):
        open_text_tower(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"needs config\.json and model\.safetensors"):
        open_text_tower(tmp_path / "empty")
    clip = damaged(folder, tmp_path / "clip")
    (clip / "config.json").write_text(json.dumps({"model_type": "clip"}))
    with pytest.raises(CheckpointError, match="model_type is 'clip', expected siglip or siglip2"):
        open_text_tower(clip)


def test_another_tokenizer_is_refused(folder: Path, tmp_path: Path) -> None:
    other = damaged(folder, tmp_path / "other")
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text.replace("<eos>", "</s>"))
    with pytest.raises(CheckpointError, match="has no <eos>: it is not that of SigLIP 2"):
        open_text_tower(other)
    (other / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is no tokenizer of the library"):
        open_text_tower(other)


def test_weights_that_do_not_fit_or_are_not_finite_are_refused(
    folder: Path, tmp_path: Path
) -> None:
    for name, change, message in (
        ("missing", lambda s: s.pop("text_model.head.bias"), r"1 missing: text_model\.head\.bias"),
        ("nan", lambda s: s["text_model.head.bias"].fill_(torch.nan), "NaN or infinite"),
        ("shape", lambda s: s.update({"text_model.head.bias": torch.zeros(3)}), r"\[3\] instead"),
    ):
        other = damaged(folder, tmp_path / name)
        state = safetensors.torch.load_file(other / "model.safetensors")
        change(state)
        safetensors.torch.save_file(state, other / "model.safetensors")
        with pytest.raises(CheckpointError, match=message):
            open_text_tower(other)


def test_settings_of_another_size_are_told(folder: Path, tmp_path: Path) -> None:
    other = damaged(folder, tmp_path / "wide")
    settings = json.loads((other / "config.json").read_text())
    settings["text_config"]["hidden_size"] = 2**40
    (other / "config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError):
        open_text_tower(other)
