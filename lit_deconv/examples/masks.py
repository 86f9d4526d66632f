"""Holds what a trained network's channels respond to against the masks of the objects.

Run as `python -m lit_deconv.examples.masks CHECKPOINT`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from lit_deconv import Deconvnet
from lit_deconv.examples.datamodules import Composites
from lit_deconv.examples.zfnet import ZFNet


class MaskShare(NamedTuple):
    """How much of a layer's reconstructions lies on the objects, averaged over its channels."""

    layer: str
    channels: int
    """Channels that fire on at least one image; the others have nothing to reconstruct."""
    energy: float
    """Share of the reconstruction's energy, its sum of squares, inside the object mask."""
    area: float
    """Share of the whole image that the mask covers: what an energy spread evenly would give."""
    window: float
    """Share of the unit's receptive field that the mask covers."""


def mask_shares(
    model: nn.Module, layers: Sequence[str], images: Tensor, masks: Tensor, batch_size: int = 50
) -> list[MaskShare]:
    """Reconstruct the strongest unit of each channel and measure how much lies inside the masks.

    Args:
        model: the network.
        layers: dotted names of its layers.
        images: as the model takes them, [N, C, H, W].
        masks: where the objects are, bool [N, H, W].
        batch_size: images per forward pass.
    """
    units = strongest_units(model, layers, images, batch_size)
    return [
        _mask_share(model, layer, units[layer], images, masks)
        for layer in tqdm(layers, "reconstructing", leave=False, disable=None)
    ]


def strongest_units(
    model: nn.Module, layers: Sequence[str], images: Tensor, batch_size: int = 50
) -> dict[str, Tensor]:
    """Find where each channel responds most over all images.

    Returns:
        By layer, the units of the channels that fire, int64 [U, 4]: image, channel, row, column.
    """
    net = Deconvnet(model, list(layers))
    values: dict[str, Tensor] = {}
    units: dict[str, Tensor] = {}
    starts = range(0, len(images), batch_size)
    for start in tqdm(starts, "looking for the strongest units", leave=False, disable=None):
        for layer, maps in net.activations(images[start : start + batch_size]).items():
            value, found = _strongest(maps)
            found[:, 0] += start
            if layer in values:
                better = value > values[layer]
                value = torch.where(better, value, values[layer])
                found = torch.where(better[:, None], found, units[layer])
            values[layer], units[layer] = value, found
    return {layer: units[layer][values[layer] > 0] for layer in layers}


def main(argv: Sequence[str] | None = None) -> None:
    """Print the shares, layer by layer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", help="of a ZFNet trained on Composites, as the demo does")
    parser.add_argument("--layers", nargs="+", help="dotted names; by default every rectifier")
    options = parser.parse_args(argv)
    model = ZFNet.load_from_checkpoint(
        options.checkpoint, map_location="cpu", weights_only=True
    ).eval()
    datamodule = Composites.load_from_checkpoint(options.checkpoint, weights_only=True)
    datamodule.prepare_data()
    datamodule.setup("validate")
    pictures = datamodule.val_set
    assert pictures is not None
    images = torch.stack([pictures[i][0] for i in range(len(pictures))])
    masks = torch.stack([pictures.object_mask(i) for i in range(len(pictures))])
    layers = options.layers or [
        f"features.{name}" for name, m in model.features.named_children() if isinstance(m, nn.ReLU)
    ]
    print(f"{len(images)} validation pictures; shares of the strongest unit of each channel")
    print("layer                 channels  energy in mask  mask in image  mask in receptive field")
    for share in mask_shares(model, layers, images, masks):
        print(
            f"{share.layer:20}  {share.channels:8}  {share.energy:14.1%}  {share.area:13.1%}"
            f"  {share.window:23.1%}"
        )


def _mask_share(
    model: nn.Module, layer: str, units: Tensor, images: Tensor, masks: Tensor
) -> MaskShare:
    if not len(units):
        return MaskShare(layer, 0, float("nan"), float("nan"), float("nan"))
    winners, sample = units[:, 0].unique(return_inverse=True)
    local = torch.cat([sample[:, None], units[:, 1:]], 1)
    patches, boxes = Deconvnet(model, layer).reconstruct(images[winners], local, crop=True)
    inside = crop(masks[units[:, 0]].float(), boxes)
    within_image = crop(torch.ones_like(masks[units[:, 0]], dtype=torch.float), boxes)
    energy = patches.square().sum(1)
    return MaskShare(
        layer,
        len(units),
        float(((energy * inside).sum((1, 2)) / energy.sum((1, 2))).nanmean()),
        float(masks[units[:, 0]].float().mean()),
        float((inside.sum((1, 2)) / within_image.sum((1, 2))).mean()),
    )


def crop(maps: Tensor, boxes: Tensor) -> Tensor:
    """Cut a box of one size out of each map.

    Args:
        maps: [U, H, W].
        boxes: top, left, bottom, right, [U, 4]; half-open, may reach past the map.

    Returns:
        [U, h, w], 0 outside the map.
    """
    h, w = (boxes[0, 2:] - boxes[0, :2]).tolist()
    padded = F.pad(maps, (w, w, h, h))
    corners = (boxes[:, :2] + torch.tensor([h, w])).tolist()
    return torch.stack(
        [m[top : top + h, left : left + w] for m, (top, left) in zip(padded, corners, strict=True)]
    )


def _strongest(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Per channel of maps [N, C, H, W] the largest value [C] and its unit [C, 4]."""
    n, c, h, w = maps.shape
    value, flat = maps.transpose(0, 1).reshape(c, n * h * w).max(1)
    image, place = flat // (h * w), flat % (h * w)
    return value, torch.stack([image, torch.arange(c), place // w, place % w], 1)


if __name__ == "__main__":
    main()
