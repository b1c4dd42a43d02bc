"""`isaac-lora evaluate`: base, LoRA, wrong depth and a merged model on conversations."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from isaac_texts import record, write_records
from taught_isaac import BOX, POINT, base, examples, processor, taught, world
from test_isaac_predict import on_data

from isaac_lora import evaluate, official
from isaac_lora.adapter_files import load_adapter
from isaac_lora.asking import answers, features_of_model
from isaac_lora.depth.settings import read_depth_settings, write_depth_settings
from isaac_lora.prompts import questions_of
from isaac_lora.validation import scores, token_loss
from lora_core import merged_state_dict
from lora_core.errors import CheckpointError, ConfigError, DataError

CONTROLS = {"shuffled_depth": "true", "constant_depth": "true", "without_depth": "true"}


def content(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "evaluation.json").read_text())
    return found


def rows(output: Path) -> list[dict[str, str]]:
    with (output / "answers.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.fault("R49")
def test_base_beside_lora_with_the_figures_of_python(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate.main(on_data(tmp_path / "e", adapter=taught())) == 0
    found = content(tmp_path / "e")
    assert list(found["models"]) == ["base", "LoRA"]
    lora = found["models"]["LoRA"]
    assert lora["loss"] < 0.1
    assert lora["exact_match"] == lora["anls"] == lora["box_iou"] == lora["pointing_accuracy"] == 1
    questions = [question for one in examples() for question in questions_of(one)]
    model, features = base(), features_of_model(base())
    expected = {
        "loss": token_loss(model, examples(), processor(), batch_size=2, features=features),
        **scores(questions, answers(model, processor(), questions, max_new_tokens=64)),
    }
    assert found["models"]["base"] == pytest.approx(expected, abs=1e-6)
    assert [row["LoRA"] for row in rows(tmp_path / "e")] == [
        "A car.", "It is near.", BOX, "Hi.", POINT
    ]  # fmt: skip
    assert [row["truth"] for row in rows(tmp_path / "e")] == [one.answer for one in questions]
    assert len(list((tmp_path / "e").glob("example_*.png"))) == 5
    out = capsys.readouterr().out
    assert "5 questions" in out
    assert "evaluation.json, answers.csv, 5 pages example_*.png -> " in out
    assert "pointing_accuracy" in out
    assert "exact_match" in out


def test_wrong_depth_is_scored_beside_the_right_one(tmp_path: Path) -> None:
    given = on_data(
        tmp_path / "e",
        adapter=taught(depth=True),
        depth_checkpoint_path=world() / "depth",
        examples=0,
        max_questions=3,
        **CONTROLS,
    )
    assert evaluate.main(given) == 0
    found = content(tmp_path / "e")["models"]
    assert list(found) == [
        "base", "LoRA", "LoRA, shuffled depth", "LoRA, constant depth", "LoRA, without depth"
    ]  # fmt: skip
    losses = [one["loss"] for one in found.values()]
    assert losses[1] == min(losses) < 0.1
    assert len(set(losses)) == 5
    features = features_of_model(base())  # as published: without LoRA and without depth
    loss = token_loss(base(), examples(), processor(), batch_size=2, features=features)
    assert losses[0] == pytest.approx(loss, abs=1e-6)
    assert found["LoRA"]["exact_match"] == 1
    assert not list((tmp_path / "e").glob("*.png"))
    assert content(tmp_path / "e")["settings"]["depth"]["checkpoint"] == "depth"


def test_a_merged_model_scores_as_its_adapter_with_its_depth(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    plain = official.load_model(world() / "isaac_model")
    adapted = official.load_model(world() / "isaac_model")
    settings = read_depth_settings(taught(depth=True))
    load_adapter(adapted, taught(depth=True), depth=settings)
    plain.load_state_dict(merged_state_dict(adapted))
    merged = tmp_path / "merged"
    plain.save_pretrained(merged)
    write_depth_settings(merged, settings)
    given = {"depth_checkpoint_path": world() / "depth", "examples": 0, "max_questions": 2}
    adapter = {"adapter": taught(depth=True), "compare_base": "false", "merged_model": merged}
    assert evaluate.main(on_data(tmp_path / "e", **given, **adapter)) == 0
    found = content(tmp_path / "e")["models"]
    assert list(found) == ["LoRA", "merged"]
    assert found["merged"] == pytest.approx(found["LoRA"], abs=1e-4)
    for file in (world() / "isaac_model").iterdir():
        if "token" in file.name or file.name in ("vocab.json", "merges.txt"):
            shutil.copy(file, merged)
    assert evaluate.main(on_data(tmp_path / "alone", model_path=merged, **given)) == 0
    assert content(tmp_path / "alone")["models"]["model"] == pytest.approx(found["merged"])
    assert not [one for one in recwarn if "depth" in str(one.message)]
    with pytest.raises(ConfigError, match="merged was trained with depth from depth"):
        evaluate.main(on_data(tmp_path / "no", model_path=merged))


def test_a_model_alone_and_a_part_of_the_questions(tmp_path: Path) -> None:
    given = on_data(tmp_path / "e", max_questions=2, max_new_tokens=4, examples=1)
    assert evaluate.main(given) == 0
    found = content(tmp_path / "e")
    assert list(found["models"]) == ["model"]
    assert found["questions"] == len(rows(tmp_path / "e")) == 2
    assert len(list((tmp_path / "e").glob("*.png"))) == 1
    loss = token_loss(
        base(), examples(), processor(), batch_size=2, features=features_of_model(base())
    )
    assert found["models"]["model"]["loss"] == pytest.approx(loss, abs=1e-6)  # over all of them


def test_controls_need_depth(tmp_path: Path) -> None:
    for name in CONTROLS:
        with pytest.raises(ConfigError, match=f"--{name} compares with depth, but no depth"):
            evaluate.main(on_data(tmp_path / "e", adapter=taught(), **{name: "true"}))


def test_shuffling_a_single_picture_is_refused_before_weights_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_records(tmp_path / "one.json", [record("<image>?", image="a.png")])
    monkeypatch.setattr(official, "load_model", lambda *_: pytest.fail("weights were read"))
    given = on_data(
        tmp_path / "e",
        data_path=path,
        adapter=taught(depth=True),
        depth_checkpoint_path=world() / "depth",
        shuffled_depth="true",
    )
    with pytest.raises(DataError, match="not two different pictures"):
        evaluate.main(given)


def test_a_merged_model_of_another_depth_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        evaluate.main(on_data(tmp_path / "e", merged_model=tmp_path / "nowhere"))


@pytest.mark.fault("D30")
def test_conversations_without_answers_are_bad(tmp_path: Path) -> None:
    asks = {"conversations": [{"from": "human", "value": "Hello?"}]}
    path = write_records(tmp_path / "d.json", [asks])
    with pytest.raises(DataError, match="record 0: no assistant turn"):
        evaluate.main(on_data(tmp_path / "e", data_path=path))


def test_an_earlier_evaluation_stays(tmp_path: Path) -> None:
    (tmp_path / "evaluation.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"evaluation.json is there already"):
        evaluate.main(on_data(tmp_path))
    assert (tmp_path / "evaluation.json").read_text() == "{}"


def test_counts_below_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--max_questions is -1"):
        evaluate.main(on_data(tmp_path, max_questions=-1))
