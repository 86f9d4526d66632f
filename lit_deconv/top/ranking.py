"""Which units are the strongest: an order that neither batches nor processes can change.

A kept unit is a row of five integers, so that everything about it merges in one reduction: the
activation (as an integer that sorts like it), the identity of its image, its place in the map, the
process that holds its patch, and the slot where it does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

FIELDS = 5
KEY, IDENTITY, PLACE, HOLDER, SLOT = range(FIELDS)
EMPTY = torch.iinfo(torch.int64).max
"""Identity of no image."""
SPARE = 1
"""Units kept beyond k: a near-tie at the k-th place can still go to the lower identity."""
TIE = 1e-5
"""Activations that differ by less, relatively, are tied."""

_SIGN = 1 << 31
_NEVER = -_SIGN
_LOWEST = -0x7F800000  # as_key(-inf)
# Activations in one bucket share all but their last 6 bits: they differ by less than 7.7e-6.
_BUCKET_BITS = 6


class Admitted(NamedTuple):
    """Units of a batch that take the slots of weaker ones, in fixed shapes.

    Attributes:
        slots: int64 [C, M], the slots.
        samples: int64 [C, M], rows of the batch.
        valid: bool [C, M], False where nothing changes.
    """

    slots: Tensor
    samples: Tensor
    valid: Tensor


class Bar(NamedTuple):
    """The weakest unit kept, of each of C channels.

    Attributes:
        tie: float32 [C], the smallest activation that is tied with it.
        above: float32 [C], the smallest that is stronger.
        last: int64 [C], the highest identity of those tied with it.
    """

    tie: Tensor
    above: Tensor
    last: Tensor

    def reached(self, best: Tensor, identity: Tensor, most: int) -> Tensor:
        """Which images can enter: stronger than a kept unit, and among the strongest of their batch.

        Args:
            best: [C, N], the largest activation in each image's map, without NaN.
            identity: int64 [N].
            most: How many units are kept.

        Returns:
            bool [C, N].
        """
        tied = (best >= self.tie[:, None]) & (identity < self.last[:, None])
        stronger = tied | (best >= self.above[:, None])
        if int(stronger.sum(1).amax()) <= most:
            return stronger
        # of an image that is there twice a single unit is kept
        most = min(most + len(identity) - len(identity.unique()), len(identity))
        last = as_key(best.topk(most, 1).values[:, -1:]) >> _BUCKET_BITS
        return stronger & (best >= as_value(last << _BUCKET_BITS))

    def split(self, sizes: Sequence[int]) -> list[Bar]:
        """One for each layer, of its own memory."""
        parts = zip(*(column.split(sizes) for column in self), strict=True)
        return [Bar(*(column.clone() for column in columns)) for columns in parts]

    def to(self, device: torch.device) -> Bar:
        """The same on another device."""
        return Bar(*(column.to(device) for column in self))


def as_key(values: Tensor) -> Tensor:
    """Integers that sort like float32 numbers.

    Args:
        values: Floating-point numbers without NaN, of any shape.

    Returns:
        int64, same shape.
    """
    bits = values.float().contiguous().view(torch.int32).to(torch.int64)
    return torch.where(bits >= 0, bits, -(bits + _SIGN))


def as_value(key: Tensor) -> Tensor:
    """What ``as_key`` was given, as float32."""
    bits = torch.where(key >= 0, key, -key - _SIGN)
    return bits.to(torch.int32).view(torch.float32)


def no_units(channels: int, k: int) -> Tensor:
    """Room for the strongest units of each channel.

    Args:
        channels: C.
        k: How many are asked for; ``SPARE`` more are kept.

    Returns:
        int64 [C, k + SPARE, FIELDS], all empty.
    """
    units = torch.zeros(channels, k + SPARE, FIELDS, dtype=torch.int64)
    units[..., KEY] = _LOWEST
    units[..., IDENTITY] = EMPTY
    return units


def ranked(key: Tensor, identity: Tensor, most: int) -> Tensor:
    """The strongest units, at most one an image; in one bucket the lower identity comes first.

    The order is total, so the strongest of the strongest of parts are the strongest of the whole.

    Args:
        key: int64 [C, P], from ``as_key``.
        identity: int64 [C, P]; at least ``most`` of them differ, or are ``EMPTY``.
        most: How many.

    Returns:
        int64 [C, most], indices along P.
    """
    order = key.sort(dim=1, descending=True, stable=True).indices
    by_image = identity.gather(1, order).sort(dim=1, stable=True)
    order = order.gather(1, by_image.indices)
    image = by_image.values
    again = torch.zeros_like(image, dtype=torch.bool)
    again[:, 1:] = (image[:, 1:] == image[:, :-1]) & (image[:, 1:] != EMPTY)
    bucket = torch.where(again, _NEVER, key.gather(1, order) >> _BUCKET_BITS)
    best = bucket.sort(dim=1, descending=True, stable=True).indices[:, :most]
    return order.gather(1, best)


def merged(parts: Tensor) -> Tensor:
    """The strongest units of several processes or passes: the reduction.

    Args:
        parts: int64 [W, C, K, FIELDS].

    Returns:
        int64 [C, K, FIELDS].
    """
    most = parts.shape[2]
    pool = parts.transpose(0, 1).flatten(1, 2)
    order = ranked(pool[..., KEY], pool[..., IDENTITY], most)
    return pool.gather(1, order[..., None].expand(-1, -1, FIELDS))


def bar_of(units: Tensor) -> Bar:
    """What an image must reach to be among the strongest of a channel.

    Args:
        units: int64 [C, K, FIELDS].
    """
    bucket = units[..., KEY] >> _BUCKET_BITS
    weakest = bucket.amin(1)
    last = torch.where(bucket == weakest[:, None], units[..., IDENTITY], -EMPTY).amax(1)
    return Bar(as_value(weakest << _BUCKET_BITS), as_value((weakest + 1) << _BUCKET_BITS), last)


def admitted(
    units: Tensor, best: Tensor, identity: Tensor, reached: Tensor | None = None
) -> Admitted:
    """Which images of a batch enter, and whose slots they take. Those that stay keep theirs.

    Args:
        units: int64 [C, K, FIELDS].
        best: [C, N], the largest activation in each image's map, without NaN.
        identity: int64 [N].
        reached: bool [C, N], the only ones that can enter; None where nobody may look.
    """
    key, identity = as_key(best), identity.expand(len(best), -1)
    if reached is not None:
        # few, and sorting the others would take the longest
        columns = _first_true(reached, int(reached.sum(1).max()))
        possible = reached.gather(1, columns)
        key = torch.where(possible, key.gather(1, columns), _LOWEST)
        identity = torch.where(possible, identity.gather(1, columns), EMPTY)
    most, images = units.shape[1], key.shape[1]
    order = ranked(
        torch.cat([units[..., KEY], key], 1),
        torch.cat([units[..., IDENTITY], identity], 1),
        most,
    )
    stays = torch.zeros(len(best), most + images, dtype=torch.bool, device=best.device)
    stays = stays.scatter(1, order, True)
    # As many enter as leave: the first that enters takes the first slot that is left, and so on.
    leaves, enters = ~stays[:, :most], stays[:, most:]
    samples = _first_true(enters, min(most, images))
    valid = enters.gather(1, samples)
    if reached is not None:
        samples = columns.gather(1, samples)
    return Admitted(_first_true(leaves, min(most, images)), samples, valid)


def resolved(units: Tensor, k: int) -> Tensor:
    """The k strongest, best first; of those within ``TIE`` of the largest left, the lowest identity.

    Args:
        units: int64 [C, K, FIELDS], K >= k.
        k: How many.

    Returns:
        int64 [C, k, FIELDS].
    """
    values, identity = as_value(units[..., KEY]), units[..., IDENTITY]
    left = torch.ones_like(identity, dtype=torch.bool)
    chosen = []
    for _ in range(k):
        remaining = torch.where(left, values, -torch.inf)
        largest = remaining.amax(1, keepdim=True)
        # an infinite activation is tied with its like alone
        reach = torch.where(largest.isinf(), 0, largest.abs() * TIE)
        tied = left & (remaining >= largest - reach)
        # argmin of EMPTY everywhere could name one that is gone
        identities = torch.where(tied, identity.clamp(max=EMPTY - 1), EMPTY)
        pick = identities.argmin(1, keepdim=True)
        left = left.scatter(1, pick, False)
        chosen.append(pick)
    order = torch.cat(chosen, 1)
    return units.gather(1, order[..., None].expand(-1, -1, FIELDS))


def _first_true(mask: Tensor, count: int) -> Tensor:
    order = mask.to(torch.uint8).sort(dim=1, descending=True, stable=True)
    return order.indices[:, :count]
