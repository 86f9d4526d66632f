"""How maps lie in memory, and turning them round."""

from __future__ import annotations

import torch
from torch import Tensor

# Numbers that PyTorch's shuffle of channels moves by vectors, by their bytes, and on which CPUs.
_MOVED_BY_VECTORS = {1: torch.uint8, 4: torch.float32}
_VECTORS = ("AVX2", "AVX512")
# Numbers below which its calls cost more than is gained.
_FEW = 1 << 14
# What PyTorch's fast kernels for maps in channels_last take on a CPU.
_FAST_IN_CHANNELS_LAST = (torch.float32,)


def transposed(matrices: Tensor) -> Tensor:
    """Transposes matrices, bit by bit.

    A CPU copies what is transposed number by number. To shuffle the channels of a pixel is to transpose
    a matrix, too, which for ``channels_last`` is done by vectors.

    Args:
        matrices: [..., M, N].

    Returns:
        [..., N, M], contiguous.
    """
    moved_as = _MOVED_BY_VECTORS.get(matrices.element_size())
    on_cpu = matrices.device.type == "cpu" and has_vectors()
    many = matrices.is_contiguous() and matrices.numel() > _FEW
    if moved_as is None or not on_cpu or not many or matrices.is_complex():
        return matrices.mT.contiguous()
    numbers = matrices if matrices.dtype == moved_as else matrices.view(moved_as)
    pixels = numbers.view(1, -1, 1, matrices.shape[-2:].numel()).permute(0, 3, 1, 2)
    shuffled = torch.channel_shuffle(pixels, matrices.shape[-2]).permute(0, 2, 3, 1)
    found = shuffled.reshape(*matrices.shape[:-2], matrices.shape[-1], matrices.shape[-2])
    return found if matrices.dtype == moved_as else found.view(matrices.dtype)


def channels_last(maps: Tensor) -> Tensor:
    """The same in that layout of PyTorch's; [U, C, h, w]."""
    if not maps.is_contiguous():
        return maps.contiguous(memory_format=torch.channels_last)
    pixels = transposed(maps.flatten(2)).unflatten(1, maps.shape[2:])
    return pixels.permute(0, 3, 1, 2)


def fast_in_channels_last(maps: Tensor) -> bool:
    """Whether a CPU has faster kernels for maps like these in ``channels_last`` than as they lie."""
    fast = maps.device.type == "cpu" and torch.backends.mkldnn.is_available()
    return fast and maps.dtype in _FAST_IN_CHANNELS_LAST


def has_vectors() -> bool:
    """Whether the CPU is one for which PyTorch's kernels and its library's are vectorised alike."""
    return torch.backends.cpu.get_cpu_capability() in _VECTORS


def by_map(values: Tensor) -> Tensor:
    """Maps one after the other, as PyTorch lays them; [U, C, h, w], contiguous."""
    if values.ndim != 4 or not values.is_contiguous(memory_format=torch.channels_last):
        return values.contiguous()
    if values.is_contiguous():
        return values
    return transposed(values.permute(0, 2, 3, 1).flatten(1, 2)).view(values.shape)
