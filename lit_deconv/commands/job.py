"""One run of `lit-deconv attribute`: its layers and pictures, and what the figures of all seeds share."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jsonargparse import Namespace
from torch import Tensor
from tqdm import tqdm

from lit_deconv.attr import Deconvnet
from lit_deconv.commands.pictures import Pictures
from lit_deconv.commands.report import Card, panels
from lit_deconv.commands.results import Results
from lit_deconv.commands.seeds import Seed, Shown, channels_of
from lit_deconv.engine.errors import DeconvError
from lit_deconv.engine.local import Layout
from lit_deconv.render import Heading, Look, Panel, Row, side_by_side

ROWS_A_FIGURE = 8
PATIENCE = 2.0
"""Seconds before a progress bar shows."""


class Job:
    """The layers of one run, and what the figures of all seeds share.

    Args:
        options: Those of `lit-deconv attribute`.
        net: The chosen layers.
        device: Where the model is.
        pictures: What it is shown.
        seed: What is projected down.
        methods: Captum's, by class name.
        blank: [1, C, H, W], for sizes.
        note: What every figure says.
    """

    def __init__(
        self,
        options: Namespace,
        net: Deconvnet,
        device: torch.device,
        pictures: Pictures,
        seed: Seed,
        methods: Sequence[str],
        blank: Tensor,
        note: str,
    ) -> None:
        self.options, self.net, self.device, self.pictures = options, net, device, pictures
        self.seed, self.methods, self.note = seed, methods, note
        self.layers = list(net.layers)
        self.finished: list[str] = []
        self.cards: list[Card] = []
        self.look = Look(pictures.view.mean, pictures.view.std)
        self.layouts = net.layouts(blank)
        seed.check(self.layouts)
        self.channels = {
            name: channels_of(options.channels, name, layout)
            for name, layout in self.layouts.items()
        }
        self._about = described(net, self.layouts, blank)

    def beside(self, results: Results, net: Deconvnet, name: str, shown: Shown) -> None:
        """Figures of rows: the picture, ours, Captum's."""
        rows = plain_rows(shown)
        if self.methods:
            from lit_deconv.commands.beside import Beside  # Captum takes a second to import

            size, extra = self.options.batch_size, self.options.compare_args
            rows = Beside(self.methods, net.model, self.device, extra, size).rows(net, name, shown)
        kind = "captum" if self.methods else self.seed.kind
        shows = "" if self.methods else f"the picture and what {name} has of it"
        heading = Heading(name, note=self.note, shows=shows)
        for start in range(0, len(rows), ROWS_A_FIGURE):
            some = rows[start : start + ROWS_A_FIGURE]
            draw = partial(side_by_side, some, heading, self.look)
            results.figure(name, kind, draw, self.note)
        if self.options.report and self.methods:
            values = shown.activations.tolist()
            for row, channel, value in zip(rows, shown.channels, values, strict=True):
                figures = panels(row, self.look)
                self.cards.append(Card(name, channel, value, f"{name}, {row.label}", figures))

    def unit(
        self,
        picture: int,
        channel: int | None,
        position: Sequence[int],
        value: float,
        box: list[int],
    ) -> dict[str, Any]:
        """What the index says of one reconstruction."""
        return {
            "channel": channel,
            "position": list(position) or None,
            "activation": value,
            "box": box,
            "picture": str(self.pictures.paths[picture]),
        }

    def batches(self, size: int) -> Iterator[tuple[list[int], Tensor]]:
        """Numbers of pictures, and the pictures [N, C, H, W], with a progress bar."""
        total = len(self.pictures.paths)
        with progress(total=total, desc="pictures", unit="picture") as bar:
            for numbers, images in self.pictures.batches(size):
                yield numbers, images
                bar.update(len(numbers))

    def finish(self, results: Results, name: str) -> None:
        """All of a layer is there: it goes into the index."""
        results.index["layers"][name] = self._about[name]
        self.finished.append(name)
        results.save()


def described(
    net: Deconvnet, layouts: Mapping[str, Layout], blank: Tensor
) -> dict[str, dict[str, Any]]:
    """What the index says of each layer.

    Args:
        net: The layers.
        layouts: Of them.
        blank: [1, C, H, W].
    """
    explained = net.explain(blank)
    return {
        name: {
            "channels": layout.channels,
            "map": list(layout.map_size),
            "field": list(layout.field.size),
            "path": explained[name].path,
            "captum_faults": list(explained[name].captum_faults),
        }
        for name, layout in layouts.items()
    }


@contextmanager
def fitting(model: str, shape: Sequence[int]) -> Iterator[None]:
    """What a model raises of pictures that it cannot take, said to people.

    Raises:
        ValueError: It cannot take them.
    """
    try:
        yield
    except (RuntimeError, TypeError) as error:
        if isinstance(error, DeconvError):
            raise
        raise ValueError(
            f"{model} cannot take a picture of {list(shape)} ({error}); --size sets its size, and a "
            "model that takes more than images needs a function that wraps it"
        ) from error


def progress(**about: Any) -> Any:
    """A progress bar on stderr, for what takes long, where somebody looks."""
    return tqdm(**about, file=sys.stderr, disable=not sys.stderr.isatty(), delay=PATIENCE)


def plain_rows(shown: Shown) -> list[Row]:
    """Rows of the picture and ours alone."""
    height, width = shown.images.shape[2:]
    rows = []
    for label, image, ours, box in zip(
        shown.labels, shown.images, shown.ours, shown.boxes.tolist(), strict=True
    ):
        outline = None if box == [0, 0, height, width] else box
        says = "outlined: field of the unit" if outline else ""
        panels = [Panel("input", image, says, True, outline), Panel(shown.name, ours, box=outline)]
        rows.append(Row(label, panels))
    return rows
