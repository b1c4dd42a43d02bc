"""Two small blocks with adapters, for what is said of adapter files and of several adapters.

Not a test: `conftest.py` puts this folder on the path.
"""

import torch
from torch import nn

from lora_core.config import LoraConfig
from lora_core.injection import inject
from lora_core.testing import disturb

FORMS = ["adapter", "adapter.pt"]
PLAIN = LoraConfig(["qkv", "proj"], r=3)
X = torch.linspace(-1, 1, 16).reshape(2, 8)


class Net(nn.Module):
    def __init__(self):
        torch.manual_seed(0)
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"qkv": nn.Linear(8, 24), "proj": nn.Linear(8, 8)}) for _ in range(2)
        )


def trained(config):
    model = Net()
    inject(model, config)
    disturb(model)
    return model
