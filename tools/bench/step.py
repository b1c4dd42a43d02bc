"""What one training step of each package costs, by method: seconds, peak memory, kept bytes.

    OMP_NUM_THREADS=1 python tools/bench/step.py --rounds 5 --json docs/benchmarks/step.json
    python tools/bench/step.py sam3 --cases "fp32, 336, stock" --methods floor PEFT
    OMP_NUM_THREADS=1 python tools/bench/step.py isaac --set tokens=2048 layers=3
    python tools/bench/step.py sam2 midi3d --threads 2

Networks have the published widths, random weights, the guide's targets, rank and dropout, the
package's loss and AdamW. Scaled are, of

    sam2        nothing: the tiny variant, one object; more cases have 512 pixels in place of 1024
    sam3        depth: 4 of 32 blocks of the image encoder, 3 of 24 text layers, 1 of 6 detector
                layers; one picture, two phrases; more cases have 336 pixels in place of 1008
    scenesplat  nothing: the language model; a room of about 1,800 voxels
    midi3d      depth: 3 of 21 blocks; tokens of latents and pictures: a quarter; two instances
    isaac       depth: 2 of 28 layers, 2 of 27 of the vision tower; 4,096 of 151,936 words; one
                conversation of 1,024 tokens, 256 of a picture, 128 labels

A package's first case, in fp32 with the guide's settings, has all methods, the others have the
first three:

    floor         nothing is trained: the frozen network, where the gradient graph begins at the
                  outputs of the same target Linears (the earliest ones; behind them it exists
                  anyway). It keeps what any method needs that sends gradients to these layers.
    lora_core     the adapters of the package's `train`
    PEFT          `peft.get_peft_model` on the same network with the same targets, rank and dropout
    full          full fine-tuning (sam3: without the text encoder; isaac: without the vision tower;
                  scenesplat: statistics of batch norms stay)
    checkpointed  lora_core with gradient checkpointing (scenesplat: torch's, around each block)
    last blocks   lora_core, in the encoder (sam2, sam3, scenesplat), transformer (midi3d), decoder
                  (isaac) on the last quarter of the blocks only; what follows an encoder has its
                  adapters, what lies before the blocks has none
    cached        sam2: adapters of the decoder alone, the encoder's features are given.
                  isaac: the features of the vision tower are given
    uncached      sam3: the text encoder runs in every step. midi3d: CLIP, DINOv2 and the VAE's
                  encoder do, with a seventh of their depth and inputs scaled as the tokens. In all
                  other methods of the two their results are given

In the cases "stock" of sam3 PEFT's network runs `Sam3Model.forward`, text encoder included, as its
users have it. That gives the last decoder layer only, without one-to-many half, and always masks:
there all methods have the loss of just that, masks included.

The methods take turns in one process: a round is one step of each. Seconds are medians over the
rounds, ratios medians of each round's ratio; with one thread on the CPU they are the process' own
time. `kept` counts the storages saved for the backward pass at the end of the forward pass, each
once, parameters and the batch excluded. `peak` is the most that a step's tensors take beyond
weights and AdamW's state (weights' gradients included). Before anything is measured, the losses of
all methods in evaluation mode are compared.

Cases in half precision are left out on processors without bf16 instructions, where torch takes 100
times as long; `--cases` runs them anyway.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
from collections.abc import Mapping
from dataclasses import fields, replace
from importlib import import_module
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # it would write about every measured peak

import torch
from results import Table, fast_in_bf16, publish
from training_step import METHODS, contenders, measure, methods_of, ratio_table, step_table

PACKAGES = ("sam2", "sam3", "scenesplat", "midi3d", "isaac")


def sizes_of(case: Any) -> dict[str, type]:
    """The fields of a case that may be set, with their types."""
    kinds = {one.name: type(one.default) for one in fields(case) if one.name != "device"}
    return {name: kind for name, kind in kinds.items() if kind in (int, float, str)}


def resized(case: Any, sizes: Mapping[str, str], device: str) -> Any:
    """A case with these values in place of its own, as far as it has such fields."""
    kinds = sizes_of(case)
    try:
        values = {name: kinds[name](text) for name, text in sizes.items() if name in kinds}
    except ValueError as error:
        sys.exit(f"--set: {error}")
    return replace(case, **values, device=device)


def selected(package: Any, args: argparse.Namespace) -> dict[str, list[str]]:
    """Case -> methods that were asked for, or those that are usual."""
    usual = [
        name
        for name, case in package.CASES.items()
        if case.precision == "fp32" or fast_in_bf16(args.device)
    ]
    first = next(iter(package.CASES))
    found = {}
    for name in package.CASES:
        if name in (args.cases or usual):
            some = methods_of(package) if args.methods or name == first else METHODS
            found[name] = [method for method in some if method in (args.methods or some)]
    return {name: methods for name, methods in found.items() if methods}


def tables_of(name: str, package: Any, args: argparse.Namespace) -> dict[str, Table]:
    """Steps and ratios of one package."""
    results = {}
    for case, methods in selected(package, args).items():
        print(f"{name}, {case}: {', '.join(methods)}", file=sys.stderr, flush=True)
        whole = resized(package.CASES[case], args.set, args.device)
        results[case] = measure(contenders(package, whole, methods), args.rounds)
        gc.collect()  # networks hold themselves in circles
    if not args.cases and (rest := package.CASES.keys() - results.keys()):
        print(f"{name}: left out, for want of bf16 instructions: {', '.join(sorted(rest))}")
    if not results:
        return {}
    return {f"{name} steps": step_table(results), f"{name} ratios": ratio_table(results)}


def refuse_unknown(packages: Mapping[str, Any], args: argparse.Namespace) -> None:
    """Exit with a message if no package knows a name that was given."""
    some = [next(iter(package.CASES.values())) for package in packages.values()]
    known = {
        "cases": {case for package in packages.values() for case in package.CASES},
        "methods": {method for package in packages.values() for method in methods_of(package)},
        "set": {name for case in some for name in sizes_of(case)},
    }
    for option, names in known.items():
        for name in getattr(args, option) or ():
            if name not in names:
                sys.exit(f"--{option}: {name!r} is none of {', '.join(sorted(names))}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "packages", nargs="*", metavar="PACKAGE", help=f"of {', '.join(PACKAGES)}; default: all"
    )
    parser.add_argument("--cases", nargs="+", help="by name, as in the tables")
    parser.add_argument("--methods", nargs="+", help="in all of the cases")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="NAME=VALUE",
        help="numbers and words of the cases, wherever a package has them; see its Case",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="where to write the tables")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    if unknown := set(args.packages) - set(PACKAGES):
        parser.error(f"{', '.join(sorted(unknown))}: packages are {', '.join(PACKAGES)}")
    if wrong := [text for text in args.set if "=" not in text]:
        parser.error(f"--set {wrong[0]}: expected NAME=VALUE")
    args.set = dict(text.split("=", 1) for text in args.set)
    torch.set_num_threads(args.threads)
    packages = {name: import_module(f"{name}_methods") for name in args.packages or PACKAGES}
    refuse_unknown(packages, args)
    tables: dict[str, Table] = {}
    for name, package in packages.items():
        tables |= tables_of(name, package, args)
    publish(tables, args.json, args.device)


if __name__ == "__main__":
    main()
