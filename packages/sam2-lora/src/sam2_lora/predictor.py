"""Masks from Python: set a picture, then ask with points and boxes.

from sam2_lora import Predictor

predictor = Predictor.load("sam2.1_hiera_large.pt", adapter="run/adapter")
predictor.set_image(rgb)
masks, scores, logits = predictor.predict(points=[[420, 130]])
instances = predictor.everything()
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from lora_core.errors import ConfigError
from lora_core.training.arguments import choose_precision
from lora_core.training.inference import autocast, evaluating
from sam2_lora.automatic import UPSCALED_VALUES, Grid, Instance, segment, segment_features
from sam2_lora.image import to_model_boxes, to_model_points, upscale_logits
from sam2_lora.losses import LOGIT_LIMIT, best_masks
from sam2_lora.metrics import OBJECTS_AT_ONCE
from sam2_lora.model import Decoded, Features, decode, encode_pictures, image_size, load

if TYPE_CHECKING:
    from transformers import Sam2Model


class Prediction(NamedTuple):
    """One mask for each of N objects, or with `multimask` the three candidates of each."""

    masks: NDArray[np.bool_]  # [N, H, W], original pixels; [N, 3, H, W] with multimask
    scores: NDArray[np.float32]  # [N] predicted IoU, 0..1; [N, 3] with multimask
    logits: NDArray[
        np.float32
    ]  # [N, h, w], a quarter of the model's input; feed it back as mask_input


class Predictor:
    """A network, and the picture that it looks at.

    The meaning of points, labels, boxes and mask_input is that of the official image predictor.

    Args:
        model: from `model.load` or `model.build`, with or without an adapter.
        precision: "auto", "fp32", "bf16" or "fp16".
    """

    def __init__(self, model: Sam2Model, precision: str = "auto") -> None:
        self.model = model
        self.device = next(model.parameters()).device
        self.precision = precision
        self._picture: tuple[NDArray[np.uint8], Features] | None = None

    @classmethod
    def load(
        cls,
        checkpoint: str | Path,
        adapter: str | Path | None = None,
        image_size: tuple[int, int] | None = None,
        device: str = "auto",
        precision: str = "auto",
        allow_partial: bool = False,
    ) -> Predictor:
        """Read a base or merged checkpoint, and an adapter to put on it.

        Args:
            checkpoint: official file or transformers folder.
            adapter: PEFT directory or `.torch` file.
            image_size: (height, width) of the model's input; None: the adapter's or the
                checkpoint's own.
            device: "auto" is the GPU if there is one.
            precision: see the class.
            allow_partial: use what fits of an adapter that is incomplete.

        Raises:
            CheckpointError: the files are missing, damaged, or do not belong together.
            ConfigError: no such device, or a precision that it does not compute in.
        """
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise ConfigError(f"--device {device}: torch sees no CUDA device; use cpu or auto")
        choose_precision(precision, device)  # raises before anything slow
        model = load(checkpoint, image_size, adapter, allow_partial)
        model.to(device)
        return cls(model, precision)

    def set_image(self, rgb: NDArray[np.uint8]) -> None:
        """Encode a picture, uint8 [H, W, 3]; all later calls are about it."""
        if rgb.ndim != 3 or rgb.shape[2] != 3 or rgb.dtype != np.uint8:
            raise ValueError(f"expected uint8 [H, W, 3], not {rgb.dtype} {list(rgb.shape)}")
        with evaluating(self.model), autocast(self.device, self.precision):
            self._picture = rgb, encode_pictures(self.model, [rgb])

    def predict(
        self,
        points: ArrayLike | None = None,
        labels: ArrayLike | None = None,
        boxes: ArrayLike | None = None,
        mask_input: ArrayLike | None = None,
        multimask: bool = False,
    ) -> Prediction:
        """Masks of one or of N objects in the picture.

        A single click is ambiguous: three masks are predicted and the one with the best predicted
        IoU is returned. A box or several clicks give one mask.

        Args:
            points: [P, 2] clicks (x, y) on one object, or [N, P, 2]; original pixels.
            labels: 1 on the object, 0 beside it; shape [P] or [N, P]. None: all 1.
            boxes: (x0, y0, x1, y1) of one object, or [N, 4]; original pixels.
            mask_input: [N, h, w] `logits` of an earlier prediction.
            multimask: return all three candidates of each object.

        Raises:
            ValueError: no picture, no prompt, or shapes that do not go together.
        """
        rgb, features = self._seen()
        clicks, signs, corners = _prompt_arrays(points, labels, boxes)
        size, model_size = (rgb.shape[0], rgb.shape[1]), image_size(self.model)
        prompts = {
            "points": None if clicks is None else to_model_points(clicks, size, model_size),
            "labels": signs,
            "boxes": None if corners is None else to_model_boxes(corners, size, model_size),
            "mask_input": self._mask_prompt(mask_input),
        }
        given = {
            name: torch.as_tensor(values, device=self.device)
            for name, values in prompts.items()
            if values is not None
        }
        several = corners is not None or (clicks is not None and clicks.shape[1] > 1)
        count = len(next(iter(given.values())))
        parts = []
        with evaluating(self.model), autocast(self.device, self.precision):
            for start in range(0, count, OBJECTS_AT_ONCE):  # so that memory stays bounded
                rows = slice(start, start + OBJECTS_AT_ONCE)
                decoded = decode(
                    self.model,
                    features,
                    torch.zeros(count, dtype=torch.long, device=self.device)[rows],
                    **{name: values[rows] for name, values in given.items()},
                    multimask=multimask or not several,
                    stability=several and not multimask,
                )
                parts.append(decoded if multimask else _best(decoded))
            logits, scores, _ = (torch.cat(part) for part in zip(*parts, strict=True))
            masks = _full_size(logits, size)
        logits = logits.clamp(-LOGIT_LIMIT, LOGIT_LIMIT)
        result = Prediction(masks, scores.cpu().numpy(), logits.cpu().numpy())
        if multimask:
            return result
        return Prediction(result.masks[:, 0], result.scores[:, 0], result.logits[:, 0])

    def everything(self, grid: Grid | None = None, tile: int = 0) -> list[Instance]:
        """Find the picture's objects without prompts: see `automatic.segment`."""
        rgb, features = self._seen()
        size = (rgb.shape[0], rgb.shape[1])
        with evaluating(self.model), autocast(self.device, self.precision):
            if 0 < tile < max(size):
                return segment(self.model, rgb, grid, tile)
            return segment_features(self.model, features, size, grid or Grid())

    def _seen(self) -> tuple[NDArray[np.uint8], Features]:
        if self._picture is None:
            raise ValueError("call set_image first")
        return self._picture

    def _mask_prompt(self, mask_input: ArrayLike | None) -> NDArray[np.float32] | None:
        if mask_input is None:
            return None
        height, width = image_size(self.model)
        return np.asarray(mask_input, dtype=np.float32).reshape(-1, 1, height // 4, width // 4)


def _best(decoded: Decoded) -> Decoded:
    """The mask of each object with the highest predicted IoU."""
    best = decoded.iou.max(1, keepdim=True).values
    return Decoded(best_masks(decoded), best, decoded.object_score)


def _full_size(logits: torch.Tensor, size: tuple[int, int]) -> NDArray[np.bool_]:
    """Masks [N, M, H, W] at original resolution, a bounded number of them at a time."""
    chunk = max(1, UPSCALED_VALUES // (size[0] * size[1] * logits.shape[1]))
    parts = [(upscale_logits(part, size) > 0).cpu().numpy() for part in logits.split(chunk)]
    return np.concatenate(parts)


def _prompt_arrays(
    points: ArrayLike | None, labels: ArrayLike | None, boxes: ArrayLike | None
) -> tuple[NDArray[np.float32] | None, NDArray[np.int64] | None, NDArray[np.float32] | None]:
    """Prompts with their leading dimension of objects: [N, P, 2], [N, P], [N, 4].

    Raises:
        ValueError: nothing given, or shapes that do not go together.
    """
    clicks: NDArray[np.float32] | None = None
    signs: NDArray[np.int64] | None = None
    corners: NDArray[np.float32] | None = None
    if points is not None:
        clicks = np.asarray(points, dtype=np.float32)
        clicks = clicks[None] if clicks.ndim == 2 else clicks
        if clicks.ndim != 3 or clicks.shape[2] != 2 or 0 in clicks.shape:
            raise ValueError(f"points: expected [P, 2] or [N, P, 2], not {list(np.shape(points))}")
        given = np.ones(clicks.shape[:2]) if labels is None else np.asarray(labels)
        signs = np.atleast_2d(given).astype(np.int64)
        if signs.shape != clicks.shape[:2] or not np.isin(signs, (0, 1)).all():
            raise ValueError(
                f"labels: expected 0 or 1 for each of the {list(clicks.shape[:2])} points"
            )
    elif labels is not None:
        raise ValueError("labels without points")
    if boxes is not None:
        corners = np.atleast_2d(np.asarray(boxes, dtype=np.float32))
        if corners.ndim != 2 or corners.shape[1] != 4 or (corners[:, :2] > corners[:, 2:]).any():
            raise ValueError("boxes: expected (x0, y0, x1, y1) with x0 <= x1 and y0 <= y1")
    if clicks is None and corners is None:
        raise ValueError("give points, boxes, or both")
    if clicks is not None and corners is not None and len(clicks) != len(corners):
        raise ValueError(f"{len(clicks)} objects have points, but {len(corners)} have boxes")
    return clicks, signs, corners
