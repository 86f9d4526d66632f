"""Convolutions of 3x3 at stride 1 on a CPU by Winograd's tiles.

Maps lie in ``channels_last``, [U, rows, columns, C] in memory. What is added or subtracted for a tile are
all channels of a pixel then, and the 16 products of all tiles are one call, that of a grouped convolution
of 1x1, or with many filters one call each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from lit_deconv.engine.rules.layout import channels_last, fast_in_channels_last, has_vectors
from lit_deconv.engine.rules.shared_work import is_shared, of_whole_maps, room, transformed_once

_Here: TypeAlias = "Sequence[tuple[int, int]]"
# A function of two tensors, these, and what takes its result.
_Call: TypeAlias = "tuple[Callable[..., Any], Tensor, Tensor, Tensor]"

# Winograd's F(2x2, 3x3), Lavin & Gray 2016, section 4.1: G of the paper, for the filters. The last row is
# negated, so that in the transform back the first and the last of a tile are added in one call.
_FILTERS_TO_TILE = [[1.0, 0.0, 0.0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0.0, 0.0, -1.0]]

# Measured (benchmarks/convolutions.py), in multiply-adds of a convolution: one of the tiles' products, to
# make or read a value of a tile, to lay one of the transformed filters for the products of a block of
# tiles, to read it first, and to transform it. Where convolutions are half as fast all but the first take
# half as many, and more shapes would be faster by tiles than are counted so.
_TILE_PRODUCT, _TILE_VALUE, _FILTER_LAID, _FILTER_READ, _FILTER_MADE = 1.1, 50, 80, 80, 40
# The second of a model's own convolution, which finds other maps in the cache than those that go back.
_TILE_VALUE_FORWARD = 60
# How often a weight's transformed filters are used where they are kept: once a run of images or a part.
_USES = 4
# Channels in blocks of which PyTorch's library takes them, a multiple of which there must be.
_BLOCK = 16
# Filters from which those of each place of a tile are multiplied by themselves, as they lie: for a call of
# all places they are laid anew, which takes longer than so many calls.
_WIDE = 1 << 17
# Tiles that are worked on at a time, fewer where no filters are laid for them, and numbers of all of their
# channels: more leave the cache.
_TOGETHER, _TOGETHER_WIDE, _NUMBERS = 512, 200, 5 << 19
# Multiply-adds below which calls cost more than what they do.
_SMALL = 1 << 22


def tiles_pay(values: Tensor, weight: Tensor, here: _Here) -> bool:
    """Whether ``by_tiles`` is faster by count than PyTorch's own kernel.

    Not where autograd looks on: it cannot follow what is written in place.

    Args:
        values: [U, C, h, w].
        weight: [C, D, kh, kw].
        here: See ``convolution.transposed_convolution``.
    """
    channels, found = weight.shape[:2]
    followed = torch.is_grad_enabled() and (values.requires_grad or weight.requires_grad)
    if weight.shape[2:] != (3, 3) or followed or not _fast(values, channels, found):
        return False
    met = wanted = 1  # places of the filters at a pixel: in the map, and all
    for extent, (first, stop) in zip(values.shape[2:], here, strict=True):
        met *= sum(max(0, min(extent, stop - tap) - max(0, first - tap)) for tap in range(3))
        wanted *= 3 * (stop - first)
    # PyTorch's leaves out some of those outside the map.
    return _fewer(values, here, channels, found, (met + wanted) / 2, _TILE_VALUE)


def _fast(maps: Tensor, channels: int, found: int) -> bool:
    """Whether PyTorch's library has a fast product for these: on other CPUs groups may take a slow one."""
    whole = channels % _BLOCK == found % _BLOCK == 0
    return whole and fast_in_channels_last(maps) and has_vectors()


def _fewer(
    maps: Tensor, here: _Here, channels: int, found: int, places: float, a_value: float
) -> bool:
    """Whether tiles take less than PyTorch's own kernel with so many places of the filters in a map."""
    usual = len(maps) * channels * found * places
    return usual >= _SMALL and _count(len(maps), here, channels, found, a_value) < usual


def _count(seeds: int, here: _Here, channels: int, found: int, a_value: float) -> float:
    """What tiles take, in multiply-adds of a convolution."""
    blocks = _blocks(seeds, here, channels, found)
    a_tile = _TILE_PRODUCT * channels * found + a_value * (channels + found)
    a_filter = _FILTER_READ + _FILTER_MADE / (_USES if is_shared() else 1)
    if not _wide(channels, found):
        a_filter += blocks.all * _FILTER_LAID
    return 16 * (seeds * blocks.rows * blocks.columns * a_tile + a_filter * channels * found)


class _Blocks(NamedTuple):
    """Tiles of maps, [seeds, rows, columns], and how many seeds and rows are worked on at a time."""

    seeds: int
    rows: int
    columns: int
    seeds_together: int
    rows_together: int

    @property
    def all(self) -> int:
        """How many blocks there are."""
        return -(-self.seeds // self.seeds_together) * -(-self.rows // self.rows_together)


def _blocks(seeds: int, here: _Here, channels: int, found: int) -> _Blocks:
    rows, columns = (-(-(stop - first) // 2) for first, stop in here)
    most = _TOGETHER_WIDE if _wide(channels, found) else _TOGETHER
    most = min(most, _NUMBERS // (16 * max(channels, found)))
    lines = max(1, min(rows, most // columns))
    maps = max(1, most // (columns * lines)) if lines == rows else 1
    return _Blocks(seeds, rows, columns, _evenly(seeds, maps), _evenly(rows, lines))


def _evenly(number: int, most: int) -> int:
    """How many of a number are taken at a time, so that all parts are of about the same size."""
    return -(-number // -(-number // most)) if number else 1


def tiles_pay_forward(maps: Tensor, weight: Tensor, here: _Here) -> bool:
    """The same of a model's own convolution; only where whole maps go back, which share its filters.

    Args:
        maps: [U, C, h, w].
        weight: [D, C, 3, 3].
        here: As of the transposed one, see ``by_tiles``.
    """
    found, channels = weight.shape[:2]
    if not of_whole_maps() or not _fast(maps, channels, found):
        return False
    places = 9 * math.prod(stop - first for first, stop in here)
    return _fewer(maps, here, channels, found, places, _TILE_VALUE_FORWARD)


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

    Returns:
        [U, D, *here] in ``channels_last``.
    """
    (top, bottom), (left, right) = here
    filters = transformed_once(weight, _of_convolution if forward else _of_adjoint)
    found, channels = filters.shape[1:]
    seeds, rows, columns, some_seeds, some_rows = _blocks(len(values), here, channels, found)
    maps, down, tiles, across = room(
        values,
        (seeds, 2 * rows + 2, 2 * columns + 2, channels),
        (some_seeds, some_rows, 4, 2 * columns + 2, channels),
        (some_seeds, some_rows, columns, 4, 4, channels),
        (some_seeds, some_rows, 4, columns, 2, found),
    )
    # A pixel wanted meets the two in front of its place and that one itself.
    _paste(channels_last(values).permute(0, 2, 3, 1), maps, top - 2, left - 2)
    pixels = values.new_empty(seeds, rows, 2, columns, 2, found)
    covered = maps.unfold(1, 4, 2).movedim(-1, 0)  # by a tile along the rows
    wanted = pixels.movedim(2, 0)
    within: dict[tuple[int, int], _Within] = {}  # views cost as much as small sums
    for first in range(0, seeds, some_seeds):
        count = min(some_seeds, seeds - first)
        for begin in range(0, rows, some_rows):
            lines = min(some_rows, rows - begin)
            if (count, lines) not in within:
                within[count, lines] = _Within.of(down, tiles, across, count, lines)
            block = within[count, lines]
            here_covered = covered.narrow(1, first, count).narrow(2, begin, lines)
            _run(_differences(block.down, here_covered))
            _run(block.differences)
            _multiply(block, filters)
            here_wanted = wanted.narrow(1, first, count).narrow(2, begin, lines)
            _run(_sums(here_wanted, block.summed))
    pixels = pixels.view(seeds, 2 * rows, 2 * columns, found)
    found_there = pixels[:, : bottom - top, : right - left].permute(0, 3, 1, 2)
    return found_there.contiguous(memory_format=torch.channels_last)


class _Within(NamedTuple):
    """What is worked on between the pixels of a block and those of the result, of some seeds and rows.

    Attributes:
        down: Differences of the rows, written to: [4, seeds, rows, 2 columns + 2, C].
        differences: What makes the tiles of these.
        tiles: [seeds, rows, columns, 4, 4, C], the columns of a tile first.
        across: Sums of the products' columns, written to: [2, seeds, rows, columns, 4, D].
        summed: The same as what is read: 4 of [seeds, rows, columns, 2, D].
    """

    down: Tensor
    differences: list[_Call]
    tiles: Tensor
    across: Tensor
    summed: Sequence[Tensor]

    @classmethod
    def of(cls, down: Tensor, tiles: Tensor, across: Tensor, seeds: int, rows: int) -> _Within:
        """The first seeds and rows of what ``by_tiles`` has room for, side by side."""
        down, tiles, across = (
            part.view(-1, *part.shape[2:])[: seeds * rows].view(seeds, rows, *part.shape[2:])
            for part in (down, tiles, across)
        )
        neighbours = down.unfold(3, 4, 2).permute(5, 0, 1, 3, 2, 4)
        return cls(
            down.movedim(2, 0),
            _differences(tiles.movedim(3, 0), neighbours),
            tiles,
            across.permute(4, 0, 1, 3, 2, 5),
            across.unbind(2),
        )


def _paste(maps: Tensor, wider: Tensor, row: int, column: int) -> None:
    """Writes to ``wider`` what it covers of some maps, and zero around them.

    Args:
        maps: [U, h, w, C].
        wider: [U, H, W, C].
        row: The row of the maps that is the first of ``wider``.
        column: The column.
    """
    inside = []
    for dim, first in ((1, row), (2, column)):
        begin = min(max(first, 0), maps.shape[dim])
        stop = max(begin, min(first + wider.shape[dim], maps.shape[dim]))
        maps = maps.narrow(dim, begin, stop - begin)
        inside.append((begin - first, stop - first) if stop > begin else (0, 0))
    (top, bottom), (left, right) = inside
    for outside in (
        wider[:, :top], wider[:, bottom:], wider[:, top:bottom, :left], wider[:, top:bottom, right:]
    ):  # fmt: skip
        outside.zero_()
    wider[:, top:bottom, left:right] = maps


def _multiply(block: _Within, filters: Tensor) -> None:
    """A block's tiles by the filters, [16, D, C], and the sums of each tile's columns."""
    tiles, shape = block.tiles, filters.shape[1:]
    if not (_wide(*shape) and tiles.dtype == torch.float32 and _fast(tiles, *shape)):
        _run(_sums(block.across, _products(tiles, filters).unbind(3)))
        return
    by_place = filters.unflatten(0, (4, 4))
    for row in range(4):
        products = [
            _linear(tiles[..., column, row, :], by_place[column, row]) for column in range(4)
        ]
        _run(_sums(block.across[..., row, :], products))


def _wide(channels: int, found: int) -> bool:
    """Whether the places of a tile are multiplied one by one."""
    return channels * found >= _WIDE and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _linear(pixels: Tensor, filters: Tensor) -> Tensor:
    """[..., C] by [D, C]: [..., D]; ``F.linear`` of float32 takes another library, of half the rate."""
    found: Tensor = torch.ops.mkldnn._linear_pointwise(
        pixels.flatten(0, -2), filters, None, "none", [], ""
    )
    return found.view(*pixels.shape[:-1], len(filters))


def _products(tiles: Tensor, filters: Tensor) -> Tensor:
    """Each of a tile's 16 places by its own filters.

    Args:
        tiles: [..., 4, 4, C].
        filters: [16, D, C].

    Returns:
        [..., 4, 4, D].
    """
    _, found, channels = filters.shape
    if tiles.dtype == torch.float32 and _fast(tiles, channels, found):
        # For one thread conv2d would take a slower way.
        pixels = tiles.view(1, -1, 1, 16 * channels).permute(0, 3, 1, 2)
        grouped = filters.view(16 * found, channels, 1, 1)
        products = torch.mkldnn_convolution(pixels, grouped, None, [0, 0], [1, 1], [1, 1], 16)
        products = products.permute(0, 2, 3, 1)
    else:
        products = torch.bmm(tiles.view(-1, 16, channels).transpose(0, 1), filters.mT)
        products = products.transpose(0, 1).contiguous()
    return products.view(*tiles.shape[:-1], found)


def _run(calls: Sequence[_Call]) -> None:
    for function, one, other, out in calls:
        function(one, other, out=out)


def _differences(found: Tensor, neighbours: Tensor) -> list[_Call]:
    """The transform of four neighbours, B^T of the paper.

    Args:
        found: [4, ...], written to.
        neighbours: [4, ...].
    """
    _, b, c, _ = neighbours
    return [
        (torch.add, b, c, found[1]),
        (torch.sub, c, b, found[2]),
        (torch.sub, neighbours[:2], neighbours[2:], found[::3]),
    ]


def _sums(found: Tensor, products: Sequence[Tensor]) -> list[_Call]:
    """The transform back to two neighbours, A^T of the paper.

    Args:
        found: [2, ...], written to.
        products: 4 of [...].
    """
    a, b, c, d = products
    first, second = found
    return [
        (torch.add, b, c, first),
        (torch.sub, b, c, second),
        (torch.add, first, a, first),
        (torch.add, second, d, second),
    ]


def _of_adjoint(weight: Tensor) -> Tensor:
    """[C, D, 3, 3] turned round and transformed: [16, D, C]."""
    return _transformed(weight.transpose(0, 1), weight.new_tensor(_FILTERS_TO_TILE).flip(1))


def _of_convolution(weight: Tensor) -> Tensor:
    """[D, C, 3, 3] transformed: [16, D, C]."""
    return _transformed(weight, weight.new_tensor(_FILTERS_TO_TILE))


def _transformed(weight: Tensor, along: Tensor) -> Tensor:
    # Columns first, as the tiles are.
    both = torch.einsum("rx,cy->crxy", along, along).reshape(16, 9)
    return (both @ weight.reshape(-1, 9).t()).view(16, *weight.shape[:2])
