"""The last N blocks of a network: what a setting for them saves, and when to advise it.

What runs before the first adapter needs no gradient, so autograd keeps nothing of it: the forward
pass up to there costs what inference costs, and the backward pass ends there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from lora_core import mechanisms
from lora_core.injection import lora_layers
from lora_core.module_names import unwrapped
from lora_core.report import plural


@dataclass(frozen=True)
class Stack:
    """The blocks of which a setting keeps the last ones adapted.

    Attributes:
        setting: the flag, such as --last_blocks.
        blocks: paths of the blocks in the order in which they run.
        before: paths of layers in front of them that are not adapted either where it is given.
    """

    setting: str
    blocks: Sequence[str]
    before: Sequence[str] = ()

    @classmethod
    def of(cls, network: nn.Module, setting: str, path: str, before: Sequence[str] = ()) -> Stack:
        """The children of a ModuleList of the network; without one at `path` there are none."""
        found = dict(unwrapped(network).named_modules()).get(path)
        names = found._modules if isinstance(found, nn.ModuleList) else ()
        return cls(setting, [f"{path}.{name}" for name in names], before)

    def adapted(self, network: nn.Module) -> int:
        """N, where the first of the blocks with an adapter is the Nth from the end; 0: none has."""
        layers = lora_layers(network)
        for place, block in enumerate(self.blocks):
            if any(_inside(path, [block]) for path in layers):
                return len(self.blocks) - place
        return 0

    def fewer(self, network: nn.Module) -> list[int]:
        """Half and a quarter of the blocks from the first one with an adapter on, rounded down."""
        count, layers = self.adapted(network), lora_layers(network)
        return [
            part
            for part in (count // 2, count // 4)
            if part and not all(_inside(path, self._others(part)) for path in layers)
        ]

    def keep_last(self, network: nn.Module, count: int) -> None:
        """Take the adapters off all blocks but the last `count`, and let nothing train in these."""
        model = unwrapped(network)
        others = self._others(count)
        for path, layer in lora_layers(model).items():
            if _inside(path, others):
                for name in list(layer.lora_adapters):
                    mechanisms.drop(layer, name)
        for path in others:
            model.get_submodule(path).requires_grad_(False)

    def remedies(self, network: nn.Module) -> Iterator[str]:
        """Yield the flag with half of the adapted blocks, for when memory runs out."""
        for count in self.fewer(network)[:1]:
            before = plural(len(self.blocks) - count, "block")
            yield f"{self.setting} {count} (nothing is kept of the {before} before)"

    def _others(self, count: int) -> list[str]:
        """Paths of what is not adapted when only the last `count` blocks are."""
        return [*self.before, *self.blocks[: len(self.blocks) - count]]


def _inside(path: str, tops: Sequence[str]) -> bool:
    return any(path == top or path.startswith(f"{top}.") for top in tops)
