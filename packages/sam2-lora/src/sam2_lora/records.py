"""One picture of a data set with what is annotated on it.

A record holds annotations as they were read; masks are decoded when they are asked for, so that
tens of thousands of pictures are ready within seconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lora_core.errors import DataError, one_line
from lora_core.pictures.encodings import Shape
from lora_core.pictures.files import read_mask
from lora_core.pictures.masks import Object, Size, binary_object, objects_by_value
from lora_core.pictures.reading import sizes_differ
from sam2_lora.config import MaskKind


@dataclass(frozen=True)
class Record:
    """A picture and its annotations."""

    key: str  # unique in its split: the picture's path below the data root, with "/"
    image: Path
    size: Size  # (height, width) of the upright picture
    shapes: tuple[Shape, ...] = ()
    mask: Path | None = None  # a mask file instead of shapes
    mask_kind: MaskKind = "auto"
    merged: bool = False  # an annotation holds all of its class: its parts are the objects

    @property
    def objects(self) -> list[Object]:
        """The annotations' masks, decoded anew at each access; empty ones are left out.

        Raises:
            DataError: as `decoded`.
        """
        return self.decoded()[0]

    def decoded(self) -> tuple[list[Object], int]:
        """The annotations' masks, and how many annotations cover no pixel.

        Raises:
            DataError: annotations cannot be decoded; one line for each.
        """
        if self.mask is not None:
            return self._mask_objects(self.mask), 0
        found, problems = [], []
        for shape in self.shapes:
            try:
                item = shape.decode(self.size)
            except DataError as error:
                problems.append(f"{shape.where}: {error}")
                continue
            if item.crop.size:
                found.append(item)
        if problems:
            raise DataError("\n".join(problems))
        return found, len(self.shapes) - len(found)

    def check_size(self, pixels: NDArray[np.generic]) -> None:
        """Refuse a picture [H, W, ...] of another size than the annotations mean.

        Raises:
            DataError: it was exchanged after its header was read, or the header is wrong.
        """
        if pixels.shape[:2] != self.size:
            raise DataError(
                f"{one_line(self.image)}: {pixels.shape[1]} x {pixels.shape[0]} pixels "
                f"(width x height), expected {self.size[1]} x {self.size[0]} as its header said: "
                "was the picture exchanged, or is it damaged?"
            )

    def _mask_objects(self, path: Path) -> list[Object]:
        values = read_mask(path)
        if values.shape != self.size:
            raise DataError(f"{one_line(path)}: {sizes_differ(values.shape, self.size)}")
        try:
            if self.mask_kind in {"auto", "binary"}:
                return binary_object(values, evident=self.mask_kind == "auto", label="object")
            return objects_by_value(values, labels=self.mask_kind == "labels")
        except DataError as error:
            raise type(error)(f"{one_line(path)}: {error}") from None
