"""Single units in bulk: those whose windows leave the image alike go together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lit_deconv.engine.geometry import ReceptiveField
from lit_deconv.engine.local import Local
from lit_deconv.engine.recording import Recording, cropped, places, rows_per_chunk
from lit_deconv.engine.signal import Signal, Span, Window
from lit_deconv.engine.walk import Part, count_of, pixels, union

# Parts of less than one in so many of what they may hold cost more than the margins that they save: in
# a walk, and over patches, whose way forward has margins anyway.
_FEW_WALKED, _FEW_PATCHED = 8, 2


def patched_units(local: Local, images: Tensor, units: Tensor, crop: bool) -> list[Any]:
    """Units computed from the patches under them alone, forward and back.

    Args:
        local: The layer's way; its units can be computed from patches.
        images: [N, C, *map].
        units: int64 [U, 2 + D].
        crop: Return patches and boxes instead of full images.

    Returns:
        A list of one result, as there is one input.
    """
    plan, field = local.plan, local.field
    assert plan is not None
    result = empty(images, field, units, crop)
    for index, _, signal in _by_patches(
        local, images, units, lambda u, at: plan.cut(images, u[:, 0], at)
    ):
        result.index_copy_(0, index, _finished(signal, images, field, units[index], crop))
    return [with_boxes(result, field, units, crop)]


def units_of_patches(
    local: Local, patches: Tensor, units: Tensor, image: torch.Size
) -> tuple[Tensor, Tensor]:
    """Units of which only their receptive field was kept.

    Args:
        local: The layer's way; its units can be computed from patches.
        patches: [P, C, *field], 0 outside the image; or whole images.
        units: int64 [U, 2 + D]: row of ``patches``, channel, position.
        image: Channels and extents of an image.

    Returns:
        Activations [U] and reconstructions [U, C, *field].
    """
    plan, field = local.plan, local.field
    assert plan is not None
    images = patches.new_empty(1).expand(len(patches), *image)

    def under(chosen: Tensor, at: Window) -> Tensor:
        if patches.shape[1:] == image:
            return plan.cut(patches, chosen[:, 0], at)
        rows = patches.index_select(0, chosen[:, 0])
        if tuple(plan.size) == tuple(field.size) and not any(field.whole):
            placed = Signal(rows, None, plan.extents[plan.image].window(at))
            return placed.clipped(image[1:]).values
        start = field.boxes(chosen[:, 2:])[:, : len(field.size)]
        window = Window(start, (1,) * len(field.size), (0,) * len(field.size))
        pasted = Signal(rows, None, window).clipped(image[1:]).full(image[1:]).values
        return plan.cut(pasted, torch.arange(len(rows), device=rows.device), at)

    activations = patches.new_empty(len(units))
    found = patches.new_empty(len(units), image[0], *field.size)
    for index, own, signal in _by_patches(local, images, units, under):
        activations[index] = own
        found.index_copy_(0, index, cropped(signal, images, field, units[index]))
    return activations, found


def _by_patches(
    local: Local,
    images: Tensor,
    units: Tensor,
    cut: Callable[[Tensor, Window], Tensor],
) -> Iterator[tuple[Tensor, Tensor, Signal | None]]:
    """Chunk by chunk: which units, their activations, their signals at the image."""
    plan, each = local.plan, images.element_size()
    assert plan is not None
    largest = max(
        value.shape[1] * torch.Size(extent.size).numel() for value, extent in plan.extents.items()
    )
    forward = len(images) * local.largest * each
    rows = rows_per_chunk(largest * each, images.device, forward)
    order, parts = _parts(units, plan.interior(), lambda span: rows, _FEW_PATCHED)
    for index, part in zip(order.split([part.seeds for part in parts]), parts, strict=True):
        chunk = units[index]
        at = places(chunk, part.span)
        activation, tape = plan.forward(cut(chunk, at), at)
        own = activation.gather(1, chunk[:, 1:2]).squeeze(1)
        yield index, own, plan.reverse(tape, own, chunk[:, 1], at)


def walked_units(
    recording: Recording,
    layer: str,
    units: Tensor,
    images: tuple[Tensor, ...],
    crop: bool,
    rows: Tensor,
    results: Sequence[Tensor],
) -> None:
    """Units walked back over a recording of whole images.

    Args:
        recording: The forward pass.
        layer: The layer's name.
        units: int64 [U, 2 + D].
        images: What was recorded.
        crop: Whether results are patches instead of full images.
        rows: int64 [U], where in the results each unit goes.
        results: One an input, see ``empty``.
    """
    field = recording.receptive_field(layer)
    most = partial(recording.units_per_part, layer)
    order, parts = _parts(units, recording.interior(layer), most, _FEW_WALKED)
    units, rows = units[order], rows[order]
    start = 0
    for count, found in recording.walk_units(layer, units, parts):
        some = slice(start, start + count)
        for result, signal, image in zip(results, found, images, strict=True):
            result.index_copy_(0, rows[some], _finished(signal, image, field, units[some], crop))
        start += count


def walked_maps(
    recording: Recording,
    layer: str,
    channels: Tensor,
    images: tuple[Tensor, ...],
    results: Sequence[Tensor],
) -> None:
    """Whole feature maps, each alone, walked back over a recording.

    Args:
        recording: The forward pass.
        layer: The layer's name.
        channels: int64 [M].
        images: What was recorded, each [N, ...].
        results: One an input, [M, N, ...].
    """
    count = len(images[0])
    places = torch.arange(len(channels) * count, device=channels.device)
    number, sample = places // count, places % count
    start = 0
    for some, found in recording.walk_maps(layer, torch.stack([channels[number], sample], 1)):
        these = slice(start, start + some)
        for result, signal, image in zip(results, found, images, strict=True):
            result[number[these], sample[these]] = pixels(signal, image, some)
        start += some


def _parts(
    units: Tensor, interior: Span, most: Callable[[Span], int], share: int
) -> tuple[Tensor, list[Part]]:
    """In which order to walk units, and which of them go together all the way.

    Units whose windows leave the image alike go together, so that none computes what lies outside it
    for all of them. That is settled on the CPU: a device is waited for once, before the walk.

    Args:
        units: int64 [U, 2 + D].
        interior: Positions whose windows do not leave any map, where they are known.
        most: The largest part of units with positions within these bounds, or anywhere.
        share: Units that leave the image differently go together where there are less than
            ``most(None) / share`` of them.

    Returns:
        Their order, int64 [U], and the parts in that order.
    """
    positions, rows = units[:, 2:].cpu(), most(None)
    if positions.numel() == 0:  # no units, or a layer without positions
        return torch.arange(len(units), device=units.device), _filled([Part(len(units))], most)
    if len(units) * share < rows:
        low, high = positions.aminmax(dim=0)
        span = tuple(zip(low.tolist(), high.tolist(), strict=True))
        return torch.arange(len(units), device=units.device), [Part(len(units), span)]
    kind, counts, spans = _kinds_of_margin(positions, interior, 2 * len(units) // rows)
    parts: list[Part] = []
    few: list[Part] = []
    for part in map(Part, counts, spans):
        few.append(part)
        if count_of(few) * share >= rows:
            parts += _filled(few, most)
            few = []
    return kind.argsort(stable=True).to(units.device), parts + _filled(few, most)


def _kinds_of_margin(
    positions: Tensor, interior: Span, most: int
) -> tuple[Tensor, list[int], list[Span]]:
    """Tells units apart by how far they are from the interior, as finely as gives ``most`` kinds.

    Args:
        positions: int64 [U, D].
        interior: Where there is no margin.
        most: How many kinds there may be, unless there is one a dimension and side.

    Returns:
        The kind of each unit, int64 [U]; how many units there are of each; bounds of their positions.
    """
    low, high = positions.new_zeros(2, positions.shape[1])
    if interior is not None:
        low, high = (positions.new_tensor(bounds) for bounds in zip(*interior, strict=True))
        middle = (low + high) // 2  # where no window stays inside
        low, high = low.where(low <= high, middle), high.where(low <= high, middle)
    margin = (positions - low).clamp(max=0) + (positions - high).clamp(min=0)
    step = 1
    while True:
        steps = margin.sign() * ((margin.abs() + step - 1) // step)
        key = torch.zeros(len(steps), dtype=torch.int64)  # sorted far faster than rows are
        # From the interior to either side: later windows are smaller and fit where the first ones were.
        for along in steps.where(steps >= 0, steps.amax(0) - steps).unbind(1):
            key = key * (along.max() + 1) + along
        found, kind, counts = key.unique(return_inverse=True, return_counts=True)
        if len(found) <= most or step > margin.abs().max():
            break
        step *= 2
    kinds = steps.new_empty(len(found), steps.shape[1])
    kinds[kind] = steps
    # Step -1 ends just before the interior, which is step 0, and step 1 begins just behind it.
    first = torch.where(kinds > 0, high + (kinds - 1) * step + 1, low + kinds * step)
    last = torch.where(kinds < 0, low + (kinds + 1) * step - 1, high + kinds * step)
    spans: list[Span] = [
        tuple(zip(*bounds, strict=True))
        for bounds in zip(first.tolist(), last.tolist(), strict=True)
    ]
    return kind, counts.tolist(), spans


def _filled(few: list[Part], most: Callable[[Span], int]) -> list[Part]:
    """All of these together, in as few parts as there may be, of about the same size."""
    count, span = count_of(few), union(part.span for part in few)
    parts = max(1, -(-count // most(span)))
    rows = max(1, -(-count // parts))
    return [Part(min(rows, count - start), span) for start in range(0, count, rows)]


def _finished(
    signal: Signal | None, image: Tensor, field: ReceptiveField, units: Tensor, crop: bool
) -> Tensor:
    if crop:
        return cropped(signal, image, field, units)
    if signal is not None and signal.window is not None:
        signal = Signal(signal.values, units[:, 0], signal.window)
    return pixels(signal, image, len(units))


def samples_of(units: Iterable[Tensor], images: int) -> Tensor:
    """Which of so many images have a unit, int64, ascending; at least two where there are two.

    A forward may do something else for a single image.
    """
    found = torch.cat([some[:, 0] for some in units]).unique()
    if len(found) == 1 and images > 1:
        found = found.clamp(max=images - 2) + torch.arange(2, device=found.device)
    return found


def with_units(
    images: tuple[Tensor, ...], units: Mapping[str, Tensor]
) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Of the images ``samples_of`` the units alone, and the units on these.

    Args:
        images: The inputs, each [N, ...].
        units: By layer, int64 [U, 2 + D].
    """
    samples = samples_of(units.values(), len(images[0]))
    if len(samples) in (0, len(images[0])):
        return images, dict(units)
    own = {
        name: torch.cat([torch.searchsorted(samples, some[:, :1].contiguous()), some[:, 1:]], 1)
        for name, some in units.items()
    }
    return tuple(image[samples] for image in images), own


def empty(image: Tensor, field: ReceptiveField, units: Tensor, crop: bool) -> Tensor:
    """Where reconstructions of units go, made once so that none is held twice.

    Args:
        image: An input, [N, C, *map].
        field: The layer's receptive fields.
        units: int64 [U, 2 + D].
        crop: Whether they are patches instead of full images.
    """
    return image.new_empty(len(units), image.shape[1], *(field.size if crop else image.shape[2:]))


def with_boxes(result: Tensor, field: ReceptiveField, units: Tensor, crop: bool) -> Any:
    """Reconstructions as ``Deconvnet.reconstruct`` returns them."""
    return (result, field.boxes(units[:, 2:])) if crop else result
