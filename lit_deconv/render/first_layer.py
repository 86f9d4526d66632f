"""Figure 6 of the paper: the filters of the first layer."""

from __future__ import annotations

from torch import Tensor

from lit_deconv.render import page
from lit_deconv.render.evolution import thin_epochs
from lit_deconv.render.heading import LEAST, Heading, enhanced, finish, in_a_row
from lit_deconv.render.pixels import Look, count_nonfinite, magnify, to_pil


def filters(weight: Tensor, heading: Heading, look: Look | None = None, most: int = 64) -> Tensor:
    """First-layer filters as a grid, each with its own scale and its number below.

    Args:
        weight: [F, C, h, w], as a convolution holds it; C need not be 3.
        heading: What the title says.
        look: How values become pixels.
        most: Beyond these, evenly spaced filters are shown and the title says so.

    Returns:
        uint8 [3, H, W].
    """
    look = look or Look()
    if weight.ndim != 4 or not len(weight):
        raise ValueError(f"expected filters [F, C, h, w], got {list(weight.shape)}")
    chosen = thin_epochs(range(len(weight)), most)
    scale, across, widest = in_a_row(len(chosen))
    pictures = [to_pil(magnify(enhanced(weight[n], look), LEAST, widest)) for n in chosen]
    cells = [
        page.above(
            [
                picture,
                page.write(str(index), 12 * scale, picture.width, ink=page.PALE_INK, scale=scale),
            ],
            2,
        )
        for index, picture in zip(chosen, pictures, strict=True)
    ]
    shows = "filters" if len(chosen) == len(weight) else f"filters, {len(chosen)} of {len(weight)}"
    broken = count_nonfinite(weight[chosen])
    return finish(page.mosaic(cells, across), heading, [look.rule("filter")], shows, broken, scale)
