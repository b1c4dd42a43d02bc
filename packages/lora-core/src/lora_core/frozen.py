"""What a frozen image encoder makes of each picture, computed once and kept on disk.

    frozen = FrozenImages(encode, {"base": fingerprint, ...}, device, FeatureCache(folder, size))
    item = frozen.item(path, placement, pixels)   # in any process: features, or what makes them
    batch = {**inputs([item, ...]), ...}          # when samples are put together
    features = frozen.features(batch)             # in the process that has the encoder

The encoder sees one picture at a time, with a cache and without one: its last bits may depend on
how many pictures it sees at once. Losses then are the same, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from lora_core.cache import ADAPTER_PARTS, FeatureCache, fingerprint

Features = dict[str, Tensor]  # of one picture, without the dimension of the batch


@dataclass(frozen=True, eq=False)
class Unseen:
    """A picture whose features are not in the cache.

    Attributes:
        pixels: f32 [3, H, W], as the encoder reads it.
        key: of its entry in the cache.
    """

    pixels: Tensor
    key: dict[str, str]


def why_changing(encoder: nn.Module) -> str:
    """Why what an encoder makes of a picture is not always the same; "" if it is.

    Dropout is found as `nn.Dropout` modules alone.
    """
    for name, parameter in encoder.named_parameters():
        if not ADAPTER_PARTS.isdisjoint(name.split(".")):
            return f"it is adapted ({name})"
        if parameter.requires_grad:
            return f"it is trained ({name})"
    for name, module in encoder.named_modules():
        if isinstance(module, nn.Dropout) and module.p > 0:
            return f"it has dropout ({name}, p = {module.p:g})"
    return ""


def inputs(items: Sequence[Tensor | Features | Unseen]) -> dict[str, Any]:
    """The pictures of a batch.

    Returns:
        pixel_values: f32 [B, 3, H, W], if all of them are pixels; else items, as given.
    """
    pixels = [item for item in items if isinstance(item, Tensor)]
    if len(pixels) == len(items):
        # In a data loader's worker it stacks into the memory that travels, which `stack` does not.
        return {"pixel_values": default_collate(pixels)}
    return {"items": list(items)}


class FrozenImages:
    """Features of pictures from an encoder that does not change, or from the disk.

    Args:
        encode: f32 [1, 3, H, W] on the device -> tensors [1, ...] by name. It sets the precision
            itself; gradients are off.
        facts: everything besides the picture that its features depend on, by name.
        device: of the encoder.
        cache: where features are kept; None: nowhere.
    """

    def __init__(
        self,
        encode: Callable[[Tensor], Mapping[str, Tensor]],
        facts: Mapping[str, str],
        device: torch.device,
        cache: FeatureCache | None = None,
    ) -> None:
        self._encode: Callable[[Tensor], Mapping[str, Tensor]] | None = encode
        self.facts, self.device, self.cache = dict(facts), device, cache

    def __getstate__(self) -> dict[str, Any]:
        """For the workers of a data loader, which look entries up and compute none."""
        return {**self.__dict__, "_encode": None}

    def item(
        self, picture: Path, placement: object, pixels: Callable[[], Tensor]
    ) -> Tensor | Features | Unseen:
        """The features of a picture, or what they are computed from; in any process.

        Args:
            picture: its file, whose content is part of the key.
            placement: what was done to it; its `repr` is part of the key.
            pixels: gives it as the encoder reads it, f32 [3, H, W]; not called if the features are
                at hand.

        Returns:
            Features on the CPU; without a cache the pixels.
        """
        if self.cache is None:
            return pixels()
        key = {**self.facts, "picture": fingerprint(picture), "placement": repr(placement)}
        found = self.cache.find(key)
        return Unseen(pixels(), key) if found is None else found

    def features(self, batch: Mapping[str, Any]) -> Features:
        """The features of a batch that holds what `inputs` gives, [B, ...] on the device."""
        items = batch["items"] if "items" in batch else batch["pixel_values"]
        each = [self._of(item) for item in items]
        return {
            name: torch.stack([one[name].to(self.device, non_blocking=True) for one in each])
            for name in each[0]
        }

    def _of(self, item: Tensor | Features | Unseen) -> Features:
        if isinstance(item, Tensor):
            return self._computed(item)
        if not isinstance(item, Unseen):
            return item
        made = self._computed(item.pixels)
        if self.cache is not None:
            self.cache.keep(item.key, made)
        return made

    @torch.no_grad()
    def _computed(self, pixels: Tensor) -> Features:
        if self._encode is None:
            raise RuntimeError("the encoder is in the process that trains, not in a data loader's")
        found = self._encode(pixels[None].to(self.device))
        return {name: tensor[0] for name, tensor in found.items()}
