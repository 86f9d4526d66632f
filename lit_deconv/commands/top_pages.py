"""The pages of `lit-deconv top`: reconstructed and drawn one by one, by any process, then put together."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from lit_deconv.attr import Deconvnet
from lit_deconv.commands.report import Card, Figure
from lit_deconv.commands.results import LOG, folder_of
from lit_deconv.commands.strongest import Page, Reader, page, page_count
from lit_deconv.commands.strongest_figures import channel_card, unit_rows
from lit_deconv.render import Heading, Look, channel_grid, figure2
from lit_deconv.sinks import Picture, TensorBoardSink, encode_png
from lit_deconv.top import LayerTop


@dataclass(frozen=True)
class Place:
    """A page: some channels of a layer.

    Args:
        layer: Name of the layer.
        number: From 0.
    """

    layer: str
    number: int

    @property
    def tag(self) -> str:
        """Its files' name without the ending, in the output folder."""
        return f"{folder_of(self.layer)}/strongest-{self.number + 1:03d}"


def places(channels: Mapping[str, Sequence[int]]) -> list[Place]:
    """All pages, in order."""
    return [
        Place(layer, number)
        for layer, chosen in channels.items()
        for number in range(page_count(len(chosen)))
    ]


@dataclass(frozen=True)
class Pages:
    """Where pages go, and what they have in common.

    Args:
        folder: The output folder.
        finished: Folder with what is known of each finished page.
        names: Of the images, by number.
        look: How values become pixels.
        note: What every figure says.
        raw: float32, float16 or none.
        k: Units a channel.
        report: Whether there will be one.
    """

    folder: Path
    finished: Path
    names: Sequence[str]
    look: Look
    note: str
    raw: str
    k: int
    report: bool

    def is_finished(self, place: Place) -> bool:
        """Whether an earlier run drew it."""
        return self._mark(place).is_file()

    def draw(
        self, place: Place, net: Deconvnet, top: LayerTop, read: Reader, device: torch.device
    ) -> None:
        """Reconstruct a page and write it.

        Args:
            place: Which.
            net: Its layer.
            top: Its layer's strongest units.
            read: Reads the images that have them.
            device: Where the model is.
        """
        start = time.perf_counter()
        found = page(net, place.layer, top, place.number, read, device)
        units = unit_rows(found, self.names)
        (self.folder / place.tag).parent.mkdir(parents=True, exist_ok=True)
        self._write_raw(place, found, units)
        strongest = found.strongest()
        draw = figure2 if self.k > 1 else channel_grid
        figure = draw(strongest, Heading(place.layer, note=self.note), self.look)
        (self.folder / f"{place.tag}.png").write_bytes(encode_png(figure))
        cards = []
        if self.report:
            cards = [asdict(channel_card(place.layer, s, units, self.look)) for s in strongest]
        about = {
            "units": len(units),
            "doubtful": int(found.doubtful.sum()),
            "cards": cards,
            "seconds": time.perf_counter() - start,
        }
        mark = self._mark(place)
        beside = mark.with_suffix(".part")
        beside.write_text(json.dumps(about), encoding="utf-8")
        beside.replace(mark)

    def _write_raw(self, place: Place, found: Page, units: list[dict[str, Any]]) -> None:
        if self.raw != "none":
            values = found.reconstructions.to(getattr(torch, self.raw)).numpy()
            with (self.folder / f"{place.tag}.npz").open("wb") as stream:
                np.savez(
                    stream,
                    reconstructions=values,
                    boxes=found.boxes.numpy(),
                    units=found.units.numpy(),
                )
            file = f"{place.tag}.npz"
            units = [{**unit, "file": file, "row": row} for row, unit in enumerate(units)]
        path = self.folder / f"{place.tag}.json"
        path.write_text(json.dumps(units, indent=1), encoding="utf-8")

    def about(self, place: Place) -> dict[str, Any]:
        """How many units a finished page has, and how many of them are doubtful."""
        found: dict[str, Any] = json.loads(self._mark(place).read_text(encoding="utf-8"))
        return {key: found[key] for key in ("units", "doubtful")}

    def cards(self, place: Place) -> list[Card]:
        """What the report shows of a finished page."""
        found = json.loads(self._mark(place).read_text(encoding="utf-8"))["cards"]
        return [Card(**{**c, "figures": [Figure(**f) for f in c["figures"]]}) for c in found]

    def log(self, all_places: Sequence[Place]) -> None:
        """Write the TensorBoard log of all pages, from their files."""
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(self.folder / LOG))
        sink = TensorBoardSink(writer)
        for place in all_places:
            path = self.folder / f"{place.tag}.png"
            with Image.open(path) as picture:
                width, height = picture.size
            sink.image(Picture(place.tag, path.read_bytes(), height, width, 0, self.note))
        writer.close()

    def _mark(self, place: Place) -> Path:
        return self.finished / f"{folder_of(place.layer)}-{place.number}.json"
