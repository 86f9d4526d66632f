"""Convolution: the transposed filters, X' = C^T Y. No bias."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_deconv.engine.registry import reverse_rule
from lit_deconv.engine.rules._shared import output
from lit_deconv.engine.rules.resampling import per_dim
from lit_deconv.engine.signal import Signal
from lit_deconv.engine.tape import Op

_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}

# Up to this many input channels a strided adjoint is cheaper as a stride-1 convolution to
# stride^2 times as many channels, whose pixels are then put side by side.
_FEW_CHANNELS = 4


def _not_transposed(op: Op) -> bool:
    return not op["transposed"]


@reverse_rule("convolution", of="input", windows=_not_transposed, one_hot=_not_transposed)
def convolution(op: Op, signal: Signal) -> Iterator[tuple[Any, Signal]]:
    """The adjoint of a convolution of any rank, stride, padding, dilation and grouping."""
    weight: Tensor = op["weight"].to(signal.values.dtype)
    if op["transposed"]:
        yield op["input"], signal.map(lambda values: _adjoint(op, values, weight))
        return
    grouped = op["groups"] != 1 and weight.shape[1] != 1
    if signal.channel is not None and (grouped or len(signal.values) == 0):
        signal = signal.dense(output(op).shape[1])
    if signal.channel is not None:
        signal = _of_one_channel(op, signal, weight)
    else:
        signal = signal.anew(transposed_convolution(op, signal.values, weight))
    if signal.window is None:
        yield op["input"], signal.map(lambda values: _cut(op, values))
    else:
        padding = per_dim(op["padding"], weight.ndim - 2)  # one number for "valid"
        window = signal.window.moved(op["stride"], [-side for side in padding])
        yield op["input"], replace(signal, window=window).clipped(op["input"].map_size)


def _adjoint(op: Op, values: Tensor, weight: Tensor) -> Tensor:
    """Of a transposed convolution, on full maps: PyTorch's own backward."""
    shape = (values.shape[0], *op["input"].shape[1:])
    # Only the sizes of the input are read, so one number stands for it.
    placeholder = values.new_empty(1).expand(shape)
    return torch.ops.aten.convolution_backward(
        values, placeholder, weight, None, op["stride"], op["padding"], op["dilation"],
        op["transposed"], op["output_padding"], op["groups"], (True, False, False),
    )[0]  # fmt: skip


def transposed_convolution(op: Op, values: Tensor, weight: Tensor) -> Tensor:
    """The transposed convolution without padding: all that the windows cover.

    Args:
        op: A convolution.
        values: [U, C, *window] at its output.
        weight: Its filters, in the dtype of ``values``.
    """
    stride = op["stride"]
    strided = len(stride) == 2 and stride[0] == stride[1] > 1 and op["groups"] == 1
    if strided and weight.shape[1] <= _FEW_CHANNELS and list(op["dilation"]) == [1, 1]:
        return _by_subpixels(values, weight, stride[0])
    transposed = _TRANSPOSED[weight.ndim - 2]
    return transposed(values, weight, stride=stride, dilation=op["dilation"], groups=op["groups"])


def _by_subpixels(values: Tensor, weight: Tensor, stride: int) -> Tensor:
    """A strided transposed convolution to few channels as a dense one and a pixel shuffle."""
    out_channels, in_channels, height, width = weight.shape
    down, right = -(-height // stride), -(-width // stride)
    padded = F.pad(weight, (0, right * stride - width, 0, down * stride - height))
    phases = padded.view(out_channels, in_channels, down, stride, right, stride)
    filters = phases.permute(1, 3, 5, 0, 2, 4).flatten(0, 2).flip(-1, -2)
    dense = F.conv2d(values, filters, padding=(down - 1, right - 1))
    size = [
        (extent - 1) * stride + k
        for extent, k in zip(values.shape[2:], (height, width), strict=True)
    ]
    return F.pixel_shuffle(dense, stride)[..., : size[0], : size[1]]


def _of_one_channel(op: Op, signal: Signal, weight: Tensor) -> Signal:
    """The same for seeds of one channel each: its own filter, at the cost of one channel."""
    assert signal.channel is not None
    filters = weight.index_select(0, signal.channel)  # [U, C, *kernel]
    channel = None
    if op["groups"] != 1:
        # Depthwise: one input channel a filter, so the signal stays in one channel.
        channel = signal.channel // (weight.shape[0] // op["groups"])
    single = signal.values.shape[2:].numel() == 1
    if single and all(step == 1 for step in op["dilation"]):
        values = signal.values * filters
    else:
        transposed = _TRANSPOSED[weight.ndim - 2]
        units, channels = len(filters), filters.shape[1]
        values = transposed(
            signal.values.transpose(0, 1), filters, stride=op["stride"], dilation=op["dilation"],
            groups=units,
        )  # fmt: skip
        values = values.view(units, channels, *values.shape[2:])
    return replace(signal, values=values, channel=channel, owned=True)


def _cut(op: Op, values: Tensor) -> Tensor:
    """The map out of what the windows cover: padding cut off, pixels that no window saw put back."""
    sides: list[int] = []
    map_size = op["input"].map_size
    paddings = per_dim(op["padding"], len(map_size))
    for dim, (padding, extent) in enumerate(zip(paddings, map_size, strict=True)):
        sides = [-padding, padding + extent - values.shape[2 + dim], *sides]
    return F.pad(values, sides)
