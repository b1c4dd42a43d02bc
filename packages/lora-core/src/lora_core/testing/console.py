"""What every package's console command promises."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

HEAVY = ("torch", "transformers", "scipy", "PIL")


def check_light(program: str, words: Sequence[str]) -> None:
    """Run a command such as `--help`, which must answer without the libraries that take seconds.

    Args:
        program: `sam2-lora`, which its text must name; its module is `sam2_lora`.

    Raises:
        AssertionError: it fails, or imports one of `HEAVY`.
    """
    code = (
        f"import sys; from {program.replace('-', '_')}.__main__ import main; "
        "status = main(sys.argv[1:]); "
        f"heavy = {{*{HEAVY}}} & set(sys.modules); "
        "sys.exit(status or (f'imported {heavy}' if heavy else 0))"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert program in done.stdout
