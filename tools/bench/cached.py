"""What `--cache_dir` saves in a training step of sam2-lora and sam3-lora.

    OMP_NUM_THREADS=1 python tools/bench/cached.py

A step reads a picture, a JPEG of 1600 x 1200 pixels, and runs forward and backward pass; the image
encoder is frozen. Without cache it decodes the picture and runs the encoder; with cache it reads
the features from the disk: digest of the picture's file, reading, digest of the entry. Both compute
the same loss: the program compares them bit for bit. Steps take turns; seconds are medians, the
ratio is the median of the rounds'. Adapters have no dropout, so that losses can be compared.

sam2-lora is SAM 2.1 tiny with 4 objects in the picture, adapters in the decoder. sam3-lora has the
published widths, 4 of 32 blocks of the vision transformer, 1 of 6 layers of the DETR encoder and
decoder each, 2 phrases, a smaller picture, and adapters behind the image encoder. The row of
phrases is what happens once at the beginning of a run, with 3 of 24 layers of the text encoder.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "5")

import numpy as np
import sam2_methods
import sam3_methods
import torch
from measure import interleaved, ratio
from PIL import Image
from results import Table, publish
from torch import Tensor

from lora_core.cache import FeatureCache
from lora_core.frozen import FrozenImages
from lora_core.pictures.files import read_image
from sam2_lora import frozen as sam2_frozen
from sam2_lora.image import as_tensor
from sam2_lora.placement import adapt as sam2_adapt
from sam3_lora import config as sam3_config
from sam3_lora import frozen as sam3_frozen
from sam3_lora import network, objective, scoring, transforms
from sam3_lora.placement import adapt as sam3_adapt

HEADER = ("what", "kept MB", "without cache s", "with cache s", "without / with", "loss of both")
GB = 1.0  # of the cache
PHRASES = 16
BASE = SimpleNamespace(fingerprint="random weights")


def write_picture(folder: Path) -> Path:
    """A JPEG of 1600 x 1200 pixels: smooth noise, as large as a photograph's file."""
    draw = np.random.default_rng(0)
    small = Image.fromarray(draw.integers(0, 256, (300, 400, 3), dtype=np.uint8))
    small.resize((1600, 1200), Image.Resampling.BICUBIC).save(folder / "picture.jpg", quality=90)
    return folder / "picture.jpg"


def compared(
    what: str, ways: dict[str, Callable[[], float]], entries: Path, args: argparse.Namespace
) -> list[object]:
    """A row of the table.

    Args:
        ways: each gives the loss, which must be that of the others.

    Raises:
        SystemExit: the losses differ.
    """
    losses = set()

    def noted(way: str) -> Callable[[], None]:
        return lambda: losses.add(ways[way]())

    seconds = interleaved({way: noted(way) for way in ways}, args.rounds, "cpu")
    if len(losses) > 1:
        sys.exit(f"{what}: the losses differ: {sorted(losses)}")
    kept = sum(path.stat().st_size for path in entries.glob("*/*.features")) / 1e6
    without, cached = seconds["without cache"], seconds["with cache"]
    medians = [statistics.median(each) for each in (without, cached)]
    return [what, kept, *medians, ratio(without, cached), f"{losses.pop():.9f}"]


def step(
    images: FrozenImages,
    picture: Path,
    pixels: Callable[[], Tensor],
    loss: Callable[[dict[str, Any]], Tensor],
) -> Callable[[], float]:
    """Forward and backward pass from the picture's file on."""

    def run() -> float:
        value = loss({"images": [images.item(picture, "as it is", pixels)]})
        value.backward()
        return value.item()

    return run


def sam2(picture: Path, folder: Path, args: argparse.Namespace) -> list[object]:
    """SAM 2.1 tiny, decoder alone."""
    case = sam2_methods.Case(size=args.sam2_size, objects=4, targets="decoder", dropout=0.0)
    weights = sam2_methods.random_weights(case)
    model = sam2_methods.frozen(case, weights)
    model.sam2_base = BASE
    sam2_adapt(model, case.config)
    model.train()
    batch = sam2_methods.step_batch(case, weights)
    given = {name: batch[name] for name in ("seed", "buckets")}
    places = {"without cache": None, "with cache": str(folder)}
    ways = {}
    for way, place in places.items():
        cfg = replace(case.config, cache_dir=place, cache_gb=GB)
        images = sam2_frozen.frozen_images(model, cfg, "fp32")
        assert images is not None
        loss = sam2_frozen.loss_of(cfg, images)
        ways[way] = step(
            images,
            picture,
            lambda: as_tensor(read_image(picture)),
            lambda seen, loss=loss: loss(model, given | seen)[0],
        )
    return compared(f"sam2 tiny, {case.size} px, decoder", ways, folder, args)


def sam3(masks: bool, picture: Path, folder: Path, args: argparse.Namespace) -> list[object]:
    """SAM 3 with adapters behind the image encoder."""
    case = sam3_methods.Case(size=args.sam3_size, stock=masks, dropout=0.0)
    weights = sam3_methods.random_weights(case)
    model = sam3_methods.frozen(case, weights)
    network.drop_text_encoder(model)
    model.sam3_base = BASE
    batch = sam3_methods.step_batch(case, weights)
    fields = ("boxes", "counts", "masks") if masks else ("boxes", "counts")
    targets = {name: getattr(batch["targets"], name) for name in fields}
    names = ("attention_mask", "text_ids", "image_ids", "text_features")
    given = {name: batch[name] for name in names}
    cfg = sam3_config.Config(
        lora=sam3_config.Lora(apply_to_vision_encoder=False, dropout=0.0),
        dataset=sam3_config.Dataset(enable_augmentation=False, resolution=str(case.size)),
        training=sam3_config.Training(enable_segmentation=masks),
    )
    sam3_adapt(model, cfg)
    model.train()
    caches = {"without cache": None, "with cache": FeatureCache(folder, int(GB * 1e9))}
    ways = {}
    for way, cache in caches.items():
        images = sam3_frozen.frozen_images(model, cfg, "fp32", cache)
        assert images is not None
        loss = objective.loss_of(cfg, None, images)

        def forward(seen: dict[str, Any], loss: Any = loss) -> Tensor:
            torch.manual_seed(0)  # the base's own dropout
            value: Tensor = loss(model, {**given, **seen, "targets": targets})[0]
            return value

        ways[way] = step(
            images,
            picture,
            lambda: transforms.place_picture(
                read_image(picture), transforms.filling(cfg.dataset.size)
            ),
            forward,
        )
    what = f"sam3, {case.size} px, {'masks' if masks else 'boxes'}"
    return compared(what, ways, folder, args)


def phrases(folder: Path, args: argparse.Namespace) -> list[object]:
    """SAM 3's text features at the beginning of a run."""
    case = sam3_methods.Case()
    model = sam3_methods.frozen(case, sam3_methods.random_weights(case))
    model.sam3_base = BASE
    cache = FeatureCache(folder, int(GB * 1e9))

    def words(texts: list[str]) -> tuple[Tensor, Tensor]:
        ids = torch.ones(len(texts), sam3_methods.TOKENS, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, text in enumerate(texts):
            ids[row, :6] = int(text) + 2
            mask[row, :6] = 1
        return ids, mask

    def encoded(cache: FeatureCache | None) -> float:
        texts = [str(number) for number in range(PHRASES)]
        with torch.no_grad():
            found = scoring.EncodedPhrases.one_by_one(model, words, texts, cache)
        return found.features.double().sum().item()

    ways = {"without cache": lambda: encoded(None), "with cache": lambda: encoded(cache)}
    row = compared(f"sam3, {PHRASES} phrases, once", ways, folder, args)
    return [*row[:-1], "equal"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sam2_size", type=int, default=1024, help="pixels of a side")
    parser.add_argument("--sam3_size", type=int, default=336, help="pixels of a side")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the table to this file too")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        picture = write_picture(folder)
        rows = [
            sam2(picture, folder / "sam2", args),
            sam3(False, picture, folder / "boxes", args),
            sam3(True, picture, folder / "masks", args),
            phrases(folder / "phrases", args),
        ]
    publish({"cached": Table(HEADER, rows)}, args.json)


if __name__ == "__main__":
    main()
