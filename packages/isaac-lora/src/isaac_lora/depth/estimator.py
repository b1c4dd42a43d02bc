"""Depth-Anything-V2 as Isaac's depth branch uses it: frozen, float32, squares of one size.

The depth model is no part of Isaac's module tree. There it would be cast to half precision with the
rest, saved with checkpoints and adapters, and its weights read while tensors have no values yet
(`from_pretrained` builds on the meta device), which left the original with random ones.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from isaac_lora.depth.checkpoint import (
    DepthCheckpoint,
    empty_network,
    find_depth_checkpoint,
    read_weights,
)
from isaac_lora.depth.preprocessing import depth_pixels
from isaac_lora.depth.settings import ALPHA, INPUT_SIZE, DepthSettings, setting_problems
from lora_core.cache import fingerprint
from lora_core.errors import CheckpointError, ConfigError, NumericError, listing
from lora_core.merged_file import exact
from lora_core.report import plural

EPS = 1e-9  # keeps a constant map from 0/0
OFFSET = 0.1  # patches; the original adds it to the size that the position table is resized to


class DepthEstimator:
    """The depth of pictures, one at a time.

        estimator = read_depth_estimator("depth_anything_v2_vitl.pth", device=device)
        depth = estimator.normalised(picture)   # [S, S] in 0..1, larger is nearer

    Pictures are not put into batches: a map would then depend, in its last bits, on the others.

    Attributes:
        network: transformers' `DepthAnythingForDepthEstimation`, in evaluation mode.
        checkpoint: where it came from.
        fingerprint: SHA-256 of the weights, the same for each form of file that holds them.
        input_size: S, side of the square that it sees, pixels.
    """

    def __init__(
        self, network: nn.Module, checkpoint: DepthCheckpoint, fingerprint: str, input_size: int
    ) -> None:
        self.network, self.checkpoint = network, checkpoint
        self.fingerprint, self.input_size = fingerprint, input_size

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next(self.network.parameters()).device

    def settings(self, alpha: float = ALPHA) -> DepthSettings:
        """What is stored beside an adapter that is trained with this depth."""
        return DepthSettings(
            model=self.checkpoint.model,
            checkpoint=self.checkpoint.path.absolute().name,
            fingerprint=self.fingerprint,
            alpha=alpha,
            input_size=self.input_size,
        )

    def depth(self, pixels: Tensor) -> Tensor:
        """Relative inverse depth, larger is nearer: float32 [1, 3, S, S] -> [S, S], at least 0."""
        side = self.input_size
        if pixels.shape != (1, 3, side, side) or pixels.dtype != torch.float32:
            raise ValueError(
                f"expected float32 [1, 3, {side}, {side}], not {pixels.dtype} {list(pixels.shape)}"
            )
        with exact(self.network):
            found: Tensor = self.network(pixel_values=pixels.to(self.device)).predicted_depth
        return found[0]

    def normalised(self, picture: NDArray[np.uint8], name: str = "a picture") -> Tensor:
        """The depth of a picture between its farthest and its nearest point.

        Args:
            picture: RGB, uint8 [H, W, 3], as it lies in the file.
            name: for the message.

        Returns:
            float32 [S, S] in 0..1 on the estimator's device; 0 everywhere if all is equally near.

        Raises:
            NumericError: the depth is not finite.
        """
        depth = self.depth(depth_pixels(picture, self.input_size))
        near, far = depth.max(), depth.min()
        if not math.isfinite(near - far):
            raise NumericError(
                f"{name}: the depth model {self.checkpoint.path} gives NaN or infinite depth: its "
                "weights are damaged, or the device computes wrongly; try another checkpoint"
            )
        return (depth - far) / (near - far + EPS)


def read_depth_estimator(
    checkpoint: str | Path | DepthCheckpoint,
    input_size: int = INPUT_SIZE,
    device: torch.device | str = "cpu",
) -> DepthEstimator:
    """Read a depth model.

    Args:
        checkpoint: its file or folder, or what `find_depth_checkpoint` found there.
        input_size: S, a multiple of the patch.

    Raises:
        ConfigError: an input size that the patch does not divide.
        CheckpointError: missing, damaged, of another model, or weights that do not fit.
    """
    if not isinstance(checkpoint, DepthCheckpoint):
        checkpoint = find_depth_checkpoint(checkpoint)
    if problems := setting_problems(ALPHA, input_size, checkpoint.patch):
        raise ConfigError(listing(problems))
    with torch.device("cpu"):  # not on the meta device, if that is where a model is being built
        tensors = read_weights(checkpoint)
        digest = fingerprint(tensors)
        name = "backbone.embeddings.position_embeddings"
        tensors[name] = position_table(tensors[name], input_size // checkpoint.patch)
    network = _network(checkpoint, tensors)
    return DepthEstimator(network.to(device), checkpoint, digest, input_size)


def position_table(table: Tensor, side: int) -> Tensor:
    """The position table for side x side patches, resized as the original does it.

    The original gives the scale (side + 0.1) / M to the bicubic resize, not the size; transformers
    gives the size, with which depths differ by several percent. At the native size both take the
    table as it is.

    Args:
        table: [1, 1 + M², C], the class token's first.

    Returns:
        [1, 1 + side², C].
    """
    native = math.isqrt(table.shape[1] - 1)  # M
    if native == side:
        return table
    patches = table[:, 1:].reshape(1, native, native, -1).permute(0, 3, 1, 2)  # [1, C, M, M]
    scale = (side + OFFSET) / native
    resized = F.interpolate(patches, scale_factor=(scale, scale), mode="bicubic")
    return torch.cat([table[:, :1], resized.flatten(2).transpose(1, 2)], dim=1)


def _network(checkpoint: DepthCheckpoint, tensors: dict[str, Tensor]) -> nn.Module:
    """The network with these tensors as its parameters, frozen, in evaluation mode."""
    network = empty_network(checkpoint)
    # The table's size alone decides in transformers whether it is resized once more.
    network.backbone.embeddings.position_embeddings = nn.Parameter(
        torch.empty_like(tensors["backbone.embeddings.position_embeddings"], device="meta")
    )
    network.load_state_dict(tensors, strict=True, assign=True)
    left = [name for name, tensor in network.state_dict().items() if tensor.is_meta]
    if left or any(buffer.is_meta for buffer in network.buffers()):
        raise CheckpointError(
            f"{checkpoint.path}: {plural(len(left), 'tensor')} left without values"
        )
    return network.eval().requires_grad_(False)
