"""docs/benchmarks.md from the results in docs/benchmarks: tables, their origin, goals, a picture.

    python tools/bench/page.py
    python tools/bench/page.py --check

The page holds, for each table, a pair of lines

    <!-- table: linear/fp32 -->
    <!-- end -->

between which the table `fp32` of docs/benchmarks/linear.json is put, with a line that says on what
and how it was measured. `<!-- goals -->` stands for the table of goals. `--check` changes nothing
and fails if the page is not what the results say; it needs no package at all.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from goals import PACKAGES, goals, guide, number, records
from results import Results, Table

DOCS = Path(__file__).resolve().parent.parent.parent / "docs"
PAGE, RESULTS, PICTURE = DOCS / "benchmarks.md", DOCS / "benchmarks", DOCS / "benchmarks.png"
MARKED = re.compile(r"<!-- (?:table: (?P<file>[\w.]+)/(?P<table>[^\n]+?)|goals) -->\n")
PLACE = re.compile(rf"(?P<start>{MARKED.pattern})(?P<filling>.*?)(?P<end><!-- end -->\n)", re.S)
MEMORY = {"fresh": "fresh memory", "warm": "reused memory"}


@cache
def read(file: str) -> Results:
    """One program's results.

    Raises:
        SystemExit: there are none.
    """
    path = RESULTS / f"{file}.json"
    if not path.exists():
        sys.exit(f"docs/benchmarks.md needs docs/benchmarks/{file}.json: run `nox -s bench`")
    return Results.read(path)


def find(file: str, table: str) -> Table:
    """One table.

    Raises:
        SystemExit: there is none of this name.
    """
    tables = read(file).tables
    if table not in tables:
        known = ", ".join(tables)
        sys.exit(f"docs/benchmarks.md: docs/benchmarks/{file}.json has no {table!r}, but {known}")
    return tables[table]


def origin(results: Results) -> str:
    """One line: how to measure it again, on what, with what, and when it was measured."""
    threads = "1 thread" if results.threads == 1 else f"{results.threads} threads"
    versions = ", ".join(f"{name} {version}" for name, version in results.versions.items())
    facts = (results.machine, threads, MEMORY[results.allocator], versions, results.date)
    return f"<sub>`{results.command}` – {'; '.join(facts)}</sub>"


def filled(text: str) -> str:
    """The page with all tables.

    Raises:
        SystemExit: there is no such table, or a place has no end.
    """

    def fill(place: re.Match[str]) -> str:
        if place["file"] is None:
            content = str(goals(find))
        else:
            table = find(place["file"], place["table"])
            content = f"{table}\n\n{origin(read(place['file']))}"
        return f"{place['start']}\n{content}\n\n{place['end']}"

    for place in PLACE.finditer(text):
        if MARKED.search(place["filling"]):
            sys.exit(f"docs/benchmarks.md: {place['start'].strip()} has no `<!-- end -->`")
    if len(MARKED.findall(text)) != text.count("<!-- end -->\n"):
        sys.exit("docs/benchmarks.md: as many `<!-- end -->` are needed as there are places")
    return PLACE.sub(fill, text)


def panels() -> Iterator[tuple[str, list[tuple[str, dict[str, float]]]]]:
    """Title and rows of each part of the picture: name -> ratio to the floor by method."""
    methods = {"full fine-tuning": "full", "PEFT": "PEFT p=0.05", "lora_core": "lora_core p=0.05"}
    rows = [
        (
            f"{r['of']}: {r['shape, rank']}",
            {name: number(r, column) for name, column in methods.items()},
        )
        for r in records(find("linear", "fp32"))
    ]
    yield "one Linear, forward and backward, dropout 0.05", rows
    of_method = {"full": "full fine-tuning", "PEFT": "PEFT", "lora_core": "lora_core"}
    rows = [
        (
            f"{package}-lora",
            {
                of_method[str(row["method"])]: number(row, "time / floor")
                for row in guide(find, package)
                if row["method"] in of_method
            },
        )
        for package in PACKAGES
    ]
    yield "one training step, the guide's settings", rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="fail if the page is out of date")
    args = parser.parse_args()
    before = PAGE.read_text()
    after = filled(before)
    if args.check:
        if after != before:
            sys.exit("docs/benchmarks.md is not what docs/benchmarks/*.json say: "
                     "run `python tools/bench/page.py`")  # fmt: skip
        return
    PAGE.write_text(after)
    from dot_plot import draw

    draw("time, in units of the frozen layer's or network's (the floor)", list(panels()), PICTURE)
    print(f"wrote {PAGE.relative_to(DOCS.parent)} and {PICTURE.relative_to(DOCS.parent)}")


if __name__ == "__main__":
    main()
