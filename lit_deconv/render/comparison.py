"""Several attributions of one image side by side, with what their agreement is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image, ImageDraw
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
    room,
    some,
)
from lit_deconv.render.pixels import Look, count_nonfinite, magnify, photograph, to_pil


@dataclass(frozen=True)
class Panel:
    """One named picture in a row of `side_by_side`.

    Args:
        name: The column's name, such as "Captum NeuronDeconvolution".
        image: [C, h, w]; None leaves the cell empty and the note says why.
        note: The line below: the agreement, or the reason why there is none.
        is_photograph: Drawn as an input image, else as a reconstruction.
        box: top, left, bottom, right in pixels of the image, outlined; None: no outline.
    """

    name: str
    image: Tensor | None
    note: str = ""
    is_photograph: bool = False
    box: Sequence[int] | None = None


@dataclass(frozen=True)
class Row:
    """The pictures of one probe image or unit, and the line above them."""

    label: str
    panels: Sequence[Panel]


def side_by_side(rows: Sequence[Row], heading: Heading, look: Look | None = None) -> Tensor:
    """Several attributions of one image or unit, the agreement below each picture.

    Three pictures stand in a row, and nothing is shrunk in a TensorBoard card.

    Args:
        rows: All with the same panel names in the same order.
        heading: What the title says.
        look: How values become pixels.

    Returns:
        uint8 [3, H, W].

    Raises:
        ValueError: When there is no row, or rows differ in their panels' names.
    """
    look = look or Look()
    names = [panel.name for panel in some(rows, "rows")[0].panels]
    for row in rows:
        if [panel.name for panel in row.panels] != names:
            raise ValueError(f"row {row.label!r} has other panels than the first row: {names}")
    panels = [panel for row in rows for panel in row.panels]
    across = min(len(names), 3)
    scale = fitting(side for p in panels if p.image is not None for side in p.image.shape[1:])
    most = (room(scale) - (across - 1) * page.GAP) // across
    pictures = [_panel_picture(panel, look, scale * LEAST, most) for panel in panels]
    cell = common_size(pictures)
    cells = [
        page.above(
            [
                page.centre(picture, *cell) if picture else Image.new("RGB", cell, page.VOID),
                page.write(panel.name, scale * page.TEXT, cell[0], scale=scale),
                page.write(panel.note, scale * 12, cell[0], ink=page.PALE_INK, scale=scale),
            ],
            2,
        )
        for panel, picture in zip(panels, pictures, strict=True)
    ]
    body = []
    for start, row in zip(range(0, len(panels), len(names)), rows, strict=True):
        own = cells[start : start + len(names)]
        label = page.write(row.label, scale * page.TEXT, room(scale), scale=scale)
        body.append(page.above([label, page.mosaic(own, across)]))
    shows = "the same image by several attributions"
    unknown = any(
        p.image is not None and p.is_photograph and p.image.dtype != torch.uint8 for p in panels
    )
    rules = [look.rule(), look.warning if unknown else ""]
    broken = sum(count_nonfinite(panel.image) for panel in panels if panel.image is not None)
    return finish(page.above(body, GUTTER), heading, rules, shows, broken, scale)


def _panel_picture(panel: Panel, look: Look, least: int, most: int) -> Image.Image | None:
    if panel.image is None:
        return None
    if panel.is_photograph:
        image = photograph(panel.image, look.mean, look.std, look.input_channels)
    else:
        image = enhanced(panel.image, look)
    picture = to_pil(magnify(image, least, most))
    if panel.box is not None:
        scale = picture.width / image.shape[-1]
        top, left, bottom, right = (round(edge * scale) for edge in panel.box)
        line = least // LEAST  # as wide as the letters' pixels: it outlasts the shrinking
        draw = ImageDraw.Draw(picture)
        around = (left - line, top - line, right - 1 + line, bottom - 1 + line)
        draw.rectangle(around, outline=(0, 0, 0), width=line)
        draw.rectangle((left, top, right - 1, bottom - 1), outline=(255, 255, 255), width=line)
    return picture
