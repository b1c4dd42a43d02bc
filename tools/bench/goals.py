"""What the benchmarks should show, and whether they do: one table from all results."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from results import Table

PACKAGES = ("sam2", "sam3", "scenesplat", "midi3d", "isaac")
STEP_TIME, STEP_KEPT = 0.85, 0.35  # of PEFT's, of what PEFT keeps above the floor
WIDE = 288  # features, from which on LoRA should not be slower than full fine-tuning

Find = Callable[[str, str], Table]  # file, table
Record = dict[str, object]  # a row by column


@dataclass(frozen=True)
class Value:
    """One figure and the most that it should be."""

    name: str
    value: float
    limit: float


def goals(find: Find) -> Table:
    """A row for each goal: in how many of its cases it is met, and the case farthest from it."""
    rows = [line(what, values) for what, values in _all(find)]
    return Table(["goal", "least favourable case", "cases met", "met"], rows)


def line(what: str, values: Sequence[Value]) -> list[str]:
    """A row of the table."""
    met = sum(one.value <= one.limit for one in values)
    worst = max(values, key=lambda one: one.value / one.limit)
    return [
        what,
        f"{worst.value:.2f} of {worst.limit:.2f} ({worst.name})",
        f"{met} of {len(values)}",
        "yes" if met == len(values) else "**no**",
    ]


def records(table: Table) -> list[Record]:
    """The rows by column."""
    return [dict(zip(table.header, row, strict=True)) for row in table.rows]


def number(record: Record, column: str) -> float:
    """An entry that is a number."""
    value = record[column]
    assert isinstance(value, float | int), (column, value)
    return float(value)


def _all(find: Find) -> Iterator[tuple[str, list[Value]]]:
    yield from _linear(find)
    dora = records(find("layers", "dora"))
    yield (
        "DoRA without dropout: time, of the floor",
        [Value(str(r["shape, rank"]), number(r, "lora_core p=0"), number(r, "goal")) for r in dora],
    )
    steps = [
        (name, row)
        for name in PACKAGES
        for row in guide(find, name)
        if row["method"] == "lora_core"
    ]
    yield (
        "a package's step: time, of PEFT's",
        [Value(name, number(row, "time / PEFT"), STEP_TIME) for name, row in steps],
    )
    yield (
        "a package's step: bytes above the floor, of PEFT's",
        [Value(name, number(row, "/ PEFT's"), STEP_KEPT) for name, row in steps],
    )
    yield (
        "both passes of a convolution in a stage of PT-v3, of forward passes",
        [
            Value(str(r["voxels x channels"]), number(r, "in a stage"), number(r, "goal"))
            for r in records(find("scenesplat_convolution", "convolution"))
        ],
    )
    yield (
        "`--help`, seconds of the processor",
        [
            Value(f"{r['package']} {r['slowest verb']}", number(r, "CPU s"), number(r, "goal"))
            for r in records(find("startup", "start-up"))
        ],
    )


def _linear(find: Find) -> Iterator[tuple[str, list[Value]]]:
    fresh, warm, threads = (
        records(find(file, "fp32")) for file in ("linear", "linear_warm", "linear_threads")
    )
    for p, goal in (("0", "goal"), ("0.05", "goal p=0.05")):
        yield (
            f"one Linear, dropout {p}, reused memory: time, of the floor",
            _against(warm, f"lora_core p={p}", goal),
        )
        yield (
            f"the same with fresh memory, dropout {p}",
            _against(fresh, f"lora_core p={p}", goal),
        )
    runs = {"reused memory": warm, "fresh memory": fresh, "all threads, fresh memory": threads}
    for what, rows in runs.items():
        yield (
            f"one Linear never slower than PEFT, {what}",
            [*_against(rows, "lora_core p=0", "PEFT p=0"),
             *_against(rows, "lora_core p=0.05", "PEFT p=0.05")],
        )  # fmt: skip
        wide = [row for row in rows if _sizes(row)[1] >= WIDE]
        yield (
            f"nor than full fine-tuning from {WIDE} features on, dropout 0, {what}",
            _against(wide, "lora_core p=0", "full"),
        )
    small = records(find("linear_small", "fp32"))
    yield (
        "a small Linear never slower than PEFT",
        [*_against(small, "lora_core p=0", "PEFT p=0"),
         *_against(small, "lora_core p=0.05", "PEFT p=0.05")],
    )  # fmt: skip
    kept = records(find("linear", "fp32 kept"))
    yield (
        "one Linear: kept bytes, of x",
        [
            Value(str(row["shape, rank"]), number(row, f"lora_core p={p}"), _least_kept(row))
            for row in kept
            for p in ("0", "0.05")
        ],
    )
    shared = [r for r in records(find("linear", "shared")) if r["goal"] != "-"]
    yield (
        "three Linears on one x, dropout 0.05: kept bytes, of x",
        [Value(str(r["shape, rank"]), number(r, "kept, x"), number(r, "goal")) for r in shared],
    )


def _against(rows: Sequence[Record], column: str, limit: str) -> list[Value]:
    return [
        Value(str(row["shape, rank"]), number(row, column), number(row, limit))
        for row in rows
        if row[limit] != "-"
    ]


def _sizes(row: Record) -> tuple[int, int, int]:
    """Rows, input features and rank of a shape such as 4096x576-1728,8."""
    rows, rest = str(row["shape, rank"]).split("x")
    return int(rows), int(rest.split("-")[0]), int(rest.split(",")[1])


def _least_kept(row: Record) -> float:
    """x and h, which have di and r features; the results have five digits."""
    _, di, r = _sizes(row)
    return (1 + r / di) * 1.0001


def guide(find: Find, package: str) -> list[Record]:
    """The methods in the first case of a package's steps, the guide's settings."""
    rows = records(find(f"step_{package}", f"{package} ratios"))
    return [row for row in rows if row["case"] == rows[0]["case"]]
