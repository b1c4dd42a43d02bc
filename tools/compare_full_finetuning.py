"""LoRA's share of the gain that full fine-tuning reaches, on a package's embedded default.

python tools/compare_full_finetuning.py isaac
python tools/compare_full_finetuning.py midi3d
python tools/compare_full_finetuning.py sam2 --output table.md
python tools/compare_full_finetuning.py sam3 --runs runs.jsonl
python tools/compare_full_finetuning.py scenesplat

Both methods train equally long on the same samples in the same order, at each of the same
learning rates and from the same seeds. A method's rate is the one with the best figure on the
validation samples; what is told are the figures of the last step at that rate on the test
samples, which play no part in any choice. `full_finetuning` has what differs between packages.

With `--runs` every finished run is kept in that file, and a later call with the same settings does
not repeat it: processes with some of the rates each may share the work.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

PACKAGES = ("isaac", "midi3d", "sam2", "sam3", "scenesplat")
METHODS = ("LoRA", "full")
ENOUGH = 5.0  # the full gain must be so many of its standard deviations over the seeds
Figures = dict[str, float]


class Comparison(Protocol):
    """What a package compares.

    Attributes:
        chooses: the figure, of validation data, that chooses a method's learning rate.
        compared: the figures, of test data, of whose gain LoRA's share is told.
        falling: the figures that are better when they are lower.
        about: a sentence on what the figures are.
        sample: what is trained on, in the singular.
    """

    chooses: str
    compared: tuple[str, ...]
    falling: frozenset[str]
    about: str
    sample: str

    def base(self) -> Figures:
        """Figures of the base, by caption, in the order of the table's columns."""

    def train(self, method: str, rate: float, seed: int) -> tuple[float, Figures]:
        """Train adapters ("LoRA") or every parameter ("full").

        Returns:
            The share of the parameters that were trained, 0..1, and the figures of the last step.
        """


@dataclass(frozen=True)
class Run:
    """One training: what was trained how, and what came of it."""

    method: str
    rate: float
    seed: int
    share_trained: float  # of the parameters, 0..1
    figures: Figures


def main(argv: Sequence[str] | None = None) -> int:
    """Train everything, print the table; 1 if a full gain is too small to compare with."""
    args = arguments(argv)
    with tempfile.TemporaryDirectory() as folder:
        comparison = prepare(args, Path(folder))
        base = comparison.base()
        print("base", base, flush=True)
        runs = train_all(comparison, args)
    text, valid = report(comparison, base, runs, args)
    print(f"\n{text}")
    if args.output:
        args.output.write_text(text + "\n", encoding="utf-8")
    return 0 if valid else 1


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    packages = parser.add_subparsers(dest="package", required=True)
    for name in PACKAGES:
        package = packages.add_parser(name)
        package.add_argument("--rates", type=float, nargs="+", help="learning rates")
        package.add_argument("--seeds", type=int, default=3, help="how many, from 0")
        package.add_argument("--steps", type=int)
        package.add_argument("--batch_size", type=int)
        package.add_argument("--rank", type=int, default=8)
        package.add_argument("--output", type=Path, help="write the table here as well")
        package.add_argument("--runs", type=Path, help="keep finished runs here (JSON lines)")
        importlib.import_module(f"full_finetuning.{name}").add_arguments(package)
    args = parser.parse_args(argv)
    if args.seeds < 2:
        parser.error(f"--seeds {args.seeds}: a deviation needs at least 2")
    return args


def prepare(args: argparse.Namespace, folder: Path) -> Comparison:
    """Write the data of a package into a folder, and get ready to train on them."""
    module = importlib.import_module(f"full_finetuning.{args.package}")
    comparison: Comparison = module.prepare(args, folder)
    return comparison


# -- training ----------------------------------------------------------------------------------


def train_all(comparison: Comparison, args: argparse.Namespace) -> list[Run]:
    """All runs, the LoRA ones first."""
    done = finished(args)
    runs = []
    for method in METHODS:
        for rate in args.rates:
            for seed in range(args.seeds):
                run = done.get((method, rate, seed))
                if run is None:
                    began = time.monotonic()
                    run = Run(method, rate, seed, *comparison.train(method, rate, seed))
                    print(f"{run} {time.monotonic() - began:.0f} s", flush=True)
                    keep(run, args)
                runs.append(run)
    return runs


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """What decides a run's figures beside its method, rate and seed."""
    aside = ("rates", "seeds", "output", "runs")
    return {name: value for name, value in vars(args).items() if name not in aside}


def finished(args: argparse.Namespace) -> dict[tuple[str, float, int], Run]:
    """The runs of `--runs` with these settings."""
    if args.runs is None or not args.runs.exists():
        return {}
    lines = [json.loads(line) for line in args.runs.read_text(encoding="utf-8").splitlines()]
    runs = [Run(**line["run"]) for line in lines if line["settings"] == settings_of(args)]
    return {(run.method, run.rate, run.seed): run for run in runs}


def keep(run: Run, args: argparse.Namespace) -> None:
    """Add a run to `--runs`."""
    if args.runs is not None:
        with args.runs.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"settings": settings_of(args), "run": asdict(run)}) + "\n")


# -- comparing ---------------------------------------------------------------------------------


def chosen(comparison: Comparison, runs: Sequence[Run], method: str) -> list[Run]:
    """The runs of a method at its best rate by a figure of the validation data, by seed."""
    by, by_rate = comparison.chooses, dict[float, list[Run]]()
    for run in runs:
        if run.method == method:
            by_rate.setdefault(run.rate, []).append(run)
    best = max(
        by_rate.values(),
        key=lambda group: sign(comparison, by) * statistics.fmean(r.figures[by] for r in group),
    )
    return sorted(best, key=lambda run: run.seed)


def sign(comparison: Comparison, name: str) -> int:
    """-1 for a figure that is better when it is lower, else 1."""
    return -1 if name in comparison.falling else 1


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation (of the sample)."""
    return statistics.fmean(values), statistics.stdev(values)


def report(
    comparison: Comparison, base: Figures, runs: Sequence[Run], args: argparse.Namespace
) -> tuple[str, bool]:
    """The markdown table with its conclusions, and whether all of them may be drawn."""
    from lora_core.report import plural

    groups = [chosen(comparison, runs, method) for method in METHODS]
    lines = [
        f"| method | trained parameters | learning rate | {' | '.join(base)} |",
        "|---" * (3 + len(base)) + "|",
        f"| base | 0 % | | {' | '.join(f'{value:.3f}' for value in base.values())} |",
        *(row(group, base) for group in groups),
        "",
        f"{args.steps} steps of {plural(args.batch_size, comparison.sample)}, {args.seeds} seeds, "
        f"learning rates {', '.join(f'{rate:g}' for rate in args.rates)}; {comparison.about}, "
        "± standard deviation over the seeds.",
    ]
    said = [share(name, sign(comparison, name), base, *groups) for name in comparison.compared]
    return "\n".join([*lines, *(text for text, _ in said)]), all(valid for _, valid in said)


def row(group: Sequence[Run], base: Figures) -> str:
    """A method's line of the table."""
    cells = [
        "{:.3f} ± {:.3f}".format(*spread([run.figures[name] for run in group])) for name in base
    ]
    first = group[0]
    trained = f"{100 * first.share_trained:.1f} %"
    return f"| {first.method} | {trained} | {first.rate:g} | {' | '.join(cells)} |"


def share(
    name: str, upward: int, base: Figures, lora: Sequence[Run], full: Sequence[Run]
) -> tuple[str, bool]:
    """What is concluded from a figure, and whether the full gain is large enough for that.

    Args:
        upward: 1 or -1, see `sign`.
    """
    gains = [[upward * (run.figures[name] - base[name]) for run in group] for group in (lora, full)]
    gain, deviation = spread(gains[1])
    text = (
        f"{name}: full fine-tuning gains {gain:.3f} ± {deviation:.3f}; the comparison asks for "
        f"{ENOUGH:g} deviations or more"
    )
    if gain < ENOUGH * deviation:
        return f"{text}. That is too little to compare with.", False
    # Seed by seed: both methods saw the same samples in the same order.
    mean, sd = spread([100 * a / b for a, b in zip(*gains, strict=True)])
    return f"{text}. LoRA reaches {mean:.0f} ± {sd:.0f} % of that gain.", True


if __name__ == "__main__":
    sys.exit(main())
