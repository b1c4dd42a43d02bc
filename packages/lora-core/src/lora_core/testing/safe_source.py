"""For tests: what a package's own source must not do, read from its syntax tree."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

# Calls that run text as a program, or bytes as pickled objects.
FORBIDDEN = frozenset(
    {"eval", "exec", "os.system", "os.popen", "pickle.load", "pickle.loads", "pickle.Unpickler"}
    | {"yaml.load", "yaml.unsafe_load", "yaml.full_load", "marshal.loads", "shelve.open"}
    | {"joblib.load", "dill.load", "cloudpickle.load", "subprocess.getoutput"}
    | {"subprocess.getstatusoutput", "tempfile.mktemp", "runpy.run_path", "entry_points"}
    | {"importlib.metadata.entry_points", "sys.path.insert"}
    | {"sys.path.append", "site.addsitedir"}
)
# Function -> keyword and the only value that may stand there.
REQUIRED = {"torch.load": ("weights_only", True)}
# Keywords that may never be true, whatever the function.
NEVER_TRUE = frozenset({"shell", "allow_pickle", "trust_remote_code"})


def unsafe_calls(package: Path) -> list[str]:
    """Every call below a folder that could run what is not the package's own, as `file:line: why`.

    A program is started with a list of words (`subprocess.run([...])`), never with one text.
    """
    found = []
    for path in sorted(package.rglob("*.py")):
        tree = ast.parse(path.read_text("utf-8"), str(path))
        imported = _imported(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                where = f"{path.relative_to(package)}:{node.lineno}"
                found += [f"{where}: {why}" for why in _faults(node, imported)]
    return found


def _imported(tree: ast.Module) -> dict[str, str]:
    """Name in the file -> its full name, for what is imported under another or a shorter one."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {each.asname: each.name for each in node.names if each.asname}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {each.asname or each.name: f"{node.module}.{each.name}" for each in node.names}
    return names


def _faults(call: ast.Call, imported: Mapping[str, str]) -> Iterator[str]:
    head, dot, rest = ast.unparse(call.func).partition(".")
    name = imported.get(head, head) + dot + rest
    keywords = {word.arg: word.value for word in call.keywords if word.arg}
    if name in FORBIDDEN:
        yield f"{name} is called"
    if name in REQUIRED:
        keyword, value = REQUIRED[name]
        given = keywords.get(keyword)
        if not (isinstance(given, ast.Constant) and given.value is value):
            yield f"{name} without {keyword}={value}"
    for keyword in NEVER_TRUE & keywords.keys():
        given = keywords[keyword]
        if not (isinstance(given, ast.Constant) and not given.value):
            yield f"{name}: {keyword} is not plainly false"
    if name.startswith("subprocess.") and call.args:
        first = call.args[0]
        if isinstance(first, ast.JoinedStr | ast.Constant | ast.BinOp):
            yield f"{name}: one text instead of a list of words"
