"""The memory that the strongest units of layers will take, known before the first image is."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch

from lit_deconv.engine.local import Layout
from lit_deconv.top.identity import several_processes
from lit_deconv.top.ranking import FIELDS, SPARE

MAX_BYTES = 256 << 20
"""Default bound of what a collector keeps."""

Channels: TypeAlias = "Sequence[int] | Mapping[str, Sequence[int]] | None"


@dataclass(frozen=True)
class LayerBytes:
    """What one layer of a collector keeps in memory.

    Attributes:
        numbers: Bytes of activations, identities, positions and counts.
        patches: Bytes of the image patches; 0 where they would have passed the bound.
        examples: Bytes of whole images of single units; 0 where they would have passed it.
    """

    numbers: int
    patches: int
    examples: int = 0


def chosen_channels(layer: str, layout: Layout, channels: Channels) -> list[int] | None:
    """The channels of a layer that are wanted, None for all of them.

    Raises:
        ValueError: A channel that the layer does not have, or one given twice.
    """
    wanted = channels.get(layer) if isinstance(channels, Mapping) else channels
    if wanted is None:
        return None
    numbers = [int(channel) for channel in wanted]
    outside = [c for c in numbers if not 0 <= c < layout.channels]
    if outside or len(set(numbers)) < len(numbers) or not numbers:
        raise ValueError(
            f"channels {numbers} of layer {layer!r}: expected different numbers from 0 to "
            f"{layout.channels - 1}, at least one"
        )
    return numbers


def estimate(
    layers: Mapping[str, Layout],
    k: int = 9,
    channels: Channels = None,
    dtype: torch.dtype = torch.float32,
    max_bytes: int = MAX_BYTES,
    examples: int = 0,
) -> dict[str, LayerBytes]:
    """What a collector will keep, to the byte, however many images it is shown.

    Where all patches together pass the bound, the layers with the largest do without: their images
    are read once more at the end, or lie on disk meanwhile.

    Args:
        layers: From ``Deconvnet.layouts``.
        k: Units a channel.
        channels: Which channels: the same for every layer, or by layer; all by default.
        dtype: The images'.
        max_bytes: The bound.
        examples: Of so many channels a layer one whole image is kept, where there is room.

    Returns:
        Bytes by layer.

    Raises:
        ValueError: The numbers alone pass the bound.
    """
    numbers, patches, whole = {}, {}, {}
    copies = 2 if several_processes() else 1  # torchmetrics, which merges, keeps a fresh one
    for name, layout in layers.items():
        wanted = chosen_channels(name, layout, channels)
        chosen = layout.channels if wanted is None else len(wanted)
        units = chosen * (k + SPARE)
        counts = layout.channels * (4 + 8 + 8) + 8  # largest, fires, broken; images
        numbers[name] = copies * (units * FIELDS * 8 + counts)
        numbers[name] += 16 * chosen  # what the next must reach
        numbers[name] += 8 * len(wanted or ()) + 8 * sum(len(f) for f in layout.field.first)
        few = min(examples, chosen)
        # whose images they are, and they
        whole[name] = few * (8 + FIELDS * 8 + math.prod(layout.image) * dtype.itemsize)
        patches[name] = units * layout.image[0] * math.prod(layout.patch_size) * dtype.itemsize
    left = max_bytes - sum(numbers.values())
    if left < 0:
        raise ValueError(
            f"the activations and positions of {k} units a channel take {sum(numbers.values())} "
            f"bytes, more than max_bytes={max_bytes}; choose fewer channels or raise the bound"
        )
    if sum(whole.values()) > left:
        whole = dict.fromkeys(layers, 0)
    left -= sum(whole.values())
    kept = {}
    for name in sorted(patches, key=lambda name: patches[name]):
        kept[name] = patches[name] if patches[name] <= left else 0
        left -= kept[name]
    return {name: LayerBytes(numbers[name], kept[name], whole[name]) for name in layers}


def total_bytes(parts: Iterable[LayerBytes]) -> int:
    """All of it."""
    return sum(part.numbers + part.patches + part.examples for part in parts)
