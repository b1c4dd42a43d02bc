"""To which size a picture is resized, and how many places of the sequence it takes.

All of it follows from the picture's height and width, so that nothing need be decoded to count.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from lora_core.errors import ConfigError, DataError, listing

MOST_PIXELS = 60_000_000  # of a picture, as the model's own processor has it
TOLERANCE = 1e-5  # width of the interval at which the search for a scale ends


class Grid(NamedTuple):
    """Rows and columns."""

    height: int
    width: int

    @property
    def cells(self) -> int:
        return self.height * self.width


@dataclass(frozen=True)
class PictureRules:
    """How pictures become patches; the defaults are those of Isaac-0.1.

    Attributes:
        patch_size: p, pixels of a patch's side.
        max_num_patches, min_num_patches: bounds of a picture's patches; the least may be None.
        pixel_shuffle_scale: r; r x r patches become one place of the sequence.
        max_num_pixels: of a picture as it is given; more are refused.

    Raises:
        ConfigError: numbers that no picture can satisfy.
    """

    patch_size: int = 16
    max_num_patches: int = 6144
    min_num_patches: int | None = 256
    pixel_shuffle_scale: int = 2
    max_num_pixels: int = MOST_PIXELS

    def __post_init__(self) -> None:
        problems = [
            f"{name} is {value!r}: expected a whole number from 1"
            for name, value in vars(self).items()
            if not (type(value) is int and value >= 1)
            and not (name == "min_num_patches" and value is None)
        ]
        if not problems and self.max_num_patches < self.pixel_shuffle_scale**2:
            problems.append(
                f"max_num_patches is {self.max_num_patches}: one place of the sequence alone takes "
                f"{self.pixel_shuffle_scale**2} (pixel_shuffle_scale {self.pixel_shuffle_scale})"
            )
        if not problems and (self.min_num_patches or 0) > self.max_num_patches:
            problems.append(
                f"min_num_patches is {self.min_num_patches}: more than max_num_patches "
                f"{self.max_num_patches}"
            )
        if problems:
            raise ConfigError(listing(problems))

    @property
    def multiple(self) -> int:
        """d = p r, what both sides of a resized picture are multiples of, in pixels."""
        return self.patch_size * self.pixel_shuffle_scale


def target_size(height: int, width: int, rules: PictureRules) -> Grid:
    """The size in pixels to which a picture of `height` x `width` is resized.

    up(x) = max(d, d ceil(x / d)); n(h, w) = (h / p)(w / p) patches. Without a bound in the way it
    is (up(H), up(W)). Else it is (up(s H), up(s W)): s is searched by bisection, in [1, 100] for
    the least scale with n >= min, in [1e-6, 1] for the largest with n <= max. Each side is rounded
    up by itself and the search is discrete, so that a closed form would give other sizes. As s is
    at most 100, a tiny picture may stay below the minimum.

    Raises:
        DataError: no pixels, or more than `rules.max_num_pixels`.
    """
    if height < 1 or width < 1:
        raise DataError(f"{width} x {height} pixels (width x height): an empty picture")
    if height * width > rules.max_num_pixels:
        raise DataError(
            f"{width} x {height} pixels are more than {rules.max_num_pixels / 1e6:g} million: "
            "save the picture smaller, or cut it into tiles"
        )
    size = _scaled(height, width, 1.0, rules.multiple)
    least, most = rules.min_num_patches, rules.max_num_patches
    if least is not None and _patches(size, rules) < least:
        lower, upper = 1.0, 100.0
        while upper - lower >= TOLERANCE:
            scale = (lower + upper) / 2
            if _patches(_scaled(height, width, scale, rules.multiple), rules) >= least:
                upper = scale
            else:
                lower = scale
        return _scaled(height, width, upper, rules.multiple)
    if _patches(size, rules) <= most:
        return size
    lower, upper = TOLERANCE / 10, 1.0
    while upper - lower >= TOLERANCE:
        scale = (lower + upper) / 2
        if _patches(_scaled(height, width, scale, rules.multiple), rules) <= most:
            lower = scale
        else:
            upper = scale
    return _scaled(height, width, lower, rules.multiple)


def _scaled(height: int, width: int, scale: float, multiple: int) -> Grid:
    """Both sides times `scale`, each rounded up to a multiple."""
    sides = (max(multiple, math.ceil(scale * x / multiple) * multiple) for x in (height, width))
    return Grid(*sides)


def _patches(size: Grid, rules: PictureRules) -> int:
    return (size.height // rules.patch_size) * (size.width // rules.patch_size)


def patch_grid(height: int, width: int, rules: PictureRules) -> Grid:
    """Rows and columns of patches, before the shuffle, of a picture of `height` x `width`."""
    size = target_size(height, width, rules)
    return Grid(size.height // rules.patch_size, size.width // rules.patch_size)


def token_grid(grid: Grid | tuple[int, int], rules: PictureRules) -> Grid:
    """Rows and columns of places in the sequence, of a picture with this grid of patches."""
    return Grid(grid[0] // rules.pixel_shuffle_scale, grid[1] // rules.pixel_shuffle_scale)


def num_tokens(height: int, width: int, rules: PictureRules) -> int:
    """Places of the sequence that a picture of `height` x `width` takes."""
    return token_grid(patch_grid(height, width, rules), rules).cells
