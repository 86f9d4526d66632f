"""Reconstructs the strongest units from what was kept of their images, and checks each activation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lit_deconv.attr import Deconvnet
from lit_deconv.top.cutting import cut
from lit_deconv.top.result import Images, LayerTop, TopActivations

TOLERANCE = {torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""How far the recomputed activation may be from the recorded one, relatively; else ``EXACT``."""
EXACT = 1e-4
_IMAGES_AT_ONCE = 32


@dataclass(frozen=True)
class TopReconstructions:
    """The strongest units of one layer in pixels.

    Attributes:
        images: [C, K, c, h, w], reconstructions under the boxes, or in the windows moved into the
            image; 0 where not verified.
        patches: [C, K, c, h, w], the image there; 0 where this process saw none.
        activations: [C, K], computed anew; NaN where nothing could be computed.
        verified: bool [C, K], whether they agree with the recorded ones.
        expected: bool [C, K], the units that this process was to reconstruct.
    """

    images: Tensor
    patches: Tensor
    activations: Tensor
    verified: Tensor
    expected: Tensor

    @property
    def doubtful(self) -> int:
        """How many units are left out, as their activation came out different."""
        return int((self.expected & ~self.verified).sum())


def reconstruct_top(
    net: Deconvnet, top: TopActivations, *, inside: bool = False
) -> dict[str, TopReconstructions]:
    """Projects the strongest units down, each alone, from the patches under them.

    A unit whose activation, computed anew, is not the recorded one (other weights, or a model whose
    receptive fields are not what its ops say) is tried once more on the whole image, where it can be
    read; if that fails too it is left out and marked.

    Args:
        net: The layers of ``top``, with the weights of that time.
        top: What was collected. In a distributed run each process reconstructs what it holds.
        inside: Give what lies in ``LayerTop.windows``, as figures show it, instead of the boxes: at
            the border of the image they hold more of it.

    Returns:
        By layer.
    """
    parts = {name: _Part(net, name, layer, inside) for name, layer in top.items()}
    for part in parts.values():
        part.use_kept()
    if top.images is not None:
        _use_images(list(parts.values()), top.images)
    return {name: part.result() for name, part in parts.items()}


def tolerance(dtype: torch.dtype) -> float:
    """How far an activation recorded in this precision may be from the one computed anew."""
    return TOLERANCE.get(dtype, EXACT)


class _Part:
    """One layer's units, U of them, on their way to pixels."""

    def __init__(self, net: Deconvnet, name: str, layer: LayerTop, inside: bool) -> None:
        self.net, self.name, self.layer = net, name, layer
        self.expected = layer.held & layer.exists
        self.at = tuple(self.expected.nonzero().unbind(1))
        self.channel, self.position = layer.channels[self.at[0]], layer.positions[self.at]
        self.identity, self.boxes = layer.identity[self.at], layer.boxes[self.at]
        self.shown = layer.windows[self.at] if inside else self.boxes
        self.recorded = layer.values[self.at]
        dtype = layer.values.dtype if layer.kept is None else layer.kept.dtype
        self.good = torch.zeros_like(self.recorded, dtype=torch.bool)
        size = (len(self.at[0]), layer.layout.image[0], *layer.layout.field.size)
        self.images = layer.values.new_zeros(size, dtype=dtype)
        self.patches = self.images.clone()
        self.activations = self.images.new_full(size[:1], torch.nan)

    def convert(self, dtype: torch.dtype) -> None:
        """To the images' precision, which is not known before the first is read."""
        self.images, self.patches = self.images.to(dtype), self.patches.to(dtype)
        self.activations = self.activations.to(dtype)

    def use_kept(self) -> None:
        """Reconstructs from what the collector kept."""
        if self.layer.kept is None or not len(self.identity):
            return
        kept = self.layer.kept[self.at]
        everything = torch.arange(len(kept), device=kept.device)
        if not self.layer.layout.takes_image:
            self.patches = self.layer.cut_kept(kept, self.shown)
            self.run(self.layer.cut_kept(kept, self.boxes), everything, everything)
            return
        # Several channels may have kept the same image: it runs once.
        _, sample = self.identity.unique(return_inverse=True)
        first = torch.empty_like(everything).index_put((sample,), everything)
        for start in range(0, int(sample.max()) + 1, _IMAGES_AT_ONCE):
            stop = start + _IMAGES_AT_ONCE
            index = ((sample >= start) & (sample < stop)).nonzero().squeeze(1)
            images = kept[first[start : int(sample[index].max()) + 1]]
            self.use_images(images, index, sample[index] - start)

    def use_images(self, images: Tensor, index: Tensor, sample: Tensor) -> None:
        """Reconstructs some units from whole images [M, c, H, W]: their rows, and their image's."""
        self.patches[index] = self.layer.cut(images, sample, self.shown[index])
        self.run(images, index, sample)
        again = ~self.good[index]
        if bool(again.any()):
            self.run(images, index[again], sample[again], "images")

    def run(
        self,
        images: Tensor,
        index: Tensor,
        sample: Tensor,
        via: Literal["auto", "images"] = "auto",
    ) -> None:
        """Walks some units back and checks their activations."""
        units = torch.cat([sample[:, None], self.channel[index, None], self.position[index]], 1)
        activations, back = self.net.reconstruct_patches(
            images, units, self.layer.layout.image, layer=self.name, via=via
        )
        self.activations[index], self.images[index] = activations, back
        allowed = tolerance(self.layer.recorded)
        recorded = self.recorded[index]
        # What is near zero is the sum of terms as large as any, and rounds as they do.
        largest = torch.where(self.recorded.isfinite(), self.recorded.abs(), 0).max()
        room = allowed * recorded.abs() + 1e-2 * allowed * largest
        self.good[index] = (activations.float() - recorded).abs() <= room

    def result(self) -> TopReconstructions:
        """The units in their places."""

        def placed(values: Tensor, elsewhere: float = 0) -> Tensor:
            room = values.new_full((*self.expected.shape, *values.shape[1:]), elsewhere)
            return room.index_put(self.at, values)

        dims = self.images.ndim - 2
        moved = self.shown[:, :dims] - self.boxes[:, :dims]
        everything = torch.arange(len(self.images), device=self.images.device)
        self.images = cut(self.images, everything, moved, self.images.shape[2:])
        mask = self.good.view(-1, *[1] * (self.images.ndim - 1))
        return TopReconstructions(
            placed(torch.where(mask, self.images, self.images.new_zeros(()))),
            placed(self.patches),
            placed(self.activations, torch.nan),
            placed(self.good),
            self.expected,
        )


def _use_images(parts: list[_Part], read: Images) -> None:
    """Units that are not verified yet, image by image, each read once for all layers."""
    missing = torch.cat([part.identity[~part.good] for part in parts]).unique()
    for identities in missing.split(_IMAGES_AT_ONCE):
        if not len(identities):
            return
        images = read(identities.tolist()).to(missing.device)
        for part in parts:
            wanted = torch.isin(part.identity, identities) & ~part.good
            index = wanted.nonzero().squeeze(1)
            if not len(index):
                continue
            part.convert(images.dtype)
            part.use_images(images, index, torch.searchsorted(identities, part.identity[index]))
