"""The strongest units of one layer: what one process keeps while it looks at batch after batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_deconv.engine.local import Layout
from lit_deconv.top.cutting import cut, moved_inside
from lit_deconv.top.examples import ExampleImages
from lit_deconv.top.ranking import (
    admitted,
    as_key,
    bar_of,
    merged,
    no_units,
    resolved,
)


class Counted(NamedTuple):
    """What a metric says of all images; C chosen channels, A all of the layer's.

    Attributes:
        units: int64 [C, k, FIELDS], best first, see ``ranking``.
        largest: [A], largest activation of each channel; -inf before the first image.
        fires: int64 [A], images in whose map something is above zero.
        broken: int64 [A], images in whose map something is not a number; they are never chosen.
        images: int64 [], how many there were.
    """

    units: Tensor
    largest: Tensor
    fires: Tensor
    broken: Tensor
    images: Tensor


REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "units": merged,
    "largest": lambda parts: parts.amax(0),
    "fires": lambda parts: parts.sum(0),
    "broken": lambda parts: parts.sum(0),
    "images": lambda parts: parts.sum(0),
}
"""How the states of several processes or passes, stacked, become one."""


class Seen(NamedTuple):
    """A batch as the ranking sees it.

    Attributes:
        best: [C, N], the largest activation in each image's map; -inf for one that is no number.
        place: int64 [C, N], where it is. On the CPU 0 for what is not among the strongest.
        reached: bool [C, N], what is among the strongest; None where nobody may look.
    """

    best: Tensor
    place: Tensor
    reached: Tensor | None


class Changed(NamedTuple):
    """Units that enter, flat: int64 [M] each.

    Attributes:
        channel: Which channel.
        slot: Whose place it takes.
        sample: Row of the batch.
        place: Flat place in the map.
        enters: bool [M], False where nothing changes.
    """

    channel: Tensor
    slot: Tensor
    sample: Tensor
    place: Tensor
    enters: Tensor

    def rows(self, index: Tensor) -> Changed:
        """Some of them."""
        return Changed(*(column[index] for column in self))

    def split(self, sizes: Sequence[int]) -> list[Changed]:
        """Some for each layer."""
        parts = [column.split(sizes) for column in self]
        return [Changed(*columns) for columns in zip(*parts, strict=True)]

    def moved(self, by: int) -> Changed:
        """The same, channels counted from elsewhere."""
        return self._replace(channel=self.channel + by)


class TopOfProcess:
    """Per channel the k largest activations over a process's images, at most one an image.

    ``update`` looks at the layer's maps of a batch, ``settle`` lets what is strongest of it in, for
    all layers at once. On an accelerator neither waits for the device: they work on fixed shapes. On
    the CPU, where looking costs nothing, they leave out what cannot be among the strongest.
    ``TopUnits`` is the same as a metric, which merges across processes.

    Args:
        layout: The layer.
        k: Units a channel.
        channels: Which channels; all by default.
        keep_patches: Keep the image patch under each unit, moved into the image at the border.
        holder: Number of this process.
        examples: Of which of these channels, by their place among them, the whole image of the
            strongest unit is kept too.
        **kwargs: For a class that this one is combined with.
    """

    units: Tensor
    largest: Tensor
    fires: Tensor
    broken: Tensor
    images: Tensor

    def __init__(
        self,
        layout: Layout,
        k: int = 9,
        channels: Sequence[int] | None = None,
        keep_patches: bool = True,
        holder: int = 0,
        examples: Sequence[int] = (),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.layout = layout
        self.k = k
        self.holder = holder
        self.keep_patches = keep_patches
        self.patches: Tensor | None = None
        self.examples = ExampleImages(examples) if len(examples) else None
        self.seen: Seen | None = None
        """What of a batch is not settled yet."""
        self.recorded: torch.dtype | None = None
        """Of the activations seen last."""
        self.chosen = None if channels is None else torch.tensor(channels)
        self.first = [first.clone() for first in layout.field.first]
        for name, start in self.start().items():
            setattr(self, name, start)
        self.bar = bar_of(self.units)

    def start(self) -> dict[str, Tensor]:
        """The states that ``REDUCTIONS`` merges, by name, as they are before the first image."""
        every = self.layout.channels
        counts = {name: torch.zeros(every, dtype=torch.int64) for name in ("fires", "broken")}
        return {
            "units": no_units(every if self.chosen is None else len(self.chosen), self.k),
            "largest": torch.full((every,), -torch.inf),
            **counts,
            "images": torch.zeros((), dtype=torch.int64),
        }

    def update(self, output: Tensor, identity: Tensor) -> None:
        """Looks at one batch; ``settle`` must follow.

        Args:
            output: The layer's maps [N, A, *map]; read at once, as they may be overwritten.
            identity: int64 [N], whose they are.
        """
        with torch.inference_mode(False), torch.no_grad():
            self.recorded = output.dtype
            maps = output.detach().flatten(2)
            looks = _may_look(maps.device)
            best, place = (maps.amax(2), None) if looks else maps.max(2)
            best = best.float()
            if not looks or bool(best.sum().isnan()):  # of what is no number no sum is one
                self.broken = self.broken + best.isnan().sum(0)
                best = best.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
            if len(best):
                self.largest = torch.maximum(self.largest, best.amax(0))
            self.fires = self.fires + (best > 0).sum(0)
            self.images = self.images + len(best)
            if self.chosen is not None:
                best = best.index_select(1, self.chosen)
                place = None if place is None else place.index_select(1, self.chosen)
            best = best.t().contiguous()
            if place is None:
                reached = self.bar.reached(best, identity, self.units.shape[1])
                self.seen = Seen(best, self._places(maps, reached), reached)
            else:
                self.seen = Seen(best, place.t(), None)

    def compute(self) -> Counted:
        """The strongest units of all images."""
        units = resolved(self.units, self.k)
        return Counted(units, self.largest, self.fires, self.broken, self.images)

    def reset(self) -> None:
        """Forgets all images."""
        with torch.inference_mode(False):  # what is made in it could not be written to outside
            for name, start in self.start().items():
                setattr(self, name, start.to(self.units.device))
            self.seen, self.bar = None, bar_of(self.units)
            if self.examples is not None:
                self.examples.reset()

    def _places(self, maps: Tensor, reached: Tensor) -> Tensor:
        """Where the maps are largest, for those that are among the strongest; else 0."""
        places = torch.zeros(reached.shape, dtype=torch.int64)
        channel, sample = reached.nonzero(as_tuple=True)
        if not len(channel):
            return places
        of_layer = channel if self.chosen is None else self.chosen[channel]
        places[channel, sample] = maps[sample, of_layer].argmax(1)
        return places

    def keep(self, units: Tensor, changed: Changed, images: Tensor, identity: Tensor) -> None:
        """Takes over what was settled: the units, and the patches of those that entered.

        Args:
            units: int64 [C, K, FIELDS].
            changed: Which of them are new.
            images: [N, C, H, W].
            identity: int64 [N], who they are.
        """
        self.units = units
        if self.examples is not None:
            self.examples.update(units, images, identity)
        if not self.keep_patches:
            return
        if self.patches is None:
            size = (*units.shape[:2], images.shape[1], *self.layout.patch_size)
            self.patches = images.new_zeros(size)
        patches = self._under(images, changed.sample, changed.place)
        if not _may_look(units.device):
            mask = changed.enters.view(-1, *[1] * (patches.ndim - 1))
            patches = torch.where(mask, patches, self.patches[changed.channel, changed.slot])
        self.patches.index_put_((changed.channel, changed.slot), patches)

    def _under(self, images: Tensor, sample: Tensor, place: Tensor) -> Tensor:
        if self.layout.takes_image:
            return images.index_select(0, sample)
        size = self.layout.patch_size
        inside = moved_inside(self.starts(place), size, images.shape[2:])
        return cut(images, sample, inside, size)

    def starts(self, place: Tensor) -> Tensor:
        """First row, column, ... of the boxes of units.

        Args:
            place: int64 [U], flat places in the map.

        Returns:
            int64 [U, D].
        """
        if len(self.layout.image) - 1 != len(self.layout.map_size):
            return place.new_zeros(len(place), len(self.layout.image) - 1)
        starts, field = [], self.layout.field
        for dim in reversed(range(len(self.first))):
            extent = self.layout.map_size[dim]
            whole = field.whole[dim]
            starts.append(torch.zeros_like(place) if whole else self.first[dim][place % extent])
            place = place.div(extent, rounding_mode="floor")
        return torch.stack(starts[::-1], 1)

    def merged_elsewhere(self) -> None:
        """What is kept is of all processes, which is all the same to one."""

    def on(self, device: torch.device) -> TopOfProcess:
        """Moves all that is kept to a device."""
        for name in REDUCTIONS:
            setattr(self, name, getattr(self, name).to(device))
        self.rest_on(device)
        return self

    def rest_on(self, device: torch.device) -> None:
        """Moves what is no state to a device."""
        if self.chosen is not None:
            self.chosen = self.chosen.to(device)
        self.first = [first.to(device) for first in self.first]
        self.bar = self.bar.to(device)
        if self.examples is not None:
            self.examples.to(device)
        if self.patches is not None:
            self.patches = self.patches.to(device)


def settle(metrics: Sequence[TopOfProcess], images: Tensor, identity: Tensor) -> None:
    """Lets the strongest units of a batch in, of all layers at once.

    Args:
        metrics: Those that did not look at this batch are left alone.
        images: [N, C, H, W], as the model was given them.
        identity: int64 [N], who they are.
    """
    with torch.inference_mode(False), torch.no_grad():
        looked = [metric for metric in metrics if metric.seen is not None]
        _settle(looked, images, identity)
        for metric in looked:
            metric.seen = None


def _settle(metrics: Sequence[TopOfProcess], images: Tensor, identity: Tensor) -> None:
    seen = [metric.seen for metric in metrics if metric.seen is not None]
    if not seen or not len(images):
        return
    best, places = torch.cat([s.best for s in seen]), torch.cat([s.place for s in seen])
    units = torch.cat([metric.units for metric in metrics])
    sizes = [len(s.best) for s in seen]
    looks = _may_look(best.device)
    channels = torch.arange(len(best), device=best.device)
    if looks:
        reached = torch.cat([s.reached for s in seen if s.reached is not None])
        channels = reached.any(1).nonzero().squeeze(1)
        if not len(channels):
            return
        slots, samples, valid = admitted(
            units[channels], best[channels], identity, reached[channels]
        )
    else:
        slots, samples, valid = admitted(units, best, identity)
    changed = Changed(
        channels[:, None].expand_as(slots).flatten(),
        slots.flatten(),
        samples.flatten(),
        places[channels[:, None], samples].flatten(),
        valid.flatten(),
    )
    counts = [size * slots.shape[1] for size in sizes]
    if looks:
        changed = changed.rows(changed.enters.nonzero().squeeze(1))
        ends = torch.tensor(sizes).cumsum(0)
        counts = torch.searchsorted(changed.channel, ends).diff(prepend=ends.new_zeros(1)).tolist()
    channel, slot = changed.channel, changed.slot
    entry = torch.stack(
        [
            as_key(best[channel, changed.sample]),
            identity[changed.sample],
            changed.place,
            torch.full_like(slot, metrics[0].holder),
            slot,
        ],
        1,
    )
    entry = torch.where(changed.enters[:, None], entry, units[channel, slot])
    units = units.index_put((channel, slot), entry)
    if looks:
        for metric, bar in zip(metrics, bar_of(units).split(sizes), strict=True):
            metric.bar = bar
    start = 0
    for metric, part, new in zip(metrics, units.split(sizes), changed.split(counts), strict=True):
        if len(new.slot):
            metric.keep(part.clone(), new.moved(-start), images, identity)
        start += len(part)


def _may_look(device: torch.device) -> bool:
    """Whether asking for a value waits for nothing."""
    return device.type == "cpu"
