"""Check who imports whom, without importing anything: `python tools/imports.py`.

The rule: lora_core imports no model package; a model package imports lora_core and never another
model package; nobody imports from tools or tests; heavy libraries are reached only from the
modules named here; and inside a model package the arrows point one way, so a cycle is an error.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# In lora_core, the only modules and folders that may reach these libraries, even inside a function.
HOME_IN_CORE = {
    "transformers": {"quiet", "trainer", "training"},
    "accelerate": {"trainer", "training"},
    "peft": {"peft_bridge", "testing"},
    "tensorboard": {"report"},
}
# Modules that settings, --help and validation pass through: no heavy import at their top level.
LIGHT = {"", "__main__", "config", "errors", "guards", "report", "settings"}
HEAVY = {"torch", "transformers", "accelerate", "peft", "scipy", "skimage", "PIL"}


def imports(tree: ast.Module) -> Iterator[tuple[int, str, bool]]:
    """Yield (line, dotted name, whether at module level) for each import that runs."""
    skipped: set[ast.AST] = set()
    inside: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            skipped.update(ast.walk(node))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            inside.update(ast.walk(node))
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, node not in inside
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                yield node.lineno, "." * node.level, node not in inside
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}", node not in inside


def faults(
    package: str, packages: set[str], where: str, module: str, found: list[tuple[int, str, bool]]
) -> Iterator[str]:
    """Yield each import of a module (its dotted name below the package) that the rule forbids."""
    home = module.split(".")[0]
    for line, name, at_top in found:
        library = name.split(".")[0]
        if name.startswith("."):
            yield f"{where}:{line}: relative import; write the package's name"
        elif library in {"tools", "tests", "noxfile"}:
            yield f"{where}:{line}: imports {name}, which is no part of a package"
        elif library in packages and library not in {package, "lora_core"}:
            yield f"{where}:{line}: {package} imports {library}; what two need moves to lora_core"
        elif package == "lora_core" and home not in HOME_IN_CORE.get(library, {home}):
            homes = " and ".join(sorted(HOME_IN_CORE[library]))
            yield f"{where}:{line}: only {homes} may import {library}"
        elif at_top and home in LIGHT and library in HEAVY:
            yield f"{where}:{line}: {home} must stay light; import {library} where it is used"


def module_name(path: Path) -> str:
    """Dotted name of a file below its package; "" for the package itself."""
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def known(name: str, modules: set[str]) -> str | None:
    """The module that an imported name, dotted below the package, is or lies in."""
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name or None


def cycle(package: str, arrows: dict[str, set[str]]) -> Iterator[str]:
    """Yield the cycle among a package's own modules, if there is one."""
    try:
        TopologicalSorter(arrows).prepare()
    except CycleError as error:
        yield f"{package}: modules import each other in a circle: {' -> '.join(error.args[1])}"


def sources(root: Path) -> dict[str, Path]:
    """Name and folder of every importable package below `packages/`."""
    return {init.parent.name: init.parent for init in root.glob("packages/*/src/*/__init__.py")}


def check(root: Path = ROOT) -> list[str]:
    """All faults of all packages, as lines of text."""
    problems: list[str] = []
    packages = sources(root)
    for package, source in sorted(packages.items()):
        arrows: dict[str, set[str]] = {}
        files = {module_name(path.relative_to(source)): path for path in source.rglob("*.py")}
        for module, path in sorted(files.items()):
            found = list(imports(ast.parse(path.read_text("utf-8"), str(path))))
            where = path.relative_to(root).as_posix()
            problems += faults(package, set(packages), where, module, found)
            own = [name.partition(".")[2] for _, name, _ in found if name.startswith(f"{package}.")]
            reached = {known(name, set(files)) for name in own} - {None, module}
            # A folder's modules may be gathered by its __init__, and still use each other.
            arrows[module] = {
                name for name in reached if name and name != module.rpartition(".")[0]
            }
        problems += cycle(package, arrows)
    return problems


if __name__ == "__main__":
    problems = check()
    print("\n".join(problems) or f"imports: {len(sources(ROOT))} packages follow the rule")
    sys.exit(bool(problems))
