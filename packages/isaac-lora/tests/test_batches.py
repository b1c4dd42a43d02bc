"""Batches: what stands where, padded and packed, with and without pictures."""

import numpy as np
import pytest
import torch
from isaac_texts import noise

from isaac_lora.batches import (
    OrderByLength,
    batches_by_length,
    collate_packed,
    collate_padded,
    num_label_tokens,
)
from isaac_lora.conversations.samples import IGNORED, Sample, assemble, with_pictures
from isaac_lora.conversations.tokens import Piece
from isaac_lora.network.positions import mrope_position_ids
from isaac_lora.pictures.target_size import PictureRules, patch_grid
from lora_core.errors import DataError

RULES = PictureRules(4, 64, 16, 2)


def sample(texts: list[list[int]], learned_from: int, *pictures: tuple[int, int]) -> Sample:
    """Token lists around pictures; of the last list what stands from `learned_from` is learned."""
    pieces = [Piece(ids, [False] * len(ids)) for ids in texts]
    last = pieces[-1]
    last.learned = [place >= learned_from for place in range(len(last.ids))]
    grids = [patch_grid(*size, RULES) for size in pictures]
    made = assemble(pieces, grids, RULES, image_id=99)
    levels = [noise(*size, seed) for seed, size in enumerate(pictures)]
    return with_pictures(made, levels, RULES, keep_pictures=True)


SAMPLES = [
    sample([[1, 2], [3, 4, 5]], 1, (23, 31)),
    sample([[6, 7, 8, 9]], 2),
    sample([[], [10], [11, 12]], 0, (9, 6), (61, 37)),
]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_hold_each_sample_and_nothing_else(side: str) -> None:
    batch = collate_padded(SAMPLES, pad_id=0, pixel_shuffle_scale=2, padding_side=side)
    longest = max(map(len, SAMPLES))
    assert batch["input_ids"].shape == (3, longest)
    for row, one in enumerate(SAMPLES):
        real = slice(longest - len(one), None) if side == "left" else slice(len(one))
        assert batch["attention_mask"][row].sum() == len(one)
        assert batch["attention_mask"][row, real].all()
        for name in ("input_ids", "labels", "image_mask"):
            assert torch.equal(batch[name][row, real], getattr(one, name))
        alone = mrope_position_ids(one.image_mask[None], one.grids, 2)[0]
        assert torch.equal(batch["position_ids"][row, real], alone)
    padding = batch["attention_mask"] == 0
    assert (batch["input_ids"][padding] == 0).all()
    assert (batch["labels"][padding] == IGNORED).all()
    assert not batch["image_mask"][padding].any()
    assert (batch["position_ids"][padding] == 0).all()


def test_packed_samples_begin_anew_and_predict_nothing_of_each_other() -> None:
    batch = collate_packed(SAMPLES, pixel_shuffle_scale=2)
    starts = np.cumsum([0, *map(len, SAMPLES)])
    assert batch["input_ids"].shape == (1, starts[-1])
    for number, one in enumerate(SAMPLES):
        place = slice(starts[number], starts[number + 1])
        assert torch.equal(batch["input_ids"][0, place], one.input_ids)
        assert (batch["document_ids"][0, place] == number).all()
        alone = mrope_position_ids(one.image_mask[None], one.grids, 2)[0]
        assert torch.equal(batch["position_ids"][0, place], alone)
        assert batch["labels"][0, starts[number]] == IGNORED


def test_a_learned_first_token_is_predicted_by_no_other_sample() -> None:
    first = sample([[7, 8]], 0)
    assert first.labels.tolist() == [7, 8]
    packed = collate_packed([first, first], pixel_shuffle_scale=2)
    assert packed["labels"].tolist() == [[IGNORED, 8, IGNORED, 8]]
    left = collate_padded([first, SAMPLES[0]], pad_id=0, pixel_shuffle_scale=2, padding_side="left")
    assert left["labels"][0, -2:].tolist() == [IGNORED, 8]
    assert num_label_tokens(packed) == 2 * first.num_label_tokens == 2


@pytest.mark.fault("R45")
def test_label_tokens_of_a_batch_are_those_of_its_samples() -> None:
    wanted = sum(one.num_label_tokens for one in SAMPLES)
    assert wanted == 2 + 2 + 2
    assert num_label_tokens(collate_padded(SAMPLES, pad_id=0, pixel_shuffle_scale=2)) == wanted
    assert num_label_tokens(collate_packed(SAMPLES, pixel_shuffle_scale=2)) == wanted


def test_pictures_of_all_samples_follow_the_places() -> None:
    batch = collate_padded(SAMPLES, pad_id=0, pixel_shuffle_scale=2)
    assert batch["grids"].tolist() == [[6, 8], [4, 4], [10, 6]]
    assert torch.equal(batch["patches"][:48], SAMPLES[0].patches)
    assert torch.equal(batch["patches"][48:], SAMPLES[2].patches)
    assert [picture.shape[:2] for picture in batch["pictures"]] == [(23, 31), (9, 6), (61, 37)]


def test_a_batch_of_text_alone_has_no_pictures() -> None:
    for batch in (
        collate_padded([SAMPLES[1]], pad_id=0, pixel_shuffle_scale=2),
        collate_packed([SAMPLES[1]], pixel_shuffle_scale=2),
    ):
        assert not {"patches", "grids", "pictures"} & set(batch)
        assert not batch["image_mask"].any()


def test_no_samples_are_no_batch() -> None:
    with pytest.raises(DataError, match="no samples"):
        collate_padded([], pad_id=0, pixel_shuffle_scale=2)
    with pytest.raises(DataError, match="no samples"):
        collate_packed([], pixel_shuffle_scale=2)
    with pytest.raises(DataError, match="expected left or right"):
        collate_padded(SAMPLES, pad_id=0, pixel_shuffle_scale=2, padding_side="top")  # type: ignore[arg-type]


@pytest.mark.parametrize("most", [None, 4000])
def test_batches_hold_every_sample_once_and_little_padding(most: int | None) -> None:
    lengths = np.random.default_rng(0).integers(50, 2000, 500).tolist()
    made = batches_by_length(lengths, 4, np.random.default_rng(1), most_places=most)
    assert sorted(index for batch in made for index in batch) == list(range(500))
    places = sum(len(batch) * max(lengths[index] for index in batch) for batch in made)
    assert places < 1.05 * sum(lengths)
    assert all(len(batch) <= 4 for batch in made)
    if most:
        assert all(len(b) * max(lengths[i] for i in b) <= most for b in made if len(b) > 1)
    again = batches_by_length(lengths, 4, np.random.default_rng(1), most_places=most)
    assert made == again
    assert made != batches_by_length(lengths, 4, np.random.default_rng(2), most_places=most)


def test_a_sample_beyond_the_bound_stands_alone() -> None:
    made = batches_by_length([10, 5000, 20], 4, np.random.default_rng(0), most_places=100)
    assert [1] in made
    assert sorted(map(sorted, made)) == [[0, 2], [1]]


def test_an_order_by_length_is_one_of_seed_and_epoch_and_ends_with_the_small_batch() -> None:
    lengths = np.random.default_rng(0).integers(50, 2000, 403).tolist()
    order, again = OrderByLength(lengths, 4, seed=1), OrderByLength(lengths, 4, seed=1)
    again.set_epoch(5)
    assert list(order) != list(again)
    again.set_epoch(0)
    assert list(order) == list(again)
    assert sorted(order) == list(range(403))
    assert len(order) == 403
    taken = list(order)
    padded = sum(
        max(lengths[i] for i in taken[at : at + 4]) * len(taken[at : at + 4])
        for at in range(0, 403, 4)
    )
    assert padded < 1.05 * sum(lengths)
