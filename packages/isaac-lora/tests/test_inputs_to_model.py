"""Processor and batches in front of the recorded model: its answers and its loss."""

import json
from typing import Any

import pytest
import torch
from isaac_texts import small_tokenizer
from recorded_isaac import CASE, GOLDENS, PAD, SAMPLES, WITH_IMAGES, labels_of, recorded_model

from isaac_lora.batches import collate_packed, collate_padded, num_label_tokens
from isaac_lora.conversations.samples import Sample
from isaac_lora.processing import IsaacProcessor

TEXTS = json.loads((GOLDENS / "model/samples.json").read_text())


def processor() -> IsaacProcessor:
    return IsaacProcessor(small_tokenizer(), patch_size=4, max_num_patches=64, min_num_patches=16)


def inputs_of(*names: str) -> Any:
    pictures = [CASE.io[f"images.{k}"].numpy() for name in names for k in TEXTS[name]["images"]]
    return processor()([TEXTS[name]["text"] for name in names], pictures)


def sample(name: str) -> Sample:
    made = inputs_of(name)
    grids = made.get("grids", torch.empty(0, 2, dtype=torch.int64))
    patches = made.get("patches", torch.empty(0, 48))
    return Sample(made["input_ids"][0], labels_of(name)[0], made["image_mask"][0], grids, patches)


def test_a_batch_of_questions_gets_the_recorded_answers() -> None:
    inputs = inputs_of(*SAMPLES)
    with torch.no_grad():
        out = recorded_model().generate(
            **inputs, max_new_tokens=5, do_sample=False, eos_token_id=None
        )
    answers = dict(zip(SAMPLES, out[:, inputs["input_ids"].shape[1] :], strict=True))
    for name in WITH_IMAGES:
        assert torch.equal(answers[name], CASE.io[f"{name}.greedy_time_axis.tokens"])


@pytest.mark.parametrize("form", ["right", "left", "packed"])
def test_a_batch_of_samples_has_the_recorded_loss(form: Any) -> None:
    samples = [sample(name) for name in SAMPLES]
    if form == "packed":
        batch = collate_packed(samples, pixel_shuffle_scale=2)
    else:
        batch = collate_padded(samples, pad_id=PAD, pixel_shuffle_scale=2, padding_side=form)
    assert num_label_tokens(batch) == int(CASE.io["batch.num_label_tokens"])
    with torch.no_grad():
        loss = recorded_model()(**batch).loss
    assert abs(float(loss) - float(CASE.io["batch.loss_token_mean"])) < 1e-5
