"""The two naming schemes of SAM 2's tensors: the official program's and transformers'.

Nothing is transposed, fused or split between the two, with two exceptions: the four point
embeddings are rows of one table in transformers, and the positional matrix is held there twice.
The map is a table of name templates that is read in both directions, so it holds for every size.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cache

import torch
from torch import Tensor

from lora_core.errors import CheckpointError

_TRUNK = "image_encoder.trunk", "vision_encoder.backbone"
_BLOCK = f"{_TRUNK[0]}.blocks.{{i}}", f"{_TRUNK[1]}.blocks.{{i}}"
_PROMPT = "sam_prompt_encoder", "prompt_encoder"
_DECODER = "sam_mask_decoder", "mask_decoder"
_LAYER = f"{_DECODER[0]}.transformer.layers.{{i}}", f"{_DECODER[1]}.transformer.layers.{{i}}"
_MEMORY = "memory_attention.layers.{i}"
_PROJECTIONS = (("q_proj",) * 2, ("k_proj",) * 2, ("v_proj",) * 2, ("out_proj", "o_proj"))
_MLP2 = ("layers.0", "proj_in"), ("layers.1", "proj_out")
_MLP3 = ("layers.0", "proj_in"), ("layers.1", "layers.0"), ("layers.2", "proj_out")


def _rows(prefix: tuple[str, str], *rows: tuple[str, str] | str) -> list[tuple[str, str]]:
    """(official, transformers) templates below a common prefix; a lone name is used by both."""
    pairs = [(row, row) if isinstance(row, str) else row for row in rows]
    return [(f"{prefix[0]}.{ours}", f"{prefix[1]}.{theirs}") for ours, theirs in pairs]


# Templates of module paths and of free parameters: {i} is a number, {name} one component.
IMAGE = (
    ("no_mem_embed", "no_memory_embedding"),
    *_rows(_TRUNK, "pos_embed", "pos_embed_window", ("patch_embed.proj", "patch_embed.projection")),
    *_rows(_BLOCK, ("norm{n}", "layer_norm{n}"), "attn.qkv", "attn.proj", "proj"),
    *_rows((f"{_BLOCK[0]}.mlp", f"{_BLOCK[1]}.mlp"), *_MLP2),
    ("image_encoder.neck.convs.{i}.conv", "vision_encoder.neck.convs.{i}"),
    *_rows(
        _PROMPT,
        "not_a_point_embed",
        "no_mask_embed",
        ("pe_layer.positional_encoding_gaussian_matrix", "shared_embedding.positional_embedding"),
        ("mask_downscaling.0", "mask_embed.conv1"),
        ("mask_downscaling.1", "mask_embed.layer_norm1"),
        ("mask_downscaling.3", "mask_embed.conv2"),
        ("mask_downscaling.4", "mask_embed.layer_norm2"),
        ("mask_downscaling.6", "mask_embed.conv3"),
    ),
    (
        f"{_PROMPT[0]}.pe_layer.positional_encoding_gaussian_matrix",
        "shared_image_embedding.positional_embedding",
    ),
    *_rows(_DECODER, "iou_token", "mask_tokens", "obj_score_token", "conv_s0", "conv_s1"),
    *_rows((f"{_LAYER[0]}.{{attention}}", f"{_LAYER[1]}.{{attention}}"), *_PROJECTIONS),
    *_rows((f"{_LAYER[0]}.mlp", f"{_LAYER[1]}.mlp"), *_MLP2),
    *_rows(_LAYER, ("norm{n}", "layer_norm{n}")),
    *_rows(
        (f"{_DECODER[0]}.transformer", f"{_DECODER[1]}.transformer"),
        *_rows(("final_attn_token_to_image",) * 2, *_PROJECTIONS),
        ("norm_final_attn", "layer_norm_final_attn"),
    ),
    *_rows(
        _DECODER,
        ("output_upscaling.0", "upscale_conv1"),
        ("output_upscaling.1", "upscale_layer_norm"),
        ("output_upscaling.3", "upscale_conv2"),
        *_rows(("output_hypernetworks_mlps.{i}",) * 2, *_MLP3),
        *_rows(("iou_prediction_head",) * 2, *_MLP3),
        *_rows(("pred_obj_score_head",) * 2, *_MLP3),
    ),
)
VIDEO = (
    ("maskmem_tpos_enc", "memory_temporal_positional_encoding"),
    ("no_mem_pos_enc", "no_memory_positional_encoding"),
    ("no_obj_ptr", "no_object_pointer"),
    ("no_obj_embed_spatial", "occlusion_spatial_embedding_parameter"),
    ("mask_downsample", "mask_downsample"),
    ("obj_ptr_tpos_proj", "temporal_positional_encoding_projection_layer"),
    *_rows(("obj_ptr_proj", "object_pointer_proj"), *_MLP3),
    ("memory_attention.norm", "memory_attention.layer_norm"),
    *_rows((f"{_MEMORY}.{{attention}}",) * 2, *_PROJECTIONS),
    *_rows((_MEMORY,) * 2, "linear1", "linear2", ("norm{n}", "layer_norm{n}")),
    *(
        (
            f"memory_encoder.mask_downsampler.encoder.{3 * m + step}",
            f"memory_encoder.mask_downsampler.layers.{m}.{layer}",
        )
        for m in range(4)
        for step, layer in enumerate(("conv", "layer_norm"))
    ),
    ("memory_encoder.mask_downsampler.encoder.12", "memory_encoder.mask_downsampler.final_conv"),
    ("memory_encoder.pix_feat_proj", "memory_encoder.feature_projection"),
    ("memory_encoder.out_proj", "memory_encoder.projection"),
    *_rows(
        ("memory_encoder.fuser.layers.{i}", "memory_encoder.memory_fuser.layers.{i}"),
        ("gamma", "scale"),
        ("dwconv", "depthwise_conv"),
        ("norm", "layer_norm"),
        ("pwconv1", "pointwise_conv1"),
        ("pwconv2", "pointwise_conv2"),
    ),
)
_VIDEO_ONLY = re.compile(
    r"(maskmem_tpos_enc|no_mem_pos_enc|no_obj_ptr|no_obj_embed_spatial)"
    r"|(mask_downsample|memory_attention|memory_encoder|obj_ptr_proj|obj_ptr_tpos_proj)\..+"
)
_POINT = re.compile(r"sam_prompt_encoder\.point_embeddings\.(\d+)\.weight")
_POINTS = "prompt_encoder.point_embed.weight"


def _pattern(template: str) -> re.Pattern[str]:
    text = re.escape(template).replace(r"\{", "{").replace(r"\}", "}")
    text = re.sub(r"\{(i|n)\}", r"(?P<\1>\\d+)", text)
    text = re.sub(r"\{(\w+)\}", r"(?P<\1>\\w+)", text)
    return re.compile(text + r"(?P<leaf>\.weight|\.bias)?")


@cache
def _table(to_official: bool) -> tuple[tuple[re.Pattern[str], str], ...]:
    rows = (*IMAGE, *VIDEO)
    if to_official:
        rows = tuple((theirs, ours) for ours, theirs in rows)
    return tuple((_pattern(source), target) for source, target in rows)


@cache
def _translate(name: str, to_official: bool) -> tuple[str, ...]:
    matches = ((pattern.fullmatch(name), target) for pattern, target in _table(to_official))
    return tuple(
        target.format(**match.groupdict()) + (match["leaf"] or "")
        for match, target in matches
        if match
    )


def key_map(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Official tensor names -> transformers names, for names that the table knows.

    The positional matrix has two transformers names; each of the point embeddings maps to the one
    table of which it is a row.
    """
    found = {
        name: (_POINTS,) if _POINT.fullmatch(name) else _translate(name, to_official=False)
        for name in names
    }
    return {name: targets for name, targets in found.items() if targets}


def module_to_official(path: str) -> str:
    """Module path in transformers -> in the official model; an unknown path stays as it is."""
    return next(iter(_translate(path, to_official=True)), path)


def is_video(name: str) -> bool:
    """Whether an official tensor belongs to the video memory, which the image model lacks."""
    return _VIDEO_ONLY.fullmatch(name) is not None


def to_transformers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Official tensors -> state dict of transformers' `Sam2VideoModel` (of `Sam2Model`, if there
    are no video tensors). Names that the table does not know are left out."""
    state: dict[str, Tensor] = {}
    rows: dict[int, Tensor] = {}
    for name, tensor in tensors.items():
        point = _POINT.fullmatch(name)
        if point:
            rows[int(point[1])] = tensor
        for target in () if point else _translate(name, to_official=False):
            state[target] = tensor
    if rows:
        state[_POINTS] = torch.cat([rows[j] for j in sorted(rows)])
    return state


def to_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of transformers' `Sam2Model` or `Sam2VideoModel` -> official tensors.

    Names that the table does not know stay as they are, so that a check can report them.

    Raises:
        CheckpointError: the two copies of the positional matrix differ (as in a model that was
            built from a config alone): the official form has only one.
    """
    tensors: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name == _POINTS:
            for j, row in enumerate(tensor.split(1)):
                tensors[f"sam_prompt_encoder.point_embeddings.{j}.weight"] = row
            continue
        target = next(iter(_translate(name, to_official=True)), name)
        twin = tensors.get(target)
        if twin is not None and not twin.is_meta and not torch.equal(twin, tensor):
            raise CheckpointError(
                f"{name} differs from its second copy: prompts and image would use different "
                "positions. Copy one into the other before training from scratch."
            )
        tensors[target] = tensor
    return tensors
