"""Check a release tag before anything is published: `python tools/release.py sam2-lora-v0.1.0`.

The tag must name a package, its version and a dated entry of its changelog. Prints the package's
name for the release workflow, which builds and publishes it.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TAG = re.compile(
    r"(?P<package>[a-z0-9]+(?:-[a-z0-9]+)*)-v(?P<version>\d+\.\d+\.\d+(?:(?:a|b|rc)\d+)?)"
)


def problem(tag: str, root: Path = ROOT) -> tuple[str, str | None]:
    """Return (package, None), or (package, what is wrong with the tag)."""
    match = TAG.fullmatch(tag)
    if not match:
        return "", f"tag {tag!r} is not <package>-v<version>, such as sam2-lora-v0.1.0"
    package, version = match["package"], match["version"]
    folder = root / "packages" / package
    if not (folder / "pyproject.toml").is_file():
        return package, f"there is no package {package!r}"
    init = folder / "src" / package.replace("-", "_") / "__init__.py"
    written = re.search(r'^__version__ = "([^"]+)"', init.read_text("utf-8"), re.MULTILINE)
    if not written or written[1] != version:
        found = written[1] if written else "none"
        return package, f"{init.relative_to(root)} says version {found}, the tag says {version}"
    entry = rf"^## {re.escape(version)} \(\d{{4}}-\d\d-\d\d\)$"
    if not re.search(entry, (folder / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE):
        return package, f"packages/{package}/CHANGELOG.md has no entry '## {version} (YYYY-MM-DD)'"
    return package, None


def main(tag: str) -> int:
    package, wrong = problem(tag)
    if wrong:
        print(wrong, file=sys.stderr)
        return 2
    print(package)
    return 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python tools/release.py <package>-v<version>")
    sys.exit(main(sys.argv[1]))
