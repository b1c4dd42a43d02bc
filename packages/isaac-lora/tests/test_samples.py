"""Conversations to samples: counted before a pixel is decoded, never cut, never empty."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from isaac_texts import noise, record, small_tokenizer, write_picture, write_records

from isaac_lora.batches import collate_padded
from isaac_lora.conversations.records import Conversation, read_conversations
from isaac_lora.conversations.samples import (
    IGNORED,
    load_sample,
    outline,
    with_pictures,
)
from isaac_lora.conversations.survey import content_of, facts, files_of, refuse_unusable
from isaac_lora.pictures.content import content_digest
from isaac_lora.processing import IsaacProcessor
from lora_core.errors import DataError
from lora_core.shielded import Limits
from lora_core.validate import validate


def small() -> IsaacProcessor:
    return IsaacProcessor(small_tokenizer(), patch_size=4, max_num_patches=64, min_num_patches=16)


def conversation(tmp_path: Path, value: dict[str, Any]) -> Conversation:
    reading = read_conversations(write_records(tmp_path / "d.json", [value]))
    assert not reading.bad, reading.bad
    return reading.records[0]


def test_tokens_are_counted_from_sizes_as_they_are_with_pixels(tmp_path: Path) -> None:
    for name, size in (("a.png", (23, 31)), ("b.png", (9, 6))):
        write_picture(tmp_path / name, *size)
    one = conversation(tmp_path, record("<image> or <image>?", images=["a.png", "b.png"]))
    counted = outline(one, [(23, 31), (9, 6)], small())
    loaded = load_sample(one, small(), tmp_path, keep_pictures=True)
    assert torch.equal(counted.input_ids, loaded.input_ids)
    assert int(counted.image_mask.sum()) == 12 + 4
    assert counted.grids.tolist() == [[6, 8], [4, 4]]
    assert counted.patches is None
    assert loaded.patches is not None
    assert loaded.patches.shape == (48 + 16, 48)
    assert loaded.patches.dtype == torch.uint8
    assert [picture.shape for picture in loaded.pictures] == [(23, 31, 3), (9, 6, 3)]


def test_facts_count_what_a_sample_holds(tmp_path: Path) -> None:
    write_picture(tmp_path / "a.png")
    one = conversation(tmp_path, record("<image>?", image="a.png"))
    found = facts(one, small(), tmp_path, 16384)
    sample = load_sample(one, small(), tmp_path)
    assert found == {
        "tokens": len(sample), "image_tokens": 12, "sizes": [[23, 31]],
        "label_tokens": int((sample.labels != IGNORED).sum()),
        "turns": 2, "contents": [content_digest(noise(23, 31))],
    }  # fmt: skip
    assert json.loads(json.dumps(found)) == found


@pytest.mark.fault("D35")
def test_a_sample_that_is_too_long_is_refused_whole_and_before_it_is_decoded(
    tmp_path: Path,
) -> None:
    path = write_picture(tmp_path / "a.jpg", 40, 40)
    path.write_bytes(path.read_bytes()[:-900])  # decoding it would say something else
    one = conversation(tmp_path, record("<image>?", image="a.jpg"))
    length = len(outline(one, [(40, 40)], small()))
    with pytest.raises(DataError, match=rf"{length} tokens, 16 of them .* --max_seq_length"):
        facts(one, small(), tmp_path, length - 1)
    with pytest.raises(DataError, match="cannot be read"):
        facts(one, small(), tmp_path, length)


@pytest.mark.fault("D01")
def test_all_missing_pictures_of_a_record_are_listed(tmp_path: Path) -> None:
    one = conversation(tmp_path, record("<image><image>", images=["a.png", "b.png"]))
    with pytest.raises(DataError, match=r"(?s)a\.png.*\n.*b\.png"):
        facts(one, small(), tmp_path, 16384)


def test_a_data_set_is_looked_at_in_workers(tmp_path: Path) -> None:
    write_picture(tmp_path / "a.png")
    values = [record("<image>", image="a.png"), record("<image>", image="none.png"), record()]
    records = read_conversations(write_records(tmp_path / "d.json", values)).records
    outcomes = validate(
        records,
        lambda one: facts(one, small(), tmp_path, 16384),
        kind="isaac test",
        root=tmp_path,
        files=lambda one: files_of(one, tmp_path),
        content=content_of,
    )
    assert [bool(outcome.problem) for outcome in outcomes] == [False, True, False]
    assert "image not found" in outcomes[1].problem


def test_the_identity_of_a_conversation_is_what_it_says_and_holds(tmp_path: Path) -> None:
    inline = "data:image/png;base64,aGVsbG8="
    values = [
        record("<image>", image=inline, id=1), record("<image>", image=inline, id=2),
        record("<image>", image=inline + "A", id=3), record("<image> ", image=inline, id=4),
    ]  # fmt: skip
    records = read_conversations(write_records(tmp_path / "d.json", values)).records
    digests = [content_of(one) for one in records]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3
    odd = conversation(tmp_path, record("<image>" * 3, images=["a.png", "https://x/b.png", inline]))
    assert files_of(odd, tmp_path) == [tmp_path / "a.png"]


@pytest.mark.fault("H13")
def test_a_template_without_end_costs_a_sample_and_not_the_run(tmp_path: Path) -> None:
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    processor = IsaacProcessor(small_tokenizer(endless))
    records = read_conversations(write_records(tmp_path / "d.json", [record()])).records
    [outcome] = validate(
        records,
        lambda one: facts(one, processor, tmp_path, 16384),
        kind="isaac test of a template",
        root=tmp_path,
        files=lambda one: [],
        limits=Limits(seconds=0.5),
        workers=1,
    )
    assert "0.5" in outcome.problem


@pytest.mark.fault("D36", "D37")
def test_the_end_of_a_turn_is_learned_though_it_may_be_the_padding_too(tmp_path: Path) -> None:
    one = conversation(tmp_path, record())
    sample = outline(one, [], small())
    end = small_tokenizer().convert_tokens_to_ids("<|im_end|>")
    assert (sample.labels == end).sum() == 1
    batch = collate_padded([sample, sample], pad_id=end, pixel_shuffle_scale=2)
    assert (batch["labels"] == end).sum() == 2
    with pytest.raises(DataError, match="no token of it would be learned"):
        refuse_unusable(replace(sample, labels=torch.full_like(sample.labels, IGNORED)), 99)


def test_a_picture_that_changed_its_size_meanwhile_is_noticed(tmp_path: Path) -> None:
    one = conversation(tmp_path, record("<image>", image="a.png"))
    sample = outline(one, [(23, 31)], small())
    with pytest.raises(DataError, match="not what it was"):
        with_pictures(sample, [noise(61, 37)], small().rules)


def test_text_alone_has_no_patches(tmp_path: Path) -> None:
    sample = load_sample(conversation(tmp_path, record()), small())
    assert sample.patches is not None
    assert sample.patches.shape == (0, 48)
    assert sample.grids.shape == (0, 2)
    assert not sample.image_mask.any()
    assert np.isin(sample.labels[sample.labels != IGNORED], sample.input_ids).all()
