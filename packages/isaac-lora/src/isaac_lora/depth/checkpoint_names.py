"""Names of Depth-Anything-V2's tensors: the original's, and transformers' before and since 5.

transformers splits `attn.qkv` into three tensors; all others have a counterpart each.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

# transformers 5 -> original: the beginning of a name, then what may follow it.
_BEGINNINGS = {
    "backbone.embeddings.cls_token": "pretrained.cls_token",
    "backbone.embeddings.mask_token": "pretrained.mask_token",
    "backbone.embeddings.position_embeddings": "pretrained.pos_embed",
    "backbone.embeddings.patch_embeddings.projection": "pretrained.patch_embed.proj",
    "backbone.encoder.layer": "pretrained.blocks",
    "backbone.layernorm": "pretrained.norm",
    "head.conv1": "depth_head.scratch.output_conv1",
    "head.conv2": "depth_head.scratch.output_conv2.0",
    "head.conv3": "depth_head.scratch.output_conv2.2",
}
for _i in range(4):
    _BEGINNINGS |= {
        f"neck.reassemble_stage.layers.{_i}.projection": f"depth_head.projects.{_i}",
        f"neck.reassemble_stage.layers.{_i}.resize": f"depth_head.resize_layers.{_i}",
        f"neck.convs.{_i}": f"depth_head.scratch.layer{_i + 1}_rn",
        f"neck.fusion_stage.layers.{_i}": f"depth_head.scratch.refinenet{4 - _i}",
    }
_ENDS = {
    ".attention.o_proj": ".attn.proj",
    ".layer_scale1.lambda1": ".ls1.gamma",
    ".layer_scale2.lambda1": ".ls2.gamma",
    ".projection": ".out_conv",
    ".residual_layer1.convolution": ".resConfUnit1.conv",
    ".residual_layer2.convolution": ".resConfUnit2.conv",
}
_QKV = re.compile(r"(.*)\.attention\.([qkv])_proj\.(weight|bias)")
# transformers 4 -> 5, as files on the model hub have it
_OLDER = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}


def original_name(name: str) -> str:
    """The original's name of a tensor of transformers 5; of q, k and v that of all three.

    Raises:
        ValueError: no such tensor in the original.
    """
    for beginning, original in _BEGINNINGS.items():
        if name == beginning or name.startswith(f"{beginning}."):
            rest = name.removeprefix(beginning)
            if parts := _QKV.fullmatch(rest):
                return f"{original}{parts[1]}.attn.qkv.{parts[3]}"
            for ours, theirs in _ENDS.items():
                rest = rest.replace(ours, theirs)
            return original + rest
    raise ValueError(f"the original has no {name}")


def part_of_original(name: str, tensor: Tensor) -> Tensor:
    """What of the original's tensor belongs to this one: all, or a third of the rows of qkv.

    Rows that cannot be split stay together, so that the comparison of shapes finds them.
    """
    parts = _QKV.fullmatch(name)
    if parts is None or tensor.ndim == 0 or tensor.shape[0] % 3:
        return tensor
    return tensor.chunk(3)["qkv".index(parts[2])]


def from_original(
    tensors: Mapping[str, Tensor], names: Iterable[str]
) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of an original checkpoint under the names of transformers 5.

    Args:
        tensors: by original names. names: that the model has; those the file lacks are left out.

    Returns:
        name -> tensor (views), and the original names that belong to none of `names`.
    """
    renamed, used = {}, set()
    for name in names:
        key = original_name(name)
        if key in tensors:
            renamed[name] = part_of_original(name, tensors[key])
            used.add(key)
    return renamed, [key for key in tensors if key not in used]


def current_name(name: str) -> str:
    """transformers' name of a tensor since version 5, from any version's."""
    for older, newer in _OLDER.items():
        name = name.replace(older, newer)
    return name
