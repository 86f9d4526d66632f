"""What `lit-deconv top` will take of memory and disk, said before it begins."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lit_deconv.commands.strongest import CHANNELS_A_PAGE
from lit_deconv.engine.local import Layout
from lit_deconv.render import Heading, Strongest, figure2
from lit_deconv.sinks import encode_png
from lit_deconv.top import estimate

RAW = {"float32": 4, "float16": 2, "none": 0}
"""Bytes of a value in the raw reconstructions, by what `--raw` says."""

COPIES = 6
"""So often a page of units is held at once, in parts: patches, ways back, moved windows, figures."""


@dataclass(frozen=True)
class Cost:
    """Bytes, none of which grows with the number of images beyond the units that are kept.

    Args:
        channels: Channels of all layers.
        units: Of all channels.
        ranking: In memory, for the activations and positions.
        page: In memory, for one page of figures.
        raw: On disk, the reconstructions.
        figures: On disk at most, PNG files and the TensorBoard log.
        winners: On disk at most and only meanwhile, the images of the units.
    """

    channels: int
    units: int
    ranking: int
    page: int
    raw: int
    figures: int
    winners: int

    @property
    def disk(self) -> int:
        """All on disk."""
        return self.raw + self.figures + self.winners

    def __str__(self) -> str:
        return (
            f"{self.channels} channels, {self.units} units. Memory beside the model and one batch: "
            f"{size(self.ranking)} to rank, about {size(self.page)} to draw. Disk, at most: "
            f"{size(self.raw)} raw reconstructions, {size(self.figures)} figures and log, and "
            f"{size(self.winners)} for images until all is drawn"
        )

    def check(self, folder: Path) -> None:
        """Whether there is room.

        Raises:
            ValueError: There is not.
        """
        free = shutil.disk_usage(folder).free
        if self.disk > free:
            raise ValueError(
                f"this may need {size(self.disk)} of disk ({self}), and {folder} has {size(free)} left; "
                "name fewer --channels, a smaller --top-k or --size, or --raw float16 or none"
            )


def cost_of(
    layouts: Mapping[str, Layout],
    channels: Mapping[str, Sequence[int]],
    k: int,
    images: int,
    image_bytes: int,
    raw: str,
) -> Cost:
    """Reckon it up.

    Args:
        layouts: Of the layers.
        channels: By layer.
        k: Units a channel.
        images: How many there are.
        image_bytes: Of one, as it is stored.
        raw: What `--raw` says.
    """
    each = min(k, images)
    counts = {name: len(channels[name]) * each for name in layouts}
    field = {
        name: layout.image[0] * math.prod(layout.field.size) for name, layout in layouts.items()
    }
    drawn = {tuple(layout.field.size): 0 for layout in layouts.values()}
    for layout in layouts.values():
        if not drawn[tuple(layout.field.size)]:
            drawn[tuple(layout.field.size)] = _figure_bytes(layout, each)
    ranking = estimate(layouts, k, channels, max_bytes=1 << 62)
    whole = max(math.prod(layout.image) for layout in layouts.values())
    return Cost(
        channels=sum(map(len, channels.values())),
        units=sum(counts.values()),
        ranking=sum(part.numbers for part in ranking.values()),
        page=COPIES * CHANNELS_A_PAGE * each * whole * 4,
        raw=sum(counts[name] * field[name] * RAW[raw] for name in layouts),
        # every figure is a file, and an entry of the log
        figures=2
        * sum(
            len(channels[name]) * drawn[tuple(layout.field.size)]
            for name, layout in layouts.items()
        ),
        winners=min(images, sum(counts.values())) * image_bytes,
    )


def _figure_bytes(layout: Layout, k: int) -> int:
    """Of a figure of one channel as PNG; noise, as nothing compresses worse."""
    noise = torch.rand(k, layout.image[0], *layout.field.size)
    shown = Strongest(0, [1.0] * k, noise, noise, 1.0)
    return len(encode_png(figure2([shown], Heading("layer"))))


def size(count: int) -> str:
    """Bytes for people."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.3g} {unit}"
        value /= 1024
    return f"{value:.3g} TiB"
