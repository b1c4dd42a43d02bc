"""Which modules of a model are adapted."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TypeAlias

from torch import nn

from lora_core.config import LoraConfig
from lora_core.errors import ConfigError, listing, near
from lora_core.layers import LoraLayer
from lora_core.mechanisms import kind_of

Roles: TypeAlias = Mapping[str, Sequence[str]]

_WILDCARDS = re.compile(r"[*?\[]")


def resolve(model: nn.Module, config: LoraConfig, roles: Roles | None = None) -> list[str]:
    """The full paths of the modules that `config` asks to adapt, in module order.

    An entry of `target_modules` or `exclude_modules` is, in this order,
    1. the name of a role, which stands for its patterns,
    2. `re:` and a regular expression for the whole path,
    3. a glob, if it has one of `*?[`: `*` stays within one dotted component, `**` crosses them,
    4. a full path, or the end of paths behind a dot, as in PEFT.
    Globs and expressions choose among the layers that can be adapted; a module that is *named* and
    cannot be adapted is an error. One string in place of a list is an expression for the whole
    path, as in PEFT. Exclusion wins, also over what lies inside an excluded module; so do
    `modules_to_save` and `last_blocks`. With an `nn.MultiheadAttention` comes its `out_proj`.

    Args:
        roles: role name -> patterns, supplied by a model's package.

    Raises:
        ConfigError: an entry that matches nothing, several things by accident, or something that
            cannot be adapted; the message has close names.
    """
    modules = adaptable_view(model)
    if callable(config.target_modules):
        chosen = _by_function(modules, config.target_modules)
    else:
        entries = _entries(config.target_modules)
        chosen = _by_entries(modules, entries, roles or {}, "target_modules", _supported)
    kept = _allowed(modules, config, roles or {})
    for path in list(chosen):
        if isinstance(modules[path], nn.MultiheadAttention):
            chosen.add(f"{path}.out_proj")
    paths = [path for path in modules if path in chosen and kept(path)]
    if not paths:
        raise ConfigError(
            f"target_modules matches {len(chosen)} modules, and exclude_modules, modules_to_save "
            f"and last_blocks leave none of them: {_some(chosen)}"
        )
    return _unique(modules, paths)


def matching(modules: Mapping[str, nn.Module], entry: str, roles: Roles | None = None) -> set[str]:
    """The paths that one entry names; see `resolve`.

    Raises:
        ConfigError: the entry is a full path and also the end of another, or no valid pattern.
    """
    if roles and entry in roles:
        return set().union(*(matching(modules, pattern) for pattern in roles[entry]))
    if entry.startswith("re:") or _WILDCARDS.search(entry):
        try:
            expression = re.compile(entry[3:]) if entry.startswith("re:") else glob(entry)
        except (re.error, RecursionError, OverflowError) as error:
            raise ConfigError(f"{entry[:200]!r} is no pattern: {error}") from None
        return {path for path in modules if expression.fullmatch(path)}
    ends = {path for path in modules if path.endswith(f".{entry}")}
    if entry in modules and ends:
        raise ConfigError(
            f"target {entry!r} is ambiguous: it is the path of a module and also the end of "
            f"{_some(ends)}. Write 're:{re.escape(entry)}' for the first alone, '**.{entry}' for "
            "all of them."
        )
    return ends | ({entry} & modules.keys())


def glob(pattern: str) -> re.Pattern[str]:
    """A glob over dotted paths as an expression: `**.` also matches nothing at all."""
    parts = re.split(r"(\*\*\.|\*\*|\*|\?|\[[^\]]+\])", pattern)
    wild = {"**.": r"(?:.*\.)?", "**": ".*", "*": r"[^.]*", "?": r"[^.]"}
    return re.compile(
        "".join(
            wild.get(part) or (part.replace("[!", "[^") if part[:1] == "[" else re.escape(part))
            for part in parts
        )
    )


def adaptable_view(model: nn.Module) -> dict[str, nn.Module]:
    """Path -> module without the root, and without the inside of adapters; every name of a shared
    module is here."""
    return {
        path: module
        for path, module in model.named_modules(remove_duplicate=False)
        if path and not any(part.startswith("lora_") for part in path.split("."))
    }


def _entries(value: list[str] | str) -> list[str]:
    return [f"re:{value}"] if isinstance(value, str) else list(value)


def _supported(module: nn.Module) -> bool:
    return kind_of(module) is not None


def _by_function(
    modules: Mapping[str, nn.Module], choose: Callable[[str, nn.Module], bool]
) -> set[str]:
    chosen = {path for path, module in modules.items() if choose(path, module)}
    if not chosen:
        raise ConfigError("the target_modules function chose no module")
    _refuse_unsupported(modules, chosen, "the target_modules function")
    return chosen


def _by_entries(
    modules: Mapping[str, nn.Module],
    entries: Sequence[str],
    roles: Roles,
    field: str,
    accepts: Callable[[nn.Module], bool],
) -> set[str]:
    chosen: set[str] = set()
    problems = []
    for entry in entries:
        found = matching(modules, entry, roles)
        if entry.startswith("re:") or entry in roles or _WILDCARDS.search(entry):
            named, found = found, {path for path in found if accepts(modules[path])}
            if named and not found:
                problems.append(
                    f"{field}: {entry!r} matches only modules that cannot be adapted: "
                    f"{_with_kinds(modules, named)}"
                )
                continue
        if not found:
            hint = _beyond(modules, entry) or _close(modules, entry, roles)
            problems.append(f"{field}: {entry!r} matches no module. {hint}")
        elif accepts is _supported:
            _refuse_unsupported(modules, found, f"{field}: {entry!r}")
        chosen |= found
    if problems:
        raise ConfigError(listing(problems))
    return chosen


def _refuse_unsupported(
    modules: Mapping[str, nn.Module], chosen: Collection[str], what: str
) -> None:
    wrong = [path for path in chosen if not _supported(modules[path])]
    if not wrong:
        return
    weights = (modules[path]._parameters.get("weight") for path in wrong)
    quantised = {str(w.dtype) for w in weights if w is not None and w.dtype.itemsize < 2}
    advice = "name the layers inside"
    if quantised:
        advice = f"these are {', '.join(sorted(quantised))}, so load the base in full precision"
    raise ConfigError(
        f"{what} names modules that cannot be adapted: {_with_kinds(modules, wrong)}. LoRA "
        f"changes a floating-point weight with two or more axes: {advice}."
    )


def _allowed(
    modules: Mapping[str, nn.Module], config: LoraConfig, roles: Roles
) -> Callable[[str], bool]:
    """Whether a path survives `exclude_modules`, `modules_to_save` and `last_blocks`."""
    entries = _entries(config.exclude_modules or [])
    out = _by_entries(modules, entries, roles, "exclude_modules", lambda module: True)
    out |= saved_modules(modules, config)
    for path, count in config.last_blocks.items():
        out |= _first_blocks(modules, path, count)
    return lambda path: not any(path == top or path.startswith(f"{top}.") for top in out)


def saved_modules(modules: Mapping[str, nn.Module], config: LoraConfig) -> set[str]:
    """The paths of `modules_to_save`."""
    entries = list(config.modules_to_save)
    return _by_entries(modules, entries, {}, "modules_to_save", lambda module: True)


def _first_blocks(modules: Mapping[str, nn.Module], path: str, count: int) -> set[str]:
    blocks = modules.get(path)
    if not isinstance(blocks, (nn.ModuleList, nn.Sequential)):
        lists = [p for p, m in modules.items() if isinstance(m, (nn.ModuleList, nn.Sequential))]
        what = "is no list of blocks" if blocks is not None else "is not in the model"
        raise ConfigError(f"last_blocks: {path!r} {what}. Lists: {_some(lists)}")
    if count > len(blocks):
        raise ConfigError(
            f"last_blocks: {path!r} has {len(blocks)} blocks, {count} were asked for "
            f"(1 to {len(blocks)})"
        )
    return {f"{path}.{name}" for name in list(blocks._modules)[: len(blocks) - count]}


def _unique(modules: Mapping[str, nn.Module], paths: Iterable[str]) -> list[str]:
    """Each module object once, under its first name in the model."""
    first: dict[int, str] = {}
    for path, module in modules.items():
        first.setdefault(id(module), path)
    return list(dict.fromkeys(first[id(modules[path])] for path in paths))


def _beyond(modules: Mapping[str, nn.Module], entry: str) -> str:
    """How many blocks there are, where an entry names one after the last."""
    parts = entry.removeprefix("re:").replace("\\.", ".").split(".")
    for position, part in enumerate(parts):
        if not part.isdecimal():
            continue
        parent = f".{'.'.join(parts[:position])}"
        for path, module in modules.items():
            blocks = isinstance(module, nn.ModuleList | nn.Sequential) and len(module)
            if blocks and f".{path}".endswith(parent) and int(part) >= blocks:
                return f"{path} has {blocks} blocks, 0 to {blocks - 1}"
    return ""


def _close(modules: Mapping[str, nn.Module], entry: str, roles: Roles) -> str:
    """The names that look like an entry: roles, last components, full paths."""
    layers = [path for path, m in modules.items() if _supported(m) or isinstance(m, LoraLayer)]
    names = [*roles, *dict.fromkeys(path.rsplit(".", 1)[-1] for path in layers), *layers]
    hint = near(entry.removeprefix("re:"), names)
    return hint or f"Layers of this model: {_some(layers)}"


def _some(paths: Collection[str], limit: int = 5) -> str:
    shown = ", ".join(sorted(paths)[:limit])
    return shown + (f" and {len(paths) - limit} more" if len(paths) > limit else "")


def _with_kinds(modules: Mapping[str, nn.Module], paths: Collection[str]) -> str:
    return _some([f"{path} ({type(modules[path]).__name__})" for path in paths])
