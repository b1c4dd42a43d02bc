"""Results that outlive a stopped command: for what they are used again, and when they go."""

import json
from pathlib import Path

import pytest

from lora_core.kept_results import KeptResults, stamps

FACTS = {"settings": {"steps": 3}, "files": [("a", 1, 2)]}


@pytest.fixture
def kept(tmp_path: Path) -> KeptResults:
    kept = KeptResults(tmp_path / "kept")
    kept.keep("LoRA, no depth/1", FACTS, [["A car.", True], 0.1 + 0.2])
    return kept


def test_a_value_is_found_again_with_all_its_digits(kept: KeptResults) -> None:
    again = KeptResults(kept.folder)
    assert again.find("LoRA, no depth/1", FACTS) == [["A car.", True], 0.1 + 0.2]
    assert again.find("LoRA, no depth/2", FACTS) is None


def test_what_follows_from_something_else_is_not_used(kept: KeptResults) -> None:
    assert kept.find("LoRA, no depth/1", FACTS | {"settings": {"steps": 4}}) is None


@pytest.mark.parametrize("content", ["", "[]", "{", '{"follows_from": 3}', "\xff"])
def test_damaged_files_are_no_results(content: str, kept: KeptResults) -> None:
    (kept.folder / "LoRA, no depth" / "1.json").write_text(content, "latin-1")
    assert kept.find("LoRA, no depth/1", FACTS) is None
    kept.keep("LoRA, no depth/1", FACTS, 5)
    assert kept.find("LoRA, no depth/1", FACTS) == 5


def test_only_what_was_kept_is_removed(kept: KeptResults, tmp_path: Path) -> None:
    KeptResults(kept.folder).keep("base/1", FACTS, 1)
    notes = kept.folder / "base" / "notes.json"
    notes.write_text("{}")
    kept.remove()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [notes]
    notes.unlink()
    kept.remove()
    assert list(tmp_path.iterdir()) == []
    kept.remove()  # nothing is there


def test_a_file_that_changed_has_another_stamp(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"12")
    before = stamps([file])
    assert json.loads(json.dumps(before)) == [[str(file), 2, file.stat().st_mtime_ns]]
    file.write_bytes(b"123")
    assert stamps([file]) != before
