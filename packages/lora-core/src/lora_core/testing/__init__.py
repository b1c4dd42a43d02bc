"""For the tests of every package; plain functions that raise AssertionError.

`goldens`: recorded numbers. `contract`: the promises of LoRA. `readme`: the commands of a README.
"""

from lora_core.testing.contract import CONTRACT, Case, disturb
from lora_core.testing.goldens import (
    Golden,
    assert_close_golden,
    assert_gradient_close,
    load_golden,
)
from lora_core.testing.readme import Command, check_commands, readme_commands

__all__ = [
    "CONTRACT",
    "Case",
    "Command",
    "Golden",
    "assert_close_golden",
    "assert_gradient_close",
    "check_commands",
    "disturb",
    "load_golden",
    "readme_commands",
]
