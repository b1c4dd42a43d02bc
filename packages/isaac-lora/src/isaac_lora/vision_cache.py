"""What the frozen vision tower makes of each picture, computed once and kept on disk.

    features = VisionFeatures(model.model.vision_embedding[0], rules, FeatureCache(folder, size))
    features.fill(pictures)            # before training
    part = features.part(picture)      # in any process: of the cache, or else what the tower reads
    model(..., grids=grids, vision_features=features.joined(parts))

The tower sees one picture at a time, so that its numbers do not depend, in their last bits, on the
other pictures of a batch: with a cache and without one (`cache=None`) losses are the same, bit for
bit. An entry is what its digest is of: the picture, the weights, the rules for pictures, and the
precision. A token takes r² V numbers: 18 kB in float32 for Isaac-0.1, a picture up to 28 MB.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from isaac_lora.network.vision import IsaacVisionTransformer
from isaac_lora.pictures.content import KnownPicture
from isaac_lora.pictures.pixels import preprocess
from isaac_lora.pictures.target_size import Grid, PictureRules
from lora_core.cache import ADAPTER_PARTS, FeatureCache, fingerprint
from lora_core.disk import check_space
from lora_core.errors import ConfigError, NumericError
from lora_core.memory import size
from lora_core.report import Progress, plural, say

KIND = "isaac vision 1"  # of entries; another number where the computation changes
NAME = "features"  # of the tensor in an entry
ENTRY = 600  # bytes of an entry besides its numbers, at most


@dataclass(frozen=True, eq=False)
class UnseenPicture:
    """What the tower reads of a picture whose features are not in the cache.

    Attributes:
        name, content: as in `KnownPicture`.
        patches: uint8 [N, 3 p²]. grid: of them, before the shuffle.
    """

    name: str
    content: str
    patches: Tensor
    grid: Grid


class VisionFeatures:
    """The shuffled tokens of pictures, as `IsaacModel.get_vision_features` gives them.

    Args:
        tower: frozen, on its device, with the weights that it will keep.
        rules: by which pictures become patches.
        cache: where the features are kept; None: they are computed each time.
        autocast: of the training, whose precision the features then have; None: of the weights.

    Raises:
        ConfigError: the tower is trained, or drops at random: its features are not constant.
    """

    def __init__(
        self,
        tower: IsaacVisionTransformer,
        rules: PictureRules,
        cache: FeatureCache | None = None,
        autocast: torch.dtype | None = None,
    ) -> None:
        refuse_changing(tower)
        weight = tower.post_layernorm.weight
        self.rules, self.cache, self.autocast = rules, cache, autocast
        self.device = weight.device
        self.width = weight.numel() * rules.pixel_shuffle_scale**2  # of a token
        self.precision = str(autocast or weight.dtype).removeprefix("torch.")
        self._tower: IsaacVisionTransformer | None = tower
        products = torch.get_float32_matmul_precision()
        self._numbers = f"{weight.dtype} {autocast} {self.device.type} {products}"
        self._fingerprint = "" if cache is None else fingerprint(tower)

    def __getstate__(self) -> dict[str, Any]:
        """For the workers of a data loader, which look entries up and compute none."""
        return {**self.__dict__, "_tower": None}

    def key(self, content: str) -> dict[str, str]:
        """What the features of a picture depend on."""
        return {
            "kind": KIND,
            "tower": self._fingerprint,
            "picture": content,
            "settings": repr(self.rules),
            "numbers": self._numbers,
        }

    # -- one picture -------------------------------------------------------------------------------

    def find(self, content: str) -> Tensor | None:
        """The features of a picture from the cache; None: not there, or damaged.

        Returns:
            [tokens, r² V] on the CPU, in the precision that they were computed in.
        """
        if self.cache is None:
            return None
        found = self.cache.find(self.key(content))
        return None if found is None else found[NAME]

    def part(self, picture: KnownPicture) -> Tensor | UnseenPicture:
        """The features of a picture, or what `joined` computes them from; in any process."""
        found = self.find(picture.content)
        return self._unseen(picture) if found is None else found

    def _unseen(self, picture: KnownPicture) -> UnseenPicture:
        patches, grid = preprocess(picture.read(), self.rules)
        return UnseenPicture(picture.name, picture.content, patches, grid)

    def compute(self, picture: UnseenPicture) -> Tensor:
        """The features of a picture from the tower, on its device; they are kept in the cache.

        Raises:
            NumericError: they are not finite.
        """
        features = self._run(picture.patches, picture.grid)
        if not bool(features.isfinite().all()):
            raise NumericError(
                f"{picture.name}: the vision tower gives NaN or infinite features in "
                f"{self.precision}: train with --bf16 True or in float32; if that does not help, "
                "the model's weights are damaged"
            )
        if self.cache is not None:
            self.cache.keep(self.key(picture.content), {NAME: features})
        return features

    @torch.no_grad()
    def _run(self, patches: Tensor, grid: Grid) -> Tensor:
        if self._tower is None:
            raise RuntimeError("the tower is in the process that trains, not in a data loader's")
        kind = self.device.type
        with torch.autocast(kind, dtype=self.autocast, enabled=self.autocast is not None):
            found: Tensor = self._tower(patches.to(self.device), torch.tensor([grid]))
        return found

    # -- several -----------------------------------------------------------------------------------

    def joined(self, parts: Sequence[Tensor | UnseenPicture]) -> Tensor:
        """The `vision_features` of a batch, [sum of tokens, r² V] on the tower's device.

        Args:
            parts: of the pictures in the order of their places; what is missing is computed.

        Raises:
            NumericError: features that are not finite.
        """
        if not parts:
            return torch.zeros(0, self.width, device=self.device)
        return torch.cat(
            [
                part.to(self.device) if isinstance(part, Tensor) else self.compute(part)
                for part in parts
            ]
        )

    def fill(self, pictures: Iterable[KnownPicture], own: slice = slice(None)) -> int:
        """Compute what is not in the cache yet.

        Args:
            own: which of those that are missing this process computes.

        Returns:
            how many were computed. Without a cache there is nothing to fill, and it is 0.

        Raises:
            ConfigError: not all of them fit into the cache, or on the disk.
            NumericError: features that are not finite.
        """
        if self.cache is None:
            return 0
        todo = {self.cache.path(self.key(picture.content)): picture for picture in pictures}
        missing = [picture for path, picture in todo.items() if not path.exists()]
        self._check_room(list(todo.values()), missing)
        missing = missing[own]
        if missing:
            say(f"computing the vision features of {plural(len(missing), 'picture')}")
            with Progress(len(missing)) as progress:
                for done, picture in enumerate(missing, start=1):
                    self.compute(self._unseen(picture))
                    progress.update(done)
        return len(missing)

    def bytes_of(self, pictures: Iterable[KnownPicture]) -> int:
        """Bytes that the features of pictures take on the disk."""
        r, p = self.rules.pixel_shuffle_scale, self.rules.patch_size
        number = self._run(torch.zeros(r * r, 3 * p * p), Grid(r, r)).element_size()
        return sum(prod(picture.grid) * self.width * number + ENTRY for picture in pictures)

    def _check_room(self, pictures: list[KnownPicture], missing: list[KnownPicture]) -> None:
        """Require room for all of them: a cache that is too small forgets each before its use."""
        assert self.cache is not None
        needed = self.bytes_of(pictures)
        if needed > self.cache.max_bytes:
            raise ConfigError(
                f"--cache_vision: the features of {plural(len(pictures), 'picture')} take "
                f"{size(needed)}, the cache may hold {size(self.cache.max_bytes)}: allow it more, "
                "or leave --cache_vision out"
            )
        check_space({"vision features": self.bytes_of(missing)}, self.cache.folder)


def refuse_changing(tower: IsaacVisionTransformer) -> None:
    """Require that a picture's features stay what they are.

    Raises:
        ConfigError: they change as the tower is trained, or at random.
    """
    trained = [
        name
        for name, parameter in tower.named_parameters()
        if parameter.requires_grad or not ADAPTER_PARTS.isdisjoint(name.split("."))
    ]
    if trained:
        raise ConfigError(
            "--cache_vision keeps what a frozen vision tower makes, but training changes "
            f"{plural(len(trained), 'tensor')} of it ({trained[0]}{', ...' * (len(trained) > 1)}): "
            "leave out --cache_vision, or choose --target_modules and --lora_bias without the tower"
        )
    if tower.config.attention_dropout:
        raise ConfigError(
            "--cache_vision: config.json of the model has vision_config.attention_dropout "
            f"{tower.config.attention_dropout:g}, so features change at random: set it to 0"
        )
