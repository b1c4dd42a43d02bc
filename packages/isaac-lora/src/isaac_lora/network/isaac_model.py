"""The tower, the projector and Qwen3's decoder: sequences of text and images to hidden states."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3Attention,
    Qwen3DecoderLayer,
    Qwen3RMSNorm,
)
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from isaac_lora.network.configuration import IsaacConfig
from isaac_lora.network.positions import document_positions, mrope_position_ids, rotary_cos_sin
from isaac_lora.network.vision import IsaacVisionTransformer
from lora_core.errors import ConfigError, DataError
from lora_core.report import plural


class IsaacPreTrainedModel(PreTrainedModel):
    """What transformers must know about Isaac's modules."""

    config: IsaacConfig
    config_class = IsaacConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["Qwen3DecoderLayer", "IsaacVisionEncoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": Qwen3DecoderLayer,
        "attentions": Qwen3Attention,
    }


class IsaacModel(IsaacPreTrainedModel):
    """The decoder with its images, without the head."""

    def __init__(self, config: IsaacConfig) -> None:
        super().__init__(config)
        vision: Any = config.vision_config  # the configuration has made it an IsaacVisionConfig
        shuffled = vision.hidden_size * config.pixel_shuffle_scale**2
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        # A Sequential for the key names; its parts are called one by one.
        self.vision_embedding = nn.Sequential(
            IsaacVisionTransformer(vision),
            nn.Linear(shuffled, 4 * shuffled, bias=False),
            nn.SiLU(),
            nn.Linear(4 * shuffled, config.hidden_size, bias=False),
        )
        self.layers = nn.ModuleList(
            Qwen3DecoderLayer(config, index) for index in range(config.num_hidden_layers)
        )
        self.norm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def get_vision_features(self, patches: Tensor, grids: Tensor) -> Tensor:
        """Run the tower: (sum N, 3 p^2) patches, uint8 or normalised, to (sum N / r^2, r^2 V).

        A frozen tower runs without gradients; its result depends on the image alone and can be
        kept and given to `forward` as `vision_features`.
        """
        tower = self.vision_embedding[0]
        trained = patches.requires_grad or any(p.requires_grad for p in tower.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and trained):
            return tower(patches, grids)

    def get_image_features(
        self,
        patches: Tensor | None = None,
        grids: Tensor | None = None,
        vision_features: Tensor | None = None,
        depth_encoding: Tensor | None = None,
    ) -> Tensor:
        """Give the tokens of all images, (sum N / r^2, C).

        Args:
            patches, grids: as `get_vision_features`; not needed with `vision_features`.
            vision_features: (sum N / r^2, r^2 V), what the tower has made.
            depth_encoding: (sum N / r^2, C), added to the projector's output in its dtype.

        Raises:
            DataError: neither patches with grids nor features; a depth encoding of another shape.
        """
        if vision_features is None:
            if patches is None or grids is None:
                raise DataError("images need `patches` and `grids`, or `vision_features`")
            vision_features = self.get_vision_features(patches, grids)
        tokens = self._projected(vision_features)
        if depth_encoding is None:
            return tokens
        if depth_encoding.shape != tokens.shape:
            raise DataError(
                f"depth_encoding has the shape {tuple(depth_encoding.shape)}, but the images have "
                f"{tuple(tokens.shape)} (tokens after the pixel shuffle, hidden size)"
            )
        return tokens + depth_encoding.to(tokens)

    def _projected(self, vision_features: Tensor) -> Tensor:
        _, wide, activation, narrow = self.vision_embedding
        return narrow(activation(wide(vision_features)))

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        image_mask: Tensor | None = None,
        patches: Tensor | None = None,
        grids: Tensor | None = None,
        vision_features: Tensor | None = None,
        depth_encoding: Tensor | None = None,
        document_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Run the decoder; arguments as in `IsaacForConditionalGeneration.forward`."""
        if (input_ids is None) == (inputs_embeds is None):
            raise DataError("give either input_ids or inputs_embeds")
        if document_ids is not None:
            use_cache = _no_cache(past_key_values)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        hidden_states: Any = inputs_embeds  # Any: one of the two is there
        if input_ids is not None:
            hidden_states = self.embed_tokens(input_ids)
        if input_ids is not None or patches is not None or vision_features is not None:
            hidden_states = self._with_images(
                hidden_states, image_mask, patches, grids, vision_features, depth_encoding
            )
        if position_ids is None:
            position_ids = self._prompt_positions(
                hidden_states, image_mask, grids, attention_mask, document_ids, past_key_values
            )
        rope: Any = self.config.rope_parameters
        cos_sin = rotary_cos_sin(
            _three_axes(position_ids, image_mask),
            image_mask,
            self.config.head_dim,
            rope["rope_theta"],
            hidden_states.dtype,
        )
        mask, in_document = self._causal_mask(
            hidden_states, _of_full_attention(attention_mask), past_key_values, document_ids
        )
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                attention_mask=mask,
                position_ids=in_document,
                past_key_values=past_key_values,
                use_cache=use_cache,
                position_embeddings=cos_sin,
                **kwargs,
            )
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states),
            past_key_values=past_key_values if use_cache else None,
        )

    def _with_images(
        self,
        inputs_embeds: Tensor,
        image_mask: Tensor | None,
        patches: Tensor | None,
        grids: Tensor | None,
        vision_features: Tensor | None,
        depth_encoding: Tensor | None,
    ) -> Tensor:
        """Put the tokens of the images at their places of `inputs_embeds`, (B, L, C)."""
        first = vision_features if vision_features is not None else patches
        if first is None or len(first) == 0:
            return self._without_images(inputs_embeds, image_mask)
        if image_mask is None:
            raise DataError("images need `image_mask`, which says where their tokens stand")
        if self.config.use_depth and depth_encoding is None:
            raise DataError(
                "the model's configuration has use_depth, but these images came without depth: "
                "load it with from_pretrained(..., use_depth=True, depth_checkpoint_path=...) and "
                "give it `pictures`, or give `depth_encoding`; to go without depth, use_depth=False"
            )
        tokens = self.get_image_features(patches, grids, vision_features, depth_encoding)
        places = int(image_mask.sum())
        if places != len(tokens):
            raise DataError(
                f"image_mask has {plural(places, 'image place')}, but the images give "
                f"{plural(len(tokens), 'token')}"
            )
        return inputs_embeds.masked_scatter(
            image_mask.bool()[..., None], tokens.to(inputs_embeds.dtype)
        )

    def _without_images(self, inputs_embeds: Tensor, image_mask: Tensor | None) -> Tensor:
        """Give `inputs_embeds`; in training with a share of zero from what is trained of vision.

        Processes that train together wait for the gradients of all trained weights. One whose
        batch has no image would never send the projector's and the tower's.
        """
        if image_mask is not None and bool(image_mask.any()):
            raise DataError("image_mask has image places, but no images came with it")
        trained = any(p.requires_grad for p in self.vision_embedding.parameters())
        if not (self.training and torch.is_grad_enabled() and trained):
            return inputs_embeds
        return inputs_embeds + 0.0 * self._projected(self._no_features(inputs_embeds)).sum()

    def _no_features(self, like: Tensor) -> Tensor:
        """Features of a picture of zeros: from the tower if it is trained, else themselves zero."""
        parts: Any = self.vision_embedding
        tower, wide = parts[0], parts[1]
        if not any(p.requires_grad for p in tower.parameters()):
            return like.new_zeros(1, wide.in_features)
        side, patch = self.config.pixel_shuffle_scale, tower.config.patch_size
        grids = torch.tensor([[side, side]], device=like.device)
        return self.get_vision_features(like.new_zeros(side * side, 3 * patch * patch), grids)

    def _prompt_positions(
        self,
        hidden_states: Tensor,
        image_mask: Tensor | None,
        grids: Tensor | None,
        attention_mask: Tensor | None,
        document_ids: Tensor | None,
        past_key_values: Cache | None,
    ) -> Tensor:
        """Give the (B, L, 3) positions of sequences that begin here."""
        if past_key_values is not None and past_key_values.get_seq_length() > 0:
            raise DataError(
                "position_ids are needed with past_key_values: an image takes many places and one "
                "step of time, so the places before do not tell the time"
            )
        if image_mask is None:
            image_mask = torch.zeros(hidden_states.shape[:2], dtype=torch.bool)
            image_mask = image_mask.to(hidden_states.device)
        if attention_mask is not None and attention_mask.ndim != 2:
            attention_mask = None
        return mrope_position_ids(
            image_mask, grids, self.config.pixel_shuffle_scale, attention_mask, document_ids
        )

    def _causal_mask(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        past_key_values: Cache | None,
        document_ids: Tensor | None,
    ) -> tuple[Any, Tensor | None]:
        """Give the mask of the decoder and, for packed rows, places counted in each document."""
        in_document = None
        if document_ids is not None:
            in_document = document_positions(_own_padding(document_ids, attention_mask))
            attention_mask = None  # else transformers would not look for documents
            if len(document_ids) > 1 and "flash" in str(self.config._attn_implementation):
                raise ConfigError(
                    f"flash attention takes packed samples in one row, not in {len(document_ids)}; "
                    "use a batch of one packed row, or attn_implementation='sdpa'"
                )
        elif past_key_values is None and _padded_on_the_right(attention_mask):
            # Real places never look to the right, so the mask of (L, L) for each row is not needed.
            attention_mask = None
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=hidden_states,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=in_document,
        )
        return mask, in_document


def _no_cache(past_key_values: Cache | None) -> bool:
    """Packed samples end where they end: there is nothing to keep for a next token."""
    if past_key_values is not None:
        raise DataError("packed rows (document_ids) are for training and take no past_key_values")
    return False


def _padded_on_the_right(attention_mask: Any) -> bool:
    if attention_mask is None or attention_mask.ndim != 2:
        return False
    return bool((attention_mask[:, 1:] <= attention_mask[:, :-1]).all())


def _of_full_attention(attention_mask: Any) -> Any:
    """`generate` makes a mask for each kind of layer where it compiles; Isaac has one kind."""
    return attention_mask["full_attention"] if isinstance(attention_mask, dict) else attention_mask


def _three_axes(position_ids: Tensor, image_mask: Tensor | None) -> Tensor:
    """Take (B, L, 3) positions as they are, and (B, L) ones of text as times."""
    if position_ids.ndim == 3 and position_ids.shape[-1] == 3:
        return position_ids
    if position_ids.ndim != 2 or image_mask is not None:
        raise DataError(
            f"position_ids have the shape {tuple(position_ids.shape)}; with images they must be "
            "(batch, length, 3): time, row, column. Leave them out to have them made"
        )
    return position_ids[..., None].expand(-1, -1, 3)


def _own_padding(document_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Make padding a document of its own, so that no sample sees it."""
    if attention_mask is None:
        return document_ids
    return document_ids.masked_fill(~attention_mask.bool(), -1)
