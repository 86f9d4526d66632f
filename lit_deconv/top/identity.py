"""Who an image is: its index in the data set where that is known, else a hash of its pixels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, SequentialSampler

NOT_COUNTED = -1
"""Index of an image that is left out, because another process counts it."""

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int32}
_CHUNK_BYTES = 8 << 20


def several_processes() -> bool:
    """Whether this process is one of several of a run, which merge what they saw."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def hashed(images: Tensor) -> Tensor:
    """A hash of each image's bits, the same on every device and in every batch.

    A sum of the pixels' bits times fixed odd random numbers, modulo 2^64: two images that differ
    share it with a probability of 2^-(63 - z), z being the last bits that are zero in all of their
    differences. It never waits for the device.

    Args:
        images: [N, C, *map].

    Returns:
        int64 [N], all negative, so that they cannot be taken for indices.
    """
    bits = images.detach().contiguous().flatten(1).view(_BITS[images.element_size()])
    weights = _odd_numbers(bits.shape[1], bits.device)
    rows = max(1, _CHUNK_BYTES // max(1, 8 * bits.shape[1]))
    sums = [(part.to(torch.int64) * weights).sum(1) for part in bits.split(rows)]
    return torch.cat(sums) | torch.iinfo(torch.int64).min


def batch_indices(loader: DataLoader[Any]) -> Iterator[list[int]] | None:
    """The data indices of each batch that a loader will give, where they are known beforehand.

    That is so for samplers that draw no random numbers of their own: sequential ones in a run of
    one process (of several, each may have data of its own), and those of ``DistributedSampler``,
    whose padding (images given to two processes) is ``NOT_COUNTED``.

    Args:
        loader: Reads map-style data.

    Returns:
        Indices batch by batch; None where they are not known.
    """
    batches = getattr(loader, "batch_sampler", None)
    # a loader of its own class, or one whose workers overtake each other, may give another order
    is_kept = type(loader).__iter__ is DataLoader.__iter__ and getattr(loader, "in_order", True)
    if type(batches) is not BatchSampler or not is_kept:
        return None
    sampler = batches.sampler
    if type(sampler) is SequentialSampler:
        return iter(batches) if _processes() == 1 else None
    if type(sampler) is DistributedSampler:
        return _without_padding(batches, sampler)
    return None


def _without_padding(
    batches: BatchSampler, sampler: DistributedSampler[Any]
) -> Iterator[list[int]]:
    total, position = len(sampler.dataset), sampler.rank  # type: ignore[arg-type]
    for batch in batches:
        counted: Sequence[bool] = [
            position + row * sampler.num_replicas < total for row in range(len(batch))
        ]
        position += len(batch) * sampler.num_replicas
        yield [i if real else NOT_COUNTED for i, real in zip(batch, counted, strict=True)]


def _processes() -> int:
    distributed = torch.distributed
    together = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if together else 1


def _odd_numbers(count: int, device: torch.device) -> Tensor:
    """The first numbers of splitmix64, made odd; int64 [count]."""
    mixed = torch.arange(1, count + 1, device=device) * -0x61C8864680B583EB
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        mixed = (mixed ^ _shifted(mixed, shift)) * factor
    return (mixed ^ _shifted(mixed, 31)) | 1


def _shifted(numbers: Tensor, bits: int) -> Tensor:
    """Unsigned shift to the right."""
    return (numbers >> bits) & ((1 << (64 - bits)) - 1)
