"""One recorded forward pass and the walks over it, by rules or by autograd, behind one interface."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from lit_deconv.engine.autograd import AutogradRecording
from lit_deconv.engine.geometry import ReceptiveField, receptive_field, whole_image
from lit_deconv.engine.patches import Extent, NotLocal, PatchPlan, plan
from lit_deconv.engine.signal import Signal, Span, Window
from lit_deconv.engine.tape import Op, Tape
from lit_deconv.engine.walk import FULL_FROM, Part, on_path, pixels, union, walk, walk_in_parts

# Bytes of the largest map of signals that one chunk of units may make: about a cache on a CPU,
# enough work to fill the device elsewhere.
_CHUNK_BYTES = {"cpu": 4 << 20}
_CHUNK_BYTES_ELSEWHERE = 256 << 20

# Several maps of a chunk live at once: those of single units are to take no more than the forward
# pass of the images did, unless that was next to nothing.
_SHARE_OF_FORWARD = 4
_CHUNK_BYTES_AT_LEAST = 7 << 17

# Parts that start together: their seeds are small beside what they grow to.
_PARTS = 16

# Near the layer so many times the seeds that may pass the narrowest op stay together at most: what
# waits for its parts is held.
_WAITING = 8

# Whole layers of so many parts' worth of images cost less together than apart, if they ran together.
_TOGETHER = 8


def rows_per_chunk(largest: int, device: torch.device, forward: int | None = None) -> int:
    """How many seeds to walk at a time.

    Args:
        largest: Bytes of the largest map of one seed.
        device: Where they are.
        forward: Bytes of the largest map of the forward pass; on a CPU a chunk of seeds is bounded
            by it, too, where it is given.
    """
    room = _CHUNK_BYTES.get(device.type, _CHUNK_BYTES_ELSEWHERE)
    if forward is not None and device.type in _CHUNK_BYTES:
        room = min(room, max(forward // _SHARE_OF_FORWARD, _CHUNK_BYTES_AT_LEAST))
    return max(1, room // max(1, largest))


class Recording(Protocol):
    """What both walks offer.

    Attributes:
        activations: Each layer's output, [N, C, *map].
    """

    activations: dict[str, Tensor]

    def walk(self, layer: str, seed: Signal) -> list[Signal | None]:
        """Full-map seeds at the layer back to each input."""

    def walk_units(
        self, layer: str, units: Tensor, parts: Sequence[Part]
    ) -> Iterator[tuple[int, list[Signal | None]]]:
        """Units [U, 2 + D], each alone with its own activation, back to each input.

        Part by part, or several parts in one: how many units, and what arrived of them.
        """

    def receptive_field(self, layer: str) -> ReceptiveField:
        """The receptive fields of the layer's units."""

    def interior(self, layer: str) -> Span:
        """Positions whose units see nothing outside any map; None where that is not known."""

    def walk_maps(self, layer: str, maps: Tensor) -> Iterator[tuple[int, list[Signal | None]]]:
        """Feature maps [M, 2] of channel and sample, each alone, back to each input.

        Some at a time: how many, and what arrived of them.
        """

    def units_per_part(self, layer: str, span: Span = None) -> int:
        """How many units may stay together all the way: more of those whose windows leave the image.

        Args:
            layer: The layer's name.
            span: Bounds of their positions, where they are known.
        """


# Which images, these images as given, and their recording.
Recorded: TypeAlias = "tuple[slice, tuple[Tensor, ...], Recording]"


class OnTape:
    """The rules' walk over a tape.

    Args:
        tape: What was recorded.
        images: Of which images.
        runs: In how many runs of the model.
    """

    def __init__(self, tape: Tape, images: tuple[Tensor, ...], runs: int = 1) -> None:
        self.tape = tape
        self.images = images
        self._runs = runs
        self.activations = tape.activations
        self._fields: dict[str, ReceptiveField] = {}
        self._plans: dict[str, PatchPlan | None] = {}
        self._rooms: dict[tuple[str, bool, float], dict[Op, int]] = {}
        self._largest: dict[str, int] = {}
        self._maps: dict[str, dict[tuple[int, Extent, torch.Size], None]] = {}

    def walk(self, layer: str, seed: Signal) -> list[Signal | None]:
        """See ``Recording``. Far from the layer a few images at a time, which fill the cache."""
        target, room = self.tape.layers[layer], self._room(layer, True, math.inf)
        count, most = len(seed.values), min(room.values(), default=1)
        if count <= (_TOGETHER if self._runs == 1 else 1) * most:
            return walk(self.tape, target, seed)
        parts = [Part(min(most, count - start)) for start in range(0, count, most)]
        results = [image.new_empty(count, *image.shape[1:]) for image in self.images]
        start = 0
        for some, found in walk_in_parts(self.tape, target, seed, parts, room):
            for result, signal, image in zip(results, found, self.images, strict=True):
                result[start : start + some] = pixels(signal, image, some)
            start += some
        return [Signal(result) for result in results]

    def walk_units(
        self, layer: str, units: Tensor, parts: Sequence[Part]
    ) -> Iterator[tuple[int, list[Signal | None]]]:
        """See ``Recording``. A unit starts as a window of one place, in one channel."""
        seed = unit_seed(self.activations[layer], units, union(part.span for part in parts))
        return walk_in_parts(self.tape, self.tape.layers[layer], seed, parts, self._room(layer))

    def receptive_field(self, layer: str) -> ReceptiveField:
        """See ``Recording``."""
        if layer not in self._fields:
            self._fields[layer] = receptive_field(self.tape, self.tape.layers[layer])
        return self._fields[layer]

    def interior(self, layer: str) -> Span:
        """See ``Recording``."""
        found = self._plan(layer)
        return None if found is None else found.interior()

    def walk_maps(self, layer: str, maps: Tensor) -> Iterator[tuple[int, list[Signal | None]]]:
        """See ``Recording``."""
        room = self._room(layer, whole=True)
        most = min(room.values(), default=1)
        for together in maps.split(most * _PARTS) if len(maps) else ():
            channel, sample = together.unbind(1)
            values = self.activations[layer][sample, channel].unsqueeze(1)
            seed = Signal(values, sample, channel=channel)
            parts = [Part(len(part)) for part in together.split(most)]
            yield from walk_in_parts(self.tape, self.tape.layers[layer], seed, parts, room)

    def units_per_part(self, layer: str, span: Span = None) -> int:
        """See ``Recording``."""
        most, windows = min(self._room(layer).values(), default=1), self._plan(layer)
        if windows is None or span is None:
            return most
        if layer not in self._largest:
            self._largest[layer] = self._numbers(layer, windows, None)
        return most * self._largest[layer] // self._numbers(layer, windows, span)

    def _numbers(self, layer: str, windows: PatchPlan, span: Span) -> int:
        """Those of the largest map or window that a unit passes, without what lies outside the map."""
        largest, full = 1, False
        for channels, extent, map_size in self._passed(layer, windows):
            window = math.prod(extent.seen(span, map_size))
            full = full or window >= FULL_FROM * map_size.numel()
            largest = max(largest, channels * (map_size.numel() if full else window))
        return largest

    def _room(self, layer: str, whole: bool = False, waiting: float = _WAITING) -> dict[Op, int]:
        """How many seeds may pass each op together: windows, or ``whole`` maps.

        A window that has grown to the map stays a map from there on.

        Args:
            layer: The layer's name.
            whole: Whether they are maps.
            waiting: At most so many times the seeds that may pass the narrowest op.
        """
        key = layer, whole, waiting
        if key not in self._rooms:
            self._rooms[key] = self._computed_room(*key)
        return self._rooms[key]

    def _computed_room(self, layer: str, whole: bool, waiting: float) -> dict[Op, int]:
        windows, room = None if whole else self._plan(layer), {}
        path = on_path(self.tape, self.tape.layers[layer])
        forward = None if whole else max((value.shape.numel() for _, value in path), default=0)
        for op, _ in path:
            sizes = []
            for value in op.parents:
                size = value.map_size.numel()
                if windows is not None and value in windows.extents:
                    window = math.prod(windows.extents[value].size)
                    if window < FULL_FROM * size:
                        size = window
                    else:
                        windows = None
                sizes.append(value.shape[1:2].numel() * size)
            room[op] = self._rows(max(sizes, default=1), forward)
        most = waiting * min(room.values(), default=1)
        return {op: int(min(rows, most)) for op, rows in room.items()}

    def _passed(self, layer: str, windows: PatchPlan) -> Iterable[tuple[int, Extent, torch.Size]]:
        """Channels, extents and size of the maps that a unit passes, those alike once, last first."""
        if layer not in self._maps:
            self._maps[layer] = dict.fromkeys(
                (value.shape[1], windows.extents[value], value.map_size)
                for op, _ in on_path(self.tape, self.tape.layers[layer])
                for value in op.parents
                if value in windows.extents
            )
        return self._maps[layer]

    def _rows(self, numbers: int, forward: int | None) -> int:
        image = self.images[0]
        each = image.element_size()
        return rows_per_chunk(numbers * each, image.device, forward and forward * each)

    def _plan(self, layer: str) -> PatchPlan | None:
        """Which part of each value a unit needs; None where that is not known."""
        if layer not in self._plans:
            try:
                self._plans[layer] = plan(self.tape, self.tape.layers[layer])
            except NotLocal:
                self._plans[layer] = None
        return self._plans[layer]


def unit_seed(activation: Tensor, units: Tensor, span: Span = None) -> Signal:
    """Single units as a signal: each its own activation, one place in one channel.

    Args:
        activation: The layer's output, [N, C, *map].
        units: int64 [U, 2 + D].
        span: Bounds of the units' positions, where known, see ``Window``.
    """
    spatial = activation.ndim - 2
    values = activation[units.unbind(1)].view(-1, 1, *[1] * spatial)
    window = places(units, span) if spatial else None
    return Signal(values, units[:, 0], window, channel=units[:, 1])


def places(units: Tensor, span: Span = None) -> Window:
    """Where units sit in their layer, as windows of one place.

    Args:
        units: int64 [U, 2 + D].
        span: Bounds of their positions, where known.
    """
    spatial = units.shape[1] - 2
    return Window(units[:, 2:], (1,) * spatial, (0,) * spatial, span)


class ByAutograd:
    """The autograd walk, on full maps."""

    def __init__(self, recording: AutogradRecording) -> None:
        self.recording = recording
        self.activations = recording.outputs

    def walk(self, layer: str, seed: Signal) -> list[Signal | None]:
        """See ``Recording``."""
        values = seed.dense(self.activations[layer].shape[1]).values
        if seed.sample is None:
            return [Signal(image) for image in self.recording.walk(layer, values)]
        return [Signal(i) for i in self.recording.walk_units(layer, seed.sample, values)]

    def walk_units(
        self, layer: str, units: Tensor, parts: Sequence[Part]
    ) -> Iterator[tuple[int, list[Signal | None]]]:
        """See ``Recording``."""
        activation = self.activations[layer]
        for some in units.split([part.seeds for part in parts]):
            seeds = activation.new_zeros(len(some), *activation.shape[1:])
            rows = torch.arange(len(some), device=some.device)
            places = (rows, *some[:, 1:].unbind(1))
            seeds[places] = activation[some.unbind(1)]
            found = self.recording.walk_units(layer, some[:, 0], seeds)
            yield len(some), [Signal(image) for image in found]

    def receptive_field(self, layer: str) -> ReceptiveField:
        """The whole image: autograd does not say what a unit sees."""
        return whole_image(self.recording.inputs[0].shape[2:])

    def interior(self, layer: str) -> Span:
        """See ``Recording``: there are no windows here."""
        return None

    def walk_maps(self, layer: str, maps: Tensor) -> Iterator[tuple[int, list[Signal | None]]]:
        """See ``Recording``."""
        for some in maps.split(self.units_per_part(layer)) if len(maps) else ():
            channel, sample = some.unbind(1)
            values = self.activations[layer][sample, channel].unsqueeze(1)
            yield len(values), self.walk(layer, Signal(values, sample, channel=channel))

    def units_per_part(self, layer: str, span: Span = None) -> int:
        """See ``Recording``: here it is bounded by the images that they return."""
        largest = max(image[0].numel() * image.element_size() for image in self.recording.inputs)
        return max(1, _CHUNK_BYTES_ELSEWHERE // max(1, largest))


def cropped(signal: Signal | None, image: Tensor, field: ReceptiveField, units: Tensor) -> Tensor:
    """The part of each reconstruction under its unit's receptive field.

    Args:
        signal: What a walk returned at the input.
        image: The input, [N, C, *map], for shape and dtype.
        field: The layer's receptive fields.
        units: int64 [U, 2 + D].

    Returns:
        [U, C, *field]; zero where a box reaches past the image.
    """
    channels = image.shape[1]
    if signal is None:
        return image.new_zeros(len(units), channels, *field.size)
    if signal.window is not None:
        aligned = _cut_window(signal, field)
        if aligned is not None:
            return aligned.to(image.dtype)
    start = field.boxes(units[:, 2:])[:, : len(field.size)]
    full = signal.full(image.shape[2:]).values
    under = Window(start, (1,) * len(field.size), (0,) * len(field.size))
    rows = torch.arange(len(units), device=full.device)
    frame = Signal(full.new_empty(len(units), channels, *field.size), rows, under)
    patches = frame.of_window(full)
    return Signal(patches, rows, under).clipped(image.shape[2:]).values.to(image.dtype)


def _cut_window(signal: Signal, field: ReceptiveField) -> Tensor | None:
    """The patch straight from the window, where its place in the box is the same for all units."""
    assert signal.window is not None
    pad: list[int] = []
    for dim, size in enumerate(field.size):
        stride, shift = signal.window.stride[dim], signal.window.shift[dim]
        extent = signal.values.shape[2 + dim]
        even = field.stride[dim] == stride or len(field.first[dim]) == 1
        if field.whole[dim] or not even:
            return None
        before = shift - int(field.first[dim][0])
        pad = [before, size - before - extent, *pad]
    return torch.nn.functional.pad(signal.values, pad) if any(pad) else signal.values
