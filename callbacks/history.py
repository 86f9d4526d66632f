"""Each channel's strongest reconstruction over the epochs, small enough for every checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lit_deconv.render import Evolution
from lit_deconv.render.evolution import COLUMNS
from lit_deconv.top import LayerTop, TopReconstructions

from .probe import spread

__all__ = ["History"]

ROWS = 16
"""Channels a layer, at most."""
EPOCHS = COLUMNS
"""Columns, at most."""
SIDE = 64
"""Reconstructions larger than this are averaged down."""
_CLIP = 0.995
"""As figures are clipped: what is beyond is not seen."""


class History:
    """What figure 4 shows, layer by layer: a bounded set of epochs, the first and the latest in it.

    A reconstruction is kept as one byte a value. Epochs are thinned as they come: of the n-th, those
    are kept whose n is a multiple of a power of two, and the latest.
    """

    def __init__(self) -> None:
        self._layers: dict[str, dict[str, Any]] = {}

    def load(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state_dict` gave; an empty one begins anew."""
        self._layers = {name: dict(layer) for name, layer in state.items()}

    def state_dict(self) -> dict[str, Any]:
        """Numbers, lists and tensors alone."""
        return {name: dict(layer) for name, layer in self._layers.items()}

    def add(self, name: str, epoch: int, top: LayerTop, found: TopReconstructions) -> None:
        """Keeps an epoch's strongest unit of each channel; an epoch seen before is replaced."""
        rows = spread(len(top.channels), ROWS)
        channels = top.channels[rows].tolist()
        layer = self._layers.get(name)
        if layer is None or layer["channels"] != channels:
            layer = {"channels": channels, "moments": []}
        moments = layer["moments"]
        before = [each for each in moments if each["epoch"] < epoch]
        if moments and moments[-1]["epoch"] == epoch:
            number = moments[-1]["number"]
        else:
            number = before[-1]["number"] + 1 if before else 0
        images, scale = _small(found.images[rows, 0])
        values = torch.where(found.verified[rows, 0], found.activations[rows, 0], torch.nan)
        moment = {
            "epoch": epoch,
            "number": number,
            "activations": values.float().cpu(),
            "images": images,
            "scale": scale,
        }
        self._layers[name] = {"channels": channels, "moments": _thinned([*before, moment])}

    def rows(self, name: str) -> list[Evolution]:
        """One row of figure 4 per channel."""
        layer = self._layers.get(name)
        if layer is None:
            return []
        moments = layer["moments"]
        return [
            Evolution(
                channel,
                [each["epoch"] for each in moments],
                [_picture(each, row) for each in moments],
                [float(each["activations"][row]) for each in moments],
            )
            for row, channel in enumerate(layer["channels"])
        ]


def _thinned(moments: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    latest, stride = moments[-1], 1
    # Kept are 0, stride, ... below the latest, and the latest.
    while (latest["number"] - 1) // stride + 2 > EPOCHS:
        stride *= 2
    return [each for each in moments[:-1] if each["number"] % stride == 0] + [latest]


def _small(images: Tensor) -> tuple[Tensor, Tensor]:
    """Bytes [C, c, h, w] and what one of them is worth [C]."""
    images = images.detach().float().cpu()
    size = min(images.shape[-2], SIDE), min(images.shape[-1], SIDE)
    if size != images.shape[-2:]:
        images = functional.adaptive_avg_pool2d(images, size)
    scale = torch.stack([_largest(image) for image in images]) / 127
    steps = images / scale.clamp(min=1e-30).view(-1, 1, 1, 1)
    return steps.nan_to_num().round().clamp(-127, 127).to(torch.int8), scale


def _largest(image: Tensor) -> Tensor:
    sizes = image.abs()
    sizes = sizes[(sizes > 0) & sizes.isfinite()]
    if not len(sizes):
        return image.new_zeros(())
    return sizes.kthvalue(max(1, round(_CLIP * len(sizes)))).values


def _picture(moment: Mapping[str, Any], row: int) -> Tensor | None:
    if not bool(moment["activations"][row].isfinite()):
        return None
    image: Tensor = moment["images"][row].float() * moment["scale"][row]
    return image
