"""Pretrain the tiny base that sam2-lora carries, from random weights on generated shapes.

    python tools/pretrain_demo_bases.py sam2 --output runs/demo_base

A curriculum of four stages; each is a function of its seed and of the weights before it, so it can
be repeated alone (`--first_stage`). The end is an official-format file in half precision with its
config beside it, and its figures on shapes that no stage has shown. Under an hour on one CPU core.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lora_core.pictures.masks import trim
from sam2_lora import losses, metrics, names, official
from sam2_lora.config import Config
from sam2_lora.data import EvalRecord
from sam2_lora.demo_base import shapes
from sam2_lora.image import MEAN, STD, preprocess, upscale_logits
from sam2_lora.model import decode, encode, load
from sam2_lora.prompts import box_of, center_click

if TYPE_CHECKING:
    from transformers import Sam2Model

SIZE = 128  # pixels, side of the pictures
SEED = 20260  # of initial weights, pictures and prompts of training
VALIDATION_SEED = 1  # of the pictures that the log's figures are measured on
OBJECTS = 4  # prompts per picture
IMAGES = 4  # pictures per step
EMPTY_SHARE = 0.04  # of pictures that hold nothing, for the object score


@dataclass(frozen=True)
class Stage:
    """One leg of the curriculum: fresh AdamW, a warm-up, then a cosine from `lr` to `lr_end`.

    A stage may end before its cosine does: the next one goes on near that learning rate.
    """

    name: str
    steps: int
    lr: float
    lr_end: float
    level: shapes.Difficulty | None  # None: blank pictures, the prompt alone decides
    cosine: int = 0  # steps to `lr_end`; 0: the stage's own
    official_loss: bool = False  # as users' runs train: 20 focal + dice + iou + class, corrections


STAGES = (
    Stage("where", 1200, 5e-4, 5e-4, None),
    Stage("easy", 2500, 5e-4, 5e-4, shapes.EASY),
    Stage("full", 6750, 4e-4, 5e-5, shapes.FULL, cosine=10000),
    Stage("official", 3000, 2e-4, 5e-6, shapes.FULL, official_loss=True),
)
WARMUP = 100  # steps of each stage


# -- the network -------------------------------------------------------------------------------


def config_dict() -> dict[str, Any]:
    """Sam2Config of the tiny base: Hiera of width 24 with 1, 2, 3, 1 blocks, decoder width 128.

    The decoder cannot be narrower: its mask features have an eighth of its width.
    """
    width, channels = 128, [24, 48, 96, 192]
    return {
        "vision_config": {
            "backbone_config": {
                "model_type": "sam2_hiera_det_model",
                "hidden_size": channels[0],
                "num_attention_heads": 1,
                "image_size": [SIZE, SIZE],
                "blocks_per_stage": [1, 2, 3, 1],
                "embed_dim_per_stage": channels,
                "num_attention_heads_per_stage": [1, 2, 4, 8],
                "window_size_per_stage": [8, 4, 8, 4],
                "global_attention_blocks": [5],
                "window_positional_embedding_background_size": [8, 8],
            },
            "backbone_channel_list": channels[::-1],
            "backbone_feature_sizes": [[SIZE // s, SIZE // s] for s in (4, 8, 16)],
            "fpn_hidden_size": width,
        },
        "prompt_encoder_config": {"hidden_size": width, "image_size": SIZE},
        "mask_decoder_config": {
            "hidden_size": width,
            "mlp_dim": 512,
            "iou_head_hidden_dim": width,
        },
    }


def new_model(seed: int) -> Sam2Model:
    """A random `Sam2Model` that can learn from nothing.

    Three changes to transformers' initial state: PyTorch's own scales (0.02 starves narrow layers),
    one positional matrix for pictures and prompts (they are drawn apart), and cross attentions
    whose queries and keys start equal, so that they compare positions from the first step.
    """
    from transformers import Sam2Config, Sam2Model

    torch.manual_seed(seed)
    model = Sam2Model(Sam2Config(**config_dict()))
    for module in model.modules():
        reset = getattr(module, "reset_parameters", None)
        if callable(reset):
            reset()
    for name, module in model.named_modules():
        if name.endswith(("token_to_image", "image_to_token")):
            nn.init.orthogonal_(module.q_proj.weight, gain=1.6)
            module.k_proj.load_state_dict(module.q_proj.state_dict())
    matrix = model.prompt_encoder.shared_embedding.positional_embedding
    model.shared_image_embedding.positional_embedding.copy_(matrix)
    return model


# -- pictures and prompts ----------------------------------------------------------------------


class Pictures(Dataset):
    """Item i is a function of (seed, i): a picture, its masks, a click and a box for each."""

    def __init__(self, level: shapes.Difficulty | None, seed: int, count: int) -> None:
        self.level, self.seed, self.count = level, seed, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> dict[str, NDArray]:
        rng = np.random.default_rng((self.seed, i, 1))
        parts = blank(rng) if self.level is None else self.scene(rng, i, self.level)
        image, masks, points, boxes = parts
        pixels = ((image / 255 - MEAN) / STD).transpose(2, 0, 1).astype(np.float32)
        return {"pixels": pixels, "masks": masks, "points": points, "boxes": boxes}

    def scene(
        self, rng: np.random.Generator, i: int, level: shapes.Difficulty
    ) -> tuple[NDArray, ...]:
        """Shapes; each is asked for once before one is asked for again."""
        empty = level == shapes.FULL and rng.random() < EMPTY_SHARE
        image, masks = shapes.picture((self.seed, i, 0), shapes.EMPTY if empty else level, SIZE)
        if len(masks):
            order = np.concatenate([rng.permutation(len(masks)) for _ in range(OBJECTS)])
            masks = masks[order[:OBJECTS]]
        else:
            masks = np.zeros((OBJECTS, SIZE, SIZE), bool)
        points = np.stack([click(rng, mask) for mask in masks])
        return image, masks, points, np.stack([box(rng, mask) for mask in masks])


def blank(rng: np.random.Generator) -> tuple[NDArray, ...]:
    """A flat grey picture: a click asks for the disc around it, a box for itself filled.

    The masks are [OBJECTS, 2, S, S]: for the click and for the box.
    """
    y, x = np.mgrid[0:SIZE, 0:SIZE]
    points = rng.uniform(8, SIZE - 8, (OBJECTS, 2)).astype(np.float32)
    corner = rng.uniform(0, 0.7 * SIZE, (OBJECTS, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(14, 0.45 * SIZE, (OBJECTS, 2))], 1)
    boxes = boxes.clip(0, SIZE - 1).astype(np.float32)
    discs = [np.hypot(x - a, y - b) < 14 for a, b in points]
    filled = [(x >= a) & (y >= b) & (x <= c) & (y <= d) for a, b, c, d in boxes]
    return np.full((SIZE, SIZE, 3), 128, np.uint8), np.stack([discs, filled], 1), points, boxes


def click(rng: np.random.Generator, mask: NDArray[np.bool_]) -> NDArray[np.float32]:
    """A pixel (x, y) of the mask, every one equally likely; anywhere if the mask is empty."""
    ys, xs = np.nonzero(mask if mask.any() else np.ones_like(mask))
    k = rng.integers(len(ys))
    return np.array([xs[k], ys[k]], np.float32)


def box(rng: np.random.Generator, mask: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Bounding box (x0, y0, x1, y1); each side moves by up to a tenth of the box, at most 20 px."""
    ys, xs = np.nonzero(mask)
    if not len(ys):
        corner = rng.uniform(0, SIZE / 2, 2)
        return np.concatenate([corner, corner + rng.uniform(8, SIZE / 2, 2)]).astype(np.float32)
    edges = np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1], np.float32)
    reach = np.minimum(0.1 * np.tile(edges[2:] - edges[:2], 2), 20)
    return (edges + rng.uniform(-1, 1, 4) * reach).clip(0, SIZE).astype(np.float32)


# -- steps -------------------------------------------------------------------------------------


def early_step(
    model: Sam2Model, batch: dict[str, Tensor], stage: Stage, draw: torch.Generator
) -> Tensor:
    """Loss of a step that learns to see: one click or one box per object, no corrections.

    As in SAM 2 three masks answer a click and one answers a box; a fifth of the steps does the
    reverse, since inference falls back from the one mask to the three when it is unsure.
    """
    chance = torch.rand(4, generator=draw)  # two spare: the committed weights were drawn so
    use_box, reverse = bool(chance[0] < 0.5), bool(chance[1] < 0.2)
    owner = torch.arange(IMAGES).repeat_interleave(OBJECTS)
    targets = batch["masks"].flatten(0, 1)  # [N, S, S], or [N, 2, S, S] of a blank picture
    if stage.level is None:
        targets = targets[:, int(use_box)]
    decoded = decode(
        model,
        encode(model, batch["pixels"]),
        owner,
        points=None if use_box else batch["points"].flatten(0, 1)[:, None],
        boxes=batch["boxes"].flatten(0, 1) if use_box else None,
        multimask=reverse == use_box,
    )
    return early_loss(decoded.masks, decoded.iou, decoded.object_score, targets)


def early_loss(logits: Tensor, iou: Tensor, score: Tensor, targets: Tensor) -> Tensor:
    """3 BCE + dice of the best of M masks at half size + |iou - IoU| + BCE of the object score.

    BCE in place of 20 focal: its gradients are the larger ones while masks are still poor.
    """
    half = (SIZE // 2, SIZE // 2)
    x = F.interpolate(logits, half, mode="bilinear", align_corners=False)  # [N, M, S/2, S/2]
    t = F.adaptive_avg_pool2d(targets.float()[:, None], half).expand_as(x)
    p = x.sigmoid()
    bce = F.binary_cross_entropy_with_logits(x, t, reduction="none").mean((2, 3))
    dice = 1 - (2 * (p * t).sum((2, 3)) + 1) / (p.sum((2, 3)) + t.sum((2, 3)) + 1)
    true_iou = losses.mask_iou(x > 0, t > 0.5)
    present = targets.flatten(1).any(1)
    object_loss = (3 * bce + dice).min(1).values + (iou - true_iou).abs().mean(1)
    class_loss = F.binary_cross_entropy_with_logits(score[:, 0], present.float())
    return (object_loss * present).mean() + class_loss


def official_step(
    model: Sam2Model, batch: dict[str, Tensor], step: int, draw: torch.Generator
) -> Tensor:
    """Loss of a step as every user's run takes it: half of the objects by a click, half by a box,
    then up to four correction clicks with the previous mask as a prompt."""
    owner = torch.arange(IMAGES).repeat_interleave(OBJECTS)
    flat = {name: batch[name].flatten(0, 1) for name in ("masks", "points", "boxes")}
    by_click = torch.arange(len(owner)) % 2 == 0
    ones = torch.ones(int(by_click.sum()), 1, dtype=torch.int64)
    buckets = [
        {"points": flat["points"][by_click][:, None], "labels": ones},
        {"boxes": flat["boxes"][~by_click]},
    ]
    for bucket, chosen in zip(buckets, (by_click, ~by_click), strict=True):
        bucket |= {"image": owner[chosen], "targets": flat["masks"][chosen].to(torch.uint8)}
    clicks = (0, 0, 1, 2, 4)[int(torch.randint(5, (), generator=draw))]
    seeds = [(SEED, step, row) for row in range(IMAGES)]
    packed = {"pixel_values": batch["pixels"], "buckets": buckets, "seed": seeds}
    total, _ = losses.loss(model, packed, replace(RULES, correction_clicks=clicks))
    return total / (1 + clicks)


RULES = Config(precision="fp32")


# -- the run -----------------------------------------------------------------------------------


def run_stage(model: Sam2Model, index: int, folder: Path, workers: int) -> None:
    """Train one stage; its weights go to folder/stage-<index>.safetensors."""
    stage = STAGES[index]
    draw = torch.Generator().manual_seed(SEED + index)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01, foreach=True)
    pictures = Pictures(stage.level, SEED + index, stage.steps * IMAGES)
    began, recent = time.process_time(), []
    model.train()
    for step, batch in enumerate(DataLoader(pictures, IMAGES, num_workers=workers)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(stage, step)
        if stage.official_loss:
            loss = official_step(model, batch, step, draw)
        else:
            loss = early_step(model, batch, stage, draw)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        recent.append(loss.item())
        if (step + 1) % 500 == 0 or step + 1 == stage.steps:
            seconds = time.process_time() - began
            figures = {} if stage.level is None else score(model, validation(30))
            print(stage.name, step + 1, f"{np.mean(recent):.3f}", f"{seconds:.0f} s", figures)
            recent.clear()
            save_file(model.state_dict(), folder / f"stage-{index}.safetensors")


def learning_rate(stage: Stage, step: int) -> float:
    """Warm-up times cosine."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / (stage.cosine or stage.steps)))
    return (stage.lr_end + (stage.lr - stage.lr_end) * cosine) * min(1, (step + 1) / WARMUP)


# -- how good it is ----------------------------------------------------------------------------

Picture = tuple[NDArray, NDArray]  # image and masks, as shapes.picture returns them


def validation(count: int) -> Iterator[Picture]:
    """Pictures for the log; the card's come from `shapes.held_out`."""
    return (shapes.picture((VALIDATION_SEED, i, 0), shapes.FULL, SIZE) for i in range(count))


def score(model: Sam2Model, pictures: Iterable[Picture]) -> dict[str, float]:
    """Mean IoU per object by one point, a box, 3 and 5 correction clicks, and the box filled."""
    records: Any = (  # what an EvalSet yields
        EvalRecord(str(i), image, [trim(mask, (0, 0), mask.shape, "shape") for mask in masks], [])
        for i, (image, masks) in enumerate(pictures)
    )
    figures = metrics.evaluate(model, records, RULES)
    wanted = ("iou", "box_iou", "click3_iou", "click5_iou", "filled_box_iou", "objects")
    return {name: round(figures[name], 4) for name in wanted}


@torch.no_grad()
def obedience(model: Sam2Model, pictures: Iterable[Picture]) -> dict[str, float]:
    """Share of pairs of objects in a picture where swapping the prompts swaps the masks.

    A pair counts if each prompt's mask overlaps its own object more than the other one.
    """
    swapped: dict[str, list[bool]] = {"swap_click": [], "swap_box": []}
    for image, masks in pictures:
        features = encode(model, preprocess(image, (SIZE, SIZE))[None])
        rows = torch.zeros(len(masks), dtype=torch.int64)
        truth = torch.from_numpy(masks)
        points = torch.tensor([[center_click(mask).xy] for mask in masks], dtype=torch.float32)
        boxes = torch.from_numpy(np.stack([box_of(mask) for mask in masks]))
        by_click = decode(model, features, rows, points=points)
        by_box = decode(model, features, rows, boxes=boxes, multimask=False)
        for name, decoded in (("swap_click", by_click), ("swap_box", by_box)):
            guess = upscale_logits(losses.best_masks(decoded), (SIZE, SIZE)) > 0  # [N, 1, S, S]
            iou = losses.mask_iou(guess.expand(-1, len(masks), -1, -1), truth)  # [prompt, object]
            own = iou.diagonal()
            for a, b in itertools.combinations(range(len(masks)), 2):
                swapped[name].append(bool(own[a] > iou[a, b] and own[b] > iou[b, a]))
    return {name: round(float(np.mean(hits)), 4) for name, hits in swapped.items()}


def finish(model: Sam2Model, output: Path) -> None:
    """Write the base in half precision and measure the file, not the model in memory."""
    tensors = names.to_official(model.state_dict())
    path = output / "sam2_demo.safetensors"
    official.write_official(path, {name: tensor.half() for name, tensor in tensors.items()})
    path.with_suffix(".json").write_text(json.dumps(config_dict(), indent=2) + "\n")
    written = load(path)
    print("held-out shapes:", score(written, shapes.held_out(200)))
    print("swapped prompts:", obedience(written, shapes.held_out(200)))


def main() -> None:
    """Run the stages from `--first_stage` on, then write and measure the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("package", choices=["sam2"])
    parser.add_argument("--output", type=Path, required=True, help="folder for stages and result")
    parser.add_argument("--first_stage", type=int, default=0, help="continue from the one before")
    parser.add_argument("--workers", type=int, default=1, help="processes that paint pictures")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.output.mkdir(parents=True, exist_ok=True)
    model = new_model(SEED)
    if args.first_stage:
        model.load_state_dict(load_file(args.output / f"stage-{args.first_stage - 1}.safetensors"))
    for index in range(args.first_stage, len(STAGES)):
        run_stage(model, index, args.output, args.workers)
    finish(model, args.output)


if __name__ == "__main__":
    main()
