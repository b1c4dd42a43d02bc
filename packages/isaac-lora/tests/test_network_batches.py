"""Rows of a batch do not see each other, however they are put together."""

from typing import Any

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from recorded_isaac import (
    CASE,
    PAD,
    SAMPLES,
    WITH_IMAGES,
    images_of,
    packed,
    padded,
    recorded_model,
    sample,
    slices,
)
from torch import Tensor

from isaac_lora.network.isaac import IsaacForConditionalGeneration
from lora_core.errors import CheckpointError, ConfigError, DataError

EXACT: dict[str, Any] = {"rtol": 0.0, "atol": 1e-5}


@pytest.fixture(scope="module")
def model() -> IsaacForConditionalGeneration:
    return recorded_model()


def batch_of(form: str) -> dict[str, Any]:
    return packed(SAMPLES) if form == "packed" else padded(SAMPLES, form)


def new_tokens(model: IsaacForConditionalGeneration, **inputs: Any) -> Tensor:
    length = inputs["input_ids"].shape[1]
    settings: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    return model.generate(**(settings | inputs), pad_token_id=PAD)[:, length:]


@pytest.mark.fault("C30")
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("form", ["left", "right", "packed"])
@torch.no_grad()
def test_padded_and_packed_samples_have_the_logits_of_single_ones(
    form: str, attention: str
) -> None:
    model = recorded_model()
    model.set_attn_implementation(attention)
    logits = model(**batch_of(form), logits_to_keep=0).logits
    for name, (row, places) in zip(SAMPLES, slices(SAMPLES, form), strict=True):
        torch.testing.assert_close(logits[row, places], CASE.io[f"{name}.logits"][0], **EXACT)


@pytest.mark.fault("C30")
@pytest.mark.parametrize("form", ["left", "right", "packed"])
def test_gradients_of_a_batch_are_the_sum_of_single_ones(form: str) -> None:
    alone, together = recorded_model(), recorded_model()
    for name in SAMPLES:
        labels = CASE.io[f"{name}.labels"]
        alone(**sample(name), labels=labels, num_items_in_batch=1).loss.backward()
    together(**batch_of(form), num_items_in_batch=1).loss.backward()
    for (name, one), other in zip(alone.named_parameters(), together.parameters(), strict=True):
        assert one.grad is not None
        scale = one.grad.abs().max().item()
        error = (one.grad - other.grad).abs().max().item()
        assert error <= 1e-5 * scale + 1e-6, name


@torch.no_grad()
def test_what_stands_at_padding_and_at_image_places_is_never_read(
    model: IsaacForConditionalGeneration,
) -> None:
    for form in ("left", "right", "packed"):
        batch = batch_of(form)
        expected = model(**batch).loss
        real = batch.get("attention_mask", batch.get("document_ids", -1) + 1) > 0
        unread = batch["image_mask"] | ~real
        other = batch | {"input_ids": batch["input_ids"].masked_fill(unread, 7)}
        assert torch.equal(model(**other).loss, expected)


@torch.no_grad()
def test_padding_on_the_right_takes_no_mask_of_length_squared(
    model: IsaacForConditionalGeneration, monkeypatch: pytest.MonkeyPatch
) -> None:
    masks: list[Any] = []
    attend = F.scaled_dot_product_attention

    def watched(*qkv: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
        masks.append(attn_mask)
        return attend(*qkv, attn_mask=attn_mask, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    model(**padded(SAMPLES, "right"))
    assert len(masks) > 2
    assert all(mask is None for mask in masks)
    model(**padded(SAMPLES, "left"))
    assert any(mask is not None for mask in masks)


@torch.no_grad()
def test_user_text_may_contain_the_token_of_image_places(
    model: IsaacForConditionalGeneration,
) -> None:
    inputs = sample("image1")
    place_token = inputs["input_ids"][inputs["image_mask"]][0]
    text = torch.cat([inputs["input_ids"], place_token.view(1, 1)], dim=1)
    mask = torch.cat([inputs["image_mask"], torch.zeros(1, 1).bool()], dim=1)
    longer = model(**inputs | {"input_ids": text, "image_mask": mask}).logits
    torch.testing.assert_close(longer[:, :-1], CASE.io["image1.logits"], **EXACT)


def test_left_padded_prompts_get_the_answers_of_single_ones(
    model: IsaacForConditionalGeneration,
) -> None:
    names = (*WITH_IMAGES, "text")
    batch = padded(names, "left")
    del batch["labels"]
    together = new_tokens(model, **batch)
    for row, name in enumerate(names):
        assert torch.equal(together[row : row + 1], new_tokens(model, **sample(name)))


def test_answers_are_the_same_with_and_without_kept_keys(
    model: IsaacForConditionalGeneration,
) -> None:
    batch = padded(WITH_IMAGES, "left")
    del batch["labels"]
    assert torch.equal(new_tokens(model, **batch), new_tokens(model, **batch, use_cache=False))


def test_beams_and_several_answers_keep_each_prompts_own_images(
    model: IsaacForConditionalGeneration,
) -> None:
    batch = padded(("image2", "text", "image1"), "left")
    del batch["labels"]
    several: dict[str, Any] = {"num_beams": 3, "num_return_sequences": 2}
    together = new_tokens(model, **batch, **several)
    for row, name in enumerate(("image2", "text", "image1")):
        alone = new_tokens(model, **sample(name), **several)
        assert torch.equal(together[2 * row : 2 * row + 2], alone)


def test_sampled_answers_depend_on_the_seed_only(model: IsaacForConditionalGeneration) -> None:
    def answer(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return new_tokens(model, **sample("image1"), do_sample=True, num_return_sequences=4)

    assert torch.equal(answer(1), answer(1))
    assert not torch.equal(answer(1), answer(2))


@pytest.mark.parametrize(
    "way", [{"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 2}], ids=str
)
@pytest.mark.parametrize("name", WITH_IMAGES)
def test_other_ways_to_generate_give_the_same_answer(
    model: IsaacForConditionalGeneration, name: str, way: dict[str, Any]
) -> None:
    tokens = new_tokens(model, **sample(name), **way)
    assert torch.equal(tokens[0], CASE.io[f"{name}.greedy_time_axis.tokens"])


def test_a_prompt_with_images_is_not_taken_in_parts(model: IsaacForConditionalGeneration) -> None:
    with pytest.raises(DataError, match="no prefill_chunk_size"):
        new_tokens(model, **sample("image1"), prefill_chunk_size=4)
    in_parts = new_tokens(model, **sample("text"), prefill_chunk_size=4)
    assert torch.equal(in_parts, new_tokens(model, **sample("text")))


def test_a_conversation_goes_on_from_kept_keys_with_its_positions_only(
    model: IsaacForConditionalGeneration,
) -> None:
    inputs, name = sample("image1"), "image1"
    with torch.no_grad():
        kept = model(**inputs, use_cache=True).past_key_values
    first = CASE.io[f"{name}.greedy_time_axis.tokens"][:1]
    ids = torch.cat([inputs["input_ids"], first[None]], dim=1)
    with pytest.raises(DataError, match="to go on from past_key_values give position_ids"):
        new_tokens(model, input_ids=ids, past_key_values=kept)
    end = torch.tensor([[[CASE.io[f"{name}.next_time_position"].item(), 0, 0]]])
    positions = torch.cat([CASE.io[f"{name}.position_ids"], end], dim=1)
    tokens = new_tokens(
        model, input_ids=ids, past_key_values=kept, position_ids=positions, max_new_tokens=4
    )
    assert torch.equal(tokens[0], CASE.io[f"{name}.greedy_time_axis.tokens"][1:])


def test_generation_stops_at_the_end_token(model: IsaacForConditionalGeneration) -> None:
    third = CASE.io["image1.greedy_time_axis.tokens"][2].item()
    tokens = new_tokens(model, **sample("image1"), eos_token_id=third)
    assert tokens[0].tolist() == CASE.io["image1.greedy_time_axis.tokens"][:3].tolist()


def test_generation_takes_embeddings_of_a_prompt(model: IsaacForConditionalGeneration) -> None:
    inputs = sample("image1")
    ready = {
        "inputs_embeds": CASE.io["image1.inputs_embeds"],
        "image_mask": inputs["image_mask"],
        "grids": inputs["grids"],
    }
    tokens = model.generate(**ready, max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert torch.equal(tokens[0], CASE.io["image1.greedy_time_axis.tokens"])


def test_prompts_padded_on_the_right_are_refused(model: IsaacForConditionalGeneration) -> None:
    batch = padded(("text", "image1"), "right")
    del batch["labels"]
    with pytest.raises(DataError, match=r"rows \[0\] are padded on the right.*padding_side='left'"):
        new_tokens(model, **batch)


@torch.no_grad()
def test_kept_tower_features_give_the_same_loss(model: IsaacForConditionalGeneration) -> None:
    batch = padded(SAMPLES, "right")
    features = model.model.get_vision_features(batch["patches"], batch["grids"])
    kept = {name: value for name, value in batch.items() if name != "patches"}
    assert torch.equal(model(**kept, vision_features=features).loss, model(**batch).loss)


def test_a_frozen_tower_keeps_nothing_for_a_gradient() -> None:
    model = recorded_model()
    images = images_of(WITH_IMAGES)
    assert model.model.get_vision_features(**images).requires_grad
    model.model.vision_embedding[0].requires_grad_(False)
    assert not model.model.get_vision_features(**images).requires_grad
    model(**sample("image1"), labels=CASE.io["image1.labels"]).loss.backward()
    assert model.model.vision_embedding[1].weight.grad.abs().sum() > 0


@torch.no_grad()
def test_a_depth_encoding_is_added_to_the_tokens_of_the_images(
    model: IsaacForConditionalGeneration,
) -> None:
    tokens = CASE.io["image1.projector"]
    depth = torch.linspace(-1, 1, tokens.numel(), dtype=torch.float64).view_as(tokens)
    images = images_of(("image1",))
    fused = model.model.get_image_features(**images, depth_encoding=depth)
    torch.testing.assert_close(fused, tokens + depth.float(), **EXACT)
    zero = model(**sample("image1"), depth_encoding=torch.zeros_like(tokens)).logits
    torch.testing.assert_close(zero, CASE.io["image1.logits"], **EXACT)
    moved = model(**sample("image1"), depth_encoding=depth).logits
    assert (moved - zero).abs().max() > 0.01
    with pytest.raises(DataError, match="depth_encoding has the shape"):
        model(**sample("image1"), depth_encoding=depth.repeat(4, 1))


def test_a_batch_without_images_gives_the_projector_gradients_of_zero() -> None:
    model = recorded_model().train()
    empty = {"patches": torch.zeros(0, 48), "grids": torch.zeros(0, 2, dtype=torch.long)}
    for images in ({}, empty):
        model.zero_grad()
        model(**sample("text"), **images, labels=CASE.io["text.labels"]).loss.backward()
        for index in (1, 3):
            gradient = model.model.vision_embedding[index].weight.grad
            assert gradient is not None
            assert not gradient.any()


@pytest.mark.fault("C42")
@pytest.mark.parametrize("frozen", [False, True])
def test_checkpointed_steps_have_the_same_gradients(frozen: bool) -> None:
    gradients = []
    for checkpointed in (False, True):
        model = recorded_model().train()
        model.model.vision_embedding[0].requires_grad_(not frozen)
        model.model.embed_tokens.requires_grad_(not frozen)
        if checkpointed:
            model.activation_checkpointing_enable()
            assert model.model.vision_embedding[0].encoder.layers[0].gradient_checkpointing
        model(**padded(SAMPLES, "right")).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert len(gradients[0]) > 10
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


@torch.no_grad()
def test_a_model_in_bfloat16_runs_and_stays_near(model: IsaacForConditionalGeneration) -> None:
    half = recorded_model().to(torch.bfloat16)
    loss = half(**padded(SAMPLES, "right")).loss
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(model(**padded(SAMPLES, "right")).loss.item(), rel=0.02)


def test_images_and_places_that_do_not_fit_are_refused(
    model: IsaacForConditionalGeneration,
) -> None:
    inputs = sample("image1")
    mask = inputs["image_mask"]
    fewer = mask.clone()
    fewer[0, mask[0].nonzero()[0]] = False
    split = mask.roll(-1).clone()
    split[0, mask[0].nonzero()[0]] = False
    split[0, -1] = True
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"image_mask": fewer}, "image places, but the images"),
        ({"image_mask": split}, "interrupted by text"),
        ({"image_mask": None}, "images need `image_mask`"),
        ({"patches": None, "grids": None}, "no images came with it"),
        ({"grids": inputs["grids"] * 2}, "`grids` is of 1 image with 192"),
        ({"grids": torch.tensor([[len(inputs["patches"]), 1]])}, "cannot be shuffled by 2"),
        ({"position_ids": torch.arange(mask.shape[1])[None]}, r"must be \(batch, length, 3\)"),
        ({"labels": torch.zeros(1, 3).long()}, "one label for every token"),
        ({"inputs_embeds": CASE.io["image1.inputs_embeds"]}, "either input_ids or inputs_embeds"),
    ]
    for change, message in wrong:
        with pytest.raises(DataError, match=message):
            model(**inputs | change)


def test_places_behind_kept_keys_need_their_positions(
    model: IsaacForConditionalGeneration,
) -> None:
    with torch.no_grad():
        kept = model(**sample("image1"), use_cache=True).past_key_values
    with pytest.raises(DataError, match="position_ids are needed with past_key_values"):
        model(input_ids=torch.ones(1, 1).long(), past_key_values=kept)


def test_packed_rows_take_no_kept_keys_and_one_row_with_flash_attention() -> None:
    model = recorded_model()
    batch = packed(SAMPLES)
    assert model(**batch, use_cache=True).past_key_values is None
    model.config._attn_implementation = "flash_attention_2"
    two = {name: batch[name].repeat(2, 1) for name in ("input_ids", "document_ids")}
    with pytest.raises(ConfigError, match="packed samples in one row, not in 2"):
        model(**two)


def test_a_model_is_the_same_after_saving_and_loading(
    model: IsaacForConditionalGeneration, tmp_path: Any
) -> None:
    model.save_pretrained(tmp_path)
    again = IsaacForConditionalGeneration.from_pretrained(tmp_path)
    assert not again.training
    assert again.config.video_patch_size == 4
    assert set(again.state_dict()) == set(CASE.weights)
    with torch.no_grad():
        assert torch.equal(again(**sample("image1")).logits, model(**sample("image1")).logits)


def changed_folder(folder: Any, change: Any) -> Any:
    recorded_model().save_pretrained(folder)
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    change(tensors)
    safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_tensors_that_are_missing_or_left_over_are_refused_with_their_names(
    tmp_path: Any,
) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.1.self_attn.q_projection.weight"] = tensors.pop(
            "model.layers.1.self_attn.q_proj.weight"
        )

    folder = changed_folder(tmp_path, change)
    told = r"1 missing: model\.layers\.1\.self_attn\.q_proj\.weight; 1 left over: .*q_projection"
    with pytest.raises(CheckpointError, match=told):
        IsaacForConditionalGeneration.from_pretrained(folder)


def test_a_depth_model_among_the_tensors_is_passed_over(tmp_path: Any) -> None:
    name = "model.depth_model.pretrained.cls_token"
    folder = changed_folder(tmp_path, lambda tensors: tensors.update({name: torch.zeros(2)}))
    model, info = IsaacForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert info["unexpected_keys"] == {name}
    assert set(model.state_dict()) == set(CASE.weights)
