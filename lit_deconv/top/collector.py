"""Collects the strongest units of several layers from hooks on batches that run anyway."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lit_deconv.engine.errors import LayerError
from lit_deconv.engine.local import Layout
from lit_deconv.top.counting import REDUCTIONS, Counted, TopOfProcess, settle
from lit_deconv.top.examples import Examples
from lit_deconv.top.identity import NOT_COUNTED, hashed, several_processes
from lit_deconv.top.memory import (
    MAX_BYTES,
    Channels,
    LayerBytes,
    chosen_channels,
    estimate,
    total_bytes,
)
from lit_deconv.top.ranking import HOLDER, IDENTITY, KEY, PLACE, SLOT, as_value, bar_of
from lit_deconv.top.result import Images, LayerTop, TopActivations


class Collector:
    """The strongest units of each layer over the images that it is shown.

    In hooks: ``begin`` when a batch of images goes into the model, ``see`` when a layer answers,
    ``end`` when the model has (``drop`` where it failed). None of them runs the model, draws a
    random number or, on an accelerator, waits for the device. What it keeps is known beforehand
    (``bytes``) and does not grow.

    Args:
        layers: From ``Deconvnet.layouts``.
        k: Units a channel.
        channels: Which channels: the same for every layer, or by layer; all by default.
        dtype: The images'.
        device: Where the images and the layers' outputs will be.
        max_bytes: Bound of what is kept. Layers whose patches do not fit keep identities and
            positions alone.
        holder: Number of this process among those that collect together.
        examples: Of so many channels a layer, evenly spaced, the whole image of the strongest unit
            is kept too, where that fits the bound.
        merges: In a distributed run ``compute`` merges across processes; False for those who do it
            themselves, by ``states``, ``merged`` and ``take_over``.
    """

    def __init__(
        self,
        layers: Mapping[str, Layout],
        k: int = 9,
        channels: Channels = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        max_bytes: int = MAX_BYTES,
        holder: int = 0,
        examples: int = 0,
        merges: bool = True,
    ) -> None:
        if k < 1:
            raise ValueError(f"k={k}: expected at least one unit a channel")
        self.layers = dict(layers)
        self.bytes: dict[str, LayerBytes] = estimate(
            layers, k, channels, dtype, max_bytes, examples
        )
        self.max_bytes = max_bytes
        self.holder, self.examples = holder, examples
        self.device = torch.device(device)
        several = several_processes()
        kept = _kind(merges and several)
        self._alone = merges and not several
        with torch.inference_mode(False):
            self.metrics = {
                name: kept(
                    layout,
                    k,
                    chosen_channels(name, layout, channels),
                    keep_patches=self.bytes[name].patches > 0,
                    holder=holder,
                    examples=self._example_rows(name, channels, examples),
                ).on(self.device)
                for name, layout in layers.items()
            }
        self._images: Tensor | None = None
        self._identity: Tensor | None = None
        self._rows: Tensor | None = None
        self._seen: set[str] = set()

    @property
    def keeps_every_patch(self) -> bool:
        """Whether all layers' patches fit the bound."""
        return all(metric.keep_patches for metric in self.metrics.values())

    @property
    def batch(self) -> tuple[Tensor, Tensor]:
        """The images of this batch that count, [N, C, H, W], and their identities [N]."""
        if self._images is None or self._identity is None:
            raise ValueError("there is no batch between end() and begin()")
        return self._images, self._identity

    def begin(
        self, images: Tensor, indices: Sequence[int] | None = None, by_hash: bool = False
    ) -> None:
        """A batch goes into the model.

        Args:
            images: [N, C, H, W]. Copied, as models may write to their input.
            indices: Data index of each; ``NOT_COUNTED`` (-1) for one that another process counts.
                Without them an image is known by a hash of its pixels.
            by_hash: It is so with them too: they say no more than which images count.
        """
        self.drop()
        self._seen = set()
        expected = {layout.image for layout in self.layers.values()}
        if expected and tuple(images.shape[1:]) not in expected:
            raise ValueError(
                f"images of {list(images.shape[1:])} after some of {list(*expected)}: expected images "
                f"of one size; resize them to one"
            )
        with torch.inference_mode(False), torch.no_grad():
            self._images = images.detach().clone()
            self._rows = None
            if indices is not None:
                if len(indices) != len(images):
                    raise ValueError(
                        f"{len(indices)} indices for {len(images)} images: expected one each"
                    )
                counted = [row for row, index in enumerate(indices) if index != NOT_COUNTED]
                if len(counted) < len(images):
                    self._rows = _sent(counted, images.device)
                    self._images = self._images.index_select(0, self._rows)
                    indices = [indices[row] for row in counted]
            if indices is None or by_hash:
                self._identity = hashed(self._images)
            else:
                self._identity = _sent(indices, images.device)

    def see(self, layer: str, output: Tensor) -> None:
        """A layer answers. What it returned may be overwritten afterwards.

        Args:
            layer: Its name.
            output: [N, A, *map].

        Raises:
            LayerError: The layer ran twice in one batch, or outside one, or its output is no stack
                of feature maps for each image.
        """
        if self._images is None or self._identity is None:
            raise LayerError(f"layer {layer!r} ran before a batch of images was seen")
        if layer in self._seen:
            raise LayerError(
                f"layer {layer!r} runs more than once in one forward pass, so it has no one output; "
                f"choose another layer"
            )
        self._seen.add(layer)
        if self._rows is not None:
            output = output.detach().index_select(0, self._rows)
        layout = self.layers[layer]
        expected = (len(self._images), layout.channels, *layout.map_size)
        if tuple(output.shape) != expected:
            raise LayerError(
                f"layer {layer!r} gave {list(output.shape)} for {len(self._images)} images, expected "
                f"{list(expected)}: one stack of feature maps an image"
            )
        self.metrics[layer].update(output, self._identity)

    def end(self) -> None:
        """The batch is over: the strongest units are settled and its images let go."""
        if self._images is not None and self._identity is not None:
            settle(list(self.metrics.values()), self._images, self._identity)
        self.drop()

    def drop(self) -> None:
        """The batch came to nothing, such as by an exception: its images are let go."""
        for metric in self.metrics.values():
            if metric.seen is not None:  # a metric is slow to write to
                metric.seen = None
        self._images = self._identity = self._rows = None

    def reset(self) -> None:
        """Forgets all images, before another pass over the data."""
        self.drop()
        for metric in self.metrics.values():
            metric.reset()

    def compute(self, images: Images | None = None) -> TopActivations:
        """The strongest units; in a distributed run of all processes, which must all call it.

        Args:
            images: Reads images again, by identity, for layers that keep no patches.

        Raises:
            RuntimeError: The collector was made before the processes knew of each other.
        """
        if self._alone and several_processes():
            raise RuntimeError(
                "this collector was made before torch.distributed was initialised, so it would not "
                "merge what the processes saw; make it afterwards"
            )
        with torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings():
            # a process may have had no batch
            warnings.filterwarnings("ignore", message=".*``compute``.*before the ``update``")
            return TopActivations(
                {name: self._top(name, metric.compute()) for name, metric in self.metrics.items()},
                images,
            )

    def states(self) -> dict[str, dict[str, Tensor]]:
        """What was counted so far, by layer: numbers alone, no patches.

        These are no copies, and stay as they are: what is counted later goes into new tensors.
        """
        return {
            name: {state: getattr(metric, state) for state in REDUCTIONS}
            for name, metric in self.metrics.items()
        }

    @staticmethod
    def merged(
        states: Sequence[Mapping[str, Mapping[str, Tensor]]],
    ) -> dict[str, dict[str, Tensor]]:
        """One of several: what processes or passes counted of different images, see ``states``."""
        return {
            name: {
                state: REDUCTIONS[state](torch.stack([each[name][state] for each in states]))
                for state in layer
            }
            for name, layer in states[0].items()
        }

    def take_over(self, states: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Goes on from what was counted elsewhere, in place of what was counted here.

        In a distributed run every process is to be given the same: ``compute`` then merges no more.
        """
        self._alone = False
        for name, metric in self.metrics.items():
            for state, value in states[name].items():
                setattr(metric, state, value.to(self.device))
            metric.merged_elsewhere()
            metric.bar = bar_of(metric.units)

    def winners(self) -> Tensor:
        """Identities of all images of which this process keeps a unit; int64, waits for the device."""
        kept = [metric.units[..., IDENTITY].flatten() for metric in self.metrics.values()]
        values = [as_value(metric.units[..., KEY]).flatten() for metric in self.metrics.values()]
        return torch.cat(kept)[torch.cat(values) > -torch.inf].unique()

    def summary(self) -> str:
        """What it keeps, in a sentence, for those who run it."""
        bare = [name for name, metric in self.metrics.items() if not metric.keep_patches]
        mib = total_bytes(self.bytes.values()) / 2**20
        text = f"strongest units keep {mib:.1f} MiB (bound {self.max_bytes / 2**20:.0f} MiB)"
        if bare:
            text += f"; without patches: {', '.join(bare)}"
        if self.examples and not any(each.examples for each in self.bytes.values()):
            text += "; without the whole images that methods beside ours take"
        return text

    def _example_rows(self, layer: str, channels: Channels, examples: int) -> list[int]:
        if not self.bytes[layer].examples:
            return []
        layout = self.layers[layer]
        count = len(chosen_channels(layer, layout, channels) or range(layout.channels))
        few = min(examples, count)
        return [index * count // few for index in range(few)]

    def _top(self, layer: str, counted: Counted) -> LayerTop:
        metric, layout = self.metrics[layer], self.layers[layer]
        units = counted.units
        flat = units[..., PLACE].flatten()
        start = metric.starts(flat).view(*units.shape[:2], -1)
        size = start.new_tensor(layout.field.size)
        values = as_value(units[..., KEY])
        held = (units[..., HOLDER] == self.holder) & (values > -torch.inf)
        # torchmetrics makes a scalar of a tensor with one element
        largest, fires, broken = (
            count.view(layout.channels)
            for count in (counted.largest, counted.fires, counted.broken)
        )
        channels = metric.chosen
        if channels is None:
            channels = torch.arange(layout.channels, device=units.device)
        return LayerTop(
            channels=channels,
            values=values,
            identity=units[..., IDENTITY],
            positions=_unravelled(units[..., PLACE], layout.map_size),
            boxes=torch.cat([start, start + size], -1),
            kept=_of_slots(metric, units[..., SLOT], held),
            held=held,
            largest=largest,
            fires=fires / counted.images.clamp(min=1),
            broken=broken,
            images=int(counted.images),
            recorded=metric.recorded or torch.float32,
            layout=layout,
            examples=_examples(metric, units, channels, values, layout.map_size),
        )


def _examples(
    metric: TopOfProcess, units: Tensor, channels: Tensor, values: Tensor, map_size: Sequence[int]
) -> Examples | None:
    kept = metric.examples
    if kept is None or kept.images is None:
        return None
    found, ranks = kept.ranks(units)
    rows = kept.rows[found]
    places = units[rows, ranks, PLACE]
    return Examples(
        channels[rows],
        ranks,
        values[rows, ranks],
        _unravelled(places, map_size),
        kept.images[found],
    )


def _kind(merges: bool) -> type[TopOfProcess]:
    if not merges:
        return TopOfProcess
    from lit_deconv.top.metric import TopUnits

    return TopUnits


def _of_slots(metric: TopOfProcess, slots: Tensor, held: Tensor) -> Tensor | None:
    if not metric.keep_patches:
        return None
    size = (metric.layout.image[0], *metric.layout.patch_size)
    if metric.patches is None:
        return torch.zeros(*slots.shape, *size, device=slots.device)
    rows = torch.arange(len(slots), device=slots.device)[:, None]
    patches = metric.patches[rows, torch.where(held, slots, 0)]
    mask = held.view(*held.shape, *[1] * (patches.ndim - 2))
    return torch.where(mask, patches, patches.new_zeros(()))


def _unravelled(place: Tensor, map_size: Sequence[int]) -> Tensor:
    positions = []
    for extent in reversed(map_size):
        positions.append(place % extent)
        place = place.div(extent, rounding_mode="floor")
    return torch.stack(positions[::-1], -1)


def _sent(numbers: Sequence[int], device: torch.device) -> Tensor:
    """To a device without waiting for it."""
    return torch.tensor(numbers, dtype=torch.int64).to(device, non_blocking=True)
