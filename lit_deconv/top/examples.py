"""Whole images of a few channels' strongest units, for methods that cannot do with a patch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_deconv.top.ranking import HOLDER, IDENTITY, KEY, PLACE, no_units, ranked

_KNOWN_BY = [KEY, IDENTITY, PLACE, HOLDER]


@dataclass(frozen=True)
class Examples:
    """The strongest units of M channels of a layer, with their images, as far as this process saw them.

    Attributes:
        channels: int64 [M], numbers of the channels.
        ranks: int64 [M], place among the channel's units: 0, unless others are tied with it.
        values: [M], activations.
        positions: int64 [M, D], position in the map.
        images: [M, c, H, W].
    """

    channels: Tensor
    ranks: Tensor
    values: Tensor
    positions: Tensor
    images: Tensor


class ExampleImages:
    """Keeps, for some channels, the image that the strongest unit is in.

    Like the metric it belongs to it waits for no accelerator.

    Args:
        rows: Which of the layer's chosen channels.
    """

    def __init__(self, rows: Sequence[int]) -> None:
        self.rows = torch.tensor(rows)
        self.units = no_units(len(rows), 1)[:, 0]
        """int64 [M, FIELDS], whose images these are."""
        self.images: Tensor | None = None
        """[M, c, H, W], None before the first."""

    def update(self, units: Tensor, images: Tensor, identity: Tensor) -> None:
        """Takes over the images of those units of a batch that are now the strongest.

        Args:
            units: int64 [C, K, FIELDS], all kept units of the layer.
            images: [N, c, H, W], the batch.
            identity: int64 [N], who they are.
        """
        own = units[self.rows]
        first = ranked(own[..., KEY], own[..., IDENTITY], 1)
        best = own.gather(1, first[..., None].expand(-1, -1, own.shape[2]))[:, 0]
        is_new = (best != self.units).any(1)
        if is_new.device.type == "cpu" and not bool(is_new.any()):
            return
        # a unit becomes the strongest in the batch that it is in
        sample = (best[:, IDENTITY, None] == identity).to(torch.uint8).argmax(1)
        found = images.index_select(0, sample)
        if self.images is None:
            self.images = torch.zeros_like(found)
        self.images = torch.where(is_new.view(-1, *[1] * (found.ndim - 1)), found, self.images)
        self.units = best

    def ranks(self, units: Tensor) -> tuple[Tensor, Tensor]:
        """Which of these images belong to units of all processes, and which of them.

        Args:
            units: int64 [C, k, FIELDS], best first.

        Returns:
            Indices among the images [H] and the ranks of their units [H], int64.
        """
        same = units[self.rows][..., _KNOWN_BY] == self.units[:, None, _KNOWN_BY]
        held = same.all(2) & (self.units[:, None, KEY] > no_units(1, 1)[0, 0, KEY].item())
        found = held.any(1).nonzero().squeeze(1)
        return found, held.to(torch.uint8).argmax(1)[found]

    def reset(self) -> None:
        """Forgets all images."""
        self.units = no_units(len(self.rows), 1)[:, 0].to(self.rows.device)

    def to(self, device: torch.device) -> None:
        """Moves to a device."""
        self.rows, self.units = self.rows.to(device), self.units.to(device)
        self.images = None if self.images is None else self.images.to(device)
