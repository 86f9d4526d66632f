"""The scale of each normalisation whose statistics are kept as constants, by the function's name.

Each takes the arguments of the function of that name in ``torch.nn.functional`` and returns a tensor
that broadcasts against its input, or None where the function normalises with running statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def _layer_norm_scale(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, eps: float, **_: Any
) -> Tensor:
    dims = tuple(range(-len(normalized_shape), 0))
    scale = (input.detach().var(dims, unbiased=False, keepdim=True) + eps).rsqrt()
    return scale if weight is None else scale * weight.detach()


def _rms_norm_scale(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    eps: float | None,
    **_: Any,
) -> Tensor:
    dims = tuple(range(-len(normalized_shape), 0))
    floor = torch.finfo(input.dtype).eps if eps is None else eps
    scale = (input.detach().square().mean(dims, keepdim=True) + floor).rsqrt()
    return scale if weight is None else scale * weight.detach()


def _group_norm_scale(
    input: Tensor, num_groups: int, weight: Tensor | None, eps: float, **_: Any
) -> Tensor:
    groups = input.detach().reshape(input.shape[0], num_groups, -1)
    scale = (groups.var(-1, unbiased=False) + eps).rsqrt()
    scale = scale.repeat_interleave(input.shape[1] // num_groups, 1)
    return _per_channel(scale, weight, input.dim())


def _instance_norm_scale(
    input: Tensor, weight: Tensor | None, use_input_stats: bool, eps: float, **_: Any
) -> Tensor | None:
    return _group_norm_scale(input, input.shape[1], weight, eps) if use_input_stats else None


def _batch_norm_scale(
    input: Tensor, weight: Tensor | None, training: bool, eps: float, **_: Any
) -> Tensor | None:
    if not training:
        return None
    dims = [0, *range(2, input.dim())]
    scale = (input.detach().var(dims, unbiased=False) + eps).rsqrt()
    return _per_channel(scale[None], weight, input.dim())


def _length_scale(
    input: Tensor, p: float, dim: int | tuple[int, ...], eps: float, **_: Any
) -> Tensor:
    return (
        torch.linalg.vector_norm(input.detach(), p, dim, keepdim=True).clamp(min=eps).reciprocal()
    )


def _per_channel(scale: Tensor, weight: Tensor | None, dim: int) -> Tensor:
    if weight is not None:
        scale = scale * weight.detach()
    return scale.reshape(*scale.shape, *[1] * (dim - 2))


SCALES: dict[str, Callable[..., Tensor | None]] = {
    "layer_norm": _layer_norm_scale,
    "rms_norm": _rms_norm_scale,
    "group_norm": _group_norm_scale,
    "instance_norm": _instance_norm_scale,
    "batch_norm": _batch_norm_scale,
    "normalize": _length_scale,
}
