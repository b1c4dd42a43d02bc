"""What the frozen networks make of pictures, for training and validation.

    depths = model.depths_of(cfg, device, cache_of(cfg))    # None: without depth
    fill_depth(depths, pictures, device)                    # before the weights of Isaac are read
    features = features_of(cfg, net, processor.rules, depths, number_format)
    fill_vision(features, pictures, device)                 # with --cache_vision
    net(**features.inputs(batch))                           # batch: of `data.collate`

The vision tower and the depth model see one picture at a time, with a cache and without, so that
losses are the same bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from isaac_lora.config import Config
from isaac_lora.depth.controls import DepthSource
from isaac_lora.depth.depth_cache import DepthGrids
from isaac_lora.depth.encoding import encode_depth
from isaac_lora.examples import Example
from isaac_lora.pictures.content import KnownPicture
from isaac_lora.pictures.target_size import PictureRules
from isaac_lora.vision_cache import VisionFeatures
from lora_core.cache import FeatureCache
from lora_core.distributed import in_shares
from lora_core.memory import AUTOCAST

if TYPE_CHECKING:
    from isaac_lora.network.isaac import IsaacForConditionalGeneration

NOT_FOR_THE_MODEL = frozenset(["keys", "vision_parts", "depth_parts"])


@dataclass(frozen=True)
class FrozenFeatures:
    """Where the parts of a batch's pictures become inputs of the model.

    Attributes:
        vision: None: the model runs its tower itself, because it is trained.
        depth: None: without depth.
        alpha: scale of the depth. channels: of the decoder.
    """

    vision: VisionFeatures | None = None
    depth: DepthSource | None = None
    alpha: float = 1.0
    channels: int = 0

    def inputs(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """A batch of `data.collate` as arguments of the model.

        What is not in a cache is computed. A batch that has `vision_features` or `depth_encoding`
        already keeps them.

        Raises:
            NumericError: features or a depth that are not finite.
        """
        found = {name: value for name, value in batch.items() if name not in NOT_FOR_THE_MODEL}
        if batch.get("vision_parts") and self.vision is not None:
            found["vision_features"] = self.vision.joined(batch["vision_parts"])
        if batch.get("depth_parts") and self.depth is not None:
            values = self.depth.joined(batch["depth_parts"])
            found["depth_encoding"] = encode_depth(self.alpha * values, self.channels)
        return found


def cache_of(cfg: Config) -> FeatureCache:
    """The cache of a configuration, for depth and vision features alike."""
    return FeatureCache(cfg.cache_place, int(cfg.cache_gb * 1e9))


def features_of(
    cfg: Config,
    net: IsaacForConditionalGeneration,
    rules: PictureRules,
    depths: DepthGrids | None,
    precision: str,
    cache: FeatureCache | None = None,
) -> FrozenFeatures:
    """What computes the features of a run.

    Args:
        net: adapted, on its device. rules: of the processor.
        depths: as `model.depths_of` gives them. precision: fp32, bf16 or fp16.
        cache: used for vision features with `cache_vision`.

    Raises:
        ConfigError: `cache_vision`, and the tower is trained or drops at random.
    """
    tower: Any = net.model.vision_embedding[0]
    trained = any(parameter.requires_grad for parameter in tower.parameters())
    vision = None
    if cfg.cache_vision or not (trained or tower.config.attention_dropout):
        kept = cache if cfg.cache_vision else None
        vision = VisionFeatures(tower, rules, kept, AUTOCAST.get(precision))
    return FrozenFeatures(vision, depths, cfg.depth_alpha, net.config.hidden_size)


# -- before training -------------------------------------------------------------------------------


def pictures_of(examples: Sequence[Example], rules: PictureRules) -> list[KnownPicture]:
    """The pictures of conversations, each once; none is opened."""
    every = [picture for example in examples for picture in example.pictures(rules)]
    return list({(picture.content, picture.grid): picture for picture in every}.values())


def fill_depth(
    depths: DepthGrids | None, pictures: Sequence[KnownPicture], device: torch.device
) -> None:
    """Estimate the depth that is not in the cache yet; each process takes its share.

    Raises:
        NumericError: a depth that is not finite.
    """
    if depths is not None:
        in_shares(lambda own: depths.fill(pictures[own]), device)


def fill_vision(
    features: FrozenFeatures, pictures: Sequence[KnownPicture], device: torch.device
) -> None:
    """Compute the vision features that are not in the cache yet; each process takes its share.

    Raises:
        ConfigError: not all of them fit into the cache, or on the disk.
        NumericError: features that are not finite.
    """
    vision = features.vision
    if vision is not None and vision.cache is not None:
        in_shares(lambda own: vision.fill(pictures, own), device)
