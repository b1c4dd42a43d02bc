"""Settings of the backbone: defaults, released values, refusals."""

import subprocess
import sys
from typing import Any

import pytest

from lora_core.errors import ConfigError
from scenesplat_lora.network.ptv3_config import LANGUAGE, PTv3Config


def test_lists_and_a_single_curve_become_tuples() -> None:
    config = PTv3Config.from_dict(
        {"type": "PT-v3m1", "order": "hilbert", "stride": [2, 2, 2, 4], "in_channels": 11}
    )
    assert config.order == ("hilbert",)
    assert config.stride == (2, 2, 2, 4)
    assert (config.stages, config.out_channels) == (5, 64)
    assert (LANGUAGE.stages, LANGUAGE.out_channels) == (4, 768)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"enc_depth": (2,) * 5}, "unknown field 'enc_depth'. did you mean 'enc_depths'"),
        ({"type": "PT-v2m2"}, "type is 'PT-v2m2'"),
        ({"stride": (2, 2)}, "stride has 2 entries, expected 4"),
        ({"dec_depths": (2, 2)}, "dec_depths has 2 entries, expected 4"),
        ({"enc_num_head": (2, 4, 8, 16, 7)}, r"enc_channels\[4\] = 512 is no multiple"),
        ({"enc_patch_size": (0,) * 5}, "enc_patch_size is .* positive whole numbers"),
        ({"stride": (2, 2, 3, 2)}, "stride 3 is no power of two"),
        ({"order": ("z", "peano")}, "order 'peano' is unknown"),
        ({"order": ()}, "order is empty"),
        ({"drop_path": 1.0}, "drop_path is 1.0"),
        ({"mlp_ratio": 0}, "mlp_ratio is 0"),
        ({"enable_rpe": True}, "need enable_flash=False"),
        ({"pdnorm_ln": True}, "pdnorm_ln is not supported"),
        ({"in_channels": 0}, "in_channels is 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PTv3Config.from_dict(settings)


def test_all_problems_come_together() -> None:
    with pytest.raises(ConfigError) as caught:
        PTv3Config(order=("a",), drop_path=2, stride=(3, 2, 2, 2))
    assert len(str(caught.value).splitlines()) == 3


def test_settings_do_not_import_torch() -> None:
    code = (
        "import sys, scenesplat_lora, scenesplat_lora.network.ptv3_config; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
