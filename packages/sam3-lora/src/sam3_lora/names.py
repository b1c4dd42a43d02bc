"""The two naming schemes of SAM 3's tensors: the official program's and transformers'.

The official model keeps q, k and v of every attention in one tensor, its text projection
transposed, and a class token's position that nothing reads; everything else is renamed only. The
map is a table of name templates that is read in both directions, so it holds for every size.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cache

import torch
from torch import Tensor

_VISION = "backbone.vision_backbone", "vision_encoder"
_BLOCK = "backbone.vision_backbone.trunk.blocks.{i}", "vision_encoder.backbone.layers.{i}"
_TEXT = "backbone.language_backbone.encoder", "text_encoder.text_model"
_TEXT_BLOCK = f"{_TEXT[0]}.transformer.resblocks.{{i}}", f"{_TEXT[1]}.encoder.layers.{{i}}"
_GEOMETRY = "geometry_encoder", "geometry_encoder"
_GEOMETRY_LAYER = "geometry_encoder.encode.{i}", "geometry_encoder.layers.{i}"
_ENCODER_LAYER = "transformer.encoder.layers.{i}", "detr_encoder.layers.{i}"
_DECODER = "transformer.decoder", "detr_decoder"
_DECODER_LAYER = "transformer.decoder.layers.{i}", "detr_decoder.layers.{i}"
_SCORES = "dot_prod_scoring", "dot_product_scoring"
_MASKS = "segmentation_head", "mask_decoder"
_NORMS = ("norm1", "layer_norm1"), ("norm2", "layer_norm2"), ("norm3", "layer_norm3")
_FFN = ("linear1", "mlp.fc1"), ("linear2", "mlp.fc2")
_MLP2 = ("layers.0", "layer1"), ("layers.1", "layer2")
_MLP3 = (*_MLP2, ("layers.2", "layer3"))


def _rows(prefix: tuple[str, str], *rows: tuple[str, str] | str) -> list[tuple[str, str]]:
    """(official, transformers) templates below a common prefix; a lone name is used by both."""
    pairs = [(row, row) if isinstance(row, str) else row for row in rows]
    return [(f"{prefix[0]}.{ours}", f"{prefix[1]}.{theirs}") for ours, theirs in pairs]


def _attention(official: str, transformers: str, out: str = "o_proj") -> list[tuple[str, str]]:
    """An nn.MultiheadAttention: its own path, of whose `in_proj` q, k and v are cut, and `out`."""
    return [(official, transformers), (f"{official}.out_proj", f"{transformers}.{out}")]


# Templates of module paths and of free parameters; {i} is a number.
TABLE = (
    *_rows(
        _VISION,
        ("trunk.patch_embed.proj", "backbone.embeddings.patch_embeddings.projection"),
        ("trunk.ln_pre", "backbone.layer_norm"),
        # Two scaling layers at level 0, with a GELU between them; one at level 1.
        ("convs.0.dconv_2x2_0", "neck.fpn_layers.0.scale_layers.0"),
        ("convs.0.dconv_2x2_1", "neck.fpn_layers.0.scale_layers.2"),
        ("convs.1.dconv_2x2", "neck.fpn_layers.1.scale_layers.0"),
        ("convs.{i}.conv_1x1", "neck.fpn_layers.{i}.proj1"),
        ("convs.{i}.conv_3x3", "neck.fpn_layers.{i}.proj2"),
    ),
    *_rows(_BLOCK, *_NORMS[:2], ("attn", "attention"), ("attn.proj", "attention.o_proj")),
    *_rows(_BLOCK, "mlp.fc1", "mlp.fc2"),
    *_rows(
        _TEXT,
        ("token_embedding", "embeddings.token_embedding"),
        ("positional_embedding", "embeddings.position_embedding.weight"),
        ("ln_final", "final_layer_norm"),
    ),
    *_attention(f"{_TEXT_BLOCK[0]}.attn", f"{_TEXT_BLOCK[1]}.self_attn", out="out_proj"),
    *_rows(_TEXT_BLOCK, ("ln_1", "layer_norm1"), ("ln_2", "layer_norm2")),
    *_rows(_TEXT_BLOCK, ("mlp.c_fc", "mlp.fc1"), ("mlp.c_proj", "mlp.fc2")),
    ("backbone.language_backbone.resizer", "text_projection"),
    *_rows(_GEOMETRY, "label_embed", "cls_embed", "boxes_direct_project", "boxes_pool_project"),
    *_rows(
        _GEOMETRY,
        "boxes_pos_enc_project",
        "final_proj",
        ("img_pre_norm", "vision_layer_norm"),
        ("norm", "prompt_layer_norm"),
        ("encode_norm", "output_layer_norm"),
    ),
    *_rows(_GEOMETRY_LAYER, *_NORMS, *_FFN, *_attention("self_attn", "self_attn")),
    *_rows(_GEOMETRY_LAYER, *_attention("cross_attn_image", "cross_attn")),
    # Here "image" is the one that asks: this attention looks at the prompt.
    *_rows(_ENCODER_LAYER, *_NORMS, *_FFN, *_attention("self_attn", "self_attn")),
    *_rows(_ENCODER_LAYER, *_attention("cross_attn_image", "cross_attn")),
    *_rows(_DECODER, "query_embed", "reference_points", "presence_token"),
    *_rows(
        _DECODER, ("presence_token_out_norm", "presence_layer_norm"), ("norm", "output_layer_norm")
    ),
    *_rows((f"{_DECODER[0]}.presence_token_head", f"{_DECODER[1]}.presence_head"), *_MLP3),
    *_rows((f"{_DECODER[0]}.bbox_embed", f"{_DECODER[1]}.box_head"), *_MLP3),
    *_rows((f"{_DECODER[0]}.ref_point_head", f"{_DECODER[1]}.ref_point_head"), *_MLP2),
    *_rows((f"{_DECODER[0]}.boxRPB_embed_x", f"{_DECODER[1]}.box_rpb_embed_x"), *_MLP2),
    *_rows((f"{_DECODER[0]}.boxRPB_embed_y", f"{_DECODER[1]}.box_rpb_embed_y"), *_MLP2),
    *_rows(_DECODER_LAYER, *_FFN, *_attention("self_attn", "self_attn")),
    *_rows(_DECODER_LAYER, *_attention("ca_text", "text_cross_attn")),
    *_rows(_DECODER_LAYER, *_attention("cross_attn", "vision_cross_attn")),
    *_rows(
        _DECODER_LAYER,
        ("norm1", "vision_cross_attn_layer_norm"),
        ("norm2", "self_attn_layer_norm"),
        ("catext_norm", "text_cross_attn_layer_norm"),
        ("norm3", "mlp_layer_norm"),
    ),
    *_rows((f"{_SCORES[0]}.prompt_mlp", f"{_SCORES[1]}.text_mlp"), *_MLP2),
    *_rows(
        _SCORES,
        ("prompt_mlp.out_norm", "text_mlp_out_norm"),
        ("prompt_proj", "text_proj"),
        ("hs_proj", "query_proj"),
    ),
    *_rows(
        _MASKS,
        "pixel_decoder.conv_layers.{i}",
        "pixel_decoder.norms.{i}",
        ("mask_predictor.mask_embed.layers.{i}", "mask_embedder.layers.{i}"),
        ("instance_seg_head", "instance_projection"),
        ("semantic_seg_head", "semantic_projection"),
        ("cross_attn_norm", "prompt_cross_attn_norm"),
        *_attention("cross_attend_prompt", "prompt_cross_attn"),
    ),
)
POSITIONS = f"{_VISION[0]}.trunk.pos_embed", f"{_VISION[1]}.backbone.embeddings.position_embeddings"
_PROJECTION = f"{_TEXT[0]}.text_projection", "text_encoder.text_projection.weight"
_FUSED = re.compile(r"(?P<path>.+)\.(?:qkv\.|in_proj_)(?P<leaf>weight|bias)")
_THIRD = re.compile(r"(?P<path>.+)\.[qkv]_proj\.(?P<leaf>weight|bias)")
_UNUSED = re.compile(
    r"geometry_encoder\.points_.+"  # point prompts, which concepts do not have
    r"|backbone\.vision_backbone\.trunk\.blocks\.\d+\.attn\.freqs_cis"  # recomputed
    r"|backbone\.vision_backbone\.sam2_convs\..+"  # the video tracker's copy of the neck
)


def _pattern(template: str) -> re.Pattern[str]:
    text = re.escape(template).replace(r"\{i\}", r"(?P<i>\d+)")
    return re.compile(text + r"(?P<leaf>\.weight|\.bias)?")


@cache
def _table(to_official: bool) -> tuple[tuple[re.Pattern[str], str], ...]:
    rows = tuple((theirs, ours) for ours, theirs in TABLE) if to_official else TABLE
    return tuple((_pattern(source), target) for source, target in rows)


@cache
def _translate(name: str, to_official: bool) -> str | None:
    """A module path or tensor name in the other scheme; None: not in the table."""
    for pattern, target in _table(to_official):
        match = pattern.fullmatch(name)
        if match:
            number = {key: value for key, value in match.groupdict().items() if key == "i"}
            return target.format(**number) + (match["leaf"] or "")
    return None


def transformers_names(official: str) -> tuple[str, ...]:
    """The tensors of `Sam3Model` that come from an official one: one, three, or none."""
    if official in (POSITIONS[0], _PROJECTION[0]):
        return (POSITIONS[1] if official == POSITIONS[0] else _PROJECTION[1],)
    fused = _FUSED.fullmatch(official)
    path = _translate(fused["path"] if fused else official, to_official=False)
    if path is None:
        return ()
    return tuple(f"{path}.{p}_proj.{fused['leaf']}" for p in "qkv") if fused else (path,)


def official_name(transformers: str) -> str | None:
    """The official tensor that holds one of `Sam3Model`, wholly or as a third; None: unknown."""
    if transformers in (POSITIONS[1], _PROJECTION[1]):
        return POSITIONS[0] if transformers == POSITIONS[1] else _PROJECTION[0]
    third = _THIRD.fullmatch(transformers)
    if third is None:
        return _translate(transformers, to_official=True)
    path = _translate(third["path"], to_official=True)
    if path is None:
        return None
    vision = path.startswith(_VISION[0])
    return f"{path}.qkv.{third['leaf']}" if vision else f"{path}.in_proj_{third['leaf']}"


def is_unused(official: str) -> bool:
    """Whether an official detector tensor has no use for concept prompts in images."""
    return _UNUSED.fullmatch(official) is not None


def key_map(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Official tensor names -> transformers names, for names that the table knows."""
    found = {name: transformers_names(name) for name in names}
    return {name: targets for name, targets in found.items() if targets}


def to_transformers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Official tensors (no prefix) -> state dict of `Sam3Model`; parts of fused ones are views.

    Unused tensors are left out; other names that the table does not know stay as they are, so that
    a check can report them.
    """
    state: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        targets = transformers_names(name)
        if len(targets) == 3:
            state.update(zip(targets, tensor.chunk(3), strict=True))
        elif name == POSITIONS[0]:
            state[targets[0]] = tensor[:, 1:]  # entry 0 belongs to a class token that is not there
        elif name == _PROJECTION[0]:
            state[targets[0]] = tensor.T
        elif targets:
            state[targets[0]] = tensor
        elif not is_unused(name):
            state[name] = tensor
    return state


def to_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of `Sam3Model` -> official tensors (no prefix); the inverse of `to_transformers`.

    The class token's position, which nothing reads, becomes 0; unused tensors do not appear. Names
    that the table does not know, and q, k, v that are not all there, stay as they are.
    """
    tensors: dict[str, Tensor] = {}
    for name, tensor in state.items():
        target = official_name(name)
        if target is None:
            tensors[name] = tensor
        elif target == POSITIONS[0]:
            tensors[target] = torch.cat([torch.zeros_like(tensor[:, :1]), tensor], 1)
        elif target == _PROJECTION[0]:
            tensors[target] = tensor.T.contiguous()
        elif _THIRD.fullmatch(name):
            parts = transformers_names(target)
            if not all(part in state for part in parts):
                tensors[name] = tensor
            elif name == parts[0]:
                tensors[target] = torch.cat([state[part] for part in parts])
        else:
            tensors[target] = tensor
    return tensors
