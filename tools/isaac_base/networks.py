"""The tokenizer and the networks of the tiny base, from random weights, and their folders."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    AddedToken,
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Qwen2Tokenizer,
)

from isaac_lora.conversations.template import CHATML
from isaac_lora.demo_questions import words
from isaac_lora.network.configuration import IsaacConfig
from isaac_lora.network.isaac import IsaacForConditionalGeneration

PATCH, SHUFFLE = 6, 2  # pixels, patches: a token sees 12 x 12 pixels
DEPTH_PATCH = 7
DEPTH_SIZE = 56  # of the square that the depth model sees, pixels
SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
    "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>",
    "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
ADDED = (
    "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>",
    "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>",
    "<think>", "</think>",
)  # fmt: skip


# -- tokenizer -------------------------------------------------------------------------------------


def write_tokenizer(folder: Path) -> Path:
    """Write a byte-level BPE with a token for each word of our questions, and Isaac's added ones.

    Its chat template is plain ChatML: without the empty thinking block an answer is one word.
    """
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        min_frequency=1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator([*words(), "system", "user", "assistant"], trainer)
    content = json.loads(trained.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=content["vocab"], merges=[tuple(pair) for pair in content["merges"]],
        unk_token=None, bos_token=None, pad_token=None, eos_token=None,
    )  # fmt: skip
    tokenizer.add_tokens(
        [AddedToken(name, normalized=False, special=True) for name in SPECIAL], special_tokens=True
    )
    tokenizer.add_tokens([AddedToken(name, normalized=False, special=False) for name in ADDED])
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"})
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(str(folder), save_jinja_files=False)
    return folder


# -- networks --------------------------------------------------------------------------------------


def isaac_config(tokenizer: Qwen2Tokenizer) -> IsaacConfig:
    """About 0.8 million parameters."""
    return IsaacConfig(
        vocab_size=-(-len(tokenizer) // 16) * 16,
        hidden_size=96, intermediate_size=192, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=24, max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, rms_norm_eps=1e-6,
        attention_bias=False, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        vision_config={
            "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
            "num_attention_heads": 4, "num_patches": 64, "patch_size": PATCH, "image_size": 48,
            "pixel_shuffle_scale_factor": SHUFFLE, "hidden_act": "gelu_pytorch_tanh",
            "attention_dropout": 0.0, "layer_norm_eps": 1e-6,
        },
        video_patch_size=PATCH, vision_max_num_patches=256, vision_min_num_patches=None,
        pixel_shuffle_scale=SHUFFLE, max_sequence_length=1024,
    )  # fmt: skip


def new_isaac(seed: int, tokenizer: Qwen2Tokenizer) -> IsaacForConditionalGeneration:
    """Isaac with random weights; in transformers' default of 0.02 so narrow a one starves."""
    torch.manual_seed(seed)
    model = IsaacForConditionalGeneration(isaac_config(tokenizer))
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.3)
        if name.endswith(("o_proj", "down_proj", "out_proj", "fc2")):
            with torch.no_grad():
                module.weight *= 0.5  # what layers add to the stream is small at first
    nn.init.normal_(model.lm_head.weight, std=0.02)
    return model


def new_depth(seed: int) -> DepthAnythingForDepthEstimation:
    """Depth Anything V2 with random weights, about 0.5 million parameters."""
    torch.manual_seed(seed)
    settings = {
        "backbone_config": {
            "model_type": "dinov2", "image_size": DEPTH_SIZE, "patch_size": DEPTH_PATCH,
            "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "mlp_ratio": 2,
            "out_indices": [1, 2, 3, 4], "apply_layernorm": True, "reshape_hidden_states": False,
        },
        "patch_size": DEPTH_PATCH, "reassemble_hidden_size": 64,
        "reassemble_factors": [4, 2, 1, 0.5], "neck_hidden_sizes": [16, 24, 32, 48],
        "fusion_hidden_size": 24, "head_hidden_size": 16, "head_in_index": -1,
        "depth_estimation_type": "relative", "max_depth": 1,
    }  # fmt: skip
    model = DepthAnythingForDepthEstimation(DepthAnythingConfig(**settings))
    for module in model.backbone.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            module.reset_parameters()
        if name.endswith("convolution2"):
            nn.init.zeros_(module.weight)  # what residual units add
    with torch.no_grad():
        model.backbone.embeddings.position_embeddings.normal_(std=0.2)
        model.head.conv3.bias.fill_(0.3)
    return model


# -- folders ---------------------------------------------------------------------------------------


def write_half(model: nn.Module, folder: Path) -> Path:
    """Write a network's folder in half precision, and leave it as it was."""
    whole = {name: value.clone() for name, value in model.state_dict().items()}
    model.half().save_pretrained(str(folder))
    model.float().load_state_dict(whole)
    return folder
