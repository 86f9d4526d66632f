"""Cuts the patches under units out of images without waiting for the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def moved_inside(start: Tensor, size: Sequence[int], extents: Sequence[int]) -> Tensor:
    """Moves windows that reach past the image into it.

    Args:
        start: int64 [..., D], first row, column, ... of each.
        size: Extents of all windows, at most those of the image.
        extents: Of the image.

    Returns:
        int64 [..., D].
    """
    columns = zip(start.unbind(-1), size, extents, strict=True)
    return torch.stack([first.clamp(0, whole - length) for first, length, whole in columns], -1)


def cut(images: Tensor, samples: Tensor, start: Tensor, size: Sequence[int]) -> Tensor:
    """One patch a unit; 0 where it reaches past the image.

    Args:
        images: [N, C, *map].
        samples: int64 [U], rows of ``images``.
        start: int64 [U, D], first row, column, ... of each patch; may lie outside the image.
        size: Extents of all patches.

    Returns:
        [U, C, *size].
    """
    extents = images.shape[2:]
    units, dims = start.shape
    index = torch.zeros(units, *[1] * dims, dtype=torch.int64, device=images.device)
    inside = torch.ones_like(index, dtype=torch.bool)
    for dim, (length, whole) in enumerate(zip(size, extents, strict=True)):
        shape = [units, *[1] * dims]
        shape[1 + dim] = length
        line = (start[:, dim, None] + torch.arange(length, device=images.device)).view(shape)
        inside = inside & (line >= 0) & (line < whole)
        index = index * whole + line.clamp(0, whole - 1)
    channels = torch.arange(images.shape[1], device=images.device)
    lines = samples[:, None] * images.shape[1] + channels
    flat = lines.view(*lines.shape, *[1] * dims) * extents.numel() + index[:, None]
    patches = images.reshape(-1).index_select(0, flat.flatten()).view(flat.shape)
    return torch.where(inside[:, None], patches, patches.new_zeros(()))
