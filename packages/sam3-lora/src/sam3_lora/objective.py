"""What is trained, as settings say: the adapted network, its phrases, the loss, the precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lora_core.report import say
from sam3_lora.config import Config

if TYPE_CHECKING:
    import torch
    from transformers import Sam3Model

    from lora_core.cache import FeatureCache
    from lora_core.frozen import FrozenImages
    from sam3_lora.data import Splits
    from sam3_lora.scoring import EncodedPhrases
    from sam3_lora.tokenizer import Tokenizer


MANY_TIMES = 4  # the patches of the base's own size: twice its sides


def adapted(net: Sam3Model, cfg: Config) -> Sam3Model:
    """Put the adapters of a configuration on its base; say what is adapted, and at which size if
    that is far from the base's own.

    Raises:
        CheckpointError: see `model.load_adapter`.
        ConfigError: impossible LoRA settings.
    """
    from lora_core import summary
    from sam3_lora import model

    if cfg.adapter:
        model.load_adapter(net, cfg.adapter)
        say(f"starting from {cfg.adapter}; its rank, alpha and layers are used")
        say(summary(net))
    else:
        say(model.adapt(net, cfg))
    if note := note_on_size(net, cfg.dataset.size):
        say(f"note: {note}")
    return net


def note_on_size(net: Sam3Model, size: tuple[int, int]) -> str:
    """What pictures far larger than those that the base was trained on cost; "" if they are not.

    Args:
        size: (height, width) of the pictures in pixels.
    """
    side = net.config.vision_config.backbone_config.image_size
    height, width = side if isinstance(side, (list, tuple)) else (side, side)
    ratio = size[0] * size[1] / (height * width)
    if ratio < MANY_TIMES:
        return ""
    own = str(height) if height == width else f"{height}x{width}"
    return (
        f"pictures of {size[0]} x {size[1]} pixels (height x width) have {ratio:.0f} times the "
        f"patches of the {height} x {width} that this base was trained on, and each update takes "
        f"that much longer or more: --dataset.resolution {own} is the base's own size"
    )


def vocabulary(net: Sam3Model, splits: Splits, cfg: Config) -> Tokenizer:
    """The tokenizer of the base; says which phrases are too long for it.

    Raises:
        ConfigError: see `model.tokenizer`.
    """
    from sam3_lora import data, model

    words = model.tokenizer(net, cfg.paths.bpe_path)
    for note in data.notes_on_length(splits.phrases, words):
        say(f"note: {note}")
    return words


def texts_of(splits: Splits) -> list[str]:
    """All that a run may ask for: its phrases, example boxes, absent concepts."""
    from sam3_lora.samples import VISUAL
    from sam3_lora.scoring import ABSENT

    return list(dict.fromkeys([*splits.phrases, VISUAL, *ABSENT]))


def encoded(
    net: Sam3Model, words: Tokenizer, splits: Splits, cache: FeatureCache | None = None
) -> EncodedPhrases | None:
    """The phrases of the data, encoded once; then the text encoder is dropped from memory.

    None where it is trained, and so must run in every step.

    Args:
        cache: from which phrases come that an earlier run has encoded.
    """
    import torch

    from sam3_lora.network import drop_text_encoder, trains_text
    from sam3_lora.scoring import EncodedPhrases

    if trains_text(net):
        return None
    with torch.no_grad():
        phrases = EncodedPhrases.one_by_one(net, words, texts_of(splits), cache)
    drop_text_encoder(net)
    return phrases


def loss_of(
    cfg: Config, phrases: EncodedPhrases | None, frozen: FrozenImages | None = None
) -> Callable[[Any, dict[str, Any]], Any]:
    """(network, batch) -> (loss, parts).

    Args:
        phrases: encoded; None: the text encoder runs in every step.
        frozen: see `frozen.frozen_images`; None: the image encoder sees all pictures at once.
    """
    from sam3_lora import losses, network
    from sam3_lora.normalisers import Normalisers
    from sam3_lora.outputs import Targets
    from sam3_lora.transforms import network_input

    masks, one_to_many = cfg.training.enable_segmentation, cfg.training.o2m_weight > 0
    weights = losses.LossSettings(
        masks=masks, o2m_weight=cfg.training.o2m_weight, mask_points=cfg.training.mask_points
    )

    def loss(net: Sam3Model, batch: dict[str, Any]) -> Any:
        if frozen is not None:
            batch = batch | frozen.features(batch["images"])
        else:
            batch = batch | {"pixel_values": network_input(batch["images"])}
        if phrases is not None:
            rows = phrases.rows(batch["phrases"])
            batch = batch | {
                "text_features": phrases.features[rows],
                "attention_mask": phrases.mask[rows],
            }
        outputs = network.forward(net, batch, masks=masks, one_to_many=one_to_many)
        sizes = Normalisers(**batch["update"]) if "update" in batch else None
        return losses.loss(outputs, Targets(**batch["targets"]), weights, sizes)

    return loss


def precision(cfg: Config) -> str:
    """The precision that settings ask for, as `choose_precision` has them.

    The guide's `use_amp` is for GPUs: on the CPU it means nothing.
    """
    if not cfg.training.use_amp or cfg.device == "cpu":
        return "fp32"
    if cfg.device == "auto":
        import torch

        if not torch.cuda.is_available():
            return "fp32"
    return {"bfloat16": "bf16", "float16": "fp16"}[cfg.training.amp_dtype]


def usable_precision(cfg: Config, device: torch.device) -> str:
    """`precision`, or an error if the device does not have it; wakes a GPU."""
    from lora_core.training.arguments import choose_precision

    return choose_precision(precision(cfg), device)
