"""The test helpers themselves: the contract holds, and notices what breaks it."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lora_core import testing
from lora_core.config import LoraConfig, Slices
from lora_core.errors import ConfigError
from lora_core.testing import (
    CONTRACT,
    Case,
    assert_close_golden,
    assert_gradient_close,
    check_commands,
    load_golden,
    readme_commands,
)

GOLDENS = Path(__file__).parent / "goldens"


class Tower(nn.Module):
    """A small vision transformer's parts: patches, fused attention, MLP, head."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 4, stride=4)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(16, 3)

    def forward(self, image):
        x = self.patch(image).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.fc1, self.fc2 = nn.Linear(16, 32), nn.Linear(32, 16, bias=False)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v))
        return x + self.fc2(F.gelu(self.fc1(x)))


IMAGE = torch.rand(2, 3, 12, 8, generator=torch.Generator().manual_seed(1))
CONFIGS = {
    "plain": LoraConfig(["attention", "mlp"], r=4),
    "slices_dropout": LoraConfig(["qkv"], r=4, slices={"qkv": Slices()}, lora_dropout=0.1),
    "dora_conv": LoraConfig(["patch", "fc2"], r=4, use_dora=True),
    "head_and_biases": LoraConfig(["qkv"], modules_to_save=["head"], bias="lora_only"),
    "ranks": LoraConfig(["mlp"], r=4, rank_pattern={"fc1": 2}, use_rslora=True),
}
ROLES = {"attention": ["qkv", "blocks.*.out"], "mlp": ["fc1", "fc2"]}


def case(config):
    return Case(Tower, lambda model: model(IMAGE), config, ROLES, rename=lambda p: f"net.{p}")


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("promise", CONTRACT, ids=lambda promise: promise.__name__)
def test_contract(promise, config, tmp_path):
    promise(case(CONFIGS[config]), tmp_path)


# -- a contract that cannot fail would promise nothing --------------------------------------------


class Restless(Tower):
    """Counts its calls in a buffer and lets the count into the output."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, image):
        self.calls += 1
        return super().forward(image) * self.calls


class Deaf(Tower):
    """Does not use its last block."""

    def forward(self, image):
        x = self.patch(image).flatten(2).transpose(1, 2)
        return self.head(self.blocks[0](x))


@pytest.mark.parametrize(
    ("model", "promise", "message"),
    [
        (Restless, testing.contract.only_adapters_train, "frozen calls changed"),
        (Restless, testing.contract.merging_keeps_the_output, "off by"),
        (Deaf, testing.contract.only_adapters_train, r"4 of 8 did not move: .*blocks\.1"),
    ],
)
def test_the_contract_notices_a_model_that_breaks_it(model, promise, message, tmp_path):
    broken = Case(model, lambda m: m(IMAGE), CONFIGS["plain"], ROLES)
    with pytest.raises(AssertionError, match=message):
        promise(broken, tmp_path)


def test_the_contract_notices_a_base_that_is_not_frozen(tmp_path):
    def run(model):
        model.head.bias.requires_grad_(True)
        return model(IMAGE)

    loose = Case(Tower, run, CONFIGS["plain"], ROLES)
    with pytest.raises(AssertionError, match=r"a gradient reaches frozen head\.bias"):
        testing.contract.only_adapters_train(loose, tmp_path)


def test_the_contract_notices_a_different_base_each_time(tmp_path):
    made = []

    def other():
        made.append(Tower())
        with torch.no_grad():
            made[-1].head.bias.add_(len(made))
        return made[-1]

    changing = Case(other, lambda m: m(IMAGE), CONFIGS["plain"], ROLES)
    for promise in (
        testing.contract.injection_changes_no_bit,
        testing.contract.files_restore_the_adapter,
        testing.contract.adapters_off_is_the_base,
    ):
        with pytest.raises(AssertionError):
            promise(changing, tmp_path)


def test_the_core_needs_no_heavy_library():
    code = (
        "import sys, lora_core\n"
        "assert 'torch' not in sys.modules\n"
        "import lora_core.testing.contract, lora_core.cache, lora_core.peft_bridge\n"
        "heavy = {'peft', 'transformers', 'diffusers', 'accelerate', 'torchvision', 'pytest'}\n"
        "assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# -- recorded numbers ------------------------------------------------------------------------------


def test_a_golden_case_is_its_config_tensors_and_weights():
    golden = load_golden(GOLDENS / "linear")
    assert golden.config["in_features"] == 24
    assert golden.weights["lin.weight"].shape == (40, 24)
    assert golden.io["in.x"].shape == (3, 7, 24)
    assert golden.folder == GOLDENS / "linear"


def test_tolerances_are_tight_on_both_sides():
    expected = torch.tensor([100.0, 1.0, 0.0])
    assert_close_golden(expected + torch.tensor([1e-3, 1e-4, 1e-4]), expected)
    for wrong in ([2e-3, 0, 0], [0, 0, 3e-4], [0, float("nan"), 0]):
        with pytest.raises(AssertionError, match="off by"):
            assert_close_golden(expected + torch.tensor(wrong), expected)
    with pytest.raises(AssertionError, match="shape"):
        assert_close_golden(expected[:2], expected)
    assert_gradient_close(expected + torch.tensor([1e-3, 0, 0]), expected)
    for wrong in ([3e-3, 0, 0], [0, float("nan"), 0]):
        with pytest.raises(AssertionError, match="relative error"):
            assert_gradient_close(expected + torch.tensor(wrong), expected)
    with pytest.raises(AssertionError, match="no gradient"):
        assert_gradient_close(None, expected)


# -- commands of a README --------------------------------------------------------------------------

README = r"""# Title

Run `sam-tool not a command` in prose.

```bash
pip install ./packages/sam-tool   # not ours
sam-tool train \
    --rate 1e-3 \
    --name "two words"
CUDA_VISIBLE_DEVICES=0 python3 scripts/train.py --steps 5 && sam-tool merge a b
torchrun --nproc_per_node 2 train.py --steps 5; nohup sam-tool hidden
python -m sam_tool predict x.png | tail -1
```

```python
sam-tool no
```

  ```console
  $ sam-tool demo
  ```
"""


def test_commands_are_found_with_their_arguments(tmp_path):
    (tmp_path / "README.md").write_text(README)
    found = readme_commands(tmp_path / "README.md", ["sam-tool", "train.py", "sam_tool"])
    assert [(command.program, command.argv) for command in found] == [
        ("sam-tool", ["train", "--rate", "1e-3", "--name", "two words"]),
        ("train.py", ["--steps", "5"]),
        ("sam-tool", ["merge", "a", "b"]),
        ("train.py", ["--steps", "5"]),
        ("sam_tool", ["predict", "x.png"]),
        ("sam-tool", ["demo"]),
    ]


def parser(argv):
    if "--rtae" in argv:
        raise ConfigError("unknown flag --rtae; did you mean '--rate'?")
    if argv == ["--help"]:
        raise SystemExit(0)
    if argv == ["bad"]:
        raise SystemExit(2)


def test_commands_that_the_real_parser_refuses_are_named(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("```bash\ntool --rate 1\ntool --help\n```\n")
    assert len(check_commands(readme, {"tool": parser})) == 2
    readme.write_text("```bash\ntool --rtae 1\ntool bad\ntool fine\n```\n")
    with pytest.raises(AssertionError, match=r"tool --rtae 1: unknown flag(.|\n)*tool bad: exit 2"):
        check_commands(readme, {"tool": parser})
    readme.write_text("no commands here")
    with pytest.raises(AssertionError, match="uses none of"):
        check_commands(readme, {"tool": parser})
