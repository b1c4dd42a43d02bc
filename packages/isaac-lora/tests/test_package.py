"""The package as it is imported."""

import subprocess
import sys

import pytest

import isaac_lora


def test_importing_the_package_loads_no_heavy_library() -> None:
    program = (
        "import sys, isaac_lora; dir(isaac_lora); "
        "print(sorted({'torch', 'transformers', 'numpy', 'PIL'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_every_public_name_is_there() -> None:
    assert isaac_lora.__all__ == sorted(isaac_lora.__all__)
    for name in isaac_lora.__all__:
        assert getattr(isaac_lora, name).__name__ == name
    assert set(isaac_lora.__all__) <= set(dir(isaac_lora))
    with pytest.raises(AttributeError, match="IsaacModell"):
        isaac_lora.IsaacModell  # noqa: B018
