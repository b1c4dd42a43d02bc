"""How long the commands take to say what they offer: `--help` of every verb of every package.

    python tools/bench/startup.py
    python tools/bench/startup.py sam2-lora --runs 11

Each is a process of its own, as in a terminal; medians over the runs after one that warms up.
`s` passes on the clock, `CPU s` is the time of the processor, which other work disturbs less.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

from results import Table, publish

PACKAGES = ("sam2-lora", "sam3-lora", "scenesplat-lora", "midi3d-lora", "isaac-lora")
GOAL = 2.0  # seconds


def run(words: list[str]) -> tuple[float, float]:
    """Seconds of the clock and of the processor that a process takes.

    Raises:
        SystemExit: it fails.
    """
    clock, before = time.perf_counter(), os.times()
    done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True)
    after = os.times()
    if done.returncode:
        sys.exit(f"{' '.join(words)} failed:\n{done.stderr}")
    cpu = sum(getattr(after, k) - getattr(before, k) for k in ("children_user", "children_system"))
    return time.perf_counter() - clock, cpu


def medians(words: list[str], runs: int) -> list[float]:
    """Of both times."""
    run(words)
    times = [run(words) for _ in range(runs)]
    return [statistics.median(each) for each in zip(*times, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("packages", nargs="*", metavar="PACKAGE", help="default: all")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the tables to this file too")
    args = parser.parse_args()
    every, slowest = [], []
    for package in args.packages or PACKAGES:
        module = package.replace("-", "_")
        verbs = list(import_module(f"{module}.__main__").COMMANDS)
        own = [package, *medians([module, "--help"], args.runs)]
        found = [
            [f"{package} {verb}", *medians([module, verb, "--help"], args.runs)] for verb in verbs
        ]
        last = max(found, key=lambda row: row[1])
        every += [own, *found]
        slowest.append([package, own[1], last[0].split()[1], last[1], last[2], GOAL])
        print(*slowest[-1], flush=True)
    header = ["package", "--help, s", "slowest verb", "its --help, s", "CPU s", "goal"]
    tables = {
        "start-up": Table(header, slowest),
        "every command": Table(["--help of", "s", "CPU s"], every),
    }
    publish(tables, args.json)


if __name__ == "__main__":
    main()
