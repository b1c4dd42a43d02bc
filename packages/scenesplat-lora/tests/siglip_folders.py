"""Tiny random SigLIP 2 model folders, as transformers saves them, with a tokenizer like Gemma's."""

from __future__ import annotations

import json
from pathlib import Path

import safetensors.torch
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing

SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")
WORDS = ("this", "is", "a", "chair", "table", "lamp", "wall", "floor")
WIDTH, PATCH, SIDE = 16, 8, 32
TEXT = {
    "hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 64,
    "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip


def tokenizer() -> Tokenizer:
    """Byte-pair encoding with byte fallback; `<eos>` behind every text; padding is baked in."""
    vocabulary = {word: number for number, word in enumerate(SPECIAL)}
    merges: list[tuple[str, str]] = []
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    for letter in ("▁", *"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ<>"):
        vocabulary[letter] = len(vocabulary)
    for word in WORDS:
        for end in range(2, len(word) + 1):
            merges.append((word[: end - 1], word[end - 1]))
            vocabulary.setdefault(word[:end], len(vocabulary))
    made = Tokenizer(
        models.BPE(
            vocabulary, list(dict.fromkeys(merges)), unk_token="<unk>", byte_fallback=True,
            fuse_unk=True,
        )
    )  # fmt: skip
    made.add_special_tokens([AddedToken(word, special=True) for word in SPECIAL])
    made.normalizer = normalizers.Replace(" ", "▁")
    made.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    made.decoder = decoders.Replace("▁", " ")
    made.post_processor = TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    made.enable_truncation(64)
    made.enable_padding(length=64, pad_id=0, pad_token="<pad>")
    return made


def whole_model(kind: str = "siglip", seed: int = 0) -> torch.nn.Module:
    """transformers' own model with random weights."""
    import transformers

    shape = {"image_size": SIDE} if kind == "siglip" else {"num_patches": 16}
    vision = {name: TEXT[name] for name in list(TEXT)[:4]} | shape | {"patch_size": PATCH}
    name = {"siglip": "Siglip", "siglip2": "Siglip2"}[kind]
    text = TEXT | {"vocab_size": tokenizer().get_vocab_size()}
    config = getattr(transformers, f"{name}Config")(text_config=text, vision_config=vision)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: torch.nn.Module = getattr(transformers, f"{name}Model")(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def write_folder(folder: Path, kind: str = "siglip") -> torch.nn.Module:
    """Write a model folder; gives the model that is in it."""
    folder.mkdir(parents=True)
    model = whole_model(kind)
    settings = model.config.to_dict()
    (folder / "config.json").write_text(json.dumps(settings))
    safetensors.torch.save_file(
        {name: tensor.contiguous() for name, tensor in model.state_dict().items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>",
                    "eos_token": "<eos>", "model_input_names": ["input_ids"],
                    "padding_side": "right"})
    )  # fmt: skip
    half = [0.5, 0.5, 0.5]
    pictures = {
        "image_processor_type": "SiglipImageProcessor", "do_resize": True, "resample": 2,
        "size": {"height": SIDE, "width": SIDE}, "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": half, "image_std": half,
    }  # fmt: skip
    if kind == "siglip2":
        pictures["image_processor_type"] = "Siglip2ImageProcessor"
        pictures |= {"patch_size": PATCH, "max_num_patches": 16}
    (folder / "preprocessor_config.json").write_text(json.dumps(pictures))
    return model
