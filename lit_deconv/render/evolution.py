"""Figure 4 of the paper: how the channels of a layer evolve over the epochs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from PIL import Image
from torch import Tensor

from lit_deconv.render import page
from lit_deconv.render.heading import (
    GUTTER,
    LEAST,
    Heading,
    common_size,
    enhanced,
    finish,
    in_a_row,
    number,
    room,
    some,
)
from lit_deconv.render.pixels import Look, count_nonfinite, magnify, to_pil

COLUMNS = 7
"""So many epochs stand in one line; with more of them even `epoch 9` would need two."""


@dataclass(frozen=True)
class Evolution:
    """One channel over the epochs: its strongest reconstruction at each.

    Args:
        channel: Number of the feature map.
        epochs: E epochs in rising order.
        reconstructions: E pictures [C, h, w]; None where there was none.
        activations: E values.
        note: Added to the row's label.
    """

    channel: int
    epochs: Sequence[int]
    reconstructions: Sequence[Tensor | None]
    activations: Sequence[float]
    note: str = ""

    def __post_init__(self) -> None:
        counts = (len(self.epochs), len(self.reconstructions), len(self.activations))
        if len(set(counts)) != 1:
            raise ValueError(
                f"channel {self.channel}: {counts[0]} epochs, {counts[1]} reconstructions and "
                f"{counts[2]} activations; expected as many of each"
            )


def figure4(rows: Sequence[Evolution], heading: Heading, look: Look | None = None) -> Tensor:
    """How each channel's strongest reconstruction evolves: a row a channel, its epochs in order.

    Zeiler & Fergus, figure 4. An epoch stands in the same place in every row; where there are more
    than `COLUMNS`, a row takes several lines. Choose the epochs with `thin_epochs`.

    Args:
        rows: One per channel.
        heading: What the title says.
        look: How values become pixels.

    Returns:
        uint8 [3, H, W].
    """
    look = look or Look()
    epochs = sorted({epoch for row in some(rows, "rows") for epoch in row.epochs})
    scale, across, widest = in_a_row(len(epochs), COLUMNS)
    sized = partial(magnify, least=min(LEAST, widest), most=widest, smooth=False)
    drawn = {
        (row.channel, epoch): to_pil(sized(enhanced(image, look)))
        for row in rows
        for epoch, image in zip(row.epochs, row.reconstructions, strict=True)
        if image is not None
    }
    cell = common_size(list(drawn.values()))
    empty = Image.new("RGB", cell, page.VOID)
    body = []
    for row in rows:
        values = dict(zip(row.epochs, row.activations, strict=True))
        cells = [
            page.above(
                [
                    page.centre(drawn.get((row.channel, epoch), empty), *cell),
                    page.write(
                        f"epoch {epoch}\n{number(values[epoch]) if epoch in values else '-'}",
                        12 * scale,
                        cell[0],
                        ink=page.PALE_INK,
                        scale=scale,
                    ),
                ],
                2,
            )
            for epoch in epochs
        ]
        label = ", ".join(filter(None, [f"channel {row.channel}", row.note]))
        written = page.write(label, page.TEXT * scale, room(scale), scale=scale)
        body.append(page.above([written, page.mosaic(cells, across)], 2))
    shows = "strongest reconstruction of each channel over the epochs, its activation below"
    broken = sum(count_nonfinite(i) for row in rows for i in row.reconstructions if i is not None)
    return finish(page.above(body, GUTTER), heading, [look.rule()], shows, broken, scale)


def thin_epochs(epochs: Sequence[int], most: int) -> list[int]:
    """At most this many, evenly spread, the first and the last always among them."""
    if most < 2:
        raise ValueError(f"most must be at least 2, to hold the first and the last, got {most}")
    if len(epochs) <= most:
        return list(epochs)
    last = len(epochs) - 1
    return [epochs[round(step * last / (most - 1))] for step in range(most)]
