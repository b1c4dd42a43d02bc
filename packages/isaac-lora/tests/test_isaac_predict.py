"""`isaac-lora predict`: answers of base and LoRA, tags in pixels, pages, and what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import taught_isaac
import torch
from isaac_texts import record, write_picture, write_records
from PIL import Image
from safetensors.torch import load_file, save_file
from taught_isaac import BOX, POINT, taught, world

from isaac_lora import evaluate, official, predict
from isaac_lora.asking import Said
from isaac_lora.conversations.records import read_conversations
from isaac_lora.prompts import questions_of
from lora_core.adapters.read import TENSORS
from lora_core.errors import CheckpointError, ConfigError, DataError


def words(output: Path, **given: Any) -> list[str]:
    """Flags; a list is several words, None leaves one out."""
    settings: dict[str, Any] = {
        "model_path": world() / "isaac_model",
        "output": output,
        "device": "cpu",
        "max_new_tokens": 64,
        "batch_size": 2,
    }
    found = list[str]()
    for name, value in (settings | given).items():
        if value is not None:
            several = value if isinstance(value, list) else [value]
            found += [f"--{name}", *map(str, several)]
    return found


def on_data(output: Path, **given: Any) -> list[str]:
    data = {"data_path": world() / "data.json", "image_folder": world() / "images"}
    return words(output, **(data | given))


def results(output: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((output / "answers.json").read_text())["questions"]
    return found


def said(output: Path, who: str) -> list[str]:
    return [one["answers"][who]["text"] for one in results(output)]


# -- conversations ---------------------------------------------------------------------------------


def test_answers_of_base_and_lora_to_the_questions_of_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict.main(on_data(tmp_path / "p", adapter=taught())) == 0
    assert said(tmp_path / "p", "LoRA") == ["A car.", "It is near.", BOX, "Hi.", POINT]
    assert not set(said(tmp_path / "p", "base")) & {"A car.", "Hi.", POINT}
    found = results(tmp_path / "p")
    assert [one["id"] for one in found] == ["one", "two", "hinted", "talk", "talk"]
    assert [one["truth"] for one in found] == said(tmp_path / "p", "LoRA")
    assert found[4]["turns"][:2] == [["user", "Hello?"], ["assistant", "Hi."]]
    assert found[4]["images"] == ["d.png"]
    assert found[3]["images"] == []
    pages = {one["page"] for one in found}
    assert pages == {path.name for path in (tmp_path / "p").glob("*.png")}
    assert "talk_answers.png" in pages
    assert "talk_2_answers.png" in pages
    out = capsys.readouterr().out
    assert "one: Tell me.\n  base: " in out
    assert "  LoRA: A car.\n  truth: A car.\n" in out
    assert "cut at --max_new_tokens 64" in out  # of the base, whose weights are random


def test_tags_are_given_in_pixels_of_their_picture(tmp_path: Path) -> None:
    given = on_data(tmp_path / "p", adapter=taught(), compare_base="false", pages="false")
    assert predict.main(given) == 0
    [box] = results(tmp_path / "p")[2]["answers"]["LoRA"]["tags"]
    assert box == {
        "kind": "box",
        "mention": "car",
        "image": 0,
        "pixels": [[3.2, 3.2], [16.0, 9.6]],  # c.png has 32 x 16 pixels
        "thousandths": [[100.0, 200.0], [500.0, 600.0]],
    }
    assert not list((tmp_path / "p").glob("*.png"))


def test_conversations_without_answers_are_asked_at_their_end(tmp_path: Path) -> None:
    asks = {"conversations": [{"from": "human", "value": "<image> Tell me."}], "image": "a.png"}
    more = record("Hello?", "Hi.", id="more", images=["d.png"])
    more["conversations"].append({"from": "human", "value": "And <image>?"})
    path = write_records(tmp_path / "asks.json", [asks, more])
    given = on_data(tmp_path / "p", data_path=path, adapter=taught(), compare_base="false")
    assert predict.main(given) == 0
    assert said(tmp_path / "p", "LoRA") == ["A car.", "Hi.", POINT]
    assert [one["truth"] for one in results(tmp_path / "p")] == [None, "Hi.", None]


def test_a_record_that_asks_nothing_is_bad(tmp_path: Path) -> None:
    path = write_records(
        tmp_path / "d.json",
        [
            {"conversations": [{"from": "system", "value": "Be short."}]},
            {"id": "x", "conversations": [{"from": "human", "value": "Hello?"}]},
        ],
    )
    reading = read_conversations(path, answered=False)
    assert [one.key for one in reading.records] == ["x"]
    [(_, reason)] = reading.bad
    assert reason.endswith("record 0: no user turn (from human or user): nothing is asked")
    assert len(read_conversations(path).bad) == 2


def test_of_many_answers_the_first_are_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_records(tmp_path / "d.json", [record("Hello?", id=f"q{n}") for n in range(23)])
    given = {"data_path": path, "max_new_tokens": 1, "pages": "false", "batch_size": 23}
    assert predict.main(on_data(tmp_path / "p", **given)) == 0
    out = capsys.readouterr().out
    assert "q19: Hello?" in out
    assert "q20" not in out
    assert "... and 3 more in answers.json" in out
    assert len(results(tmp_path / "p")) == 23


@pytest.mark.fault("D33")
def test_bad_conversations_stop_or_are_left_out_and_listed(tmp_path: Path) -> None:
    records = [record("Hello?", id="good"), record("No marker", id="bad", image="a.png")]
    path = write_records(tmp_path / "d.json", records)
    with pytest.raises(DataError, match=r"record 1 \('bad'\): 0 <image> markers in the turns"):
        predict.main(on_data(tmp_path / "p", data_path=path))
    skip = {"on_bad_sample": "skip", "max_bad_fraction": 0.5}
    assert predict.main(on_data(tmp_path / "p", data_path=path, **skip)) == 0
    assert [one["id"] for one in results(tmp_path / "p")] == ["good"]
    assert "'bad'" in (tmp_path / "p" / "bad_samples.jsonl").read_text()


# -- pictures of the command line ------------------------------------------------------------------


def test_a_question_is_asked_about_each_picture_by_itself(tmp_path: Path) -> None:
    given = words(
        tmp_path / "p",
        adapter=taught(),
        compare_base="false",
        image=[world() / "images" / "a.png", world() / "images" / "b.png"],
        question=["<image> Tell me.", "Which colour?"],
    )
    assert predict.main(given) == 0
    found = results(tmp_path / "p")
    assert [one["id"] for one in found] == ["a_1", "b_1", "a_2", "b_2"]
    assert found[0]["turns"] == [["user", "<image> Tell me."]]
    assert found[0]["answers"]["LoRA"]["text"] == "A car."
    # Without a marker the picture is a message of its own, as Isaac's own demo asks.
    assert found[2]["turns"] == [["user", "<image>"], ["user", "Which colour?"]]
    assert {path.name for path in (tmp_path / "p").iterdir()} == {
        "answers.json", "a_1_answers.png", "b_1_answers.png", "a_2_answers.png", "b_2_answers.png"
    }  # fmt: skip


def test_a_question_that_places_all_pictures_is_one_question(tmp_path: Path) -> None:
    pictures = [world() / "images" / name for name in ("a.png", "b.png")]
    given = words(tmp_path / "p", adapter=taught(), image=pictures, question="<image> or <IMAGE>?")
    assert predict.main(given) == 0
    assert said(tmp_path / "p", "LoRA") == ["It is near."]
    with pytest.raises(DataError, match="3 <image> markers, but 2 pictures in --image"):
        predict.main(words(tmp_path / "q", image=pictures, question="<image><image><image>"))


def test_a_hint_asks_for_tags_which_are_drawn(tmp_path: Path) -> None:
    given = words(
        tmp_path / "p",
        adapter=taught(),
        image=world() / "images" / "c.png",
        question="What is where? <image>",
        hint="box",
    )
    assert predict.main(given) == 0
    [one] = results(tmp_path / "p")
    assert one["turns"][0] == ["user", "<hint>BOX</hint>"]
    assert one["answers"]["LoRA"]["text"] == BOX
    with Image.open(tmp_path / "p" / "c_answers.png") as page:
        pixels = np.asarray(page)
    blue = (pixels == (86, 180, 233)).all(-1)  # the first colour of mentions
    half = pixels.shape[1] // 2
    assert blue[:, half:].sum() > 500  # in the panel of LoRA, the right one
    assert blue[:, half:].sum() > 2 * blue[:, :half].sum()  # there is the legend alone


def test_words_alone_are_answered(tmp_path: Path) -> None:
    given = words(tmp_path / "p", adapter=taught(), question="Hello?")
    assert predict.main(given) == 0
    assert said(tmp_path / "p", "LoRA") == ["Hi."]
    assert (tmp_path / "p" / "question_answers.png").is_file()


def test_a_model_without_an_adapter_answers_alone(tmp_path: Path) -> None:
    assert predict.main(words(tmp_path / "p", question="Hello?")) == 0
    [one] = results(tmp_path / "p")
    assert list(one["answers"]) == ["model"]


def test_an_empty_answer_is_told_as_such(capsys: pytest.CaptureFixture[str]) -> None:
    question = questions_of(taught_isaac.examples()[0])[0]
    predict.tell([question], {"LoRA": [Said(" ", True)]})
    assert "  LoRA: (no words)\n" in capsys.readouterr().out


# -- depth -----------------------------------------------------------------------------------------


def test_an_adapter_that_was_trained_with_depth_gets_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = {"depth_checkpoint_path": world() / "depth", "pages": "false"}
    assert predict.main(on_data(tmp_path / "p", adapter=taught(depth=True), **checkpoint)) == 0
    assert said(tmp_path / "p", "LoRA") == ["A car.", "It is near.", BOX, "Hi.", POINT]
    assert "the base answers without depth, as it was published; LoRA with it" in (
        capsys.readouterr().out
    )
    settings = json.loads((tmp_path / "p" / "answers.json").read_text())["settings"]
    assert settings["depth"]["checkpoint"] == "depth"
    assert settings["depth"]["input_size"] == taught_isaac.depth_settings()["depth_input_size"]


@pytest.mark.fault("C29")
def test_depth_is_never_silently_absent(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"was trained with depth from depth .*give it as --depth_checkpoint_path"
    ):
        predict.main(on_data(tmp_path / "p", adapter=taught(depth=True)))
    with pytest.raises(ConfigError, match="--use_depth needs --depth_checkpoint_path"):
        predict.main(words(tmp_path / "p", question="Hello?", use_depth="true"))
    other = {"depth_checkpoint_path": world() / "depth", "depth_alpha": 7}
    with pytest.raises(CheckpointError, match="depth_alpha: trained with 100, used with 7"):
        predict.main(on_data(tmp_path / "p", adapter=taught(depth=True), **other))
    short = {"max_new_tokens": 2, "pages": "false"}
    given = on_data(tmp_path / "p", adapter=taught(depth=True), use_depth="false", **short)
    with pytest.warns(UserWarning, match="trained with depth .* and is used without"):
        assert predict.main(given) == 0
    checkpoint = {"depth_checkpoint_path": world() / "depth"}
    given = words(tmp_path / "q", question="Hello?", **checkpoint, **short)
    with pytest.warns(UserWarning, match="without --use_depth True images have no depth"):
        assert predict.main(given) == 0


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({}, "--question is missing: what shall be answered"),
        ({"question": " "}, "it is empty"),
        ({"question": "a <image>"}, "--image is missing"),
        ({"question": "a", "hint": "box"}, "--image is missing"),
        ({"question": "a", "max_new_tokens": 0}, "--max_new_tokens is 0"),
        ({"question": "a", "batch_size": 0}, "--batch_size is 0"),
        ({"question": "a", "depth_input_size": 15}, "--depth_input_size 15: expected a multiple"),
        ({"question": "a", "data_path": "d.json"}, "leave out --question"),
        ({"question": "a", "max_bad_fraction": 1}, "--max_bad_fraction is 1"),
        ({"question": "a", "adapter": ""}, "--adapter is empty"),
    ],
)
def test_settings_that_cannot_work(tmp_path: Path, given: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        predict.main(words(tmp_path / "p", **given))
    assert not (tmp_path / "p").exists()


def test_all_that_is_missing_is_told_together(tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "answers.json").write_text("{}")
    given = words(
        tmp_path / "p", model_path=tmp_path / "no_model", adapter="no_adapter", question="Hello?"
    )
    with pytest.raises(ConfigError) as caught:
        predict.main(given)
    text = str(caught.value)
    assert "answers.json is there already" in text
    assert "no_model" in text
    assert "no_adapter does not exist" in text


@pytest.mark.fault("C17")
def test_a_precision_that_the_device_lacks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="precision bf16 does not run on cpu"):
        predict.main(words(tmp_path / "p", question="Hello?", precision="bf16"))


def test_an_adapter_is_no_base(tmp_path: Path) -> None:
    advice = "This is a LoRA adapter: pass it as --adapter, and its base in its place"
    with pytest.raises(CheckpointError, match=advice):
        predict.main(words(tmp_path / "p", model_path=taught(), question="Hello?"))


@pytest.mark.fault("H35", "K27", "K28", "K29")
def test_an_adapter_that_does_not_fit_is_told_before_weights_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = load_file(taught() / TENSORS)
    monkeypatch.setattr(official, "load_model", lambda *_: pytest.fail("weights were read"))
    names = sorted(good)
    first = good[names[0]]
    faults: dict[str, dict[str, Any]] = {
        "NaN or infinite": good | {names[0]: torch.full_like(first, torch.nan)},
        "missing": {name: good[name] for name in names[1:]},
        "shape": good | {names[0]: first[:, 1:].clone()},
        f"0 of {len(good)} adapter tensors match": {f"net.{name}": good[name] for name in names},
    }
    folder = Path(shutil.copytree(taught(), tmp_path / "adapter"))
    for problem, tensors in faults.items():
        save_file(tensors, folder / TENSORS, {"format": "pt"})
        for program in (predict, evaluate):
            with pytest.raises(CheckpointError, match=problem):
                program.main(on_data(tmp_path / "p", adapter=folder))
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_an_image_folder_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "nowhere"
    with pytest.raises(DataError) as caught:
        predict.main(on_data(tmp_path / "p", image_folder=folder))
    assert str(caught.value) == f"--image_folder: {folder} is not there"
    with pytest.raises(DataError, match="is no folder"):
        predict.main(on_data(tmp_path / "p", image_folder=world() / "data.json"))


def test_a_base_with_an_adapter_in_it_is_refused(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(world() / "isaac_model", tmp_path / "mixed"))
    shutil.copy(taught() / "adapter_config.json", folder)
    with pytest.raises(CheckpointError, match=r"--model_path, and the adapter --adapter"):
        predict.main(words(tmp_path / "p", model_path=folder, question="Hello?"))


def test_earlier_answers_stay_unless_they_may_be_replaced(tmp_path: Path) -> None:
    given = words(tmp_path / "p", question="Hello?")
    assert predict.main(given) == 0
    with pytest.raises(ConfigError, match="add --overwrite"):
        predict.main(given)
    assert predict.main([*given, "--overwrite"]) == 0


def test_pictures_that_cannot_be_used_are_named_all_together(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"--image: nothing at .*nowhere"):
        predict.main(words(tmp_path / "p", image=tmp_path / "nowhere", question="<image>?"))
    good = write_picture(tmp_path / "good.png")
    (tmp_path / "cut.png").write_bytes(good.read_bytes()[:-400])
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(DataError) as caught:
        predict.main(words(tmp_path / "p", image=tmp_path, question="<image>?"))
    assert {"cut.png", "text.png"} <= {
        name for name in ("cut.png", "text.png", "good.png") if name in str(caught.value)
    }
    assert "good.png" not in str(caught.value)
