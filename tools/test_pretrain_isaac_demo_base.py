"""Pretraining of isaac-lora's tiny base: a run that was stopped ends as one that was not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pretrain_isaac_demo_base as pretrain
import pytest
import torch
from isaac_base import answers, distances, looks, pool, rows, stages
from isaac_base.stages import Stages

from isaac_lora import official
from isaac_lora.batches import collate_padded
from isaac_lora.demo_questions import questions
from isaac_lora.demo_scenes import PLACES, RIBS, SIZES, Style, scene
from isaac_lora.depth.estimator import read_depth_estimator
from isaac_lora.processing import IsaacProcessor


@pytest.fixture(autouse=True, scope="module")
def small_batches():
    """The way is tested, not the result."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        for stage in (looks.Looks, answers.Answers, distances.Distances):
            monkeypatch.setattr(stage, "batch", 2)
            monkeypatch.setattr(stage, "figures", lambda self: {})
        monkeypatch.setattr(answers.Answers, "asked", 2)
        yield


def new_run(folder: Path, steps=(2, 2, 2, 2)) -> Stages:
    folder.mkdir(exist_ok=True)
    return pretrain.prepared(folder, steps, pictures=3)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Stages:
    """A run that nobody stopped."""
    run = new_run(tmp_path_factory.mktemp("run") / "whole")
    run.train(log_every=10)
    return run


@pytest.fixture(scope="module")
def processor(whole: Stages) -> IsaacProcessor:
    return IsaacProcessor.from_pretrained(whole.file.parent / "model")


@pytest.mark.parametrize("steps", [1, 3, 5, 7])
def test_a_stopped_run_goes_on_to_the_same_weights(tmp_path, monkeypatch, whole, steps) -> None:
    monkeypatch.setattr(stages, "SAVE_EVERY", -1)
    update, left = Stages._update, [steps]

    def stopping(self, stage):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return update(self, stage)

    with monkeypatch.context() as stopped:
        stopped.setattr(Stages, "_update", stopping)
        with pytest.raises(KeyboardInterrupt):
            new_run(tmp_path / "parts").train(log_every=10)
    second = new_run(tmp_path / "parts")
    assert (second.stage, second.step) == divmod(steps, 2)
    second.train(log_every=10)
    for name, module in whole.networks.items():
        found = second.networks[name].state_dict()
        assert all(torch.equal(found[key], value) for key, value in module.state_dict().items())


def test_every_stage_moves_the_weights_that_it_is_about(tmp_path, whole) -> None:
    fresh = new_run(tmp_path).networks
    for name, module in whole.networks.items():
        before, after = fresh[name].state_dict(), module.state_dict()
        moved = {key for key, value in after.items() if not torch.equal(value, before[key])}
        assert len(moved) > 0.9 * len(after) - 4, name  # mask tokens and the like never do


def test_another_length_does_not_go_on_with_the_stage(tmp_path) -> None:
    new_run(tmp_path)._save()
    with pytest.raises(SystemExit, match=r"--steps \[2, 2, 2, 2\]"):
        new_run(tmp_path, steps=(3, 2, 2, 2))
    assert new_run(tmp_path, steps=(2, 5, 2, 2)).step == 0


def test_the_result_are_two_folders_in_half_precision(tmp_path) -> None:
    run = new_run(tmp_path)
    before = {key: value.clone() for key, value in run.networks["isaac"].state_dict().items()}
    pretrain.write(run, tmp_path)
    model = official.load_model(tmp_path / "model")
    for key, value in model.state_dict().items():
        assert torch.equal(before[key].half().float(), value), key
    assert all(torch.equal(before[k], v) for k, v in run.networks["isaac"].state_dict().items())
    estimator = read_depth_estimator(tmp_path / "depth", 56)
    assert estimator.normalised(scene(0, RIBS).picture()).shape == (56, 56)


# -- rows ------------------------------------------------------------------------------------------


def test_questions_of_a_row_are_answered_as_each_alone(whole, processor) -> None:
    model = whole.networks["isaac"].eval()
    made = [scene((1, n), SIZES) for n in range(2)]
    patches = pool.patches_of(made, processor.rules)
    asked = [questions(one)[:4] for one in made]
    packer = rows.Rows(processor)
    batch = packer.batch(patches, asked)
    labels = batch.pop("labels")
    with torch.no_grad():
        together = model(**batch).logits
        sample = replace(packer.sample(asked[1][2]), patches=patches[1])
        one = collate_padded([sample], pad_id=0, pixel_shuffle_scale=2)
        alone = model(**{k: v for k, v in one.items() if k != "labels"}).logits[0]
    shared = int(sample.image_mask.nonzero().max()) + 1
    begin, length = shared + 2 * rows.ROOM, len(sample) - shared
    assert torch.allclose(together[1, begin : begin + length], alone[shared:], atol=1e-5)
    assert torch.equal(labels[1, begin : begin + length], sample.labels[shared:])
    assert int((labels != -100).sum()) == 2 * 4 * 2  # a word and the end token each


def test_accuracy_counts_answers_that_are_right_to_their_end(whole, processor) -> None:
    model = whole.networks["isaac"].eval()
    packer = rows.Rows(processor)
    made = [scene((2, n), SIZES) for n in range(2)]
    untrained = answers.accuracy(model, packer, made)
    assert set(untrained) == {"shape", "colour", "place", "nearest"}
    assert max(untrained.values()) < 1

    class Knows(torch.nn.Module):
        """Gives the labels that the batch had."""

        def forward(self, input_ids, **_):
            following = input_ids.roll(-1, dims=1)
            logits = torch.nn.functional.one_hot(following, model.vocab_size).float()
            return type("Output", (), {"logits": logits})

    assert set(answers.accuracy(Knows(), packer, made).values()) == {1.0}


# -- truth -----------------------------------------------------------------------------------------


def test_the_tower_is_told_what_lies_at_each_token() -> None:
    made = [scene((3, n), Style(True, False, (1, 3))) for n in range(20)]
    wanted = looks.truth(made)
    tokens = len(wanted["shape"]) // len(made)
    for number, one in enumerate(made):
        part = {
            name: values[number * tokens : (number + 1) * tokens] for name, values in wanted.items()
        }
        signs = part["shape"] != looks.NOTHING
        shapes = {looks.HEADS["shape"][index] for index in part["shape"][signs].tolist()}
        assert shapes == {box.shape for box in one.boxes}
        places = part["place"].reshape(4, 6)
        for column in range(6):
            here = {index for index in places[:, column].tolist() if index != looks.NOTHING}
            assert here <= {column // 2}
            if here:
                assert PLACES[column // 2] in {box.place for box in one.boxes}


def test_a_depth_map_orders_boxes_by_what_it_says() -> None:
    one = scene((4, 0), RIBS)
    depth = distances.truth([one])[0]
    assert depth.shape == (56, 56)
    assert distances.ordered(one, depth)
    assert not distances.ordered(one, 1 - depth)
    assert np.isclose(float(depth.max()), max(box.nearness for box in one.boxes), atol=0.02)
