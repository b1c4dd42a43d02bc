"""Objects from Python: set a picture, then ask for phrases.

from sam3_lora import Predictor

predictor = Predictor.load("sam3.pt", adapter="experiments/checkpoints/best.pt")
predictor.set_image(rgb)
bolts, nuts = predictor.predict(["bolt", "nut"])
bolts.scores, bolts.boxes, bolts.masks
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from lora_core.injection import adapters_off, lora_layers
from lora_core.training.arguments import choose_device, choose_precision
from lora_core.training.inference import autocast, evaluating
from sam3_lora import network as net
from sam3_lora.model import image_size, load, tokenizer
from sam3_lora.postprocess import Found, Rle, detections, encode_masks, suppress
from sam3_lora.samples import PADDING
from sam3_lora.scoring import QUERIES_AT_ONCE, EncodedPhrases
from sam3_lora.transforms import filling, network_input, place_boxes, place_picture
from sam3_lora.user_prompts import Prompt

if TYPE_CHECKING:
    from transformers import Sam3Model

    from sam3_lora.tokenizer import Tokenizer
    from sam3_lora.vision import Features


@dataclass(frozen=True)
class Prediction:
    """What was found for one phrase, the best first.

    Attributes:
        scores: f32 [n], 0..1: sigma(logit) * sigma(presence).
        boxes: f32 [n, 4], (x0, y0, x1, y1) in pixels, within the picture.
        size: (H, W) of the picture.
        rles: COCO's run lengths of the masks; None if masks were not asked for.
    """

    phrase: str
    scores: NDArray[np.float32]
    boxes: NDArray[np.float32]
    size: tuple[int, int]
    rles: list[Rle] | None = None

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def masks(self) -> NDArray[np.bool_]:
        """bool [n, H, W].

        Raises:
            ValueError: masks were not asked for.
        """
        if self.rles is None:
            raise ValueError("no masks were computed: predict(..., masks=True)")
        full = np.zeros((len(self), *self.size), dtype=bool)
        for number in range(len(self)):
            full[number] = self.mask(number)
        return full

    def mask(self, number: int) -> NDArray[np.bool_]:
        """Mask of one object, bool [H, W]; many at once need much memory in large pictures."""
        from pycocotools import mask as coco_mask

        if self.rles is None:
            raise ValueError("no masks were computed: predict(..., masks=True)")
        decoded: NDArray[np.bool_] = coco_mask.decode(self.rles[number]).astype(bool)
        return decoded


class Predictor:
    """A network with its vocabulary, and the picture that it looks at.

    Args:
        model: from `model.load` or `model.build`, with or without an adapter.
        words: its tokenizer: see `model.tokenizer`.
        precision: "auto", "fp32", "bf16" or "fp16".
        phrases: all that will be asked for, encoded already: the model may do without its text
            encoder then.
    """

    def __init__(
        self,
        model: Sam3Model,
        words: Tokenizer,
        precision: str = "auto",
        phrases: EncodedPhrases | None = None,
    ) -> None:
        self.model, self.words, self.precision = model, words, precision
        self.device = next(model.parameters()).device
        # With an adapter in the text encoder, phrases differ with and without it.
        self._keeps_phrases = not any(name.startswith("text_") for name in lora_layers(model))
        self._phrases = phrases
        self._picture: tuple[tuple[int, int], Features] | None = None

    @classmethod
    def load(
        cls,
        checkpoint: str | Path,
        adapter: str | Path | None = None,
        size: tuple[int, int] | None = None,
        device: str = "auto",
        precision: str = "auto",
        bpe_path: str | Path | None = None,
        allow_partial: bool = False,
    ) -> Predictor:
        """Read a base or merged checkpoint, and an adapter to put on it.

        Args:
            checkpoint: official file, transformers folder or hub id.
            adapter: best.pt, epoch_N.pt, or a PEFT directory.
            size: (height, width) of the model's input; None: that of the adapter's training, else
                that of the checkpoint.
            device: "auto" is the GPU if there is one.
            precision: see the class.
            bpe_path: vocabulary, where none lies beside the checkpoint.
            allow_partial: use what fits of an adapter that is incomplete.

        Raises:
            CheckpointError: the files are missing, damaged, or do not belong together.
            ConfigError: no vocabulary, no such device, or a precision that it does not compute in.
        """
        place = choose_device(device)
        choose_precision(precision, place)  # raises before anything slow
        model = load(checkpoint, size, adapter, allow_partial)
        words = tokenizer(model, bpe_path)
        return cls(model.to(place), words, precision)

    @torch.no_grad()
    def set_image(self, rgb: NDArray[np.uint8]) -> None:
        """Encode a picture, uint8 [H, W, 3]; all later calls are about it."""
        if rgb.ndim != 3 or rgb.shape[2] != 3 or rgb.dtype != np.uint8:
            raise ValueError(f"expected uint8 [H, W, 3], not {rgb.dtype} {list(rgb.shape)}")
        placed = place_picture(rgb, filling(image_size(self.model)))
        pixels = network_input([placed.to(self.device)])
        with evaluating(self.model), autocast(self.device, self.precision):
            features = net.encode_images(self.model, pixels, masks=True)
        self._picture = (rgb.shape[0], rgb.shape[1]), features

    def predict(
        self,
        prompts: Sequence[str | Prompt],
        threshold: float = 0.5,
        nms: float | None = None,
        masks: bool = True,
    ) -> list[Prediction]:
        """Find the objects of phrases in the picture.

        Args:
            prompts: phrases, or `Prompt`s with example boxes in the picture's pixels.
            threshold: objects with a score above it.
            nms: drop an object whose mask has an IoU above this with a better one of its phrase.
            masks: find masks beside boxes.

        Returns:
            One for each prompt.

        Raises:
            ValueError: no picture was set; `nms` without masks.
            DataError: an empty phrase.
            NumericError: the network gives NaN.
        """
        if self._picture is None:
            raise ValueError("call set_image first")
        if nms is not None and not masks:
            raise ValueError("nms compares masks: it needs masks=True")
        size, features = self._picture
        asked = [Prompt(one) if isinstance(one, str) else one for one in prompts]
        found: list[Prediction] = []
        if not asked:
            return found
        with evaluating(self.model), autocast(self.device, self.precision):
            phrases = self._encoded([prompt.phrase for prompt in asked])
            for start in range(0, len(asked), QUERIES_AT_ONCE):
                some = asked[start : start + QUERIES_AT_ONCE]
                query = self._query(some, phrases, size)
                outputs = net.detect(self.model, features, phrases.features, query, masks=masks)
                objects = detections(outputs, [size] * len(some), threshold)
                pairs = zip(some, objects, strict=True)
                found += [_prediction(prompt.phrase, each, nms) for prompt, each in pairs]
        return found

    def _encoded(self, texts: Sequence[str]) -> EncodedPhrases:
        """The phrases, encoded once for all pictures."""
        kept = self._phrases
        if kept is None or not self._keeps_phrases or not set(texts) <= kept.row.keys():
            kept = EncodedPhrases(self.model, self.words, texts)
        self._phrases = kept
        return kept

    def _query(
        self, prompts: Sequence[Prompt], phrases: EncodedPhrases, size: tuple[int, int]
    ) -> dict[str, torch.Tensor]:
        """What `network.detect` takes, for B questions to one picture."""
        rows = phrases.rows([prompt.phrase for prompt in prompts])
        query = {
            "attention_mask": phrases.mask,
            "text_ids": rows,
            "image_ids": torch.zeros_like(rows),
        }
        most = max(len(prompt.boxes) for prompt in prompts)
        if most:
            boxes = torch.zeros(len(prompts), most, 4)
            labels = torch.full((len(prompts), most), PADDING)
            for row, prompt in enumerate(prompts):
                count, place = len(prompt.boxes), filling(image_size(self.model))
                boxes[row, :count] = place_boxes(prompt.boxes, size, place)
                labels[row, :count] = torch.tensor(prompt.labels, dtype=labels.dtype)
            query |= {
                "exemplars": boxes.to(self.device),
                "exemplar_labels": labels.to(self.device),
            }
        return query


def only(predictor: Predictor, name: str) -> AbstractContextManager[object]:
    """Within the block the adapter is off if the name is "base"."""
    return adapters_off(predictor.model) if name == "base" else nullcontext()


def _prediction(phrase: str, found: Found, nms: float | None) -> Prediction:
    """One query's objects, the best first, with masks as run lengths."""
    found = found.select(found.scores.argsort(descending=True, stable=True))
    rles = None if found.mask_logits is None else encode_masks(found)
    scores, boxes = found.scores.float().cpu(), found.boxes.float().cpu()
    if nms is not None and rles is not None:
        kept = suppress(scores, rles, nms)
        scores, boxes = scores[kept], boxes[kept]
        rles = [rle for rle, keep in zip(rles, kept.tolist(), strict=True) if keep]
    height, width = found.size
    limits = np.array([width, height, width, height], dtype=np.float32)
    inside = np.clip(boxes.numpy(), 0, limits)  # the network's boxes may leave the picture
    return Prediction(phrase, scores.numpy(), inside, found.size, rles)
