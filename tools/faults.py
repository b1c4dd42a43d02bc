"""Which tests show what happens in which case of docs/faults.md: `python tools/faults.py`.

A test names its cases by `@pytest.mark.fault("K01", "K03")`. This writes the tables of
docs/faults.md from the markers; `--check` only says whether they are up to date. A case that no
test shows must stand in the document's list of open cases, with its reason, and one that a test
shows must not.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "faults.md"
BEGIN, END = "<!-- tables: written by tools/faults.py -->", "<!-- end of the tables -->"
OPEN = re.compile(r"^- \*\*([A-Z]\d\d)\*\*", re.MULTILINE)
# Letter -> title, highest number, and the numbers that belong to packages still to come.
GROUPS = {
    "C": ("Configuration and command line", 43, set()),
    "D": ("Pictures and annotations", 49, set()),
    "P": ("Files on disk", 45, set()),
    "K": ("Checkpoints, adapters, merging, resuming", 60, set()),
    "R": ("Numbers, memory, processes", 49, set()),
    "H": ("Hostile or untrusted input", 48, set()),
}


def cases(letter: str) -> list[str]:
    """The cases of one group that concern the packages there are."""
    _, last, others = GROUPS[letter]
    return [f"{letter}{n:02}" for n in range(1, last + 1) if n not in others]


def marked(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (case, name of a test) for every marker in a file of tests."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"), str(path))):
        if not isinstance(node, ast.FunctionDef) or not node.name.startswith("test_"):
            continue
        for call in (part for item in node.decorator_list for part in ast.walk(item)):
            if isinstance(call, ast.Call) and ast.unparse(call.func).endswith("mark.fault"):
                for word in call.args:
                    yield ast.literal_eval(word), node.name


def shown(root: Path = ROOT) -> dict[str, dict[str, str]]:
    """Case -> {name of a test: its file below packages/}."""
    found: dict[str, dict[str, str]] = {}
    for path in sorted(root.glob("packages/*/tests/test_*.py")):
        for case, test in marked(path):
            where = path.relative_to(root / "packages").as_posix()
            found.setdefault(case, {})[test] = where
    return found


def tables(tests: dict[str, dict[str, str]]) -> str:
    """The document's tables: each case with the promises that are tested, and where."""
    lines: list[str] = []
    for letter, (title, *_) in GROUPS.items():
        lines += [f"### {title}", "", "| case | what is promised | tests |", "|---|---|---|"]
        for case in cases(letter):
            if case in tests:
                promises = "; ".join(sentence(test) for test in tests[case])
                files = ", ".join(f"`{name}`" for name in sorted(set(tests[case].values())))
                lines.append(f"| {case} | {promises} | {files} |")
        lines.append("")
    return "\n".join(lines)


def sentence(test: str) -> str:
    """The promise that a test's name makes."""
    return test.removeprefix("test_").replace("_", " ")


def problems(tests: dict[str, dict[str, str]], document: str) -> list[str]:
    """Cases that nobody answers for, or that the document answers for wrongly."""
    known = {case for letter in GROUPS for case in cases(letter)}
    every = {
        f"{letter}{n:02}" for letter, (_, n_last, _) in GROUPS.items() for n in range(n_last + 1)
    }
    listed = OPEN.findall(document)
    found = [
        f"{case}: no test shows it, and it is not listed as open"
        for case in sorted(known - tests.keys() - set(listed))
    ]
    found += [
        f"{case}: marked in a test, but there is no such case"
        for case in sorted(tests.keys() - every)
    ]
    found += [
        f"{case}: listed as open, but there is no such case" for case in sorted(set(listed) - known)
    ]
    found += [
        f"{case}: listed as open twice"
        for case in sorted({c for c in listed if listed.count(c) > 1})
    ]
    return found


def renewed(document: str, tests: dict[str, dict[str, str]]) -> str:
    """The document with its tables written anew."""
    head, rest = document.split(BEGIN)
    return f"{head}{BEGIN}\n\n{tables(tests)}\n{END}{rest.split(END)[1]}"


def main(argv: list[str]) -> int:
    tests, document = shown(), DOCUMENT.read_text("utf-8")
    new = renewed(document, tests)
    found = problems(tests, document)
    if "--check" in argv and new != document:
        found.append(f"{DOCUMENT.relative_to(ROOT)} is out of date: python tools/faults.py")
    elif new != document:
        DOCUMENT.write_text(new, "utf-8")
    print(
        "\n".join(found) or f"faults: {len(tests)} cases shown, {len(OPEN.findall(document))} open"
    )
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
