"""Three-axis positions (time, row, column) of a sequence of text and images, and their rotation.

A text token advances the time by one; an image stands at one time, whatever its size, and its
tokens count rows and columns from zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_core.errors import DataError
from lora_core.report import plural


def mrope_position_ids(
    image_mask: Tensor,
    grids: Tensor | None,
    pixel_shuffle_scale: int,
    attention_mask: Tensor | None = None,
    document_ids: Tensor | None = None,
) -> Tensor:
    """Give (time, row, column) of every place; text has row = column = 0, padding all zeros.

        time_i = events begun in the sample at or before i, minus 1
        an event is a text token or a whole image

    Args:
        image_mask: (B, L) bool, true at image places.
        grids: (images, 2) integer, patch rows and columns of every image before the shuffle, in
            the order of the places, batch row after batch row. None where there are no images.
        pixel_shuffle_scale: r; an image has (rows / r) * (columns / r) places.
        attention_mask: (B, L), zero at padding, which may stand on either side.
        document_ids: (B, L) integer, another number for every sample of a packed row; time
            starts at zero in each.

    Returns:
        (B, L, 3) int64.

    Raises:
        DataError: places and grids differ in number, or an image's places are torn apart.
    """
    image_mask = image_mask.bool()
    begins, row, column = _image_places(image_mask, grids, pixel_shuffle_scale)
    real = torch.ones_like(image_mask) if attention_mask is None else attention_mask.bool()
    events = real & (~image_mask | begins)
    time = events.long().cumsum(-1) - 1
    if document_ids is not None:
        time = time - _events_before(events, document_ids)
    positions = torch.stack([time, row, column], dim=-1)
    return positions.masked_fill(~real[..., None], 0)


def _image_places(
    image_mask: Tensor, grids: Tensor | None, scale: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Give three (B, L) tensors: first place of an image (bool), row and column (int64)."""
    begins = torch.zeros_like(image_mask)
    row = torch.zeros_like(image_mask, dtype=torch.long)
    column = torch.zeros_like(row)
    if grids is None or len(grids) == 0:
        _check_number(int(image_mask.sum()), 0, 0)
        return begins, row, column
    grids = grids.to(image_mask.device).long() // scale
    sizes = grids.prod(-1)
    places = image_mask.flatten().nonzero().squeeze(-1)
    _check_number(len(places), int(sizes.sum()), len(grids))
    first = sizes.cumsum(0) - sizes  # of every image, among the places
    offset = torch.arange(len(places), device=places.device) - first.repeat_interleave(sizes)
    _check_whole(places, offset, image_mask.shape[1])
    width = grids[:, 1].repeat_interleave(sizes)
    begins.view(-1)[places] = offset == 0
    row.view(-1)[places] = offset // width
    column.view(-1)[places] = offset % width
    return begins, row, column


def _check_number(places: int, tokens: int, images: int) -> None:
    if places != tokens:
        raise DataError(
            f"image_mask has {plural(places, 'image place')}, but `grids` is of "
            f"{plural(images, 'image')} with {plural(tokens, 'token')} after the pixel shuffle; "
            "make both from the same samples"
        )


def _check_whole(places: Tensor, offset: Tensor, length: int) -> None:
    inside = offset[1:] > 0
    together = (places[1:] - places[:-1] == 1) & (places[1:] // length == places[:-1] // length)
    if bool((inside & ~together).any()):
        raise DataError(
            "image_mask and `grids` do not fit: the places of an image are interrupted by text or "
            "run over the end of a row; give the grids in the order of the images in the batch"
        )


def _events_before(events: Tensor, document_ids: Tensor) -> Tensor:
    """Give, for every place, how many events of its row come before its document, (B, L)."""
    before = events.long().cumsum(-1) - events.long()
    # The number grows along a row, so the greatest so far is that of the present document.
    return torch.where(document_begins(document_ids), before, 0).cummax(-1).values


def document_begins(document_ids: Tensor) -> Tensor:
    """Mark the first place of every document of a packed row, (B, L) bool."""
    begins = torch.ones_like(document_ids, dtype=torch.bool)
    begins[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return begins


def document_positions(document_ids: Tensor) -> Tensor:
    """Number the places of every document of a packed row from zero, (B, L) int64."""
    place = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)
    return place - torch.where(document_begins(document_ids), place, 0).cummax(-1).values


def rotary_cos_sin(
    position_ids: Tensor,
    image_mask: Tensor | None,
    head_dim: int,
    theta: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Give cos and sin, each (B, L, head_dim), of the rotary step.

        f_k = theta^(-2k / D),  k = 0 ... D/2 - 1
        phase_k = p(k) f_k,  p(k) = time for k < D/4, row for k < 3D/8, else column
        cos = [cos phase, cos phase],  sin likewise

    Text is rotated by its time on all axes, which is the ordinary rotary step.

    Args:
        position_ids: (B, L, 3) integer.
        image_mask: (B, L) bool; None: all is text.
        head_dim: D, a multiple of 8.
        theta: the base of the frequencies.
        dtype: of the result; the phases are float32.
    """
    axes = position_ids.float()
    if image_mask is None:
        axes = axes[..., :1].expand_as(axes)
    else:
        axes = torch.where(image_mask.bool()[..., None], axes, axes[..., :1])
    quarter, eighth = head_dim // 4, head_dim // 8
    axis_of = torch.tensor([0, 1, 2], device=axes.device).repeat_interleave(
        torch.tensor([quarter, eighth, eighth], device=axes.device)
    )
    even = torch.arange(0, head_dim, 2, dtype=torch.float32, device=axes.device)
    phase = axes[..., axis_of] * (1.0 / theta ** (even / head_dim))
    phase = torch.cat([phase, phase], dim=-1)
    return phase.cos().to(dtype), phase.sin().to(dtype)
