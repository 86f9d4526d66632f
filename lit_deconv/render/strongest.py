"""Figure 2 of the paper and its short form: the strongest units of each channel."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
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
    fitting,
    number,
    room,
    some,
)
from lit_deconv.render.pixels import Look, count_nonfinite, magnify, photograph, to_pil

Sized = Callable[[Tensor], Tensor]
"""Brings a picture to the size that a figure has room for."""


@dataclass(frozen=True)
class Strongest:
    """The strongest activations of one channel, one unit per image, strongest first.

    Args:
        channel: Number of the feature map.
        activations: K values.
        patches: [K, C, h, w], the image under each unit, as the model was given it.
        reconstructions: [K, C, h, w].
        fires: Share of images on which the channel is above zero, 0 to 1; None: not counted.
        note: Added to the caption.
    """

    channel: int
    activations: Sequence[float]
    patches: Tensor
    reconstructions: Tensor
    fires: float | None = None
    note: str = ""

    def __post_init__(self) -> None:
        counts = (len(self.activations), len(self.patches), len(self.reconstructions))
        if len(set(counts)) != 1:
            raise ValueError(
                f"channel {self.channel}: {counts[0]} activations, {counts[1]} patches and "
                f"{counts[2]} reconstructions; expected as many of each"
            )


def channel_grid(
    channels: Sequence[Strongest], heading: Heading, look: Look | None = None
) -> Tensor:
    """For each channel, the input patch above the reconstruction of its strongest unit.

    Three blocks stand in a row, and nothing is shrunk in a TensorBoard card.

    Args:
        channels: Only the first unit of each is shown.
        heading: What the title says.
        look: How values become pixels.

    Returns:
        uint8 [3, H, W].
    """
    firsts = [
        replace(
            c,
            activations=c.activations[:1],
            patches=c.patches[:1],
            reconstructions=c.reconstructions[:1],
        )
        for c in channels
    ]
    look = look or Look()
    scale = fitting(side for c in some(firsts, "channels") for side in c.reconstructions.shape[2:])
    sized = partial(magnify, least=scale * LEAST, most=(room(scale) - 2 * page.GAP) // 3)
    pairs = [(_photographs(c, look, sized), _reconstructions(c, look, sized)) for c in firsts]
    squares = [[_square(group, 1) for group in pair] for pair in pairs]
    cell = common_size([square for pair in squares for square in pair])
    blocks = [
        page.above(
            [
                page.above([page.centre(square, *cell) for square in pair], 2),
                _caption(strongest, scale, cell[0]),
            ],
            2,
        )
        for strongest, pair in zip(firsts, squares, strict=True)
    ]
    shows = "strongest unit of each channel: input patch, below it the reconstruction"
    body = page.mosaic(blocks, 3, page.GAP, 2 * page.GAP)
    return finish(body, heading, _rules(firsts, look), shows, _broken(firsts), scale)


def figure2(channels: Sequence[Strongest], heading: Heading, look: Look | None = None) -> Tensor:
    """For each channel, a square of reconstructions beside the square of their image patches.

    Zeiler & Fergus, figure 2: nine strongest activations, each projected down separately.

    Args:
        channels: K units each, 9 in the paper.
        heading: What the title says.
        look: How values become pixels.

    Returns:
        uint8 [3, H, W].
    """
    look = look or Look()
    top = max(len(c.activations) for c in some(channels, "channels"))
    side = max(1, math.ceil(math.sqrt(top)))
    # as many cards wide as two squares of pictures need that are not too small
    scale = math.ceil((2 * side * (LEAST + 2) + 3 * page.GAP) / page.CARD)
    most = ((room(scale) - page.GAP) // 2 + 2) // side - 2
    # a card leaves pixels out anyway, and hundreds of pictures are to be encoded
    sized = partial(magnify, least=LEAST, most=most, smooth=False)
    pairs = [(_reconstructions(c, look, sized), _photographs(c, look, sized)) for c in channels]
    squares = [[_square(group, side) for group in pair] for pair in pairs]
    cell = common_size([square for pair in squares for square in pair])
    blocks = [
        page.above(
            [
                page.beside([page.centre(square, *cell) for square in pair]),
                _caption(strongest, scale, 2 * cell[0] + page.GAP),
            ]
        )
        for strongest, pair in zip(channels, squares, strict=True)
    ]
    shows = f"top {top} activations of each channel: reconstructions | image patches"
    body = page.above(blocks, GUTTER)
    return finish(body, heading, _rules(channels, look), shows, _broken(channels), scale)


def _photographs(strongest: Strongest, look: Look, sized: Sized) -> list[Image.Image]:
    drawn = (photograph(p, look.mean, look.std, look.input_channels) for p in strongest.patches)
    return [to_pil(sized(each)) for each in drawn]


def _reconstructions(strongest: Strongest, look: Look, sized: Sized) -> list[Image.Image]:
    return [to_pil(sized(enhanced(each, look))) for each in strongest.reconstructions]


def _rules(channels: Sequence[Strongest], look: Look) -> list[str]:
    unknown = any(c.patches.dtype != torch.uint8 for c in channels)
    return [look.rule(), look.warning if unknown else ""]


def _broken(channels: Sequence[Strongest]) -> int:
    return sum(count_nonfinite(c.reconstructions) + count_nonfinite(c.patches) for c in channels)


def _caption(strongest: Strongest, scale: int, width: int) -> Image.Image:
    size = scale * page.TEXT
    if not len(strongest.activations):
        activation = "no unit"
    elif strongest.fires == 0:
        activation = "never fires"
    else:
        activation = f"activation {number(strongest.activations[0])}"
    lines = [f"channel {strongest.channel}", activation]
    if strongest.fires:
        lines.append(f"fires on {100 * strongest.fires:.3g} %")
    broken = count_nonfinite(strongest.reconstructions)
    if broken:
        lines.append(f"{broken} values not finite")
    if strongest.note:
        lines.append(strongest.note)
    # a block wide enough for a sentence takes one; in a narrow one each fact has its own line
    words = (", " if width >= 20 * size else "\n").join(lines)
    return page.write(words, size, width, scale=scale)


def _square(pictures: Sequence[Image.Image], side: int) -> Image.Image:
    """Up to side x side pictures of one size as a square; what is missing stays pale."""
    if not pictures:
        return Image.new("RGB", (LEAST, LEAST), page.VOID)
    empty = Image.new("RGB", pictures[0].size, page.VOID)
    return page.mosaic([*pictures, *[empty] * (side * side - len(pictures))], side, gap=2)
