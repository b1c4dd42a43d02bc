"""For the tests of every package; plain functions that raise AssertionError.

`goldens`: recorded numbers. `contract`: the promises of LoRA. `readme`: the commands of a README.
The names here are loaded on first use: `environment` must be there before torch.
"""

from typing import TYPE_CHECKING

from lora_core.first_use import loader

_HOME = {
    "CONTRACT": "contract",
    "Case": "contract",
    "Command": "readme",
    "Golden": "goldens",
    "assert_close_golden": "goldens",
    "assert_gradient_close": "goldens",
    "check_commands": "readme",
    "disturb": "contract",
    "load_golden": "goldens",
    "readme_commands": "readme",
}
__all__ = sorted(_HOME)

if TYPE_CHECKING:
    from lora_core.testing.contract import CONTRACT as CONTRACT
    from lora_core.testing.contract import Case as Case
    from lora_core.testing.contract import disturb as disturb
    from lora_core.testing.goldens import Golden as Golden
    from lora_core.testing.goldens import assert_close_golden as assert_close_golden
    from lora_core.testing.goldens import assert_gradient_close as assert_gradient_close
    from lora_core.testing.goldens import load_golden as load_golden
    from lora_core.testing.readme import Command as Command
    from lora_core.testing.readme import check_commands as check_commands
    from lora_core.testing.readme import readme_commands as readme_commands

__getattr__ = loader(__name__, _HOME)
