"""The models that the recorded cases in `goldens/` were made with.

Not a test: `conftest.py` puts this folder on the path.
"""

import torch
from torch import nn
from torch.nn import functional as F


class Wrapped(nn.Module):
    """One layer under the name that the case gives it."""

    def __init__(self, name, layer):
        super().__init__()
        self.name = name
        self.add_module(name, layer)

    def forward(self, *args, **kwargs):
        out = getattr(self, self.name)(*args, **kwargs)
        return out[0] if isinstance(out, tuple) else out


class Mlp(nn.Module):
    def __init__(self, dim, hidden, depth, out):
        super().__init__()
        self.blocks = nn.ModuleList()
        for _ in range(depth):
            block = nn.Module()
            block.fc1, block.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim, bias=False)
            self.blocks.append(block)
        self.head = nn.Linear(dim, out)

    def forward(self, x):
        for block in self.blocks:
            x = x + block.fc2(F.gelu(block.fc1(x)))
        return self.head(x)


class Convs(nn.Module):
    """u = c1(relu(c3(x))), t over flattened pixels, v over (channel, height, width)."""

    def __init__(self):
        super().__init__()
        self.c3 = nn.Conv2d(6, 10, 3, stride=2, padding=1)
        self.c1 = nn.Conv2d(10, 8, 1, bias=False)
        self.t = nn.Conv1d(8, 8, 3, padding=1)
        self.v = nn.Conv3d(1, 3, 3, padding=1)

    def forward(self, x):
        u = self.c1(torch.relu(self.c3(x)))
        t = self.t(u.flatten(2)).reshape(x.shape[0], 1, *u.shape[1:])
        return self.v(t)


class Fused(nn.Module):
    def __init__(self, dim, sizes):
        super().__init__()
        self.sizes = sizes
        self.qkv, self.proj = nn.Linear(dim, sum(sizes)), nn.Linear(dim, dim)

    def forward(self, x):
        qkv = self.qkv(x)
        return torch.cat([qkv, self.proj(qkv[..., sum(self.sizes[:2]) :])], -1)
