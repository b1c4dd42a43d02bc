"""A command that was stopped goes on with the answers that it had, and with no others."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from taught_isaac import taught, world
from test_isaac_evaluate import content, rows
from test_isaac_predict import on_data, results

from isaac_lora import asking, evaluate, predict, validation


class Stop(Exception):
    """As a kill, or a lost machine."""


class Counted:
    """Counts batches that a model answers, and its losses; stops in the batch behind `most`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, most: float = float("inf")) -> None:
        self.batches = self.losses = 0
        answered, token_loss = asking._answered, validation.token_loss

        def batch(*words: Any) -> Iterator[asking.Said]:
            for said in answered(*words):
                if self.batches == most:
                    raise Stop
                yield said
            self.batches += 1

        def loss(*words: Any, **more: Any) -> float:
            self.losses += 1
            return token_loss(*words, **more)

        monkeypatch.setattr(asking, "_answered", batch)
        monkeypatch.setattr(validation, "token_loss", loss)


@pytest.fixture
def stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of an evaluation of 3 batches by each of two models, stopped in the fifth."""
    with monkeypatch.context() as patch:
        Counted(patch, 4)
        with pytest.raises(Stop):
            evaluate.main(on_data(tmp_path / "e", adapter=taught()))
    return tmp_path / "e"


def test_a_stopped_evaluation_goes_on(
    stopped: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert [path.name for path in stopped.iterdir()] == ["unfinished"]
    counted = Counted(monkeypatch)
    assert evaluate.main(on_data(stopped, adapter=taught())) == 0
    assert (counted.batches, counted.losses) == (2, 0)
    out = capsys.readouterr().out
    assert "base: 5 answers from the command that was stopped" in out
    assert "LoRA: 2 answers from the command that was stopped" in out
    assert evaluate.main(on_data(tmp_path / "whole", adapter=taught())) == 0
    assert (counted.batches, counted.losses) == (8, 2)
    assert content(stopped)["models"] == content(tmp_path / "whole")["models"]
    assert rows(stopped) == rows(tmp_path / "whole")
    assert not (stopped / "unfinished").exists()
    assert "that was stopped" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "batches"),
    [
        ({"max_new_tokens": 63}, 6),
        ({"batch_size": 3}, 4),
        ({"max_questions": 3}, 2),  # the base had answered both of its batches
    ],
)
def test_answers_to_something_else_are_not_used(
    given: dict[str, Any], batches: int, stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = Counted(monkeypatch)
    assert evaluate.main(on_data(stopped, adapter=taught(), **given)) == 0
    assert counted.batches == batches
    assert not (stopped / "unfinished").exists()


def test_answers_by_another_adapter_are_not_used(
    stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Path(shutil.copytree(taught(), tmp_path / "other"))
    counted = Counted(monkeypatch)
    assert evaluate.main(on_data(stopped, adapter=other)) == 0
    assert (counted.batches, counted.losses) == (6, 2)


def test_answers_about_other_data_are_not_used(
    stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = Counted(monkeypatch)
    records = json.loads((world() / "data.json").read_text())
    answer = next(turn for turn in records[0]["conversations"] if turn["from"] == "gpt")
    answer["value"] = "A lorry."  # of the first one, as far as losses and its own batch go
    data = tmp_path / "data.json"
    data.write_text(json.dumps(records))
    assert evaluate.main(on_data(stopped, adapter=taught(), data_path=data)) == 0
    assert (counted.batches, counted.losses) == (6, 2)


def test_a_stopped_prediction_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = on_data(tmp_path / "p", adapter=taught(), pages="false")
    with monkeypatch.context() as patch:
        Counted(patch, 5)
        with pytest.raises(Stop):
            predict.main(words)
    counted = Counted(monkeypatch)
    assert predict.main(words) == 0
    assert counted.batches == 1
    assert "LoRA: 4 answers from the command that was stopped" in capsys.readouterr().out
    assert predict.main(on_data(tmp_path / "whole", adapter=taught(), pages="false")) == 0
    assert results(tmp_path / "p") == results(tmp_path / "whole")
    assert [path.name for path in (tmp_path / "p").iterdir()] == ["answers.json"]
