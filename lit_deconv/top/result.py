"""The strongest units of layers, as they were collected."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_deconv.engine.local import Layout
from lit_deconv.top.cutting import cut, moved_inside
from lit_deconv.top.examples import Examples
from lit_deconv.top.identity import several_processes

Images = Callable[[Sequence[int]], Tensor]
"""Reads images by identity: [M] of them -> [M, C, H, W]."""


@dataclass(frozen=True)
class LayerTop:
    """The strongest units of one layer; C chosen channels, A all of them, K units, D map dimensions.

    Attributes:
        channels: int64 [C], numbers of the chosen channels.
        values: [C, K], activations, best first; -inf where there were fewer images.
        identity: int64 [C, K], data index of the image, or a hash of it (negative).
        positions: int64 [C, K, D], position in the map.
        boxes: int64 [C, K, 2D], the receptive field (top, left, bottom, right; half-open).
        kept: What was kept of each image, [C, K, c, h, w]: the part under the box's ``windows``;
            the whole image for a layer that cannot be computed on less; None where that would have
            passed the memory bound.
        held: bool [C, K], whether this process saw the image; elsewhere ``kept`` is 0.
        largest: [A], largest activation.
        fires: [A], share of images on which something is above zero.
        broken: int64 [A], images on which something is not a number; they are never chosen.
        images: How many images were seen.
        recorded: Precision in which the activations were seen.
        layout: The layer's maps and receptive fields.
        examples: Whole images of a few of the units; None where none were to be kept.
    """

    channels: Tensor
    values: Tensor
    identity: Tensor
    positions: Tensor
    boxes: Tensor
    kept: Tensor | None
    held: Tensor
    largest: Tensor
    fires: Tensor
    broken: Tensor
    images: int
    recorded: torch.dtype
    layout: Layout
    examples: Examples | None = None

    @property
    def exists(self) -> Tensor:
        """False where, of [C, K], there were fewer images than K."""
        return self.values > -torch.inf

    @property
    def patches(self) -> Tensor | None:
        """[C, K, c, h, w], the image under each box, 0 outside the image; None: not kept."""
        if self.kept is None:
            return None
        under = self.cut_kept(self.kept.flatten(0, 1), self.boxes.flatten(0, 1))
        return under.view(*self.kept.shape[:3], *under.shape[2:])

    @property
    def windows(self) -> Tensor:
        """int64 [C, K, 2D], what figures show: the boxes, moved into the image at its border."""
        dims = self.boxes.shape[-1] // 2
        size = self.layout.field.size
        start = moved_inside(self.boxes[..., :dims], size, self.layout.image[1:])
        return torch.cat([start, start + start.new_tensor(size)], -1)

    def cut_kept(self, kept: Tensor, boxes: Tensor) -> Tensor:
        """What lies under boxes or windows of units, from what was kept of their images.

        Args:
            kept: [U, c, h, w], rows of ``kept``.
            boxes: int64 [U, 2D], one each.

        Returns:
            [U, c, h, w]; 0 outside the image.
        """
        rows = torch.arange(len(kept), device=kept.device)
        if self.layout.takes_image:
            return self.cut(kept, rows, boxes)
        size = self.layout.field.size
        start = boxes[:, : len(size)]
        # the window is all of the image that the box sees, so 0 outside it is 0 outside the image
        return cut(kept, rows, start - moved_inside(start, size, self.layout.image[1:]), size)

    def cut(self, images: Tensor, samples: Tensor, boxes: Tensor) -> Tensor:
        """What lies under boxes of this layer.

        Args:
            images: [M, c, H, W].
            samples: int64 [U], rows of ``images``.
            boxes: int64 [U, 2D].

        Returns:
            [U, c, h, w].
        """
        if all(self.layout.field.whole):
            return images.index_select(0, samples)
        return cut(images, samples, boxes[:, : boxes.shape[1] // 2], self.layout.field.size)


class TopActivations(Mapping[str, LayerTop]):
    """The strongest units by layer.

    Args:
        layers: By name.
        images: Reads images again, by identity; None where nothing can.
    """

    def __init__(self, layers: Mapping[str, LayerTop], images: Images | None = None) -> None:
        self._layers = dict(layers)
        self.images = images

    def __getitem__(self, layer: str) -> LayerTop:
        return self._layers[layer]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)


def of_all_processes(values: Tensor, held: Tensor) -> Tensor:
    """Completes what each process knows of the units that it holds; all of them must call it.

    Args:
        values: [C, K, ...], such as patches or reconstructions.
        held: bool [C, K], which of them are this process's. Each unit is held by one process.

    Returns:
        [C, K, ...], the same in every process.
    """
    mask = held.view(*held.shape, *[1] * (values.ndim - held.ndim))
    own = torch.where(mask, values, values.new_zeros(())).contiguous()
    if several_processes():
        torch.distributed.all_reduce(own)
    return own
