"""What `generate` must know about Isaac: three-axis positions, and images without a batch axis.

A new token's time is the last token's time + 1, as training has placed answers; rows and columns
of images never count. (Taking the greatest value of all three axes puts an answer behind a large
image at places that training never used, and other words come out.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin

from isaac_lora.network.positions import mrope_position_ids
from lora_core.errors import DataError

IMAGE_INPUTS = ("patches", "grids", "vision_features", "depth_encoding")


class IsaacGenerationMixin(GenerationMixin):
    """GenerationMixin with three-axis positions; prompts of several lengths are padded left.

    Inside `generate` positions are (3, B, L), as transformers extends and cuts them; users give,
    and the network takes, (B, L, 3). What is added to rows and columns there has no effect: text
    is rotated by its time alone.
    """

    # (depth_encoding, pictures, grids) -> depth encoding of the prompt's images: the model's.
    _depth_encoding: Callable[..., Tensor | None]

    def _prepare_position_ids_for_generation(
        self, inputs_tensor: Tensor, model_kwargs: dict[str, Any]
    ) -> Tensor:
        image_mask, cache = model_kwargs.get("image_mask"), model_kwargs.get("past_key_values")
        if cache is not None and cache.get_seq_length() > 0:
            raise DataError(
                "to go on from past_key_values give position_ids (batch, all places, 3): an image "
                "before takes many places and one step of time; or give the whole conversation"
            )
        if image_mask is None:
            return super()._prepare_position_ids_for_generation(inputs_tensor, model_kwargs)
        scale, mask = self.config.pixel_shuffle_scale, model_kwargs.get("attention_mask")
        return mrope_position_ids(image_mask, model_kwargs.get("grids"), scale, mask)

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[Tensor | None, dict[str, Any]]:
        if (positions := model_kwargs.get("position_ids")) is not None:
            rows = len(model_kwargs["inputs_embeds"] if input_ids is None else input_ids)
            model_kwargs["position_ids"] = _axes_first(positions, rows)
        images = {name: model_kwargs.pop(name, None) for name in IMAGE_INPUTS}
        images["depth_encoding"] = self._depth_encoding(
            images["depth_encoding"], model_kwargs.pop("pictures", None), images["grids"]
        )
        image_mask = model_kwargs.get("image_mask")
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        if image_mask is not None and images["grids"] is not None:
            if expand_size > 1:
                scale = self.config.pixel_shuffle_scale
                images = expanded_images(images, image_mask, expand_size, scale)
            model_kwargs.update(images)
        return input_ids, model_kwargs

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        inputs_embeds: Tensor | None = None,  # named, as transformers asks whether it is
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Give the inputs of one step; the images go in with the prompt only."""
        images = {name: kwargs.pop(name, None) for name in IMAGE_INPUTS}
        image_mask = kwargs.pop("image_mask", None)
        inputs = super().prepare_inputs_for_generation(
            input_ids,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        places = inputs.get("position_ids")
        if places is not None:
            inputs["position_ids"] = places.movedim(0, -1)
        if is_first_iteration:
            _check_padding(kwargs.get("attention_mask"))
        begins = is_first_iteration or not kwargs.get("use_cache", True)
        if begins and image_mask is not None and images["grids"] is not None:
            ready = inputs.get("inputs_embeds")
            length = (ready if ready is not None else inputs["input_ids"]).shape[1]
            inputs["image_mask"] = _over_all(image_mask, length)
            inputs.update({name: value for name, value in images.items() if value is not None})
        return inputs


def _axes_first(position_ids: Tensor, rows: int) -> Tensor:
    """Bring (B, L, 3) positions, or (B, L) of text, to (3, B, L)."""
    if position_ids.ndim == 2:
        return position_ids.expand(3, rows, -1)
    return position_ids.movedim(-1, 0)


def _over_all(image_mask: Tensor, length: int) -> Tensor:
    """Extend the prompt's (B, L) mask over the text that came after it."""
    new = length - image_mask.shape[1]
    if new < 0:
        raise DataError(
            f"the images of a prompt of {image_mask.shape[1]} places cannot go in with {length} "
            "of them; generate with images takes the whole prompt at once: no prefill_chunk_size, "
            "and no past_key_values from before"
        )
    return torch.cat([image_mask, image_mask.new_zeros(len(image_mask), new)], dim=1)


def _check_padding(attention_mask: Tensor | None) -> None:
    if attention_mask is None or attention_mask.ndim != 2:
        return
    rows = (attention_mask[:, -1] == 0).nonzero().flatten().tolist()
    if rows:
        raise DataError(
            f"the prompts of rows {rows} are padded on the right, so their answers would begin "
            "behind padding; pad on the left (padding_side='left') to generate"
        )


def expanded_images(
    images: dict[str, Tensor | None], image_mask: Tensor, expand_size: int, scale: int
) -> dict[str, Tensor | None]:
    """Repeat each row's images `expand_size` times, for beams and several answers to a prompt.

    Args:
        images: `grids` (images, 2) and any of the other image inputs, whose first axes run over
            patches or tokens of all images.
        image_mask: (B, L), before the expansion.
        expand_size: copies of every row, which stand one after the other.
        scale: the pixel shuffle's.
    """
    grids = images["grids"]
    assert grids is not None
    tokens = (grids.long() // scale).prod(-1)
    places = image_mask.flatten().nonzero().squeeze(-1)
    first = (tokens.cumsum(0) - tokens).to(places.device)
    row_of_image = (places[first] // image_mask.shape[1]).tolist()
    order = [
        image
        for row in range(len(image_mask))
        for _ in range(expand_size)
        for image in range(len(grids))
        if row_of_image[image] == row
    ]
    sizes = {"grids": [1] * len(grids), "patches": grids.prod(-1).tolist()}
    return {
        name: None if value is None else _rearranged(value, sizes.get(name, tokens.tolist()), order)
        for name, value in images.items()
    }


def _rearranged(values: Tensor, sizes: list[int], order: list[int]) -> Tensor:
    parts = values.split(sizes)
    return torch.cat([parts[image] for image in order])
