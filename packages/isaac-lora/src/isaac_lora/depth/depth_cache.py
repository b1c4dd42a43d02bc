"""The depth of each image token, computed once per picture and kept on disk.

    depths = DepthGrids(checkpoint, input_size, device, FeatureCache(folder, max_bytes))
    depths.fill(pictures)                          # before training: the model leaves the memory
    part = depths.part(picture)                    # in any process: of the cache, or the picture
    values = depths.joined(parts)                  # where the model may run
    model(..., depth_encoding=encode_depth(alpha * values, hidden_size))

An entry is what its digest is of: the picture's pixels, the depth model's weights, the input size
and the token grid, so that nothing in it can be out of date. It holds a few kilobytes. The scale
`depth_alpha` is applied later. Without a cache all is computed each time, with the same bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from isaac_lora.depth.checkpoint import DepthCheckpoint
from isaac_lora.depth.encoding import pool_depth
from isaac_lora.depth.estimator import DepthEstimator, read_depth_estimator
from isaac_lora.depth.settings import ALPHA, INPUT_SIZE, DepthSettings
from isaac_lora.pictures.content import KnownPicture, Picture
from lora_core.cache import FeatureCache
from lora_core.report import Progress, plural, say

KIND = "isaac depth 1"  # of entries; another number where the computation changes
NAME = "depth"  # of the tensor in an entry


@dataclass(frozen=True, eq=False)
class UnseenDepth:
    """A picture whose depth is not in the cache; see `KnownPicture`."""

    name: str
    content: str
    grid: tuple[int, int]
    picture: Picture


class DepthGrids:
    """Pooled, normalised depth of pictures.

    Args:
        checkpoint: of the depth model, read when it is first needed.
        input_size: side of the square that it sees. device: where it computes.
        cache: where the depths are kept; None: they are computed each time.
    """

    def __init__(
        self,
        checkpoint: DepthCheckpoint,
        input_size: int = INPUT_SIZE,
        device: torch.device | str = "cpu",
        cache: FeatureCache | None = None,
    ) -> None:
        self.checkpoint, self.input_size = checkpoint, input_size
        self.device, self.cache = torch.device(device), cache
        self._estimator: DepthEstimator | None = None
        self._settings: DepthSettings | None = None

    def estimator(self) -> DepthEstimator:
        """The depth model, in memory until `release`.

        Raises:
            ConfigError, CheckpointError: it cannot be read.
        """
        if self._estimator is None:
            self._estimator = read_depth_estimator(self.checkpoint, self.input_size, self.device)
        return self._estimator

    def to(self, device: torch.device | str) -> DepthGrids:
        """Compute on this device from now on; a depth model that is in memory moves there."""
        if torch.device(device) != self.device:
            self.device = torch.device(device)
            if self._estimator is not None:
                self._estimator.network.to(self.device)
        return self

    def settings(self, alpha: float = ALPHA) -> DepthSettings:
        """What is stored beside an adapter that is trained with this depth."""
        if self._settings is None:
            self._settings = self.estimator().settings()
        return replace(self._settings, alpha=alpha)

    @property
    def fingerprint(self) -> str:
        """Of the depth model's weights; reads them where they were not read yet."""
        return self.settings().fingerprint

    def release(self) -> None:
        """Take the depth model out of memory, until it is needed again."""
        self.fingerprint  # noqa: B018 - names of entries need it afterwards
        self._estimator = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def __getstate__(self) -> dict[str, Any]:
        """For the workers of a data loader, which look entries up and compute none."""
        self.fingerprint  # noqa: B018 - once here, and not in each of them
        return {**self.__dict__, "_estimator": None}

    def key(self, content: str, grid: tuple[int, int]) -> dict[str, str]:
        """What the depth of a picture's tokens depends on."""
        return {
            "kind": KIND,
            "model": self.fingerprint,
            "picture": content,
            "settings": f"{self.input_size} {grid[0]}x{grid[1]}",
            "numbers": self.device.type,
        }

    def find(self, content: str, grid: tuple[int, int]) -> Tensor | None:
        """The depth of a picture's tokens from the cache; None: it is not there, or damaged.

        Returns:
            float32 [rows · columns] in 0..1 on the CPU, row after row.
        """
        if self.cache is None:
            return None
        found = self.cache.find(self.key(content, grid))
        return None if found is None else found[NAME]

    def compute(
        self, picture: Picture, content: str, grid: tuple[int, int], name: str = "a picture"
    ) -> Tensor:
        """The depth of a picture's tokens from the depth model; it is kept in the cache.

        Args:
            picture: RGB, uint8 [H, W, 3], as it lies in the file.
            content: its digest. grid: of its tokens. name: for messages.

        Raises:
            NumericError: the depth is not finite.
        """
        values = pool_depth(self.estimator().normalised(picture, name), grid).cpu()
        if self.cache is not None:
            self.cache.keep(self.key(content, grid), {NAME: values})
        return values

    def values(
        self, picture: Picture, content: str, grid: tuple[int, int], name: str = "a picture"
    ) -> Tensor:
        """The depth of a picture's tokens, from the cache or else computed; see `compute`."""
        found = self.find(content, grid)
        return self.compute(picture, content, grid, name) if found is None else found

    def part(self, picture: KnownPicture) -> Tensor | UnseenDepth:
        """The depth of a picture's tokens, or what `joined` computes it from; in any process."""
        found = self.find(picture.content, picture.grid)
        if found is None:
            return UnseenDepth(picture.name, picture.content, picture.grid, picture.read())
        return found

    def joined(self, parts: Sequence[Tensor | UnseenDepth]) -> Tensor:
        """The depth of all tokens of a batch, float32 [sum of tokens] in 0..1, on the device.

        Args:
            parts: of the pictures in the order of their places; what is missing is computed.

        Raises:
            NumericError: a depth that is not finite.
        """
        found = [
            part
            if isinstance(part, Tensor)
            else self.compute(part.picture, part.content, part.grid, part.name)
            for part in parts
        ]
        return torch.cat([torch.zeros(0), *(one.cpu() for one in found)]).to(self.device)

    def fill(self, pictures: Iterable[KnownPicture]) -> int:
        """Compute what is not in the cache yet; then take the depth model out of memory.

        Returns:
            how many were computed. Without a cache there is nothing to fill, and it is 0.

        Raises:
            NumericError: a depth that is not finite.
        """
        if self.cache is None:
            return 0
        todo = {self.cache.path(self.key(p.content, p.grid)): p for p in pictures}
        missing = [picture for path, picture in todo.items() if not path.exists()]
        if missing:
            say(f"estimating the depth of {plural(len(missing), 'picture')}")
            with Progress(len(missing)) as progress:
                for done, picture in enumerate(missing, start=1):
                    self.compute(picture.read(), picture.content, picture.grid, picture.name)
                    progress.update(done)
        self.release()
        return len(missing)
