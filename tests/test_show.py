"""`show`: in the cell of a notebook, else in the system's viewer."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from lit_deconv.render import show


@pytest.mark.parametrize("in_a_notebook", [True, False])
def test_the_figure_goes_where_the_user_looks(
    in_a_notebook: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell: list[Image.Image] = []
    viewer: list[Image.Image] = []
    shell = SimpleNamespace(get_ipython=lambda: object() if in_a_notebook else None)
    monkeypatch.setitem(sys.modules, "IPython", shell)
    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(display=cell.append))
    monkeypatch.setattr(Image.Image, "show", lambda picture: viewer.append(picture))
    show(torch.full((3, 4, 5), 7, dtype=torch.uint8))
    (shown,) = cell + viewer
    assert bool(cell) == in_a_notebook
    assert shown.size == (5, 4)
    assert shown.getpixel((2, 2)) == (7, 7, 7)
