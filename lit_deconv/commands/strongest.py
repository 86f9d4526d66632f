"""The strongest units of each channel over a user's pictures: found in one pass, then reconstructed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lit_deconv.attr import Deconvnet
from lit_deconv.engine.local import Layout
from lit_deconv.engine.undisturbed import undisturbed
from lit_deconv.render import Strongest, crop_boxes, shift_boxes, shift_patches
from lit_deconv.top import Collector, LayerTop, TopActivations, reconstruct_top

CHANNELS_A_PAGE = 16

Reader = Callable[[Sequence[int]], Tensor]
"""Reads pictures [M, C, H, W] by number."""


@dataclass(frozen=True)
class Page:
    """The strongest units of some channels of a layer, on the CPU; U units, best first per channel.

    Args:
        units: int64 [U, 2 + D]: number of the picture, channel, position.
        activations: [U].
        reconstructions: [U, C, h, w], in `boxes`.
        boxes: int64 [U, 4], may reach past the image.
        images: [U, C, H, W], the whole pictures.
        fires: Share of pictures on which a channel fires, by channel.
        doubtful: bool [U], activations that came out different when computed anew; their
            reconstruction is left at zero.
    """

    units: Tensor
    activations: Tensor
    reconstructions: Tensor
    boxes: Tensor
    images: Tensor
    fires: Mapping[int, float]
    doubtful: Tensor

    def strongest(self, most: int | None = None) -> list[Strongest]:
        """By channel, for `render.figure2`; windows at the border move into the image."""
        shown = shift_boxes(self.boxes, *self.images.shape[2:])
        patches = crop_boxes(self.images, shown)
        moved = shift_patches(self.reconstructions, self.boxes, shown)
        found = []
        for channel, fires in self.fires.items():
            rows = (self.units[:, 1] == channel).nonzero().squeeze(1)[:most]
            doubtful = int(self.doubtful[rows].sum())
            found.append(
                Strongest(
                    channel,
                    self.activations[rows].tolist(),
                    patches[rows],
                    moved[rows],
                    fires,
                    f"{doubtful} left out: not reproducible" if doubtful else "",
                )
            )
        return found


def collect(
    net: Deconvnet,
    layouts: Mapping[str, Layout],
    batches: Iterator[tuple[list[int], Tensor]],
    channels: Mapping[str, Sequence[int]],
    k: int,
    device: torch.device,
) -> TopActivations:
    """Find the strongest units, one forward a batch, ended behind the deepest layer.

    Args:
        net: The layers.
        layouts: Of the layers.
        batches: Numbers of pictures, and the pictures.
        channels: By layer.
        k: Units a channel.
        device: Where the model is.

    Raises:
        ValueError: No picture could be read.
    """
    collector = Collector(layouts, k, channels, torch.float32, device)
    seen = 0
    for numbers, images in batches:
        look(net, collector, numbers, images.to(device))
        seen += len(numbers)
    if not seen:
        raise ValueError("none of the pictures could be read; see the reasons above")
    return collector.compute()


def look(net: Deconvnet, collector: Collector, numbers: Sequence[int], images: Tensor) -> None:
    """Show images to a collector: one forward pass, ended behind the deepest layer.

    Args:
        net: The layers.
        collector: Of these layers.
        numbers: Of the images.
        images: [N, C, H, W], where the model is.
    """
    waiting = set(net.layers)

    def seeing(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            collector.see(name, net.feature_map(name, output))
            waiting.discard(name)
            if not waiting:
                raise _SeenAllError

        return hook

    with ExitStack() as stack:
        stack.enter_context(undisturbed(net.model))
        stack.enter_context(torch.no_grad())
        for name, module in net.layers.items():
            stack.callback(module.register_forward_hook(seeing(name)).remove)
        collector.begin(images, numbers)
        with suppress(_SeenAllError):
            net.model(images)
        collector.end()


def pages(
    net: Deconvnet, name: str, top: LayerTop, pictures: Reader, device: torch.device
) -> Iterator[Page]:
    """Reconstruct the units of a layer, some channels at a time.

    Args:
        net: The layer.
        name: Its name.
        top: Its strongest units.
        pictures: Reads pictures by number.
        device: Where the model is.
    """
    for number in range(page_count(len(top.channels))):
        yield page(net, name, top, number, pictures, device)


def page_count(channels: int) -> int:
    """How many pages so many channels make."""
    return -(-channels // CHANNELS_A_PAGE)


def page(
    net: Deconvnet, name: str, top: LayerTop, number: int, pictures: Reader, device: torch.device
) -> Page:
    """Reconstruct the units of some channels of a layer.

    Args:
        net: The layer.
        name: Its name.
        top: Its strongest units.
        number: Of the page, from 0.
        pictures: Reads pictures by number.
        device: Where the model is.
    """

    def read(numbers: Sequence[int]) -> Tensor:
        return pictures(numbers).to(device)

    part = _channels(top, slice(number * CHANNELS_A_PAGE, (number + 1) * CHANNELS_A_PAGE))
    back = reconstruct_top(net, TopActivations({name: part}, read))[name]
    rows = part.exists
    channels = part.channels[:, None].expand_as(part.values)[rows]
    units = torch.cat(
        [part.identity[rows][:, None], channels[:, None], part.positions[rows]], 1
    ).cpu()
    return Page(
        units,
        part.values[rows].cpu(),
        back.images[rows].cpu(),
        part.boxes[rows].cpu(),
        pictures(units[:, 0].tolist()),
        {channel: float(top.fires[channel]) for channel in part.channels.tolist()},
        ~back.verified[rows].cpu(),
    )


def _channels(top: LayerTop, which: slice) -> LayerTop:
    return replace(
        top,
        channels=top.channels[which],
        values=top.values[which],
        identity=top.identity[which],
        positions=top.positions[which],
        boxes=top.boxes[which],
        kept=None if top.kept is None else top.kept[which],
        held=top.held[which],
    )


class _SeenAllError(BaseException):
    """Ends a forward behind the deepest layer; no `except Exception` of the model's catches it."""
