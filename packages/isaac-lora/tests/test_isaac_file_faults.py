"""Damaged, wrong and hostile files, met by the commands as a user runs them.

Each ends with status 2 and a message of its own, and leaves nothing behind.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import PIL.ImageFile
import pytest
import tiny_isaac_run
import torch
from isaac_texts import record, write_picture, write_records
from safetensors.torch import load_file, save_file
from taught_isaac import base, config, examples, processor, taught, world

import isaac_lora
import lora_core
from isaac_lora import IsaacForConditionalGeneration, data, official
from isaac_lora.__main__ import main as command
from isaac_lora.adapter_files import load_adapter
from isaac_lora.asking import answers, features_of_model
from isaac_lora.predict import file_names
from isaac_lora.prompts import questions_of
from isaac_lora.training_words import settled
from isaac_lora.validation import token_loss
from lora_core import injection, shielded
from lora_core.errors import CheckpointError, DataError
from lora_core.pictures.files import find_images
from lora_core.testing import corrupt, hostile
from lora_core.testing.foreign import rewrite
from lora_core.testing.no_device import no_device
from lora_core.testing.safe_source import unsafe_calls

Refused = Callable[..., str]
COMMANDS = ("train", "find-lr", "predict", "evaluate", "merge")
WITHOUT_MERGE = COMMANDS[:-1]


class Hostile:
    """Its pickle makes a folder when it is loaded without care."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, ("canary",)


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: a base, an adapter, a depth model and data that may be damaged."""
    shutil.copytree(world() / "isaac_model", tmp_path / "model")
    shutil.copytree(taught(), tmp_path / "adapter")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def words(verb: str, **given: Any) -> list[str]:
    """The command line of a verb in `work`, whose results are `out`; None leaves a flag out."""
    found: dict[str, Any] = {"model_path": "model", "adapter": "adapter"}
    asked = {"data_path": world() / "data.json", "image_folder": world() / "images"}
    if verb in ("train", "find-lr"):
        found |= asked | {"output_dir": "out", "use_cpu": "true", "tensorboard": "false"}
        found |= {"ramp_dir": "out"} if verb == "find-lr" else {"max_steps": 1}
    else:
        found |= {"output": "out"}
    if verb in ("predict", "evaluate"):
        found |= asked | {"device": "cpu", "max_new_tokens": 4}
    return [verb, *(f"--{key}={value}" for key, value in (found | given).items() if value)]


@pytest.fixture
def refused(
    work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Refused:
    """Run a command that must fail for a reason that the user can put right; gives its message."""
    monkeypatch.setattr(official, "load_model", lambda *_: pytest.fail("the base was read"))

    def run(verb: str, *said: str, **given: Any) -> str:
        with no_device(weights=True):  # those of the adapter
            status = command(words(verb, **given))
        message = capsys.readouterr().err
        assert status == 2, message
        assert message.startswith("error: ")
        assert "Traceback" not in message
        for part in said:
            assert part in message, message
        assert not (work / "out").exists()
        assert not (work / "canary").exists()
        return message

    return run


# -- the base --------------------------------------------------------------------------------------

REASONS = {
    "lfs_pointer": "is a Git LFS pointer, not the file itself: run `git lfs pull` there",
    "web_page": "is a web page, not a checkpoint: the download failed or needs a login",
    "empty": "is empty: copy or download it again",
    "text": "is damaged",
    "cut_after_4_of_8": "is damaged",
}


@pytest.mark.fault("C25")
@pytest.mark.parametrize("damage", REASONS)
@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_a_damaged_file_of_the_base_is_named_with_its_reason(
    work: Path, refused: Refused, damage: str, file: str
) -> None:
    corrupt.DAMAGE[damage](work / "model" / file)
    for verb in ("train", "predict"):
        message = refused(verb, file)
        if damage not in ("text", "cut_after_4_of_8"):
            assert REASONS[damage] in message


@pytest.mark.fault("C25", "H28")
@pytest.mark.parametrize("verb", COMMANDS)
def test_a_base_that_is_no_folder_is_not_fetched(work: Path, refused: Refused, verb: str) -> None:
    """Neither by the name that the hub has for it, nor by an address."""
    for name in ("PerceptronAI/Isaac-0.1", "https://localhost/isaac", "nowhere"):
        refused(
            verb, name.rpartition("/")[2], "hf download PerceptronAI/Isaac-0.1", model_path=name
        )
    (work / "empty").mkdir()
    refused(verb, f"{work}/empty: a model folder needs config.json", model_path="empty")


@pytest.mark.fault("C26", "C27")
@pytest.mark.parametrize("verb", COMMANDS)
def test_a_base_of_other_tensors_never_runs(work: Path, refused: Refused, verb: str) -> None:
    path = work / "model" / official.SINGLE
    tensors = load_file(path)
    save_file({f"net.{name}": tensor for name, tensor in tensors.items()}, path, {"format": "pt"})
    none = f"0 of {len(tensors)} tensors matched"
    refused(verb, none, "missing: model.embed_tokens.weight, ", "unexpected: net.lm_head.weight, ")
    wider = {name: torch.cat([tensor, tensor]) for name, tensor in tensors.items()}
    save_file(wider, path, {"format": "pt"})
    refused(verb, none, "model.embed_tokens.weight [704, 64] instead of [352, 64]")


# -- the adapter -----------------------------------------------------------------------------------

FAULTS: dict[str, tuple[Callable[[dict[str, Any], dict[str, Any]], object], list[str]]] = {
    "renamed": (
        lambda _, t: [t.update({f"net.{k}": t.pop(k)}) for k in list(t)],
        ["adapter tensors match this model"],
    ),
    "alpha zero": (lambda c, _: c.update(lora_alpha=0), ["alpha"]),
    "no alpha": (lambda c, _: c.update(lora_alpha=None), ["lora_alpha (it is null)"]),
    "another method": (lambda c, _: c.update(peft_type="LOKR"), ["LOKR"]),
    "a newer PEFT": (
        lambda c, _: c.update(peft_version="1.9.0", use_quantum=True),
        ["use_quantum", "written by PEFT 1.9.0"],
    ),
}


@pytest.mark.fault("K27", "K30")
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("verb", ["train", "predict", "merge"])
def test_an_adapter_that_cannot_be_meant_is_refused(
    work: Path, refused: Refused, verb: str, fault: str
) -> None:
    change, said = FAULTS[fault]
    rewrite(work / "adapter", change)
    refused(verb, *said)


@pytest.mark.fault("K30")
@pytest.mark.parametrize("damage", ["empty", "text", "web_page", "cut_after_4_of_8"])
def test_damaged_settings_of_an_adapter_are_named(
    work: Path, refused: Refused, damage: str
) -> None:
    corrupt.DAMAGE[damage](work / "adapter" / "adapter_config.json")
    refused("predict", "adapter_config.json")


@pytest.mark.fault("H14")
@pytest.mark.filterwarnings("default::UserWarning")  # the settings were changed, which is said
@pytest.mark.parametrize("name", ["https://localhost/isaac", "../other", "nobody/isaac"])
def test_the_base_that_an_adapter_names_is_neither_fetched_nor_read(
    work: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(work / "model", work.parent / "other", dirs_exist_ok=True)
    (work.parent / "other" / "config.json").write_text("{}")
    path = work / "adapter" / "adapter_config.json"
    content = json.loads(path.read_text()) | {
        "base_model_name_or_path": name,
        "revision": "main",
        "auto_mapping": {"base_model_class": "Evil", "parent_library": "evil"},
    }
    path.write_text(json.dumps(content))
    with no_device(weights=True):
        assert command([*words("predict"), "--pages=false", "--compare_base=false"]) == 0
        assert command(words("merge", output="merged")) == 0
    said = json.loads((work / "out" / "answers.json").read_text())["questions"]
    assert len(said) == 5
    assert name not in (work / "merged" / "lora_merge.json").read_text()


@pytest.mark.fault("H14")
@pytest.mark.parametrize("name", ["https://localhost/isaac", "nobody/isaac", None])
def test_the_folder_of_an_adapter_in_place_of_a_model_fetches_no_base(
    work: Path, name: str | None
) -> None:
    path = work / "adapter" / "adapter_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"base_model_name_or_path": name}))
    with no_device(), pytest.raises(CheckpointError, match="is no folder on this disk, and not"):
        IsaacForConditionalGeneration.from_pretrained("adapter")
    path.write_text(json.dumps(settings | {"base_model_name_or_path": "model"}))
    model = IsaacForConditionalGeneration.from_pretrained("adapter")
    other = official.load_model("model")
    other.load_adapter(str(work / "adapter"))
    question = [questions_of(examples()[0])[0]]
    for one in (model, other):
        assert answers(one, processor(), question, max_new_tokens=8) == ["A car."]


@pytest.mark.fault("K43")
def test_dropout_never_acts_on_answers(work: Path) -> None:
    rewrite(work / "adapter", lambda settings, _: settings.update(lora_dropout=0.9))
    questions = [one for example in examples() for one in questions_of(example)][:2]
    model = official.load_model("model").train()
    load_adapter(model, "adapter")
    assert injection.configs(model)["default"].lora_dropout == 0.9
    plain = official.load_model("model")
    load_adapter(plain, taught())
    found = [answers(one, processor(), questions, max_new_tokens=8) for one in (model, plain)]
    assert found[0] == found[1] == [one.answer for one in questions]
    losses = [
        token_loss(one, examples(), processor(), batch_size=4, features=features_of_model(one))
        for one in (model, plain)
    ]
    assert losses[0] == losses[1]
    assert model.training


# -- hostile files ---------------------------------------------------------------------------------


@pytest.mark.fault("H01")
@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("place", ["model", "adapter", "depth"])
def test_no_program_in_a_file_is_run(
    work: Path, refused: Refused, place: str, legacy: bool
) -> None:
    def save(path: Path, tensors: dict[str, Any]) -> None:
        content = tensors | {"evil": Hostile()}
        torch.save(content, path, _use_new_zipfile_serialization=not legacy)

    if place == "model":
        (work / "model" / official.SINGLE).unlink()
        save(work / "model" / "pytorch_model.bin", {})
        for verb in COMMANDS:
            refused(verb, "Pickled weights are not read")
    elif place == "adapter":
        (work / "adapter" / "adapter_model.safetensors").unlink()
        save(work / "adapter" / "adapter_model.bin", {})
        for verb in COMMANDS:
            refused(verb, "adapter_model.bin", "could run a program")
    else:
        save(work / "depth_anything_v2_vits.pth", {})
        given = {"use_depth": "true", "depth_checkpoint_path": "depth_anything_v2_vits.pth"}
        for verb in WITHOUT_MERGE:
            refused(verb, "depth_anything_v2_vits.pth", "could run a program", **given)


@pytest.mark.fault("H01")
def test_a_pickle_under_the_name_of_safetensors_is_not_run(work: Path, refused: Refused) -> None:
    for path in ("model/model.safetensors", "adapter/adapter_model.safetensors"):
        kept = (work / path).read_bytes()
        (work / path).write_bytes(pickle.dumps(Hostile()))
        refused("predict", Path(path).name)
        (work / path).write_bytes(kept)


@pytest.mark.fault("H04", "H26")
def test_no_source_runs_text_or_unpickles_objects() -> None:
    assert unsafe_calls(Path(isaac_lora.__path__[0])) == []


@pytest.mark.fault("H21")
def test_truncated_pictures_are_never_tolerated_for_all() -> None:
    assert PIL.ImageFile.LOAD_TRUNCATED_IMAGES is False
    for package in (isaac_lora, lora_core):
        for path in Path(package.__path__[0]).rglob("*.py"):
            assert "LOAD_TRUNCATED_IMAGES" not in path.read_text("utf-8"), path


BOMBS: dict[str, tuple[Callable[[Path], object], str]] = {
    "side.png": (hostile.png_bomb, "million pixels"),
    "overflow.png": (lambda p: hostile.png_that_claims(p, 2**31 - 1, 2**31 - 1), "pixels"),
    "overflow.jpg": (lambda p: hostile.jpeg_that_claims(p, 65_500, 65_500), "million pixels"),
    "text.png": (hostile.png_text_bomb, "text.png"),
    "frames.gif": (hostile.gif_frames, "frames.gif"),
    "pages.tif": (hostile.tiff_pages, "pages.tif"),
    "self.svg": (hostile.svg, "self.svg"),
    "page.eps": (hostile.eps, "page.eps"),
    "scans.jpg": (hostile.jpeg_of_many_scans, "takes longer than 1 s"),  # its reader is killed
}


@pytest.mark.fault("H20", "H41")
@pytest.mark.parametrize("name", BOMBS)
def test_a_picture_that_is_a_bomb_is_named_and_harms_nobody(
    work: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shielded, "LIMITS", shielded.Limits(1.0, 2**29))
    make, said = BOMBS[name]
    make(work / name)
    path = write_records(work / "d.json", [record("<image>?", id="bad", image=name)])
    with no_device(), pytest.raises(DataError) as told:
        data.load(config(data_path=str(path), image_folder=str(work)), processor())
    message = str(told.value)
    assert "record 0 ('bad')" in message
    assert name in message or name == "scans.jpg"
    assert said in message
    assert not (work / "owned").exists()


@pytest.mark.fault("H19")
def test_names_from_conversations_never_lead_out_of_the_output(work: Path) -> None:
    names = [
        "../../x", "/etc/x", "a\0b", "CON", "n" * 300, "ü" * 200, *hostile.TEMPLATES,
        hostile.CONTROL_NAME, ".", "..", "a/b", "A", "a",
    ]  # fmt: skip
    records = [record("Who?", "He.", id=name) for name in names]
    path = write_records(work / "d.json", records)
    found = data.load(config(data_path=str(path)), processor()).train
    questions = [one for example in found for one in questions_of(example)]
    files = file_names(questions)
    assert len({name.lower() for name in files}) == len(names)
    for name in files:
        assert Path(name).name == name
        assert name.isprintable()
        assert len(os.fsencode(name)) < 230
        assert name not in (".", "..")
    given = {"data_path": path, "image_folder": None, "max_new_tokens": 1, "adapter": None}
    assert command(words("predict", **given)) == 0
    assert len(list((work / "out").glob("*.png"))) == len(names)
    assert {each.name for each in work.iterdir()} == {"model", "adapter", "d.json", "out"}


@pytest.mark.fault("H40")
def test_what_conversations_point_to_is_not_fetched(work: Path) -> None:
    """Keys of other programs are left alone."""
    more = {
        "script": "http://localhost:1/run.py", "_target_": "os.mkdir", "_args_": ["canary"],
        "dataset": "nobody/data", "coco_url": "http://localhost:1/x.png",
    }  # fmt: skip
    path = write_records(work / "d.json", [record("Who?", "He.", id="a", **more)])
    with no_device():
        assert len(data.load(config(data_path=str(path)), processor()).train) == 1
        bad = write_records(work / "e.json", [record("<image>", image="http://localhost:1/x.png")])
        with pytest.raises(DataError, match="nothing is fetched from the network"):
            data.load(config(data_path=str(bad)), processor())
    assert not (work / "canary").exists()


# -- order -----------------------------------------------------------------------------------------


@pytest.mark.fault("P32")
def test_pictures_of_a_folder_are_asked_about_in_the_order_of_their_names(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (work / "pictures").mkdir()
    for number in range(12):
        write_picture(work / "pictures" / f"{number:02}.png", 8, 8, seed=number)
    found = find_images([str(work / "pictures")], "{}_answers.png", "--image")
    assert [path.stem for path in found] == [f"{number:02}" for number in range(12)]
    listed = os.listdir
    monkeypatch.setattr(os, "listdir", lambda path=".": listed(path)[::-1])
    for number, path in enumerate(found):
        os.utime(path, (99 - number, 99 - number))
    assert find_images([str(work / "pictures")], "{}_answers.png", "--image") == found


@pytest.mark.fault("D48")
def test_the_same_conversations_are_left_out_each_time_and_in_every_process(work: Path) -> None:
    good = [record("Who?", "He.", id=f"r{number}") for number in range(6)]
    records = [*good[:2], record(answer=" ", id="bad"), *good[2:], record("<image>", image="none")]
    path = write_records(work / "d.json", records)
    skip = {"on_bad_sample": "skip", "max_bad_fraction": 0.4, "output_dir": str(work / "out")}
    cfg = config(data_path=str(path), **skip)
    made: list[Any] = []

    def of_the_first(make: Callable[[], Any]) -> Any:
        if not made:
            made.append(make())
        return made[0]

    splits = [data.load(cfg, processor(), share) for share in (of_the_first, of_the_first)]
    splits.append(data.load(cfg, processor()))
    for one in splits:
        assert [example.key for example in one.train] == [f"r{number}" for number in range(6)]
        assert [bad.sample for bad in one.bad] == ["bad", "record 7"]
    assert len({data.fingerprint(one) for one in splits}) == 1


def test_words_of_other_programs_leave_no_copy_behind(work: Path) -> None:
    """Files of settings with names of transformers are rewritten for the parser, and removed."""
    (work / "run.json").write_text('{"do_train": true, "seed": 3}')
    before = set(work.rglob("*"))
    with settled(["run.json", *tiny_isaac_run.command(work, work / "run")]):
        pass
    assert set(work.rglob("*")) == before
    assert not base().training
