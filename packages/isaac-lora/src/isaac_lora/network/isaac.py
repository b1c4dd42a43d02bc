"""Isaac: a vision tower and a projector in front of Qwen3's decoder, with Isaac-0.1's key names.

    patches -> tower (attention inside an image) -> pixel shuffle -> Linear, SiLU, Linear
            -> + depth encoding -> the image places of the sequence -> decoder -> lm_head

Images are causal like text. Inputs of a batch, for any number of images in any row:

    input_ids (B, L), image_mask (B, L), grids (images, 2), patches (sum N, 3 p^2)

with the images in the order of their places, batch row after batch row.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from isaac_lora.depth.depth_cache import DepthGrids
from isaac_lora.depth.settings import DepthSettings, write_depth_settings
from isaac_lora.json_words import in_json
from isaac_lora.network.configuration import IsaacConfig
from isaac_lora.network.depth_input import (
    check_folder,
    encoding_of_pictures,
    local_folder,
    planned_depth,
    read_depth,
)
from isaac_lora.network.generation import IsaacGenerationMixin
from isaac_lora.network.isaac_model import IsaacModel as IsaacModel
from isaac_lora.network.isaac_model import IsaacPreTrainedModel
from isaac_lora.network.token_loss import token_loss
from lora_core.base_file import read_settings, some
from lora_core.errors import CheckpointError, DataError

ADAPTER_SETTINGS = "adapter_config.json"
ITS_DEPTH = "model.depth_model."


def _refuse_misfit(place: str, info: dict[str, Any]) -> None:
    """Refuse a folder whose tensors are not those of its configuration.

    The original's depth model may be among them; it is read from its own checkpoint.
    """
    missing = sorted(info["missing_keys"])
    extra = sorted(name for name in info["unexpected_keys"] if not name.startswith(ITS_DEPTH))
    problems = [f"{len(missing)} missing: {some(missing)}"] if missing else []
    problems += [f"{len(extra)} left over: {some(extra)}"] if extra else []
    if problems:
        raise CheckpointError(
            f"{place}: the tensors are not those of an Isaac with this config.json: "
            f"{'; '.join(problems)}. Copy the folder again, or give the one that was meant"
        )


def _refuse_other_base(folder: Path) -> None:
    """Refuse the folder of an adapter whose base is not on this disk.

    transformers loads what `adapter_config.json` names, from the network too: nobody asked for it.
    """
    if os.path.exists(folder / "config.json") or not os.path.isfile(folder / ADAPTER_SETTINGS):
        return
    base = read_settings(folder / ADAPTER_SETTINGS).get("base_model_name_or_path")
    if not (isinstance(base, str) and os.path.isdir(base)):
        raise CheckpointError(
            f"{folder} is the folder of an adapter, whose base ({ADAPTER_SETTINGS}: "
            f"{in_json(base)}) is no folder on this disk, and nothing is fetched: load the base "
            "with from_pretrained, and the adapter with its load_adapter"
        )


class IsaacForConditionalGeneration(IsaacPreTrainedModel, IsaacGenerationMixin):
    """Isaac with its head: answers about images, and the loss to train it."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    depth: DepthGrids | None = None  # where the model was loaded with depth; no part of its state

    def __init__(self, config: IsaacConfig) -> None:
        super().__init__(config)
        self.model = IsaacModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_pretrained(
        cls,
        *args: Any,
        use_depth: bool | None = None,
        depth_checkpoint_path: str | Path | None = None,
        depth_alpha: float | None = None,
        depth_input_size: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Load a model folder as transformers does, strictly, and with `use_depth` a depth model.

        What is left out of the arguments below is as in `depth.json`, where the folder is that of
        an adapter that was trained with depth, and else as in `config.json`.

        Args:
            use_depth: add depth to the images.
            depth_checkpoint_path: a `.pth` file of Depth Anything V2, or a transformers folder.
            depth_alpha: scale of the depth, which lies in 0..1 before.
            depth_input_size: side of the square that the depth model sees, a multiple of 14.

        Raises:
            ConfigError: depth is wanted and no checkpoint given, or impossible settings.
            CheckpointError: tensors are missing or left over, where transformers would draw or
                drop them; the depth checkpoint is missing, damaged, or of another model; or it
                is not the depth that the folder's adapter was trained with; or the folder is
                that of an adapter whose base is not on this disk.
        """
        folder = local_folder(args[0] if args else kwargs.get("pretrained_model_name_or_path"))
        asked = {
            "use_depth": use_depth,
            "depth_checkpoint_path": depth_checkpoint_path,
            "depth_alpha": depth_alpha,
            "depth_input_size": depth_input_size,
        }
        changes, depths = planned_depth(folder, kwargs.get("config"), asked)
        if folder is not None:
            _refuse_other_base(folder)
        wants_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        _refuse_misfit(model.name_or_path, info)
        for name, value in changes.items():
            setattr(model.config, name, value)
        if depths is None and model.config.use_depth:  # the configuration was not at hand before
            depths = read_depth(vars(model.config))
        model.depth = depths
        if folder is not None:
            check_folder(folder, model.depth_settings())
        return (model, info) if wants_info else model

    def save_pretrained(
        self, save_directory: str | Path, is_main_process: bool = True, **kwargs: Any
    ) -> None:
        """Save as transformers does, and the depth that images get in `depth.json` beside it."""
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
        if is_main_process:
            write_depth_settings(Path(save_directory), self.depth_settings())

    def load_adapter(self, peft_model_id: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Load an adapter as transformers does, one that was trained with the model's depth.

        Raises:
            CheckpointError: it was trained with another depth. Warns: depth on one side only.
        """
        folder = local_folder(peft_model_id)
        within = kwargs.get("load_config") is not None  # `from_pretrained`, before there is depth
        if folder is not None and not within:
            check_folder(folder, self.depth_settings())
        return super().load_adapter(peft_model_id, *args, **kwargs)

    def depth_settings(self) -> DepthSettings | None:
        """The depth that images get, as it is stored beside an adapter; None: no depth."""
        return None if self.depth is None else self.depth.settings(self.config.depth_alpha)

    def _depth_encoding(
        self,
        depth_encoding: Tensor | None,
        pictures: Sequence[Any] | None,
        grids: Tensor | None,
    ) -> Tensor | None:
        """Give the depth encoding of a batch: the one at hand, or that of its pictures."""
        if depth_encoding is not None or grids is None or len(grids) == 0:
            return depth_encoding
        if self.depth is None and pictures is None:
            return None
        if self.depth is None:
            raise DataError(
                "`pictures` are for depth, which this model was loaded without; load it with "
                "use_depth=True and depth_checkpoint_path, or leave keep_pictures out"
            )
        if pictures is None:
            raise DataError(
                "this model was loaded with depth, which is made of the pictures: prepare the "
                "batch with keep_pictures=True, or give `depth_encoding`"
            )
        depths = self.depth.to(self.lm_head.weight.device)
        return encoding_of_pictures(depths, pictures, grids, self.config)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor | None = None,
        image_mask: Tensor | None = None,
        patches: Tensor | None = None,
        grids: Tensor | None = None,
        vision_features: Tensor | None = None,
        depth_encoding: Tensor | None = None,
        document_ids: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        pictures: Sequence[Any] | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Run the model.

        Args:
            input_ids: (B, L) int64; what stands at image places is not read.
            attention_mask: (B, L), zero at padding on either side; or a finished 4-D mask.
            position_ids: (B, L, 3) time, row, column; made from the masks and grids where absent.
            past_key_values: keys and values of the places before; needs `position_ids`.
            inputs_embeds: (B, L, C) in place of `input_ids`; with images they are put in.
            labels: (B, L) int64, -100 where there is none; place j predicts label j + 1.
            use_cache: give `past_key_values` back; as configured, and not with labels.
            logits_to_keep: as in transformers, 0 for all places, n for the last n. Left out:
                all places without labels, and none with labels, because training does not need
                them and they can take gigabytes.
            image_mask: (B, L) bool, true at image places.
            patches: (sum N, 3 p^2), patches of all images in the order of their places: levels
                as uint8, or floats in -1..1.
            grids: (images, 2) int64, rows and columns of patches before the shuffle.
            vision_features: (sum N / r^2, r^2 V), what `model.get_vision_features` has made of
                the patches; in place of `patches`.
            depth_encoding: (sum N / r^2, C), added to the projector's output.
            document_ids: (B, L) int64 for packed rows: another number for each sample that
                follows. Places see only their own sample, whose positions start at zero.
            num_items_in_batch: divides the loss in place of the number of labels here.
            pictures: RGB, uint8 [H, W, 3], of all images, as in their files; for a model that
                was loaded with depth, where `depth_encoding` is not given.

        Returns:
            `loss` (float32) where labels are given, `logits` (B, kept places, vocabulary) or
            None, `past_key_values`, and `hidden_states`, `attentions` where asked for.

        Raises:
            DataError: shapes or numbers of images, places, labels that do not fit.
        """
        if labels is not None and use_cache is None:
            use_cache = False  # keys and values of a training step serve nobody afterwards
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            image_mask=image_mask,
            patches=patches,
            grids=grids,
            vision_features=vision_features,
            depth_encoding=self._depth_encoding(depth_encoding, pictures, grids),
            document_ids=document_ids,
            **kwargs,
        )
        states = outputs.last_hidden_state
        loss = None
        if labels is not None:
            loss = token_loss(
                states,
                labels,
                self.lm_head,
                self.vocab_size,
                num_items_in_batch,
                document_ids,
                attention_mask,
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=self._logits(states, logits_to_keep, labels is not None),
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _logits(
        self, states: Tensor, logits_to_keep: int | Tensor | None, has_labels: bool
    ) -> Tensor | None:
        if logits_to_keep is None:
            return None if has_labels else self.lm_head(states)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        return self.lm_head(states[:, kept])
