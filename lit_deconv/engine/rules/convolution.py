"""Convolution: the transposed filters, X' = C^T Y. No bias."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_deconv.engine.registry import reverse_rule
from lit_deconv.engine.rules._shared import output
from lit_deconv.engine.rules.layout import by_map, fast_in_channels_last
from lit_deconv.engine.rules.resampling import per_dim
from lit_deconv.engine.rules.rounded import convolved
from lit_deconv.engine.rules.shared_work import room
from lit_deconv.engine.rules.tiles import by_tiles, tiles_pay
from lit_deconv.engine.signal import Signal
from lit_deconv.engine.tape import Op

_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}

# Up to this many input channels an adjoint is cheaper otherwise: a strided one as a convolution of stride 1
# to stride^2 times as many, whose pixels are then put side by side, and on a CPU one of stride 1 as a
# product of matrices, which leaves no vectors empty.
_FEW_CHANNELS = 4
# Signals of fewer values, or of smaller maps, are not worth the further calls.
_PRODUCTS_FROM, _PRODUCTS_FROM_PIXELS = 1 << 14, 64
# How many numbers of products are made at a time, which stay in the cache until they are added up: as
# this share of the values, within these bounds, for each of up to so many threads.
_PRODUCTS_SHARE, _PRODUCTS, _MOST_PRODUCTS, _PRODUCTS_THREADS = 4, 1 << 17, 1 << 19, 4

# On CUDA, measured on an H200 (docs/benchmarks-cuda.md): cuDNN's own adjoint beats the sub-pixel form
# for kernels and windows larger than these; and between these extents the flipped filters beat it.
_SUBPIXELS_UP_TO = 5, 11
_FLIPPED_FROM, _FLIPPED_TO, _FLIPPED_CHANNELS = 5, 11, 48
# Up to so many bytes of filters that is about as fast on a CPU, where what PyTorch's library makes and
# keeps for each size that it meets takes half the memory. In float64, which it does not take, that is slow.
_FLIPPED_BYTES_ON_CPU = 1 << 19


def _not_transposed(op: Op) -> bool:
    return not op["transposed"]


@reverse_rule(
    "convolution",
    of="input", run_rounded=convolved, windows=_not_transposed, one_hot=_not_transposed,
)  # fmt: skip
def convolution(op: Op, signal: Signal) -> Iterator[tuple[Any, Signal]]:
    """The adjoint of a convolution of any rank, stride, padding, dilation and grouping."""
    weight: Tensor = op["weight"].to(signal.values.dtype)
    if op["transposed"]:
        yield op["input"], signal.map(lambda values: _adjoint(op, values, weight))
        return
    grouped = op["groups"] != 1 and weight.shape[1] != 1
    if signal.channel is not None and (grouped or len(signal.values) == 0):
        signal = signal.dense(output(op).shape[1])
    padding = per_dim(op["padding"], weight.ndim - 2)  # one number for "valid"
    map_size = op["input"].map_size
    covered = _covered(signal.values.shape[2:], weight, *_steps(op, weight))
    if signal.window is None:
        here = [(side, side + extent) for side, extent in zip(padding, map_size, strict=True)]
        window = None
    else:
        window = signal.window.moved(_steps(op, weight)[0], [-side for side in padding])
        here = window.seen(covered, map_size)
        window = window.moved([1] * len(here), [first for first, _ in here])
    if signal.channel is not None:
        signal = _of_one_channel(op, signal, weight)
        signal = signal.anew(_cut(signal.values, here))
    else:
        signal = signal.anew(transposed_convolution(op, signal.values, weight, here))
    signal = signal.replaced(window=window)
    yield op["input"], signal.clipped(map_size) if window else signal


def _covered(
    size: Sequence[int], weight: Tensor, stride: Sequence[int], dilation: Sequence[int]
) -> list[int]:
    """Extents of all pixels under a block of ``size`` values at a convolution's output."""
    return [
        (extent - 1) * step + (kernel - 1) * reach + 1
        for extent, step, kernel, reach in zip(
            size, stride, weight.shape[2:], dilation, strict=True
        )
    ]


def _steps(op: Op, weight: Tensor) -> tuple[list[int], list[int]]:
    return per_dim(op["stride"], weight.ndim - 2), per_dim(op["dilation"], weight.ndim - 2)


def _adjoint(op: Op, values: Tensor, weight: Tensor) -> Tensor:
    """Of a transposed convolution, on full maps: PyTorch's own backward."""
    shape = (values.shape[0], *op["input"].shape[1:])
    # Only the sizes of the input are read, so one number stands for it.
    placeholder = values.new_empty(1).expand(shape)
    return torch.ops.aten.convolution_backward(
        values, placeholder, weight, None, op["stride"], op["padding"], op["dilation"],
        op["transposed"], op["output_padding"], op["groups"], (True, False, False),
    )[0]  # fmt: skip


def transposed_convolution(
    op: Op, values: Tensor, weight: Tensor, here: Sequence[tuple[int, int]]
) -> Tensor:
    """The transposed convolution, or a part of all that the windows cover.

    Args:
        op: A convolution.
        values: [U, C, *window] at its output.
        weight: Its filters, in the dtype of ``values``.
        here: First and last + 1 of the pixels wanted, per dimension, counted from the first that the
            windows cover. Those behind the last that they cover are zero.
    """
    stride, dilation = _steps(op, weight)
    plain = len(stride) == 2 and op["groups"] == 1 and dilation == [1, 1]
    if plain and values.shape[2:].numel() == 1:
        met = _cut(weight, here)
        return (values.flatten(1) @ met.flatten(1)).unflatten(1, met.shape[1:])
    if plain and stride == [1, 1] and tiles_pay(values, weight, here):
        return by_tiles(values, weight, here)
    if plain and _subpixels_pay(values, weight, stride):
        return _cut(_by_subpixels(values, weight, stride[0]), here)
    if plain and _flipped_pays(values, weight, stride):
        return _by_flipped_filters(values, weight, here)
    if plain and stride == [1, 1]:
        return _at_stride_one(values, weight, here)
    if max(stride) > 1 and weight.shape[2:].numel() == 1:
        whole = [(0, extent) for extent in values.shape[2:]]
        if plain:
            return _spread(_at_stride_one(values, weight, whole), stride, here)
        steps = [1] * len(stride)
        return _spread(_dense(values, weight, whole, steps, steps, op["groups"]), stride, here)
    return _dense(values, weight, here, stride, dilation, op["groups"])


def _at_stride_one(values: Tensor, weight: Tensor, here: Sequence[tuple[int, int]]) -> Tensor:
    """The same at stride 1 in two dimensions, neither dilated nor grouped."""
    if values.device.type == "cpu" and weight.shape[2:].numel() == 1:
        # Pixel by pixel it is a convolution, which is faster.
        return _cut(F.conv2d(values, weight.transpose(0, 1)), here)
    if _products_pay(values, weight):
        return _by_products(values, weight, here)
    if fast_in_channels_last(values) and weight.nbytes <= _FLIPPED_BYTES_ON_CPU:
        return _by_flipped_filters(values, weight, here)
    return _dense(values, weight, here, [1, 1], [1, 1], 1)


def _dense(
    values: Tensor,
    weight: Tensor,
    here: Sequence[tuple[int, int]],
    stride: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """The same by PyTorch's own transposed convolution."""
    # What PyTorch cuts off both sides is not computed, and the rest is computed faster.
    padding, added = [], []
    covered = _covered(values.shape[2:], weight, stride, dilation)
    for (first, stop), extent, step, reach in zip(here, covered, stride, dilation, strict=True):
        more = first - (extent - stop)  # than what is cut off behind
        padding.append(first if 0 <= more < max(step, reach) else min(first, max(extent - stop, 0)))
        added.append(more if 0 <= more < max(step, reach) else 0)
    found = _TRANSPOSED[weight.ndim - 2](
        values, weight, stride=stride, padding=padding, output_padding=added, groups=groups,
        dilation=dilation,
    )  # fmt: skip
    left = [(first - side, stop - side) for (first, stop), side in zip(here, padding, strict=True)]
    return _cut(found, left)


def _subpixels_pay(values: Tensor, weight: Tensor, stride: Sequence[int]) -> bool:
    if weight.shape[1] > _FEW_CHANNELS or not stride[0] == stride[1] > 1:
        return False
    kernel, window = _SUBPIXELS_UP_TO
    large = max(weight.shape[2:]) > kernel and max(values.shape[2:]) > window
    return not (values.is_cuda and large)


def _flipped_pays(values: Tensor, weight: Tensor, stride: Sequence[int]) -> bool:
    return (
        values.is_cuda
        and list(stride) == [1, 1]
        and weight.shape[2:] in ((3, 3), (5, 5))
        and min(weight.shape[:2]) >= _FLIPPED_CHANNELS
        and min(values.shape[2:]) >= _FLIPPED_FROM
        and max(values.shape[2:]) <= _FLIPPED_TO
    )


def _products_pay(values: Tensor, weight: Tensor) -> bool:
    fast = values.device.type == "cpu" and values.dtype in (torch.float32, torch.float64)
    followed = torch.is_grad_enabled() and (values.requires_grad or weight.requires_grad)
    if not fast or followed or weight.shape[1] > _FEW_CHANNELS:
        return False
    enough = values.shape[2:].numel() >= _PRODUCTS_FROM_PIXELS
    return enough and values.numel() >= _PRODUCTS_FROM


def _by_flipped_filters(values: Tensor, weight: Tensor, here: Sequence[tuple[int, int]]) -> Tensor:
    """At stride 1 a transposed convolution is a convolution with the filters turned round."""
    padding, left = [], []
    for (first, stop), extent, kernel in zip(here, values.shape[2:], weight.shape[2:], strict=True):
        reach = kernel - 1
        side = min(max(0, reach - first, stop - extent), reach)
        padding.append(side)
        left.append((first - reach + side, stop - reach + side))
    return _cut(F.conv2d(values, weight.flip(-1, -2).transpose(0, 1), padding=padding), left)


def _by_products(values: Tensor, weight: Tensor, here: Sequence[tuple[int, int]]) -> Tensor:
    """At stride 1 to few channels: one product of matrices for all places of the filters, then their sum.

    Each value is multiplied by all of its filter's weights at once. The products are added up along the
    rows, where all columns are one block, and then along the columns, some lines of some maps at a time.
    """
    (top, bottom), (left, right) = here
    channels, found, rows, columns = weight.shape
    seeds, _, height, width = values.shape
    values = by_map(values)
    filters = weight.permute(2, 3, 1, 0).reshape(1, -1, channels)
    most = min(max(values.numel() // _PRODUCTS_SHARE, _PRODUCTS), _MOST_PRODUCTS)
    most *= min(torch.get_num_threads(), _PRODUCTS_THREADS)
    lines = max(1, min(height, most // (filters.shape[1] * width)))
    maps = max(1, most // (filters.shape[1] * width * lines))
    total = values.new_zeros(seeds, found, bottom - top, right - left)
    for some, target in zip(values.split(maps), total.split(maps), strict=True):
        count = len(some)
        for first in range(0, height, lines):
            block = some.narrow(2, first, min(lines, height - first))
            extent = block.shape[2]
            start, stop = max(first, top), min(first + extent + rows - 1, bottom)  # met, and wanted
            if start >= stop:
                continue
            products, by_column = room(
                values,
                (count, filters.shape[1], extent * width),
                (count, columns * found, (stop - start) * width),
            )
            torch.bmm(filters.expand(count, -1, -1), block.flatten(2), out=products)
            by_column.zero_()
            by_row = products.view(count, rows, columns * found, -1).unbind(1)
            for row, some_products in enumerate(by_row):
                down = first + row - start
                begin, end = max(0, -down), min(extent, stop - start - down)
                if begin < end:
                    size = (end - begin) * width
                    summed = by_column.narrow(2, (begin + down) * width, size)
                    summed.add_(some_products.narrow(2, begin * width, size))
            by_place = by_column.view(count, columns, found, stop - start, width).unbind(1)
            met = target.narrow(2, start - top, stop - start)
            for column, some_sums in enumerate(by_place):
                begin, end = max(0, left - column), min(width, right - column)
                if begin < end:
                    summed = met.narrow(3, begin + column - left, end - begin)
                    summed.add_(some_sums.narrow(3, begin, end - begin))
    return total


def _spread(values: Tensor, stride: Sequence[int], here: Sequence[tuple[int, int]]) -> Tensor:
    """Values ``stride`` pixels apart, zero between them: see ``transposed_convolution``."""
    found = values.new_zeros(*values.shape[:2], *(stop - first for first, stop in here))
    taken: list[slice] = [slice(None)] * 2
    there: list[slice] = [slice(None)] * 2
    for (first, stop), step, extent in zip(here, stride, values.shape[2:], strict=True):
        begin, end = -(-first // step), min(-(-stop // step), extent)
        taken.append(slice(begin, end))
        there.append(slice(begin * step - first, (end - 1) * step - first + 1, step))
    found[tuple(there)] = values[tuple(taken)]
    return found


def _by_subpixels(values: Tensor, weight: Tensor, stride: int) -> Tensor:
    """A strided transposed convolution to few channels as a dense one and a pixel shuffle."""
    out_channels, in_channels, height, width = weight.shape
    down, right = -(-height // stride), -(-width // stride)
    padded = F.pad(weight, (0, right * stride - width, 0, down * stride - height))
    phases = padded.view(out_channels, in_channels, down, stride, right, stride)
    filters = phases.permute(0, 1, 3, 5, 2, 4).flatten(1, 3)
    whole = [(0, extent) for extent in _covered(values.shape[2:], filters, [1, 1], [1, 1])]
    at_stride_one = _by_flipped_filters if values.is_cuda else _at_stride_one
    dense = at_stride_one(values, filters, whole)
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
    return signal.replaced(values=values, channel=channel, owned=True)


def _cut(values: Tensor, here: Sequence[tuple[int, int]]) -> Tensor:
    """A part of each map; zero where it reaches behind the map's end."""
    sides: list[int] = []
    for (first, stop), extent in zip(here, values.shape[2:], strict=True):
        begin = min(first, extent)
        sides = [-begin, stop - first - (extent - begin), *sides]
    return F.pad(values, sides) if any(sides) else values
