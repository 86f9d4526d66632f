"""Figures on the screen: in a notebook's cell, else in the system's picture viewer."""

from __future__ import annotations

import sys
from importlib import import_module

from torch import Tensor

from lit_deconv.render.pixels import to_pil


def show(figure: Tensor) -> None:
    """Show a figure; `to_pil` gives it as a PIL image instead.

    Args:
        figure: uint8 [3, H, W], as all figures here are.
    """
    picture = to_pil(figure)
    shell = sys.modules.get("IPython")  # loaded where a notebook runs
    if shell is not None and shell.get_ipython() is not None:
        import_module("IPython.display").display(picture)
    else:
        picture.show()
