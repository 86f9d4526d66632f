"""What tests of the callback look at besides the log."""

from __future__ import annotations

from typing import Any

import pytest
from lit_deconv.callbacks import gallery
from lit_deconv.callbacks import pictures as drawing


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[drawing.LayerPictures]:
    """What every figure was made from, in order."""
    seen: list[drawing.LayerPictures] = []
    from lit_deconv.callbacks import session

    original = session.draw

    def draw(*args: Any) -> Any:
        for layer in original(*args):
            seen.append(layer)
            yield layer

    monkeypatch.setattr(session, "draw", draw)
    return seen


@pytest.fixture
def notes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the title of every figure says besides layer and epoch."""
    seen: list[str] = []
    hang = gallery.Gallery.hang

    def noting(*args: Any) -> Any:
        seen.append(args[-1])
        return hang(*args)

    monkeypatch.setattr(gallery.Gallery, "hang", noting)
    return seen
