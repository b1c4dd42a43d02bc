"""From files to batches: everything is looked at first, and samples follow from their records."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from isaac_texts import record, small_tokenizer, write_picture, write_records
from torch.utils.data import DataLoader

from isaac_lora import data
from isaac_lora.config import Config
from isaac_lora.conversations.records import Conversation, Turn, read_conversations
from isaac_lora.conversations.samples import load_sample, outline
from isaac_lora.conversations.shortening import first_turns, shortened
from isaac_lora.examples import Example, divided, packed_rows, single_rows
from isaac_lora.processing import IsaacProcessor
from lora_core.errors import DataError
from lora_core.training import loading
from lora_core.validate import REPORT


@cache
def small() -> IsaacProcessor:
    return IsaacProcessor(small_tokenizer(), patch_size=4, max_num_patches=64, min_num_patches=16)


def settings(folder: Path, **given: Any) -> Config:
    """A configuration of the conversations in `folder`."""
    needed = {
        "model_path": "model", "data_path": str(folder / "train.json"),
        "image_folder": str(folder), "output_dir": str(folder / "run"),
    }  # fmt: skip
    return Config(**needed | given)


def chat(turns: int, **more: Any) -> dict[str, Any]:
    """A record of so many questions, each about a picture, with their answers."""
    said = [
        {"from": name, "value": text}
        for number in range(turns)
        for name, text in (("human", f"<image> {number}?"), ("gpt", f"It is {number}."))
    ]
    return {"conversations": said, "images": [f"{n % 2}.png" for n in range(turns)]} | more


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_picture(tmp_path / "0.png", 23, 31, 0)
    write_picture(tmp_path / "1.png", 9, 6, 1)
    return tmp_path


def load(folder: Path, records: list[Any], **given: Any) -> data.Splits:
    write_records(folder / "train.json", records)
    return data.load(settings(folder, **given), small())


# -- reading and looking ---------------------------------------------------------------------------


def test_everything_is_counted_before_training(folder: Path) -> None:
    splits = load(folder, [chat(2, id="a"), record(id="b")])
    first, second = splits.train
    sample = load_sample(first.conversation, small(), folder)
    assert first.tokens == len(sample)
    assert first.image_tokens == 12 + 4
    assert first.label_tokens == sample.num_label_tokens
    assert first.sizes == ((23, 31), (9, 6))
    assert [picture.grid for picture in first.pictures(small().rules)] == [(3, 4), (2, 2)]
    assert (second.image_tokens, second.sizes, second.contents) == (0, (), ())
    assert "train              2       2" in str(splits)
    assert "note: no conversations for validation" in str(splits)


@pytest.mark.fault("D01", "D29", "D35")
def test_all_problems_of_records_and_pictures_are_told_at_once(folder: Path) -> None:
    bad = [
        record("<image>", id="gone", image="none.png"),
        {"id": "mute", "conversations": []},
        chat(9, id="long"),
        record(),
    ]
    with pytest.raises(DataError) as told:
        load(folder, bad, max_seq_length=120)
    text = str(told.value)
    for part in (
        f"{folder}/train.json: record 0 ('gone'): image not found: {folder}/none.png",
        "record 1 ('mute'): conversations is an empty list",
        "record 2 ('long'): ",
        "more than --max_seq_length 120: divide it",
        "3 problems",
    ):
        assert part in text


def test_both_missing_files_are_told_at_once(folder: Path) -> None:
    with pytest.raises(DataError, match=r"(?s)train\.json.*val\.json"):
        data.load(settings(folder, val_data_path=str(folder / "val.json")), small())


@pytest.mark.fault("D48")
def test_bad_conversations_are_left_out_if_asked_and_said_to_be(folder: Path) -> None:
    records = [record("<image>", image="none.png"), {"id": "x"}, chat(1, id="good")]
    splits = load(folder, records, on_bad_sample="skip", max_bad_fraction=0.9)
    assert [one.key for one in splits.train] == ["good"]
    assert {bad.sample for bad in splits.bad} == {"x", "record 0"}
    assert "2 bad samples of train left out, the first: " in str(splits)
    with pytest.raises(DataError, match="2 of 3 samples are bad"):
        load(folder, records, on_bad_sample="skip", max_bad_fraction=0.5)
    listed = (folder / "run" / REPORT).read_text().splitlines()
    assert {json.loads(line)["sample"] for line in listed} == {"x", "record 0"}


def read(folder: Path, value: dict[str, Any]) -> Conversation:
    [one] = read_conversations(write_records(folder / "one.json", [value])).records
    return one


@pytest.mark.fault("D35")
@pytest.mark.parametrize("last", ["answer", "question"])
def test_what_is_kept_of_a_long_conversation_is_all_that_fits_up_to_an_answer(
    folder: Path, last: str
) -> None:
    value = chat(6)
    if last == "question":
        value["conversations"].append({"from": "human", "value": "And why?"})
    whole = read(folder, value)
    sizes = [(23, 31), (9, 6)] * 3
    for answers in range(1, 7):
        wanted = first_turns(whole, 2 * answers)
        alone = len(outline(wanted, sizes[:answers], small()))
        for spare in (0, 3):  # tokens; the next turn does not fit either
            assert shortened(whole, sizes, small(), alone + spare) == wanted
        assert len(wanted.images) == answers
    assert shortened(whole, sizes, small(), alone + 100) == whole
    least = len(outline(first_turns(whole, 2), sizes[:1], small()))
    assert shortened(whole, sizes, small(), least - 1) == whole, "it is refused as it is"


@pytest.mark.fault("D35")
def test_long_conversations_are_cut_if_asked_and_counted(folder: Path) -> None:
    length = load(folder, [chat(3)]).train[0].tokens
    records = [chat(8, id="long"), chat(1, id="short")]
    splits = load(folder, records, max_seq_length=length, cut_long_samples=True)
    long, short = splits.train
    assert (long.tokens, len(long.sizes), len(long.conversation.turns)) == (length, 3, 6)
    assert len(short.conversation.turns) == 2
    note = "1 conversation cut at --max_seq_length after an answer, 10 turns left out"
    assert f"{note}; the first: 'long', 10 turns" in str(splits)


@pytest.mark.fault("D35")
def test_nothing_is_cut_that_would_lose_all_answers(folder: Path) -> None:
    least = load(folder, [chat(1)]).train[0].tokens
    with pytest.raises(DataError, match="not even its first answer fits"):
        load(folder, [chat(4)], max_seq_length=least - 1, cut_long_samples=True)


# -- validation ------------------------------------------------------------------------------------


def named(count: int, pictures: int) -> list[Conversation]:
    turns = (Turn("user", "<image>"), Turn("assistant", "a"))
    return [Conversation(n, f"record {n}", turns, (f"{n % pictures}.png",)) for n in range(count)]


@pytest.mark.fault("D10")
def test_conversations_about_one_picture_are_on_one_side(folder: Path) -> None:
    train, val = divided(named(100, 20), 0.2)
    assert (len(train), len(val)) == (80, 20)
    assert not {one.images for one in train} & {one.images for one in val}
    more_train, _ = divided(named(110, 22), 0.2)
    before = {one.images for one in val}
    assert len(before - {one.images for one in more_train}) >= 3, "most stay where they were"
    assert divided(named(9, 9), 0.5) == (named(9, 9), [])
    assert divided(named(50, 50), 0.0) == (named(50, 50), [])


@pytest.mark.fault("D10")
def test_a_picture_in_both_splits_is_said_to_be(folder: Path) -> None:
    copy = folder / "copy.png"
    copy.write_bytes((folder / "0.png").read_bytes())
    train = [record("<image>", image="0.png"), record("Same?")]
    val = [
        record("<image> other", image="copy.png", id="twin"),
        record("Same?", id="echo"),
        record("Other?", id="fine"),
    ]
    path = write_records(folder / "val.json", val)
    splits = load(folder, train, val_data_path=str(path))
    assert [one.key for one in splits.val] == ["twin", "echo", "fine"]
    assert "2 conversations of val with an image or a whole text of train" in str(splits)
    assert "flatter: 'twin', 'echo'" in str(splits)
    assert "'fine'" not in str(splits)


def test_the_identity_of_the_data_is_what_is_said_and_shown(folder: Path, tmp_path: Path) -> None:
    value = [record("<image>", image="0.png", id="a")]
    print_of = data.fingerprint(load(folder, value))
    assert data.fingerprint(load(folder, [*value], image_folder=f"{folder}/.")) == print_of
    moved = [record("<image>", image=str(folder / "0.png"), id="a")]
    assert data.fingerprint(load(folder, moved)) == print_of
    assert data.fingerprint(load(folder, [value[0] | {"id": "b"}])) != print_of
    write_picture(folder / "0.png", 23, 31, 7)
    assert data.fingerprint(load(folder, value)) != print_of


# -- samples and batches ---------------------------------------------------------------------------


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return bool(a == b)


def test_batches_are_the_same_from_worker_processes(folder: Path) -> None:
    splits = load(folder, [chat(2), record(), chat(1)])
    train = data.TrainSet(single_rows(splits.train), small())
    batches = [
        list(
            DataLoader(
                train,  # type: ignore[arg-type]
                batch_size=2,
                num_workers=workers,
                collate_fn=lambda rows: data.collate(rows, small()),
            )
        )
        for workers in (0, 1)
    ]
    for here, there in zip(*batches, strict=True):
        assert same(here, there)
    first = batches[0][0]
    assert first["keys"] == ["record 0", "record 1"]
    alone = load_sample(splits.train[0].conversation, small(), folder)
    assert torch.equal(first["patches"], alone.patches)
    assert first["patches"].dtype == torch.uint8
    assert torch.equal(first["input_ids"][0], alone.input_ids)
    assert data.num_label_tokens(first) == sum(one.label_tokens for one in splits.train[:2])


@pytest.mark.fault("D08")
def test_a_picture_that_changed_or_went_stops_the_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = data.TrainSet(single_rows(load(folder, [chat(1, id="ex")]).train), small())
    monkeypatch.setattr(loading, "PAUSES", (0.0, 0.0))
    write_picture(folder / "0.png", 23, 31, 5)
    with pytest.raises(DataError, match=r"'ex': image '0\.png': its pixels have changed"):
        train[0]
    (folder / "0.png").unlink()
    with pytest.raises(DataError, match=r"(?s)image not found.*tried 3 times.*--resume"):
        train[0]


def counted(tokens: list[int]) -> list[Example]:
    return [
        Example(Conversation(n, str(n), (), ()), None, count, 0, 1, (), ())
        for n, count in enumerate(tokens)
    ]


def test_packed_rows_hold_each_conversation_once_and_little_is_left_free() -> None:
    tokens = np.random.default_rng(0).integers(20, 600, 400).tolist()
    rows = packed_rows(counted(tokens), 1000, seed=3)
    assert sorted(int(one.key) for row in rows for one in row.examples) == list(range(400))
    assert max(row.tokens for row in rows) <= 1000
    assert len(rows) < 1.05 * sum(tokens) / 1000
    assert packed_rows(counted(tokens), 1000, seed=3) == rows
    assert packed_rows(counted(tokens), 1000, seed=4) != rows
    assert [row.key for row in single_rows(counted([5, 6]))] == ["0", "1"]


def test_packed_and_padded_batches_hold_the_same_tokens(folder: Path) -> None:
    cfg = settings(folder, packing=True, max_seq_length=120)
    splits = load(folder, [chat(2), record(), chat(1), record("Why?")], packing=True)
    rows = data.training_rows(cfg, splits)
    train = data.TrainSet(rows, small())
    assert data.updates_per_epoch(cfg, rows) == 1
    loaded = [train[index] for index in range(len(rows))]
    assert len(rows) < 4
    packed, padded = (data.collate(loaded, small(), packed=kind) for kind in (True, False))
    assert packed["input_ids"].shape == (1, sum(one.tokens for one in splits.train))
    assert torch.equal(packed["patches"], padded["patches"])
    real = padded["attention_mask"].bool()
    assert torch.equal(padded["input_ids"][real], packed["input_ids"][0])
    assert data.num_label_tokens(packed) == data.num_label_tokens(padded)


@pytest.mark.parametrize("packed", [False, True])
def test_the_largest_batch_has_the_shapes_of_a_real_one(folder: Path, packed: bool) -> None:
    splits = load(folder, [record(), chat(3), chat(1)])
    rows = single_rows(splits.train)
    train = data.TrainSet(rows, small())
    real = data.collate([train[1], train[2]], small(), packed)
    made = data.largest_batch(rows, 2, small(), packed)
    assert made.keys() == real.keys()
    for name, value in real.items():
        if isinstance(value, torch.Tensor):
            assert (made[name].shape, made[name].dtype) == (value.shape, value.dtype), name
    assert made["keys"] == real["keys"]
