"""The table of what is adapted."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TypeAlias

from torch import nn

from lora_core.full_training import FullTensor
from lora_core.layers import AdapterSpec, LoraLayer
from lora_core.mechanisms import TiedLayer, WrappedLayer
from lora_core.report import table

HEADER = ("module", "kind", "mechanism", "r", "alpha", "parameters", "note")
SHARED = ("kind", "mechanism", "r", "alpha", "note")  # said once where all lines have the same
MAX_NAMES = 8  # of modules that share a line


@dataclass(frozen=True)
class Row:
    """One adapter of one module."""

    path: str
    kind: str
    mechanism: str
    r: int
    alpha: float
    parameters: int
    note: str = ""

    @property
    def alike(self) -> tuple[object, ...]:
        """What rows that share a line of the table have in common."""
        return (self.kind, self.mechanism, self.r, self.alpha, self.note)


@dataclass(frozen=True)
class Summary:
    """What is adapted. Printing it gives a table in which what is alike shares a line.

    Attributes:
        rows: one per adapted module and adapter, in module order.
        full: state-dict keys that are trained in full -> number of values.
        trainable, total: parameters that require gradients, and all.
    """

    rows: tuple[Row, ...]
    full: dict[str, int]
    trainable: int
    total: int

    def __str__(self) -> str:
        lines: list[tuple[object, ...]] = [
            (
                path + (f" x {len(group)}" if len(group) > 1 else ""),
                group[0].kind,
                group[0].mechanism,
                str(group[0].r),
                f"{group[0].alpha:g}",
                sum(row.parameters for row in group),
                group[0].note,
            )
            for path, group in grouped(self.rows)
        ]
        lines += [
            (path, "trained in full", "", "", "", count, "")
            for path, count in _by_module(self.full).items()
        ]
        same = _same(lines)
        shown = [place for place, name in enumerate(HEADER) if name not in same]
        text = table([HEADER[i] for i in shown], [[line[i] for i in shown] for line in lines])
        share = 100 * self.trainable / max(1, self.total)
        return (
            f"{text}\n{len(self.rows)} adapted modules{_facts(same)}, {self.trainable:,} of "
            f"{self.total:,} parameters train ({share:.2f} %)"
        )


def _same(lines: Sequence[Sequence[object]]) -> dict[str, object]:
    """Column -> what it has in all lines."""
    columns = dict(zip(HEADER, zip(*lines, strict=True), strict=False))
    return {
        name: columns[name][0] for name in SHARED if name in columns and len({*columns[name]}) == 1
    }


def _facts(same: Mapping[str, object]) -> str:
    """{"kind": "Linear", "r": "8"} -> " (Linear, r 8)"; what needs no word is left out."""
    words = [
        f"{name} {value}" if name in ("r", "alpha") else str(value)
        for name, value in same.items()
        if value not in ("", "wrap")
    ]
    return f" ({', '.join(words)})" if words else ""


def require_linears(
    summary: Summary, shapes: Sequence[tuple[int, int]], rank: int, what: str
) -> None:
    """Require adapters of one rank on Linears of these (in, out), r * (in + out) parameters each.

    Args:
        what: the setting that asked for them, for the message.

    Raises:
        RuntimeError: others were adapted, as after a change of names in the model's library;
            training would be worth nothing.
    """
    wanted = (len(shapes), rank * sum(map(sum, shapes)))
    if (len(summary.rows), summary.trainable) != wanted:
        raise RuntimeError(
            f"{what} adapted {len(summary.rows)} layers with {summary.trainable} trainable "
            f"parameters instead of {wanted[0]} with {wanted[1]}"
        )


def summarise(
    model: nn.Module,
    layers: Mapping[str, LoraLayer],
    full: Mapping[str, FullTensor],
    names: Sequence[str],
) -> Summary:
    """The table of the named adapters."""
    rows = []
    readers: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        if isinstance(module, TiedLayer):
            readers.setdefault(id(module.lora_owner), []).append(path)
    for path, layer in layers.items():
        for name in names:
            if name not in layer.lora_adapters:
                continue
            spec = layer.lora_adapters[name]
            notes = [f"adapter {name}"] if len(names) > 1 else []
            notes += _notes(spec, _is_called(model, path, layer), readers.get(id(layer), []))
            size = sum(p.numel() for p in layer.lora_parameters(name).values())
            kind = layer.lora_base_class.__name__
            rows.append(Row(path, kind, spec.mechanism, spec.r, spec.alpha, size, ", ".join(notes)))
    shown = {
        key: entry.tensor.numel() for key, entry in full.items() if entry.adapters & set(names)
    }
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    trainable = sum(size for size, flag in sizes if flag)
    return Summary(tuple(rows), shown, trainable, sum(size for size, _ in sizes))


def _notes(spec: AdapterSpec, is_called: bool, readers: Sequence[str]) -> list[str]:
    """What a reader of the table could not guess.

    Args:
        readers: the modules that share the weight, and so the adapter.
    """
    notes = []
    if spec.slices:
        notes.append("rows " + " ".join(f"{name}[{a}:{b}]" for name, a, b in spec.slices))
    if len(spec.weight_names) > 1:
        notes.append(" ".join(spec.weight_names))
    if spec.groups > 1:
        notes.append(f"{spec.groups} groups")
    if readers:
        notes.append(f"acts on {', '.join(readers)} too")
    if spec.beyond_peft or readers:
        notes.append("not for plain PEFT")
    if spec.use_dora:
        notes.append("DoRA")
    if spec.freeze_A:
        notes.append("A frozen")
    if spec.dropout and spec.kind == "embedding":
        notes.append("no dropout on tokens")
    elif spec.dropout and not is_called:
        notes.append("dropout of input channels")
    return notes


def _is_called(model: nn.Module, path: str, layer: LoraLayer) -> bool:
    """Whether the model calls the layer's fast forward, which can drop single elements of x."""
    parent = model.get_submodule(path.rpartition(".")[0])
    return isinstance(layer, WrappedLayer) and not isinstance(parent, nn.MultiheadAttention)


Group: TypeAlias = tuple[tuple[str, ...], list[Row]]  # components of the path, the rows


def grouped(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """Rows that differ only in numbers of their paths or in their last name together, as (path,
    rows).

    One component after the other, so that `a.{0..2}.b.{q,v}_proj` always means all six.
    """
    groups: list[Group] = [(tuple(row.path.split(".")), [row]) for row in rows]
    for place in range(max((len(parts) for parts, _ in groups), default=0)):
        alike: dict[tuple[object, ...], list[Group]] = {}
        for parts, members in groups:
            number = place < len(parts) and parts[place].isdigit()
            around = parts[:place] + parts[place + 1 :] if number else parts
            alike.setdefault((around, number, members[0].alike), []).append((parts, members))
        groups = [_joined(same, place) for same in alike.values()]
    return [(".".join(parts), members) for parts, members in _of_one_parent(groups)]


def _joined(groups: Sequence[Group], place: int) -> Group:
    parts = groups[0][0]
    if len(groups) > 1:
        span = _span([int(other[place]) for other, _ in groups])
        parts = (*parts[:place], span, *parts[place + 1 :])
    return parts, [row for _, members in groups for row in members]


def _of_one_parent(groups: Sequence[Group]) -> list[Group]:
    """Groups that differ only in the last name together; numbers stay on their own."""
    alike: dict[tuple[object, ...], list[Group]] = {}
    for parts, members in groups:
        named = parts[-1].isidentifier()
        key = (parts[:-1] if named else parts, named, members[0].alike)
        alike.setdefault(key, []).append((parts, members))
    joined: list[Group] = []
    for same in alike.values():
        if 1 < len(same) <= MAX_NAMES:
            parts = (*same[0][0][:-1], _braced([parts[-1] for parts, _ in same]))
            joined.append((parts, [row for _, members in same for row in members]))
        else:
            joined += same
    return joined


def _braced(names: Sequence[str]) -> str:
    """["q_proj", "v_proj"] -> "{q,v}_proj", ["fc1", "fc2"] -> "fc{1,2}": whole words and numbers
    are shared."""
    words = [re.findall(r"\d+|_|[^\d_]+", name) for name in names]
    front = _shared(words)
    rest = [each[len(front) :] for each in words]
    back = _shared([each[::-1] for each in rest])[::-1]
    inner = ["".join(each[: len(each) - len(back)]) for each in rest]
    if not all(inner):
        return "{" + ",".join(names) + "}"
    return "".join(front) + "{" + ",".join(inner) + "}" + "".join(back)


def _shared(lists: Sequence[Sequence[str]]) -> list[str]:
    """What all lists begin with."""
    columns = zip(*lists, strict=False)
    return [column[0] for column in takewhile(lambda column: len({*column}) == 1, columns)]


def _span(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 5] -> "{0..2,5}"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    texts = [f"{run[0]}..{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs]
    return "{" + ",".join(texts) + "}"


def _by_module(full: Mapping[str, int]) -> dict[str, int]:
    """Keys trained in full, added up by module."""
    sums: dict[str, int] = {}
    for key, count in full.items():
        path = key.rpartition(".")[0]
        sums[path] = sums.get(path, 0) + count
    return sums
