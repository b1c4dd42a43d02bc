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
# In lora_core, the only modules that may reach these libraries, even inside a function.
HOME_IN_CORE = {
    "transformers": {"trainer", "training_arguments", "training_flow"},
    "accelerate": {"trainer", "training_arguments", "training_flow"},
    "peft": {"peft_bridge", "testing"},
    "tensorboard": {"report"},
}
# Modules that settings, --help and validation pass through: no heavy import at their top level.
LIGHT = {"__init__", "__main__", "config", "errors"}
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
    package: str, packages: set[str], path: Path, found: list[tuple[int, str, bool]]
) -> Iterator[str]:
    """Yield each import of this file that the rule forbids."""
    where = "/".join(path.parts[path.parts.index("packages") :])
    module = "testing" if path.parent.name == "testing" else path.stem
    for line, name, at_top in found:
        library = name.split(".")[0]
        if name.startswith("."):
            yield f"{where}:{line}: relative import; write the package's name"
        elif library in {"tools", "tests", "noxfile"}:
            yield f"{where}:{line}: imports {name}, which is no part of a package"
        elif library in packages and library not in {package, "lora_core"}:
            yield f"{where}:{line}: {package} imports {library}; what two need moves to lora_core"
        elif package == "lora_core" and module not in HOME_IN_CORE.get(library, {module}):
            homes = " and ".join(sorted(HOME_IN_CORE[library]))
            yield f"{where}:{line}: only {homes} may import {library}"
        elif at_top and path.stem in LIGHT and library in HEAVY:
            yield f"{where}:{line}: {path.stem} must stay light; import {library} where it is used"


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
        modules = {path.stem for path in source.glob("*.py")}
        for path in sorted(source.rglob("*.py")):
            found = list(imports(ast.parse(path.read_text("utf-8"), str(path))))
            problems += faults(package, set(packages), path, found)
            own = {name.split(".")[1] for _, name, _ in found if name.startswith(f"{package}.")}
            arrows[path.stem] = own & modules - {path.stem, "__init__"}
        problems += cycle(package, arrows)
    return problems


if __name__ == "__main__":
    problems = check()
    print("\n".join(problems) or f"imports: {len(sources(ROOT))} packages follow the rule")
    sys.exit(bool(problems))
