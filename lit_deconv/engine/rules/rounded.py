"""A model's own convolution in the fastest form, where it may be rounded otherwise than as called."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lit_deconv.engine.rules.layout import channels_last, fast_in_channels_last
from lit_deconv.engine.rules.resampling import per_dim
from lit_deconv.engine.rules.tiles import by_tiles, tiles_pay_forward

# Channels below which the kernel for channels_last leaves vectors empty.
_NARROW = 16


def convolved(convolution: Callable[..., Any], arguments: Mapping[str, Any]) -> Tensor:
    """A model's own convolution, which is rounded otherwise than PyTorch's kernel for its maps does.

    On a CPU the kernel for ``channels_last`` is faster, and with many channels tiles are. That kernel
    has the filters copied into its layout, too, which takes longer than it saves where they are more
    than the maps.

    Args:
        convolution: The aten op.
        arguments: Its arguments by name.

    Returns:
        What the op returns, in ``channels_last`` where that is faster.
    """
    maps, weight, bias = arguments["input"], arguments["weight"], arguments["bias"]
    plain = maps.ndim == 4 and arguments["groups"] == 1 and not arguments["transposed"]
    fast = fast_in_channels_last(maps) and maps.dtype == weight.dtype
    fast = fast and not torch.is_grad_enabled()
    if not plain or not fast or weight.shape[1] < _NARROW:
        return convolution(**arguments)
    sides = per_dim(arguments["padding"], 2)
    here = [(2 - side, extent + side) for side, extent in zip(sides, maps.shape[2:], strict=True)]
    steps = *arguments["stride"], *arguments["dilation"]
    dense = weight.shape[2:] == (3, 3) and max(steps) == 1 and max(sides) <= 2
    if dense and tiles_pay_forward(maps, weight, here):
        found = by_tiles(maps, weight, here, forward=True)
        return found if bias is None else found.add_(bias.view(-1, 1, 1))
    stride = math.prod(per_dim(arguments["stride"], 2))
    numbers = maps.numel() + len(maps) * len(weight) * maps.shape[2:].numel() // stride  # about
    lies_so = weight.is_contiguous(memory_format=torch.channels_last)  # as filters of 1x1 always do
    copied = not lies_so and weight.numel() > numbers
    laid = maps.contiguous() if copied else channels_last(maps)
    return convolution(**{**arguments, "input": laid})
