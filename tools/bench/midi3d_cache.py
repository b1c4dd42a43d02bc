"""What the cache of the frozen encoders saves in a training step of midi3d-lora.

    python tools/bench/midi3d_cache.py --flops
    OMP_NUM_THREADS=1 python tools/bench/midi3d_cache.py

With `--flops` the operations are counted at the released sizes, from the modules themselves, on
tensors without values: products of matrices, convolutions and attention, two for a multiplication
with its addition; the backward pass of attention as the five products that it needs. A row is an
instance; without cache it costs the step and the encoders.

Without it one instance is encoded and trained, everything an eighth as wide at full depth, with a
quarter of the latent tokens and points and pictures of half the side. Seconds are medians of the
process' own CPU time, in fp32. `points` is the farthest point sampling, which has no products of
matrices, and `pictures` the preprocessing of the pictures.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "5")

import numpy as np
import torch
from measure import timed
from midi3d_methods import (
    PATCH,
    Case,
    adapted_skeleton,
    base,
    build,
    clip_model,
    dino_model,
    loss_of,
    random_batch,
    vae_encoder,
)
from results import Table, publish
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from training_step import Contender
from transformers.initialization import no_init_weights

from midi3d_lora.conditioning.pixel_values import PictureSettings, mask_values, pixel_values
from midi3d_lora.vae.farthest_points import choose_query_points

TERA = 1e12


@dataclass(frozen=True)
class Sizes:
    """Of everything.

    Attributes:
        narrower: what the released channels are divided by.
        points: of an instance. side, clip_side: of the pictures that the two encoders see.
    """

    narrower: int = 1
    tokens: int = 2048
    points: int = 20480
    side: int = 512
    clip_side: int = 224

    @property
    def picture_tokens(self) -> int:
        return 1 + (self.side // PATCH) ** 2

    def case(self, instances: int = 1, checkpointing: bool = False) -> Case:
        return Case(
            width=2048 // self.narrower, layers=21, instances=instances, tokens=self.tokens,
            picture_tokens=self.picture_tokens, checkpointing=checkpointing, dropout=0.0,
        )  # fmt: skip


SCALED = Sizes(narrower=8, tokens=512, points=5120, side=256, clip_side=112)


def encoders(sizes: Sizes) -> dict[str, Callable[[], Any]]:
    """What is encoded of one instance, by name."""
    narrower = sizes.narrower
    tower, eye = clip_model(sizes.clip_side, narrower), dino_model(narrower)
    vae = vae_encoder(narrower)
    surface = torch.randn(1, sizes.points, 6)
    chosen = surface[:, : sizes.tokens]
    instance = torch.randn(1, 3, sizes.clip_side, sizes.clip_side)
    seven = torch.randn(1, 7, sizes.side, sizes.side)

    def latents() -> Tensor:
        return vae.quant(vae.encoder(vae._features(chosen), vae._features(surface)))

    return {
        "CLIP": lambda: tower(instance).image_embeds,
        "DINOv2": lambda: eye(seven).last_hidden_state,
        "VAE": latents,
    }


# -- operations ------------------------------------------------------------------------------------


def operations(run: Callable[[], Any]) -> float:
    """Floating point operations of `run`, in units of 10^12."""
    aten = torch.ops.aten

    def attention(query: Any, key: Any, value: Any, *rest: Any, **more: Any) -> int:
        return sdpa_flop_count(query, key, value)

    def attention_backward(grad: Any, query: Any, key: Any, value: Any, *r: Any, **m: Any) -> int:
        return sdpa_backward_flop_count(grad, query, key, value)

    on_cpu = {
        aten._scaled_dot_product_flash_attention_for_cpu: attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
    }
    counter = FlopCounterMode(display=False, custom_mapping=on_cpu)
    with counter:
        run()
    return counter.get_total_flops() / TERA


def step_operations(case: Case) -> float:
    """Of forward and backward pass of all rows together."""
    model, batch = adapted_skeleton(case), random_batch(case)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        return operations(lambda: loss_of(model, batch, case).backward())


def counted() -> dict[str, Table]:
    """Tables of the released sizes."""
    sizes = Sizes()
    with FakeTensorMode(), no_init_weights(), torch.no_grad():
        parts = {name: operations(run) for name, run in encoders(sizes).items()}
    encoded = sum(parts.values())
    rows = []
    for instances in (1, 4, 7):
        for checkpointing in (False, True):
            step = step_operations(sizes.case(instances, checkpointing)) / instances
            ratio = (step + encoded) / step
            rows.append([instances, "yes" if checkpointing else "no", step, encoded, ratio])
    header = ["instances of the scene", "checkpointing", "step", "encoders", "without / with cache"]
    return {
        "encoders": Table(["encoder", "10^12 operations"], list(parts.items())),
        "operations": Table(header, rows),
    }


# -- seconds ---------------------------------------------------------------------------------------


def measured(rounds: int) -> dict[str, Table]:
    """A table of the scaled sizes."""
    sizes = SCALED
    case = sizes.case()
    batch = random_batch(case)
    model = build("lora_core", case, base(case).state_dict())
    step = Contender(model, lambda net: loss_of(net, batch, case), "cpu")
    picture = np.random.default_rng(0).integers(0, 255, (512, 512, 3), dtype=np.uint8)
    small, large = settings(sizes.clip_side), settings(sizes.side)

    def pictures() -> None:
        pixel_values(picture, small)
        pixel_values(picture, large)
        pixel_values(picture, large)
        mask_values(picture[..., 0], large)

    surface = torch.randn(1, sizes.points, 6)
    parts = {
        **encoders(sizes),
        "points": lambda: choose_query_points(surface, sizes.tokens, 0),
        "pictures": pictures,
    }
    step.step()
    seconds: dict[str, list[float]] = {name: [] for name in ("step", *parts)}
    for _ in range(rounds):
        seconds["step"].append(sum(step.step()))
        with torch.no_grad():
            for name, run in parts.items():
                seconds[name].append(timed(run, "cpu")[0])
    found = {name: statistics.median(each) for name, each in seconds.items()}
    ratio = sum(found.values()) / found["step"]
    table = Table([*found, "without / with cache"], [[*found.values(), ratio]])
    return {"seconds": table}


def settings(side: int) -> PictureSettings:
    """How a picture becomes square pixels for an encoder."""
    crop = (("height", side), ("width", side))
    return PictureSettings(size=(("shortest_edge", side),), crop_size=crop)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--flops", action="store_true", help="count at the released sizes")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the tables to this file too")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    publish(counted() if args.flops else measured(args.rounds), args.json)


if __name__ == "__main__":
    main()
