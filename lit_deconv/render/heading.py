"""What all figures share: the title with its rules, the sizes, how a reconstruction is drawn."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from PIL import Image
from torch import Tensor

from lit_deconv.render import page
from lit_deconv.render.pixels import Look, enhance, to_tensor

T = TypeVar("T")

LEAST = 96
"""No reconstruction is drawn smaller than this, where it has the room."""

LARGE = 144
"""Pictures with a longer side lose too much when three of them stand in a card."""

GUTTER = 24
"""The gap between blocks, wider than the gap inside one."""


@dataclass(frozen=True)
class Heading:
    """What the title of a figure says.

    Args:
        layer: Name of the layer.
        epoch: Epoch of the weights, as the run counts them.
        note: What else must be said: averaged weights, an uncompiled module, a probe of the user's.
        shows: What is shown; each figure has its own default.
    """

    layer: str
    epoch: int | None = None
    note: str = ""
    shows: str = ""


def finish(
    body: Image.Image,
    heading: Heading,
    rules: Sequence[str],
    shows: str,
    broken: int,
    scale: int,
) -> Tensor:
    """Puts the title above: layer and epoch, what is shown, then the rules in a paler ink.

    Args:
        body: The figure below the title.
        heading: What the title says.
        rules: How to read the figure.
        shows: What is shown, unless the heading says it.
        broken: How many values are not finite.
        scale: The figure is so many cards wide, see `page.CARD`.
    """
    width = room(scale)
    when = "" if heading.epoch is None else f", epoch {heading.epoch}"
    magenta = f"Magenta marks {broken} values that are not finite." if broken else ""
    small = " ".join(filter(None, [*rules, magenta, heading.note]))
    title = page.above(
        [
            page.write(f"{heading.layer}{when}", 18 * scale, width, scale=scale),
            page.write(heading.shows or shows, page.TEXT * scale, width, scale=scale),
            page.write(small, 12 * scale, width, ink=page.PALE_INK, scale=scale),
        ],
        gap=2,
    )
    figure = page.above([title, body], GUTTER // 2)
    return to_tensor(page.framed(figure, page.GAP, least=scale * page.CARD))


def room(scale: int) -> int:
    """The width between the margins of a figure that is so many cards wide."""
    return scale * page.CARD - 2 * page.GAP


def fitting(sides: Iterable[int]) -> int:
    """How many cards wide a figure of three pictures in a row is, for pictures of these sides.

    Twice as wide for large ones: a card shrinks them, and the actual size has what it left out.
    """
    return 2 if max(sides, default=0) > LARGE else 1


def in_a_row(count: int, most: int = 6) -> tuple[int, int, int]:
    """How pictures stand beside each other: three in a card, more in a figure twice as wide.

    Args:
        count: How many there are to show together.
        most: How many stand in a row there; more take several rows, as long as each other.

    Returns:
        How many cards wide the figure is, how many stand in a row, how wide each may be.
    """
    scale = 1 if count <= 3 else 2
    across = 3 if count <= 3 else math.ceil(count / math.ceil(count / most))
    return scale, across, (room(scale) - (across - 1) * page.GAP) // across


def common_size(pictures: Sequence[Image.Image | None]) -> tuple[int, int]:
    """The width and height of a cell that holds any of these."""
    shown = [picture for picture in pictures if picture is not None]
    if not shown:
        return LEAST, LEAST
    return max(p.width for p in shown), max(p.height for p in shown)


def enhanced(image: Tensor, look: Look) -> Tensor:
    """A reconstruction as this look draws it."""
    return enhance(image, look.percentile, look.input_channels)


def number(value: float) -> str:
    """A value as captions write it."""
    return f"{value:.3g}"


def some(items: Sequence[T], name: str) -> Sequence[T]:
    """The items, or an error that says there are none."""
    if not items:
        raise ValueError(f"no {name} to draw; leave the figure out instead")
    return items
