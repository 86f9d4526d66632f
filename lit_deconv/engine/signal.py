"""What travels back through a network: a full map per seed, or one window per unit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial, reduce
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

Span: TypeAlias = "tuple[tuple[int, int], ...] | None"

# Whole numbers as wide as a value, all of whose bits are 0 or 1.
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}

# Values in a unit's window from which, on a CPU, one copy a unit beats one lookup a value.
_BLOCK = 2048

# Tables that are kept of what windows cover, of up to so many numbers each.
_TABLES, _KEPT = 128, 4096

_Own = TypeVar("_Own", bound="_Replaceable")


class _Replaceable:
    """A frozen dataclass of which walks of small windows make thousands of copies."""

    def replaced(self: _Own, **changes: Any) -> _Own:
        """``dataclasses.replace``, in a third of its time."""
        assert changes.keys() <= self.__dict__.keys()
        made = object.__new__(type(self))
        made.__dict__.update(self.__dict__, **changes)
        made.__post_init__()
        return made

    def __post_init__(self) -> None:
        pass


def seen(
    span: Span,
    strides: Sequence[int],
    shifts: Sequence[int],
    size: Sequence[int],
    map_size: Sequence[int],
) -> list[tuple[int, int]]:
    """First and last + 1 place of such windows that some unit has in the map, see ``Window.seen``."""
    if span is None:
        return [(0, extent) for extent in size]
    found = []
    for (low, high), stride, shift, extent, whole in zip(
        span, strides, shifts, size, map_size, strict=True
    ):
        first = min(max(0, -(high * stride + shift)), extent - 1)
        stop = max(min(extent, whole - (low * stride + shift)), first + 1)
        found.append((first, stop))
    return found


@dataclass(frozen=True)
class Window(_Replaceable):
    """Where the windows of a signal lie in its map: ``position * stride + shift`` per unit.

    Stride and shift are plain integers, the same for all units of a layer, so that two windows can
    be aligned without asking the device.

    Attributes:
        position: int64 [U, D], each unit's position in the layer's map.
        stride: Pixels of this map per step of position, per dimension.
        shift: Where the window of the unit at position 0 starts, per dimension.
        span: Bounds of the positions per dimension, where they are known without asking the device;
            then windows that all lie inside their map need no clipping, and what lies outside it for
            all of them need not be carried along.
    """

    position: Tensor
    stride: tuple[int, ...]
    shift: tuple[int, ...]
    span: Span = None

    def inside(self, size: Sequence[int], map_size: Sequence[int]) -> bool:
        """Whether all windows of ``size`` are known to lie in the map. False where it is not known."""
        return not any(
            any(self.may_leave(dim, extent, whole))
            for dim, (extent, whole) in enumerate(zip(size, map_size, strict=True))
        )

    def may_leave(self, dim: int, extent: int, whole: int) -> tuple[bool, bool]:
        """Whether a window of this extent may begin before its map and end behind it, along a dimension."""
        if self.span is None:
            return True, True
        (low, high), stride, shift = self.span[dim], self.stride[dim], self.shift[dim]
        return low * stride + shift < 0, high * stride + shift + extent > whole

    def seen(self, size: Sequence[int], map_size: Sequence[int]) -> list[tuple[int, int]]:
        """First and last + 1 place, per dimension, of windows of ``size`` that some unit has in the map.

        At least one place, though none may lie in the map. All where the positions are not known.
        """
        return seen(self.span, self.stride, self.shift, size, map_size)

    def offset(self) -> Tensor:
        """First row, column, ... of each window, int64 [U, D]; may lie outside the map."""
        stride = self.position.new_tensor(self.stride)
        return self.position * stride + self.position.new_tensor(self.shift)

    def moved(self, stride: Sequence[int], shift: Sequence[int]) -> Window:
        """The window one op further back: offset * stride + shift."""
        moves = list(zip(self.stride, self.shift, stride, shift, strict=True))
        return self.replaced(
            stride=tuple([old * step for old, _, step, _ in moves]),
            shift=tuple([old * step + add for _, old, step, add in moves]),
        )


@dataclass(frozen=True)
class Signal(_Replaceable):
    """A batch of signals at one point of the network.

    Attributes:
        values: [U, C, *map], or [U, C, *window] where ``window`` is set. One row a seed.
        sample: int64 [U], the image each row belongs to; None: row u belongs to image u.
        window: Where the windows lie; None for full maps.
        output: Which output of an op with several the signal stands at.
        channel: int64 [U] where each seed's signal is zero but in one channel; ``values`` then hold
            that channel alone, [U, 1, ...].
        owned: Whether nothing else holds these values, so that a rule may overwrite them. Only an op
            that made them anew says so; of what autograd follows, which may hold them, it never is true.
    """

    values: Tensor
    sample: Tensor | None = None
    window: Window | None = None
    output: int = 0
    channel: Tensor | None = None
    owned: bool = False

    def __post_init__(self) -> None:
        if self.owned and self.values.requires_grad:
            object.__setattr__(self, "owned", False)

    def map(self, function: Callable[[Tensor], Tensor]) -> Signal:
        """The same seeds at the same place, other values."""
        return self.carrying(function(self.values))

    def carrying(self, values: Tensor) -> Signal:
        """Other values for the same seeds at the same place."""
        return self.replaced(values=values, owned=False)

    def anew(self, values: Tensor) -> Signal:
        """Values for the same seeds at the same place that an op has just made."""
        return self.replaced(values=values, owned=True)

    def dense(self, channels: int) -> Signal:
        """The same signal with all of its channels."""
        if self.channel is None:
            return self
        values = self.values.new_zeros(len(self.values), channels, *self.values.shape[2:])
        index = self.channel.view(-1, *[1] * (values.ndim - 1)).expand(self.values.shape)
        return self.replaced(
            values=values.scatter_(1, index, self.values), channel=None, owned=True
        )

    def rows(
        self, seeds: slice, span: Span, map_size: Sequence[int], shared: dict[int, Tensor]
    ) -> Signal:
        """Some of the seeds, without what lies outside the map for all of them.

        Args:
            seeds: Which.
            span: Bounds of their positions, where known.
            map_size: Sizes of the map behind samples and channels.
            shared: What was cut already, by the id of the tensor it was cut from: signals that share
                a tensor share it afterwards, too.
        """

        def cut(tensor: Tensor) -> Tensor:
            if id(tensor) not in shared:
                shared[id(tensor)] = tensor[seeds]
            return shared[id(tensor)]

        part = self.replaced(
            values=self.values[seeds],
            sample=self._samples()[seeds] if self.sample is None else cut(self.sample),
            channel=None if self.channel is None else cut(self.channel),
        )
        if self.window is None:
            return part
        position = cut(self.window.position)
        return part.replaced(window=self.window.replaced(position=position, span=span)).trimmed(
            map_size
        )

    def of(self, recorded: Tensor) -> Tensor:
        """Rows of something recorded per image, [N, ...] -> [U, ...], one for each seed."""
        if self.sample is None or recorded.shape[0] == 1:
            return recorded
        return recorded.index_select(0, self.sample)

    def map_by_map(self, recorded: Tensor) -> tuple[Signal, Tensor]:
        """Where each seed is in one channel, the same as seeds of single maps; else itself.

        Args:
            recorded: Something recorded per image and channel, [N, C, *map].

        Returns:
            The signal, and with it what was recorded, as [N C, 1, *map].
        """
        if self.channel is None:
            return self, recorded
        sample = self._samples() * recorded.shape[1] + self.channel
        return self.replaced(sample=sample, channel=None), recorded.flatten(0, 1).unsqueeze(1)

    def of_window(self, recorded: Tensor) -> Tensor:
        """The part of something recorded per image that lies under each window.

        Args:
            recorded: [N, C, *map].

        Returns:
            [U, C, *window]; where a window reaches past the map, whatever is at hand.
        """
        if self.window is None:
            return self.of(recorded)
        if self._block_by_block():
            samples = self._samples() if len(recorded) > 1 else self._samples() * 0
            if self.window.inside(self.values.shape[2:], recorded.shape[2:]):
                return self._whole_blocks(recorded, samples)
            blocks = recorded.new_zeros(self.values.shape)
            for block, source in self._blocks(blocks, recorded, samples.tolist()):
                block.copy_(source)
            return blocks
        units, channels, *size = self.values.shape
        images, per_map = recorded.shape[0], recorded.shape[2:].numel()
        sample = self._samples() if images > 1 else self.window.position.new_zeros(units)
        maps = torch.arange(0, channels * per_map, per_map, device=recorded.device)
        maps = maps + sample[:, None] * (channels * per_map)
        flat = maps[..., None] + self._places(recorded.shape[2:])
        return recorded.reshape(-1).index_select(0, flat.view(-1)).view(units, channels, *size)

    def clipped(self, map_size: Sequence[int], fill: float = 0.0) -> Signal:
        """Zero, or ``fill``, where a window reaches past its map."""
        assert self.window is not None
        if self.window.inside(self.values.shape[2:], map_size):
            return self
        bits = _BITS.get(self.values.element_size())
        if fill or bits is None:
            return self.anew(torch.where(self._inside(map_size), self.values, fill))
        # Ten times as fast as filling by a mask; a product would make NaN of what is infinite.
        keep, values = self._inside(map_size, _ALL_BITS_IN[bits]), self.values.view(bits)
        zeroed = values.bitwise_and_(keep) if self.owned else values & keep
        return self.anew(zeroed.view(self.values.dtype))

    def trimmed(self, map_size: Sequence[int]) -> Signal:
        """Without the margins that lie outside the map for every unit."""
        assert self.window is not None
        size = self.values.shape[2:]
        seen = self.window.seen(size, map_size)
        if seen == [(0, extent) for extent in size]:
            return self
        values = self.values
        for dim, (first, stop) in enumerate(seen, start=2):
            values = values.narrow(dim, first, stop - first)
        window = self.window.moved((1,) * len(seen), [first for first, _ in seen])
        copied = values.contiguous()  # or the same, where it is contiguous already
        return self.replaced(values=copied, window=window, owned=self.owned or copied is not values)

    def full(self, map_size: Sequence[int]) -> Signal:
        """The signal on the whole map: each window put in its place, zero elsewhere.

        Args:
            map_size: Sizes of the map behind samples and channels.
        """
        if self.window is None:
            return self
        units, channels = self.values.shape[:2]
        if self._block_by_block():
            full = self.values.new_zeros(units, channels, *map_size)
            for block, target in self._blocks(self.values, full, range(units)):
                target.copy_(block)
            return self.replaced(values=full, window=None, owned=True)
        index = self._places(map_size)
        full = self.values.new_zeros(units, channels, *map_size)
        # Where a window reaches past the map its values are zero: adding them anywhere is nothing.
        values = torch.where(self._inside(map_size), self.values, 0)
        full.flatten(2).scatter_add_(2, index.expand(-1, channels, -1), values.flatten(2))
        return self.replaced(values=full, window=None, owned=True)

    def _block_by_block(self) -> bool:
        """Whether copying each unit's window by itself is cheaper than looking up every pixel."""
        per_unit = self.values.shape[1:].numel()
        return self.values.device.type == "cpu" and per_unit >= _BLOCK

    def _blocks(
        self, windows: Tensor, whole: Tensor, rows: Sequence[int]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Of each unit what of its window lies inside the map, and the same part of the map.

        Args:
            windows: [U, C, *window].
            whole: [N, C, *map].
            rows: Which of ``whole`` is each unit's.
        """
        assert self.window is not None
        size, steps, origin = windows.shape[2:], windows.stride(), windows.storage_offset()
        map_size, lines, start = whole.shape[2:], whole.stride(), whole.storage_offset()
        for unit, (row, offset) in enumerate(zip(rows, self.window.offset().tolist(), strict=True)):
            # One view each: a slice a dimension would take longer than the copy.
            shape = [windows.shape[1]]
            here, there = origin + unit * steps[0], start + row * lines[0]
            for dim, first in enumerate(offset):
                begin, end = max(first, 0), min(first + size[dim], map_size[dim])
                shape.append(end - begin)
                here += (begin - first) * steps[2 + dim]
                there += begin * lines[2 + dim]
            if min(shape) > 0:
                yield (
                    windows.as_strided(shape, steps[1:], here),
                    whole.as_strided(shape, lines[1:], there),
                )

    def _whole_blocks(self, recorded: Tensor, samples: Tensor) -> Tensor:
        """The part under each window where all of them lie inside the map, [U, C, *window]."""
        assert self.window is not None
        shape, steps = self.values.shape[1:], recorded.stride()
        first = self.window.offset() @ samples.new_tensor(steps[2:]) + samples * steps[0]
        start = recorded.storage_offset()
        blocks = [recorded.as_strided(shape, steps[1:], start + at) for at in first.tolist()]
        return torch.stack(blocks) if blocks else recorded.new_empty(self.values.shape)

    def _samples(self) -> Tensor:
        if self.sample is not None:
            return self.sample
        return torch.arange(self.values.shape[0], device=self.values.device)

    def _places(self, map_size: Sequence[int]) -> Tensor:
        """Flat index into the map of each place, or of any place in it for one outside.

        Returns:
            int64 [U, 1, window], of all dimensions.
        """
        assert self.window is not None
        window, size = self.window, self.values.shape[2:]
        lines = [math.prod(map_size[dim + 1 :]) for dim in range(len(size))]
        steps = [step * line for step, line in zip(window.stride, lines, strict=True)]
        along = window.position.unbind(1)
        first = along[0] * steps[0]
        for position, step in zip(along[1:], steps[1:], strict=True):
            first = first.add_(position, alpha=step)
        grid = flat_grid(size, [1] * len(size), window.shift, lines, first.device)
        return (first[:, None, None] + grid.flatten()).clamp_(0, math.prod(map_size) - 1)

    def _inside(
        self, map_size: Sequence[int], told: Callable[[Tensor, int], Tensor] | None = None
    ) -> Tensor:
        """Whether each place lies in the map, bool or as ``told``.

        Returns:
            [U, 1, *window] or what broadcasts to it.
        """
        assert self.window is not None
        told = told or _is_in
        inside: Tensor | None = None
        for dim, (extent, whole) in enumerate(zip(self.values.shape[2:], map_size, strict=True)):
            if any(self.window.may_leave(dim, extent, whole)):
                along = self._along(dim, whole, told)
                inside = along if inside is None else inside & along
        if inside is None:
            return torch.ones((), dtype=torch.bool, device=self.values.device)
        return inside

    def _along(self, dim: int, whole: int, told: Callable[[Tensor, int], Tensor]) -> Tensor:
        """What is told of the coordinates that each window covers along a dimension.

        Args:
            dim: Which.
            whole: The map's extent along it.
            told: Of coordinates, given that extent.

        Returns:
            [U, 1, ..., extent, ...].
        """
        assert self.window is not None
        window, sizes = self.window, [1] * (self.values.ndim - 2)
        extent = sizes[dim] = self.values.shape[2 + dim]
        position, covered = window.position[:, dim], (window.stride[dim], window.shift[dim], extent)
        last = None if window.span is None else window.span[dim][1]
        if last is not None and position.device.type == "cpu" and (last + 1) * extent <= _KEPT:
            line = _told_by_position(told, last, *covered, whole).index_select(0, position)
        else:
            line = told(_coordinates(position, *covered), whole)
        return line.view(-1, 1, *sizes)


def _coordinates(position: Tensor, stride: int, shift: int, extent: int) -> Tensor:
    """The coordinates that windows cover along a dimension, int64 [U, extent]."""
    along = torch.arange(shift, shift + extent, device=position.device)
    return position[:, None] * stride + along


def _is_in(coordinates: Tensor, whole: int) -> Tensor:
    return (coordinates >= 0) & (coordinates < whole)


def _as_bits(bits: torch.dtype, coordinates: Tensor, whole: int) -> Tensor:
    """``_is_in`` as whole numbers, of which all bits are 1 or 0."""
    return _is_in(coordinates, whole).to(bits).neg_()


_ALL_BITS_IN = {bits: partial(_as_bits, bits) for bits in _BITS.values()}


@lru_cache(_TABLES)
def _told_by_position(
    told: Callable[[Tensor, int], Tensor],
    last: int,
    stride: int,
    shift: int,
    extent: int,
    whole: int,
) -> Tensor:
    """What is told of windows at each position up to the last, on a CPU, where a call costs more."""
    positions = torch.arange(last + 1, device="cpu")  # whatever the default device is
    return told(_coordinates(positions, stride, shift, extent), whole)


def flat_grid(
    size: Sequence[int],
    step: Sequence[int],
    begin: Sequence[int],
    lines: Sequence[int],
    device: torch.device,
) -> Tensor:
    """Flat places in a map: along each dimension from ``begin`` on, ``step`` apart.

    Args:
        size: How many there are, per dimension, as are the next three.
        step: Places of the map from one to the next.
        begin: The first; may lie outside the map.
        lines: Flat steps of the map's dimensions.
        device: Where it is made; the device is not waited for.

    Returns:
        int64 [*size], not to be written to.
    """
    made = (
        _flat_grid if device.type == "cpu" and math.prod(size) <= _KEPT else _flat_grid.__wrapped__
    )
    return made(tuple(size), tuple(step), tuple(begin), tuple(lines), device)


@lru_cache(_TABLES)
def _flat_grid(
    size: tuple[int, ...],
    step: tuple[int, ...],
    begin: tuple[int, ...],
    lines: tuple[int, ...],
    device: torch.device,
) -> Tensor:
    along = [
        torch.arange(first * line, (first + extent * stride) * line, stride * line, device=device)
        for extent, stride, first, line in zip(size, step, begin, lines, strict=True)
    ]
    return reduce(lambda before, behind: before[..., None] + behind, along)


def added(one: Signal, other: Signal, map_size: Sequence[int]) -> Signal:
    """The sum of two signals of the same seeds at the same place of the network.

    Args:
        one: A signal.
        other: Another; two windows are joined in the smallest window that holds both.
        map_size: Sizes of the map they lie in.
    """
    if one.channel is not other.channel:
        raise ValueError("signals are added with all channels, or both in the same one")
    if one.window is None and other.window is None:
        return _sum(one, other)
    if one.window is None or other.window is None or one.window.stride != other.window.stride:
        return added(one.full(map_size), other.full(map_size), map_size)
    windows = one.window, other.window
    start = [min(shifts) for shifts in zip(*(window.shift for window in windows), strict=True)]
    stop = [
        max(first + length for first, length in ends)
        for ends in zip(
            *(
                list(zip(signal.window.shift, signal.values.shape[2:], strict=True))
                for signal in (one, other)
                if signal.window is not None
            ),
            strict=True,
        )
    ]
    size = [last - first for first, last in zip(start, stop, strict=True)]
    return _sum(widened(one, start, size), widened(other, start, size))


def _sum(one: Signal, other: Signal) -> Signal:
    """Of two in the same window, in the place of one that may be overwritten."""
    if other.owned and not one.owned:
        one, other = other, one
    in_place = (
        one.owned and one.values.dtype == other.values.dtype and not other.values.requires_grad
    )
    return one.anew(one.values.add_(other.values) if in_place else one.values + other.values)


def widened(signal: Signal, start: Sequence[int], size: Sequence[int]) -> Signal:
    """A windowed signal in a window that starts at ``start`` and holds it; zero where it was not."""
    assert signal.window is not None
    if tuple(start) == signal.window.shift and tuple(size) == signal.values.shape[2:]:
        return signal
    pad: list[int] = []
    for shift, extent, first, length in zip(
        signal.window.shift, signal.values.shape[2:], start, size, strict=True
    ):
        pad = [shift - first, first + length - shift - extent, *pad]
    values = torch.nn.functional.pad(signal.values, pad)
    return signal.anew(values).replaced(window=signal.window.replaced(shift=tuple(start)))
