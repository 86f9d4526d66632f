"""Convolutions at stride 1 on a CPU as products of matrices, on maps that lie pixel by pixel.

In memory such a map is [rows, columns, U, C], seen as [U, C, rows, columns]: each pixel holds a matrix
of all seeds by all channels. What is cut, shifted or added along rows and columns are whole blocks then,
and one product of matrices takes all seeds at once. Pointwise ops leave the layout as it is, so a chain
of convolutions is turned round once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lit_deconv.engine.rules.layout import (
    channels_last,
    fast_in_channels_last,
    lies_by_pixel,
    pixel_by_pixel,
)
from lit_deconv.engine.rules.resampling import per_dim
from lit_deconv.engine.rules.shared_work import is_shared, of_whole_maps, room, transformed_once

_Here: TypeAlias = "Sequence[tuple[int, int]]"
_Form: TypeAlias = "Callable[[Tensor, Tensor, _Here], Tensor]"
# A function of two tensors, these, and what takes its result. Views cost as much as small sums, so they
# are made once for all rows of tiles.
_Call: TypeAlias = "tuple[Callable[..., Any], Tensor, Tensor, Tensor]"

# Winograd's F(2x2, 3x3), Lavin & Gray 2016, section 4.1: G of the paper, for the filters. The last row is
# negated, so that in the transform back the first and the last of a tile are added in one call.
_FILTERS_TO_TILE = [[1.0, 0.0, 0.0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0.0, 0.0, -1.0]]

# Measured (benchmarks/convolutions.py), in multiply-adds of a large product: to turn a value
# of a map round for PyTorch's own kernel, to read or add to a value for one place of the filters, to make
# or read a value of a tile, and to transform one of the filters; and a multiply-add of the tiles' products
# with one thread and with several, which wait for one another's memory.
_TURNED, _TAP_VALUE, _TILE_VALUE, _FILTER_VALUE = 12, 10, 22, 40
_TILE_PRODUCT, _TILE_PRODUCT_SHARED = 1.2, 1.5
# How often a weight's transformed filters are used where they are kept: once a run of images or a part.
_USES = 4
# The share of what we count for PyTorch's own kernel that ours may need, to be faster.
_SHARE_BY_TAPS, _SHARE_BY_TILES = 0.8, 0.9
# And of what we count for a forward in channels_last, for which PyTorch has fast kernels of these.
_SHARE_OF_FORWARD = 0.75
# Multiply-adds below which calls cost more than what they do.
_SMALL = 1 << 22
# Columns of a matrix below which its product leaves vectors empty.
_NARROW = 16
# Rows of a matrix below which its product is slow, and rows that are worked on at a time, as many as
# there are channels within these bounds: more leave the cache.
_FEW_ROWS, _ROWS = 48, (64, 256)
# Numbers of a line of tiles for each thread with which its sums, of two to eight lines, are shared among
# threads (measured), and for how many threads so many rows of tiles are worked on at a time.
_GRAIN, _MOST_SHARING = 1 << 14, 4


def cheapest(values: Tensor, weight: Tensor, here: _Here) -> _Form | None:
    """The function below that is the fastest by count, None where PyTorch's own kernel is.

    None, too, where autograd looks on: it cannot follow what is written in place.

    Args:
        values: [U, C, h, w].
        weight: [C, D, kh, kw].
        here: See ``convolution.transposed_convolution``, as for the functions below.
    """
    seeds, channels, _, width = values.shape
    found, kernel = weight.shape[1], weight.shape[2:]
    fast = values.device.type == "cpu" and values.dtype in (torch.float32, torch.float64)
    followed = torch.is_grad_enabled() and (values.requires_grad or weight.requires_grad)
    if not fast or followed or found < _NARROW:
        return None
    products = seeds * channels * found
    met = wanted = tiles = 1  # places of the filters at a pixel: in the map, and all
    for extent, reach, (first, stop) in zip(values.shape[2:], kernel, here, strict=True):
        met *= sum(max(0, min(extent, stop - tap) - max(0, first - tap)) for tap in range(reach))
        wanted *= (stop - first) * reach
        tiles *= -(-(stop - first) // 2)
    usual = products * (met + wanted) / 2  # PyTorch's leaves out some of those outside the map
    if usual < _SMALL:
        return None
    threads = torch.get_num_threads()  # which share the products
    turned = threads * _TURNED * values.numel() if lies_by_pixel(values) else 0
    a_tap = products + _TAP_VALUE * threads * seeds * (channels + found)
    if seeds * width >= _FEW_ROWS and met * a_tap < _SHARE_BY_TAPS * usual + turned:
        return by_taps
    may_tile = kernel == (3, 3) and seeds * tiles >= _FEW_ROWS
    by_count = _count_of_tiles(seeds, tiles, channels, found)
    return by_tiles if may_tile and by_count < _SHARE_BY_TILES * usual + turned else None


def _count_of_tiles(seeds: int, tiles: int, channels: int, found: int) -> float:
    """In multiply-adds of a large product."""
    threads = torch.get_num_threads()
    a_product = _TILE_PRODUCT if threads == 1 else _TILE_PRODUCT_SHARED
    a_value = _TILE_VALUE * threads / _threads_that_share()
    a_tile = seeds * (a_product * channels * found + a_value * (channels + found))
    uses = _USES if is_shared() else 1
    a_filter = _FILTER_VALUE * channels * found / uses
    return 16 * (tiles * a_tile + a_filter)


def _threads_that_share() -> int:
    """Among how many threads the sums of tiles are shared."""
    return min(torch.get_num_threads(), _MOST_SHARING)


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
    if dense and _tiles_pay_forward(maps, weight, here):
        found = by_tiles(maps, weight, here, forward=True)
        found = found.contiguous(memory_format=torch.channels_last)
        return found if bias is None else found.add_(bias.view(-1, 1, 1))
    stride = math.prod(per_dim(arguments["stride"], 2))
    numbers = maps.numel() + len(maps) * len(weight) * maps.shape[2:].numel() // stride  # about
    lies_so = weight.is_contiguous(memory_format=torch.channels_last)  # as filters of 1x1 always do
    copied = not lies_so and weight.numel() > numbers
    laid = maps.contiguous() if copied else channels_last(maps)
    return convolution(**{**arguments, "input": laid})


def _tiles_pay_forward(maps: Tensor, weight: Tensor, here: _Here) -> bool:
    if not of_whole_maps():
        return False
    pixels = math.prod(stop - first for first, stop in here)
    tiles = math.prod(-(-(stop - first) // 2) for first, stop in here)
    found, channels = weight.shape[:2]
    usual = 9 * len(maps) * pixels * channels * found
    enough = len(maps) * tiles >= _FEW_ROWS and usual >= _SMALL
    count = _count_of_tiles(len(maps), tiles, channels, found)
    return enough and count < _SHARE_OF_FORWARD * usual


def by_taps(values: Tensor, weight: Tensor, here: _Here) -> Tensor:
    """One product for each place in the filters, of those pixels alone that it meets in the map."""
    (top, bottom), (left, right) = here
    maps = pixel_by_pixel(values)
    taps = weight.permute(2, 3, 0, 1).contiguous()
    height, width = maps.shape[:2]
    found = maps.new_zeros(bottom - top, right - left, len(values), weight.shape[1])
    for row in range(taps.shape[0]):
        first, stop = max(0, top - row), min(height, bottom - row)
        for column in range(taps.shape[1]):
            start, end = max(0, left - column), min(width, right - column)
            if first >= stop or start >= end:
                continue
            down, along = row - top, column - left
            target = found[first + down : stop + down, start + along : end + along].flatten(1, 2)
            met = maps[first:stop, start:end].flatten(1, 2)
            target.baddbmm_(met, taps[row, column].expand(stop - first, -1, -1))
    return found.permute(2, 3, 0, 1)


def by_tiles(values: Tensor, weight: Tensor, here: _Here, forward: bool = False) -> Tensor:
    """3x3 filters by Winograd's F(2x2, 3x3): 16 products for each 2x2 pixels, not 36.

    Errors are relative to the largest of the pixels met, and what meets zeros alone is zero. What is
    infinite may come out as NaN, in the same places.

    Args:
        values: [U, C, h, w].
        weight: [C, D, 3, 3], or of a convolution ``forward`` [D, C, 3, 3], which is the transposed one
            of filters turned round.
        here: See ``convolution.transposed_convolution``.
        forward: Whether it is one.
    """
    (top, bottom), (left, right) = here
    seeds, _, height, width = values.shape
    rows, columns = -(-(bottom - top) // 2), -(-(right - left) // 2)  # of tiles
    filters = transformed_once(weight, _transformed)
    if forward:
        filters = filters.transpose(1, 2)
    fewest, most = _ROWS
    together = min(max(filters.shape[1], fewest), most)
    if _threads_that_share() > 1:
        together = max(together, _threads_that_share() * _GRAIN // filters.shape[1])
    together = max(1, together // (columns * seeds))
    together = -(-rows // -(-rows // together))
    channels, found_channels = (seeds * count for count in filters.shape[1:])
    maps, down, tiles, products, across = room(
        values,
        (2 * rows + 2, 2 * columns + 2, channels),
        (4, together, 2 * columns + 2, channels),
        (4, 4, together, columns, channels),
        (4, 4, together, columns, found_channels),
        (2, 4, together, columns, found_channels),
    )
    # A pixel wanted meets the two in front of its place and that one itself.
    first, start = min(max(0, top - 2), height), min(max(0, left - 2), width)
    stop, end = min(height, top + 2 * rows), min(width, left + 2 * columns)
    inside = pixel_by_pixel(values)[first:stop, start:end]
    _paste(inside, maps.unflatten(2, (seeds, -1)), first - top + 2, start - left + 2)
    found = values.new_empty(2 * rows, 2 * columns, found_channels)
    below = maps.unfold(0, 4, 2).movedim(-1, 0)  # what a tile covers along the rows
    pixels = found.view(rows, 2, columns, 2, -1).permute(1, 3, 0, 2, 4)
    within: dict[int, list[_Call]] = {}  # by rows of tiles
    for begin in range(0, rows, together):
        count = min(together, rows - begin)
        some = [part.narrow(-3, 0, count) for part in (down, tiles, products, across)]
        if count not in within:
            within[count] = _within_tiles(some, filters, forward)
        _run(_differences(some[0], below.narrow(1, begin, count), forward))
        _run(within[count])
        _run(_sums(pixels.narrow(2, begin, count), some[3].transpose(0, 1), forward))
    found = found[: bottom - top, : right - left]
    return found.unflatten(2, (seeds, -1)).permute(2, 3, 0, 1)


def _paste(inside: Tensor, whole: Tensor, row: int, column: int) -> None:
    """Puts one map into another from a pixel on, and zero around it."""
    stop, end = row + inside.shape[0], column + inside.shape[1]
    for outside in (whole[:row], whole[stop:], whole[row:stop, :column], whole[row:stop, end:]):
        outside.zero_()
    whole[row:stop, column:end] = inside


def _run(calls: Sequence[_Call]) -> None:
    for function, one, other, out in calls:
        function(one, other, out=out)


def _within_tiles(some: Sequence[Tensor], filters: Tensor, forward: bool) -> list[_Call]:
    """What is done with some rows of tiles, from the differences of rows to the sums of columns.

    Args:
        some: Differences of the rows [4, rows, 2 columns + 2, U C], and what is written to: the tiles
            [4, 4, rows, columns, U C], their products [4, 4, rows, columns, U D], and the sums of the
            columns [2, 4, rows, columns, U D].
        filters: [16, C, D].
        forward: Whether the filters are to be turned round.
    """
    down, tiles, products, across = some
    matrices = tiles.view(16, -1, filters.shape[1]), products.view(16, -1, filters.shape[2])
    return [
        *_differences(tiles, down.unfold(2, 4, 2).movedim(-1, 0), forward),
        (torch.bmm, matrices[0], filters, matrices[1]),
        *_sums(across, products, forward),
    ]


def _differences(found: Tensor, neighbours: Tensor, forward: bool) -> list[_Call]:
    """The transform of four neighbours, B^T of the paper.

    Args:
        found: [4, ...], written to.
        neighbours: [4, ...].
        forward: Whether the filters are to be turned round: then the first and the last of what is
            found are exchanged, and negated, as the last of the filters is.
    """
    a, b, c, d = neighbours
    calls = [(torch.add, b, c, found[1]), (torch.sub, c, b, found[2])]
    if forward:
        return [*calls, (torch.sub, d, b, found[0]), (torch.sub, c, a, found[3])]
    return [*calls, (torch.sub, neighbours[:2], neighbours[2:], found[::3])]


def _sums(found: Tensor, products: Tensor, forward: bool) -> list[_Call]:
    """The transform back to two neighbours, A^T of the paper.

    Args:
        found: [2, ...], written to.
        products: [4, ...].
        forward: As above.
    """
    a, b, c, d = products
    first, second = found
    calls = [(torch.add, b, c, first), (torch.sub, b, c, second)]
    if forward:
        return [*calls, (torch.add, first, d, first), (torch.add, second, a, second)]
    return [*calls, (torch.add, found, products[::3], found)]


def _transformed(weight: Tensor) -> Tensor:
    """[C, D, 3, 3], turned round and transformed: [16, C, D]."""
    along = weight.new_tensor(_FILTERS_TO_TILE).flip(1)
    # Columns first, as the tiles are.
    both = torch.einsum("rx,cy->crxy", along, along).reshape(16, 9)
    return (both @ weight.reshape(-1, 9).t()).view(16, *weight.shape[:2])
