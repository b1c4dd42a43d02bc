"""The benchmark page: tables come from the results, goals are judged, and nothing is left out."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

BENCH = Path(__file__).parent / "bench"
TEXT = "before\n<!-- table: linear/fp32 -->\nold\n<!-- end -->\nafter\n"


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The program, with results and page in a folder of their own."""
    monkeypatch.syspath_prepend(str(BENCH))
    module = importlib.import_module("page")
    module.read.cache_clear()
    monkeypatch.setattr(module, "RESULTS", tmp_path / "benchmarks")
    monkeypatch.setattr(module, "PAGE", tmp_path / "benchmarks.md")
    yield module
    for name in ("page", "goals", "results", "measure"):
        sys.modules.pop(name, None)


def publish(page: ModuleType, monkeypatch: pytest.MonkeyPatch, rows: list[list[object]]) -> Path:
    """Write results as `tools/bench/linear.py` does."""
    results = importlib.import_module("results")
    file: Path = page.RESULTS / "linear.json"
    words = [f"{BENCH}/linear.py", "--rounds", "3", "--json", str(file)]
    monkeypatch.setattr(sys, "argv", words)
    for name in results.SETTINGS:
        monkeypatch.delenv(name, raising=False)
    results.publish({"fp32": results.Table(("shape", "ratio"), rows)}, file)
    return file


def test_table_and_its_origin_stand_between_the_marks(
    page: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(page, monkeypatch, [["1x2-3", 1.23456789]])
    text = page.filled(TEXT)
    assert text.startswith("before\n<!-- table: linear/fp32 -->\n\n| shape | ratio |\n")
    assert "| 1x2-3 | 1.23 |" in text
    assert "`python tools/bench/linear.py --rounds 3`" in text
    assert "old" not in text
    assert text.endswith("<!-- end -->\nafter\n")
    assert page.filled(text) == text


def test_results_have_a_row_to_a_line_and_are_read_as_written(
    page: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = publish(page, monkeypatch, [["a, [b]", 1.5], ["c", 2]])
    assert '"c", 2]' in file.read_text()
    assert page.find("linear", "fp32").rows == [["a, [b]", 1.5], ["c", 2]]
    assert json.loads(file.read_text())["threads"] >= 1


def test_check_fails_when_the_results_have_changed(
    page: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(page, monkeypatch, [["1x2-3", 1.0]])
    page.PAGE.write_text(page.filled(TEXT))
    monkeypatch.setattr(sys, "argv", ["page.py", "--check"])
    page.main()
    publish(page, monkeypatch, [["1x2-3", 2.0]])
    page.read.cache_clear()
    monkeypatch.setattr(sys, "argv", ["page.py", "--check"])
    with pytest.raises(SystemExit, match="is not what"):
        page.main()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TEXT.replace("linear", "absent"), r"needs docs/benchmarks/absent\.json"),
        (TEXT.replace("fp32", "fp8"), r"linear\.json has no 'fp8', but fp32"),
        (TEXT.replace("<!-- end -->\n", ""), "as many"),
        (TEXT.replace("<!-- end -->\n", "") + TEXT, "has no `<!-- end -->`"),
    ],
)
def test_a_place_that_cannot_be_filled_is_named(
    page: ModuleType, monkeypatch: pytest.MonkeyPatch, text: str, message: str
) -> None:
    publish(page, monkeypatch, [["1x2-3", 1.0]])
    with pytest.raises(SystemExit, match=message):
        page.filled(text)


def test_goals_name_the_case_farthest_from_its_limit(page: ModuleType) -> None:
    goals = importlib.import_module("goals")
    met = goals.line("kept", [goals.Value("a", 0.5, 1.0), goals.Value("b", 0.9, 1.0)])
    assert met == ["kept", "0.90 of 1.00 (b)", "2 of 2", "yes"]
    missed = goals.line("time", [goals.Value("a", 2.0, 1.0), goals.Value("b", 9.0, 8.0)])
    assert missed == ["time", "2.00 of 1.00 (a)", "0 of 2", "**no**"]
