"""Transposed convolutions at stride 1 on a CPU as products of matrices, on maps that lie pixel by pixel.

In memory such a map is [rows, columns, U, C], seen as [U, C, rows, columns]: a pixel holds a matrix of
all seeds by all channels. What is cut, shifted or added along rows and columns are whole blocks then,
and one product of matrices takes all seeds at once. Pointwise ops leave the layout as it is, so a chain
of convolutions is turned round once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

_Here: TypeAlias = "Sequence[tuple[int, int]]"

# Winograd's F(2x2, 3x3), Lavin & Gray 2016, section 4.1: the filters' transform. Those of the maps and of
# the results are sums and differences, see ``by_tiles``.
_TO_TILE = [[1.0, 0.0, 0.0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0.0, 0.0, 1.0]]

# Measured, in multiply-adds: what a value of a tile costs besides the product, and one of the filters.
_TILE_VALUE, _FILTER_VALUE = 45, 40
# Rows of a product of matrices below which it is slow, and that are worked on at a time.
_FEW_ROWS, _ROWS = 48, (64, 256)
# Multiply-adds below which calls cost more than what they do.
_SMALL = 1 << 22
# What it costs to turn a value round for PyTorch's own kernel.
_TURNED = 40
# How often a weight's filters are needed where they are kept: once a run or part.
_CALLS = 4
# What PyTorch's own kernel takes, as a share of what it is counted: by this much ours must need less.
_AGAINST_TAPS, _AGAINST_TILES = 0.75, 0.9


@dataclass
class _Kept:
    """What one call of many convolutions shares."""

    filters: dict[int, tuple[Tensor, int, Tensor]] = field(default_factory=dict)
    room: Tensor | None = None


_kept: ContextVar[_Kept | None] = ContextVar("kept", default=None)


@contextmanager
def kept() -> Iterator[None]:
    """Within it each weight's filters are transformed once, and what is made on the way lies in one place."""
    token = _kept.set(_Kept())
    try:
        yield
    finally:
        _kept.reset(token)


def lies_by_pixel(values: Tensor) -> bool:
    """Whether the channels of all seeds lie side by side at each pixel."""
    seeds, channels = values.shape[:2]
    return channels > 1 and values.stride(1) == 1 and (seeds == 1 or values.stride(0) == channels)


def by_map(values: Tensor) -> Tensor:
    """The same values map by map, contiguous.

    Transposed as one matrix, which PyTorch does by blocks: 0.7 to 2 ns a value, 1.5 to 4 otherwise.
    """
    if values.ndim != 4 or values.is_contiguous() or not lies_by_pixel(values):
        return values.contiguous()
    pixels = values.permute(2, 3, 0, 1).contiguous()
    return pixels.view(values.shape[2:].numel(), -1).t().contiguous().view(values.shape)


def cheapest(
    values: Tensor, weight: Tensor, here: _Here
) -> Callable[[Tensor, Tensor, _Here], Tensor] | None:
    """The function below that needs the fewest operations, None where PyTorch's own kernel does.

    Args:
        values: [U, C, h, w].
        weight: [C, D, kh, kw].
        here: See ``convolution.transposed_convolution``, as for the functions below.
    """
    if values.device.type != "cpu" or values.dtype not in (torch.float32, torch.float64):
        return None
    seeds, channels, _, width = values.shape
    found, kernel = weight.shape[1], weight.shape[2:]
    products = seeds * channels * found
    met = wanted = tiles = 1
    for extent, reach, (first, stop) in zip(values.shape[2:], kernel, here, strict=True):
        met *= sum(max(0, min(extent, stop - tap) - max(0, first - tap)) for tap in range(reach))
        wanted *= (stop - first) * reach
        tiles *= -(-(stop - first) // 2)
    # PyTorch's kernel leaves out some of what it would meet outside the map.
    usual = products * (met + wanted) / 2
    if usual < _SMALL:
        return None
    turned = _TURNED * values.numel() if lies_by_pixel(values) else 0
    if seeds * width >= _FEW_ROWS and products * met < _AGAINST_TAPS * usual + turned:
        return by_taps
    if kernel == (3, 3) and seeds * tiles >= _FEW_ROWS:
        by_tile = products + _TILE_VALUE * seeds * (channels + found)
        by_filter = _FILTER_VALUE * channels * found / (1 if _kept.get() is None else _CALLS)
        if 16 * (tiles * by_tile + by_filter) < _AGAINST_TILES * usual + turned:
            return by_tiles
    return None


def by_taps(values: Tensor, weight: Tensor, here: _Here) -> Tensor:
    """One product for each place in the filters, of those pixels alone that it meets in the map."""
    (top, bottom), (left, right) = here
    maps = values.permute(2, 3, 0, 1).contiguous()
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


def by_tiles(values: Tensor, weight: Tensor, here: _Here) -> Tensor:
    """3x3 filters by Winograd's F(2x2, 3x3): 16 products for each 2x2 pixels, not 36.

    Errors are those of a few sums more, relative to the largest of 4x4 pixels.
    """
    (top, bottom), (left, right) = here
    seeds, _, height, width = values.shape
    rows, columns = -(-(bottom - top) // 2), -(-(right - left) // 2)  # of tiles
    filters = _filters(weight)
    fewest, most = _ROWS
    together = max(1, min(max(weight.shape[0], fewest), most) // (columns * seeds))
    together = -(-rows // -(-rows // together))
    channels, found_channels = (seeds * count for count in weight.shape[:2])
    maps, down, tiles, products, across = _room(
        values,
        (2 * rows + 2, 2 * columns + 2, channels),
        (4, together, 2 * columns + 2, channels),
        (4, 4, together, columns, channels),
        (4, 4, together, columns, found_channels),
        (2, 4, together, columns, found_channels),
    )
    # A pixel wanted meets the two in front of its place and that one itself.
    first, stop = max(0, top - 2), min(height, top + 2 * rows)
    start, end = max(0, left - 2), min(width, left + 2 * columns)
    inside = values[:, :, first:stop, start:end].permute(2, 3, 0, 1)
    target = maps.zero_().unflatten(2, (seeds, -1))
    target[first - top + 2 : stop - top + 2, start - left + 2 : end - left + 2] = inside
    found = values.new_empty(2 * rows, 2 * columns, found_channels)
    for begin in range(0, rows, together):
        end = min(begin + together, rows)
        some = [part.narrow(-3, 0, end - begin) for part in (down, tiles, products, across)]
        _tiled(maps[2 * begin : 2 * end + 2], filters, found[2 * begin : 2 * end], *some)
    found = found[: bottom - top, : right - left]
    return found.unflatten(2, (seeds, -1)).permute(2, 3, 0, 1)


def _room(like: Tensor, *shapes: Sequence[int]) -> list[Tensor]:
    """Tensors of these shapes that nobody reads once the next ask for theirs.

    The allocator may ask the system for each large block anew; page by page that takes longer than
    what is written there.
    """
    sizes = [math.prod(shape) for shape in shapes]
    kept = _kept.get()
    room = None if kept is None else kept.room
    if room is None or room.dtype != like.dtype or len(room) < sum(sizes):
        room = like.new_empty(sum(sizes))
        if kept is not None:
            kept.room = room
    parts = room[: sum(sizes)].split(sizes)
    return [part.view(*shape) for part, shape in zip(parts, shapes, strict=True)]


def _tiled(
    maps: Tensor,
    filters: Tensor,
    found: Tensor,
    down: Tensor,
    tiles: Tensor,
    products: Tensor,
    across: Tensor,
) -> None:
    """Some rows of tiles.

    Args:
        maps: [2 rows + 2, 2 columns + 2, U C].
        filters: [16, C, D].
        found: [2 rows, 2 columns, U D], written to, as are the next.
        down: [4, rows, 2 columns + 2, U C].
        tiles: [4, 4, rows, columns, U C].
        products: [4, 4, rows, columns, U D].
        across: [2, 4, rows, columns, U D].
    """
    rows, columns = tiles.shape[2:4]
    _differences(down, *(maps[place : place + 2 * rows - 1 : 2] for place in range(4)))
    _differences(tiles, *(down[:, :, place : place + 2 * columns - 1 : 2] for place in range(4)))
    torch.bmm(
        tiles.view(16, -1, filters.shape[1]), filters, out=products.view(16, -1, filters.shape[2])
    )
    _sums(across, *products)
    _sums(found.view(rows, 2, columns, 2, -1).permute(1, 3, 0, 2, 4), *across.unbind(1))


def _differences(found: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> None:
    """The transform of four neighbours, B^T of the paper, along the first dimension of ``found``."""
    torch.sub(a, c, out=found[0])
    torch.add(b, c, out=found[1])
    torch.sub(c, b, out=found[2])
    torch.sub(b, d, out=found[3])


def _sums(found: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> None:
    """The transform back to two neighbours, A^T of the paper."""
    torch.add(a, b, out=found[0]).add_(c)
    torch.sub(b, c, out=found[1]).sub_(d)


def _filters(weight: Tensor) -> Tensor:
    """[C, D, 3, 3], turned round, for ``_tiled``: [16, C, D]."""
    kept = _kept.get()
    if kept is None or weight.is_inference():
        return _transformed(weight)
    found = kept.filters.get(id(weight))
    if found is None or found[1] != weight._version:
        found = kept.filters[id(weight)] = weight, weight._version, _transformed(weight)
    return found[2]


def _transformed(weight: Tensor) -> Tensor:
    along = weight.new_tensor(_TO_TILE).flip(1)
    # Columns first, as the maps are.
    both = torch.einsum("rx,cy->crxy", along, along).reshape(16, 9)
    return (both @ weight.reshape(-1, 9).t()).view(16, *weight.shape[:2])
