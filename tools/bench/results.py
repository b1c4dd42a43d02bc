"""The results of a benchmark: tables with what they were measured on, as JSON and as Markdown.

    publish({"fp32": Table(header, rows)}, args.json)

`docs/benchmarks/NAME.json` holds them for `page.py`, which puts them into docs/benchmarks.md.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from measure import markdown

VERSIONS = ("torch", "transformers", "peft", "diffusers", "accelerate", "spconv")
SETTINGS = ("OMP_NUM_THREADS", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_")  # of the environment
INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")  # that decide how fast products are


@dataclass(frozen=True)
class Table:
    """Columns by name, and rows of numbers and texts."""

    header: Sequence[str]
    rows: Sequence[Sequence[object]]

    def __str__(self) -> str:
        return markdown(self.header, self.rows)


@dataclass(frozen=True)
class Results:
    """Tables of one program, and what they were measured on.

    Attributes:
        tables: by a name that the page asks for.
        machine: processor, its cores and the instructions that matter, or the name of the GPU.
        versions: of Python and of the packages that are installed.
        threads: that torch used. allocator: "fresh", or "warm" where arrays reuse memory.
    """

    command: str
    tables: dict[str, Table]
    machine: str
    versions: dict[str, str]
    threads: int
    allocator: str
    date: str = field(default_factory=lambda: date.today().isoformat())

    @classmethod
    def read(cls, path: Path) -> Results:
        """What `publish` wrote."""
        content = json.loads(path.read_text())
        tables = {name: Table(**table) for name, table in content.pop("tables").items()}
        return cls(tables=tables, **content)


def publish(tables: Mapping[str, Table], file: Path | None, device: str = "cpu") -> None:
    """Print tables, and write them to `file` together with machine, versions and command."""
    print("\n" + "\n\n".join(f"{name}\n\n{table}" for name, table in tables.items()))
    if file is None:
        return
    import torch

    results = Results(
        command=command(),
        tables={name: rounded(table) for name, table in tables.items()},
        machine=machine(device),
        versions={"python": platform.python_version(), **installed()},
        threads=torch.get_num_threads(),
        allocator="warm" if os.environ.get("MALLOC_MMAP_MAX_") == "0" else "fresh",
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(asdict(results), indent=1)
    # A row to a line, as a reader of changes wants it.
    text = re.sub(r"\[\n\s+([^\[\]]*?)\n\s+\]", lambda row: _in_one_line(row[1]), text)
    file.write_text(text + "\n")


def _in_one_line(entries: str) -> str:
    return "[" + re.sub(r"\n\s+", " ", entries) + "]"


def command() -> str:
    """How to run this program again from the repository's root, whatever it was run from."""
    program, *words = sys.argv
    if "--json" in words:
        where = words.index("--json")
        del words[where : where + 2]
    settings = [f"{name}={os.environ[name]}" for name in SETTINGS if name in os.environ]
    return shlex.join([*settings, "python", f"tools/bench/{Path(program).name}", *words])


def rounded(table: Table) -> Table:
    """The table with five digits of each number, more than any measurement has."""
    rows = [[float(f"{v:.5g}") if isinstance(v, float) else v for v in row] for row in table.rows]
    return Table(table.header, rows)


def fast_in_bf16(device: str) -> bool:
    """Whether the device has instructions for products in bf16; without, some take 100 times."""
    if device == "cuda":
        return True
    facts = processor()
    found = {*facts.get("flags", "").split(), *facts.get("Features", "").split()}
    return not found.isdisjoint({"avx512_bf16", "amx_bf16", "bf16"})


def processor() -> dict[str, str]:
    """What Linux says about the last processor core; {} elsewhere."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    return dict(line.replace("\t", "").split(": ", 1) for line in lines if ": " in line)


def machine(device: str) -> str:
    """One line about what computes."""
    if device == "cuda":
        import torch

        return torch.cuda.get_device_name()
    facts = processor()
    known = [name for name in INSTRUCTIONS if name in facts.get("flags", "").split()]
    return f"{facts.get('model name', 'CPU')}, {os.cpu_count()} cores, {' '.join(known)}"


def installed() -> dict[str, str]:
    """Versions of the packages that are compared."""
    found = {}
    for name in VERSIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
