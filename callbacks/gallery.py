"""Hangs a layer's pictures in the loggers: figures, titles and names in the log."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from torch import Tensor

from lit_deconv.render import Heading, Look, figure2, figure4, filters, side_by_side
from lit_deconv.sinks import sinks_for
from lit_deconv.writer import Failure, Writer

from .pictures import LayerPictures

__all__ = ["Gallery"]

STRONGEST = "the strongest unit of a few channels by several attributions, cut to its field"

_PAGE = 32
"""Channels in one grid; more go to further ones."""


class Gallery:
    """Draws, encodes and writes in the background.

    Args:
        loggers: Of the trainer.
        folder: Where PNG files go when no logger takes images.
        look: How values become pixels.
    """

    def __init__(self, loggers: Sequence[object], folder: Path, look: Look) -> None:
        sinks, self.message = sinks_for(loggers, folder)
        self.look = look
        # all pictures of a validation may wait: of few bytes each, as they are drawn when it is turn
        self._writer = Writer(sinks, most_waiting=256)
        self._drawing = 0.0

    def hang(
        self, pictures: LayerPictures, tag: str, step: int, epoch: int, note: str
    ) -> list[Failure]:
        """Queues the figures of one layer.

        Args:
            pictures: What they take.
            tag: First part of the names in the log.
            step: The step of the scalars of the same moment.
            epoch: Epoch of the weights.
            note: What else the titles must say.

        Returns:
            Failures of earlier writes.
        """
        over, probe = (" ".join(filter(None, [each, note])) for each in pictures.sources)
        heading = Heading(pictures.layer, epoch, over)
        compared = Heading(pictures.layer, epoch, probe)
        strongest = Heading(pictures.layer, epoch, over, STRONGEST)
        name = f"{tag}/{pictures.layer}"
        figures: dict[str, Callable[[], Tensor]] = {}
        pages = range(0, len(pictures.channels), _PAGE)
        for number, first in enumerate(pages, 1):
            page = pictures.channels[first : first + _PAGE]
            figures["grid" if number == 1 else f"grid_{number}"] = partial(
                figure2, page, heading, self.look
            )
        if pictures.evolution:
            figures["evolution"] = partial(figure4, pictures.evolution, heading, self.look)
        if pictures.rows:
            figures["beside_captum"] = partial(side_by_side, pictures.rows, compared, self.look)
        if pictures.strongest_rows:
            figures["strongest_beside_captum"] = partial(
                side_by_side, pictures.strongest_rows, strongest, self.look
            )
        caption = f"{pictures.layer}, epoch {epoch}. {note}"
        failures: list[Failure] = []
        for figure, drawn in figures.items():
            failures += self._writer.image(
                f"{name}/{figure}", partial(self._timed, drawn), step, caption
            )
        if pictures.table:
            failures += self._writer.text(f"{name}/channels", pictures.table, step)
        return failures

    def hang_filters(
        self, layer: str, weight: Tensor, tag: str, step: int, epoch: int, note: str
    ) -> list[Failure]:
        """Queues the filters of the first layer.

        Args:
            layer: Its name.
            weight: [F, C, h, w], not changed afterwards.
            tag: First part of the names in the log.
            step: The step of the scalars of the same moment.
            epoch: Epoch of the weights.
            note: What else the title must say.

        Returns:
            Failures of earlier writes.
        """
        heading = Heading(layer, epoch, note)
        drawn = partial(self._timed, partial(filters, weight, heading, self.look))
        return self._writer.image(
            f"{tag}/{layer}/filters", drawn, step, f"{layer}, epoch {epoch}. {note}"
        )

    @property
    def seconds(self) -> dict[str, float]:
        """What the thread spent on drawing, and on encoding and writing, so far."""
        return {"render": self._drawing, "write": self._writer.seconds - self._drawing}

    def _timed(self, draw: Callable[[], Tensor]) -> Tensor:
        start = time.perf_counter()
        try:
            return draw()
        finally:
            self._drawing += time.perf_counter() - start

    def finish(self) -> list[Failure]:
        """Waits until everything is written.

        Returns:
            Failures of earlier writes.
        """
        return self._writer.drain()

    def close(self) -> list[Failure]:
        """Finishes the last write and ends the thread.

        Returns:
            Failures of earlier writes.
        """
        return self._writer.close()
