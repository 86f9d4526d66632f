"""Tensors to labelled uint8 pictures: contrast, windows at the border, the paper's figures."""

from lit_deconv.render.comparison import Panel, Row, side_by_side
from lit_deconv.render.evolution import Evolution, figure4, thin_epochs
from lit_deconv.render.first_layer import filters
from lit_deconv.render.heading import Heading
from lit_deconv.render.notebook import show
from lit_deconv.render.pixels import (
    Look,
    count_nonfinite,
    enhance,
    magnify,
    photograph,
    to_pil,
    to_tensor,
)
from lit_deconv.render.strongest import Strongest, channel_grid, figure2
from lit_deconv.render.windows import crop_boxes, shift_boxes, shift_patches

__all__ = [
    "Evolution",
    "Heading",
    "Look",
    "Panel",
    "Row",
    "Strongest",
    "channel_grid",
    "count_nonfinite",
    "crop_boxes",
    "enhance",
    "figure2",
    "figure4",
    "filters",
    "magnify",
    "photograph",
    "shift_boxes",
    "shift_patches",
    "show",
    "side_by_side",
    "thin_epochs",
    "to_pil",
    "to_tensor",
]
