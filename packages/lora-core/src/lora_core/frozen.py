"""What a frozen image encoder makes of each picture, computed once and kept on disk.

    frozen = FrozenImages(encode, {"base": fingerprint, ...}, device, FeatureCache(folder, size))
    image = frozen.item(path, placement, pixels)  # in any process: features, or what makes them
    batch = {"images": [image, ...], ...}         # when samples are put together
    features = frozen.features(batch["images"])   # in the process that has the encoder

Pictures are bytes until the encoder reads them: as floats they would take four times as much of the
memory that a data loader's workers share, and double the time of making a sample there.

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

from lora_core.cache import ADAPTER_PARTS, FeatureCache, fingerprint

Features = dict[str, Tensor]  # of one picture, without the dimension of the batch


@dataclass(frozen=True, eq=False)
class Unseen:
    """A picture whose features are not in the cache.

    Attributes:
        pixels: uint8 [H, W, 3].
        key: of its entry in the cache.
    """

    pixels: Tensor
    key: dict[str, str]


Picture = Tensor | Features | Unseen  # what a sample has of its picture; a tensor: uint8 [H, W, 3]


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


class FrozenImages:
    """Features of pictures from an encoder that does not change, or from the disk.

    Args:
        encode: uint8 [H, W, 3] on the device -> tensors [1, ...] by name. It sets the precision
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

    def item(self, picture: Path, placement: object, pixels: Callable[[], Tensor]) -> Picture:
        """The features of a picture, or what they are computed from; in any process.

        Args:
            picture: its file, whose content is part of the key.
            placement: what was done to it; its `repr` is part of the key.
            pixels: gives it as the encoder takes it, uint8 [H, W, 3]; not called if the features
                are at hand.

        Returns:
            Features on the CPU; without a cache the pixels.
        """
        if self.cache is None:
            return pixels()
        key = {**self.facts, "picture": fingerprint(picture), "placement": repr(placement)}
        found = self.cache.find(key)
        return Unseen(pixels(), key) if found is None else found

    def features(self, images: Sequence[Picture]) -> Features:
        """The features of B pictures, as `item` gave them, [B, ...] on the device."""
        each = [self._of(image) for image in images]
        return {
            name: torch.stack([one[name].to(self.device, non_blocking=True) for one in each])
            for name in each[0]
        }

    def _of(self, image: Picture) -> Features:
        if isinstance(image, Tensor):
            return self._computed(image)
        if not isinstance(image, Unseen):
            return image
        made = self._computed(image.pixels)
        if self.cache is not None:
            self.cache.keep(image.key, made)
        return made

    @torch.no_grad()
    def _computed(self, pixels: Tensor) -> Features:
        if self._encode is None:
            raise RuntimeError("the encoder is in the process that trains, not in a data loader's")
        found = self._encode(pixels.to(self.device))
        return {name: tensor[0] for name, tensor in found.items()}
