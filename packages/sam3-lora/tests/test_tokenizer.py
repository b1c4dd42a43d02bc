"""Phrases to ids: recorded ones through every form of file, and what happens to bad files."""

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from lora_core.errors import CheckpointError, ConfigError, DataError
from sam3_lora import tokenizer
from sam3_lora.tokenizer import (
    CONTEXT,
    MERGES,
    Tokenizer,
    clean,
    learn_merges,
    load_tokenizer,
    write_vocabulary,
)

GOLDENS = Path(__file__).parent / "goldens"
VOCABULARY = GOLDENS / "clip_vocabulary"
RECORDED = json.loads((GOLDENS / "tokenizer" / "expected.json").read_text("utf-8"))
PHRASES = json.loads((VOCABULARY / "phrases.json").read_text("utf-8"))
START, END = RECORDED["start_id"], RECORDED["end_id"]


def vocabulary() -> dict[str, int]:
    return json.loads((VOCABULARY / "vocab.json").read_text("utf-8"))


def merges() -> list[str]:
    return (VOCABULARY / "merges.txt").read_text("utf-8").splitlines()[1:]


def vocab_and_merges(folder: Path) -> Path:
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(VOCABULARY / name, folder)
    return folder


def tokenizer_json(folder: Path, pairs: list[Any]) -> Path:
    model = {"type": "BPE", "vocab": vocabulary(), "merges": pairs}
    (folder / "tokenizer.json").write_text(json.dumps({"model": model}), "utf-8")
    return folder


def official_text(folder: Path) -> Path:
    """The official file's form and length: every known merge in the line of its rank."""
    lines = [f"<{rank} >{rank}" for rank in range(MERGES)]
    ids = vocabulary()
    for merge in merges():
        lines[ids[merge.replace(" ", "")] - 512] = merge
    lines = [
        '"bpe_simple_vocab_16e6.txt#version: 0.2',
        *lines,
        "more merges",
        "that CLIP",
        "ignores",
    ]
    path = folder / "bpe_simple_vocab_16e6.txt.gz"
    path.write_bytes(gzip.compress(("\n".join(lines) + "\n").encode("utf-8"), 1))
    return path


FORMS = {
    "vocab.json and merges.txt": vocab_and_merges,
    "tokenizer.json": lambda folder: tokenizer_json(folder, merges()),
    "tokenizer.json with pairs": lambda folder: tokenizer_json(
        folder, [merge.split() for merge in merges()]
    ),
    "official file": official_text,
    "folder with the official file": lambda folder: official_text(folder).parent,
}


@pytest.fixture(scope="module")
def clip() -> Tokenizer:
    return load_tokenizer(VOCABULARY)


@pytest.mark.parametrize("form", FORMS)
def test_golden_phrases_from_every_form_of_file(form: str, tmp_path: Path) -> None:
    found = load_tokenizer(FORMS[form](tmp_path))
    ids, mask = found([case["text"] for case in RECORDED["cases"]])
    assert ids.tolist() == [case["ids"] for case in RECORDED["cases"]]
    assert mask.tolist() == [[int(id_ != 0) for id_ in case["ids"]] for case in RECORDED["cases"]]
    assert found.size == END + 1


@pytest.mark.parametrize("case", PHRASES, ids=range(len(PHRASES)))
def test_recorded_phrases_with_odd_characters(clip: Tokenizer, case: dict[str, Any]) -> None:
    ids, _ = clip([case["text"]])
    assert ids[0].tolist() == case["ids"] + [0] * (CONTEXT - len(case["ids"]))


def test_valid_ids_equal_those_of_transformers(clip: Tokenizer) -> None:
    from transformers import CLIPTokenizer

    pairs = [tuple(merge.split()) for merge in merges()]
    other = CLIPTokenizer(vocab=vocabulary(), merges=pairs)
    phrases = [
        "a red car",
        "Yellow School-Bus",
        "person's hat",
        "3D printer",
        "日本語",
        "naïve café",
    ]
    ids, mask = clip(phrases)
    for row, valid, phrase in zip(ids, mask, phrases, strict=True):
        assert row[valid.bool()].tolist() == other(phrase)["input_ids"]


def test_a_long_phrase_keeps_its_end_token_and_is_named(clip: Tokenizer) -> None:
    exact, long = " ".join(["word"] * 30), " ".join(["word"] * 31)
    ids, mask = clip([exact, long])
    assert ids[0].tolist() == ids[1].tolist()
    assert ids[1, -1] == END
    assert mask.all()
    assert clip.too_long([exact, long, "visual"]) == [long]


def test_control_tokens_in_a_phrase_are_plain_text(clip: Tokenizer) -> None:
    ids = clip.encode("<|endoftext|> <|startoftext|>")
    assert not {START, END} & set(ids)


def test_one_phrase_has_one_row_whatever_else_is_in_the_batch(clip: Tokenizer) -> None:
    alone, _ = clip(["a red car"])
    among, _ = clip(["visual", "  A Red\tCAR ", "shoe"])
    assert among[1].tolist() == alone[0].tolist()


@pytest.mark.parametrize("phrase", ["", "   ", "\n", "&nbsp;", "\x00"])
def test_an_empty_phrase_is_an_error(clip: Tokenizer, phrase: str) -> None:
    with pytest.raises(DataError, match="is empty: name what to look for"):
        clip(["shoe", phrase])


def test_no_phrases_give_no_rows(clip: Tokenizer) -> None:
    ids, mask = clip([])
    assert ids.shape == mask.shape == (0, CONTEXT)


def test_lone_surrogates_do_not_stop_it(clip: Tokenizer) -> None:
    assert clip.encode("a\ud800b")


def test_a_valid_phrase_is_not_taken_for_damaged_text() -> None:
    assert clean("Größe, œuvre, naïve, Ærø, 日本語, Ã") == "größe, œuvre, naïve, ærø, 日本語, ã"


# -- small vocabularies --------------------------------------------------------------------------

WORDS = ["red circle", "small square", "circles", "Traffic-Light"]


def test_learned_merges_make_every_word_one_token(tmp_path: Path) -> None:
    write_vocabulary(tmp_path / "vocabulary.txt", learn_merges(WORDS))
    small = load_tokenizer(tmp_path)
    assert [len(small.encode(phrase)) for phrase in WORDS] == [2, 2, 1, 3]
    words = ["red", "circle", "small", "square", "circles", "traffic", "-", "light"]
    assert len({tuple(small.encode(word)) for word in words}) == len(words)


def test_a_small_vocabulary_is_small_and_still_reads_every_word(tmp_path: Path) -> None:
    learned = learn_merges(WORDS)
    write_vocabulary(tmp_path / "own.txt", learned)
    small = load_tokenizer(tmp_path / "own.txt")
    assert small.size == 2 * 256 + len(learned) + 2
    ids, mask = small(["unheard 日本語"])
    assert ids.max() == small.size - 1
    assert mask.sum() == 2 + len("unheard") - 1 + len("日本語".encode())  # "ar", of "square"


def test_learned_merges_do_not_depend_on_the_order_of_phrases() -> None:
    assert learn_merges(WORDS) == learn_merges(reversed(WORDS))


# -- files that cannot be used -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["missing", "empty"])
def test_without_a_vocabulary_the_error_says_where_to_get_one(name: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError) as caught:
        load_tokenizer(tmp_path / name)
    message = str(caught.value)
    assert str(tmp_path / name) in message
    for part in ("bpe_simple_vocab_16e6.txt.gz", "open_clip_torch", "transformers"):
        assert part in message


DAMAGED: dict[str, tuple[str, bytes]] = {
    "no gzip": ("bpe.txt.gz", b"version https://git-lfs.github.com/spec/v1\n"),
    "cut gzip": ("bpe.txt.gz", gzip.compress(b"a b\n" * 1000)[:-12]),
    "no text": ("bpe.txt", b"\x89PNG\xff\xfe"),
    "three tokens": ("bpe.txt", b"#version\na b c\n"),
    "no JSON": ("tokenizer.json", b"{"),
    "deep JSON": ("tokenizer.json", b"[" * 200_000),
    "a list": ("tokenizer.json", b"[]"),
    "a word-piece model": ("tokenizer.json", b'{"model": {"vocab": {"a": 1}}}'),
    "ids that are text": ("tokenizer.json", b'{"model": {"vocab": {"a": "1"}, "merges": []}}'),
    "no byte tokens": ("tokenizer.json", b'{"model": {"vocab": {"a": 1}, "merges": []}}'),
    "merges of numbers": ("tokenizer.json", b'{"model": {"vocab": {"a": 1}, "merges": [[1, 2]]}}'),
}


@pytest.mark.parametrize("fault", DAMAGED)
def test_a_damaged_file_is_named(fault: str, tmp_path: Path) -> None:
    name, content = DAMAGED[fault]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        load_tokenizer(tmp_path / name)
    assert name in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_a_bomb_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "LARGEST_FILE", 2**20)
    (tmp_path / "bpe.txt.gz").write_bytes(gzip.compress(b"a" * 2**22))
    with pytest.raises(CheckpointError, match="that is no vocabulary"):
        load_tokenizer(tmp_path / "bpe.txt.gz")


def test_a_merge_whose_result_has_no_id_is_an_error(tmp_path: Path) -> None:
    vocab_and_merges(tmp_path)
    with (tmp_path / "merges.txt").open("a", encoding="utf-8") as file:
        file.write("zq zq\n")
    with pytest.raises(CheckpointError, match=r"1 tokens are missing, such as 'zqzq'"):
        load_tokenizer(tmp_path)
