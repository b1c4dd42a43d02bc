"""Where LoRA goes in SAM 2."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_core.config import LoraConfig
from sam2_lora.config import PRESETS, Config

if TYPE_CHECKING:
    from transformers import Sam2Config, Sam2Model

    from lora_core.injection import Summary
    from lora_core.last_blocks import Stack

BLOCKS = "vision_encoder.backbone.blocks"
_ATTENTION = r"(self_attn|cross_attn_token_to_image|cross_attn_image_to_token)"

# Role -> patterns. They match whole names: a mere `proj` would also hit the shortcuts of the trunk,
# and `q_proj` misses the trunk, whose q, k and v are one Linear with one adapter.
ROLES = {
    "encoder_attention": [r"re:vision_encoder\.backbone\.blocks\.\d+\.attn\.(qkv|proj)"],
    "decoder_attention": [
        rf"re:mask_decoder\.transformer\.layers\.\d+\.{_ATTENTION}\.[qkvo]_proj",
        r"re:mask_decoder\.transformer\.final_attn_token_to_image\.[qkvo]_proj",
    ],
    "decoder_mlp": [r"re:mask_decoder\.transformer\.layers\.\d+\.mlp\.proj_(in|out)"],
    "decoder_heads": [
        r"re:mask_decoder\.(output_hypernetworks_mlps\.\d+|iou_prediction_head|pred_obj_score_head)"
        r"\.(proj_in|layers\.\d+|proj_out)"
    ],
}


def roles(cfg: Config) -> tuple[str, ...]:
    """The roles that `cfg.targets` names."""
    preset, heads = cfg.preset
    return PRESETS[preset] + (("decoder_heads",) if heads else ())


def targets(cfg: Config) -> list[str]:
    """Patterns of the Linears that `cfg.targets` names, for `LoraConfig.target_modules`."""
    return [pattern for role in roles(cfg) for pattern in ROLES[role]]


def lora_config(cfg: Config) -> LoraConfig:
    """The adapter that a configuration asks for."""
    return LoraConfig(
        target_modules=targets(cfg),
        r=cfg.lora_rank,
        lora_alpha=cfg.lora_alpha,
        lora_dropout=cfg.lora_dropout,
        last_blocks={} if cfg.last_blocks is None else {BLOCKS: cfg.last_blocks},
        seed=cfg.seed,
    )


def stack(model: Sam2Model) -> Stack:
    """The blocks of the image encoder, the last of which `--last_blocks` adapts."""
    from lora_core.last_blocks import Stack

    return Stack.of(model, "--last_blocks", BLOCKS)


def linears(config: Sam2Config, role: str, last_blocks: int | None = None) -> list[tuple[int, int]]:
    """(in, out) of each Linear of a role, from the model's sizes and not from its module names.

    An adapter of rank r has r * sum(in + out) parameters.

    Args:
        last_blocks: only those in the last so many blocks of the encoder; None: in all.
    """
    trunk, decoder = config.vision_config.backbone_config, config.mask_decoder_config
    width, layers = decoder.hidden_size, decoder.num_hidden_layers
    if role == "encoder_attention":
        stages = zip(trunk.embed_dim_per_stage, trunk.blocks_per_stage, strict=True)
        after = [channels for channels, blocks in stages for _ in range(blocks)]
        before = [after[0], *after[:-1]]  # a stage's first block widens
        first = 0 if last_blocks is None else len(after) - last_blocks
        before, after = before[first:], after[first:]
        qkv = [(c, 3 * d) for c, d in zip(before, after, strict=True)]
        return qkv + [(d, d) for d in after]
    if role == "decoder_attention":
        inner = width // decoder.attention_downsample_rate
        cross = [(width, inner)] * 3 + [(inner, width)]
        return ([(width, width)] * 4 + cross * 2) * layers + cross
    if role == "decoder_mlp":
        return [(width, decoder.mlp_dim), (decoder.mlp_dim, width)] * layers
    masks, hidden = decoder.num_multimask_outputs + 1, decoder.iou_head_hidden_dim
    mask_head = [(width, width), (width, width), (width, width // 8)]
    iou_head = [(width, hidden), *[(hidden, hidden)] * (decoder.iou_head_depth - 2)]
    score_head = [(width, width), (width, width), (width, 1)]
    return mask_head * masks + [*iou_head, (hidden, masks)] + score_head


def adapt(model: Sam2Model, cfg: Config) -> Summary:
    """Freeze the network, put the adapters of a configuration on it, and check their number.

    Raises:
        ConfigError: impossible LoRA settings.
        RuntimeError: other layers than intended were adapted, as after a change of names in the
            library; training would be worth nothing.
    """
    from lora_core.injection import inject
    from lora_core.overview import require_linears

    summary = inject(model, lora_config(cfg))
    wanted = [p for role in roles(cfg) for p in linears(model.config, role, cfg.last_blocks)]
    require_linears(summary, wanted, cfg.lora_rank, f"--targets {cfg.targets}")
    return summary
