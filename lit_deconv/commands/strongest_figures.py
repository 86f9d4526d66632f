"""Figures of the strongest units of each channel, figure 2 of the paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lit_deconv.attr import Deconvnet
from lit_deconv.commands.job import Job, progress
from lit_deconv.commands.report import Card, Figure, embedded, pairs
from lit_deconv.commands.results import Results
from lit_deconv.commands.seeds import UNIT, Shown, inside
from lit_deconv.commands.strongest import Page, collect, pages
from lit_deconv.render import Heading, Look, Strongest, channel_grid, figure2, shift_patches


def strongest_figures(job: Job, results: Results) -> None:
    """Find the strongest units of each channel, then reconstruct and draw them, layer by layer."""
    batches = job.batches(job.options.batch_size)
    k = job.options.top_k
    top = collect(job.net, job.layouts, batches, job.channels, k, job.device)
    total = sum(map(len, job.channels.values()))
    with progress(total=total, desc="reconstructing", unit="channel") as bar:
        for name, layer in top.items():
            net = Deconvnet(job.net.model, [name])
            for page in pages(net, name, layer, job.pictures, job.device):
                _page(job, results, net, name, page)
                bar.update(len(page.fires))
            job.finish(results, name)


def _page(job: Job, results: Results, net: Deconvnet, name: str, page: Page) -> None:
    units = unit_rows(page, job.pictures.paths)
    arrays = {"reconstructions": page.reconstructions, "boxes": page.boxes, "units": page.units}
    results.raw(name, "strongest", arrays, units)
    strongest = page.strongest()
    draw = figure2 if job.options.top_k > 1 else channel_grid
    heading = Heading(name, note=job.note)
    results.figure(name, "strongest", lambda: draw(strongest, heading, job.look), job.note)
    if job.options.report:
        job.cards += [channel_card(name, each, units, job.look) for each in strongest]
    if job.methods and len(page.units):
        job.beside(results, net, name, _firsts(job, page))


def unit_rows(page: Page, names: Sequence[object]) -> list[dict[str, Any]]:
    """What the index says of each unit of a page.

    Args:
        page: The units.
        names: Of the pictures, by number.
    """
    return [
        {
            "channel": channel,
            "position": position,
            "activation": activation,
            "box": box,
            "picture": str(names[picture]),
            "fires": page.fires[channel],
            "verified": not doubtful,
        }
        for (picture, channel, *position), activation, box, doubtful in zip(
            page.units.tolist(),
            page.activations.tolist(),
            page.boxes.tolist(),
            page.doubtful.tolist(),
            strict=True,
        )
    ]


def channel_card(
    layer: str, shown: Strongest, units: Sequence[Mapping[str, Any]], look: Look
) -> Card:
    """What the report shows of one channel.

    Args:
        layer: Name of the layer.
        shown: The channel's strongest units.
        units: From `unit_rows`, of the page that it is on.
        look: How values become pixels.
    """
    largest = shown.activations[0] if len(shown.activations) else None
    says = "no unit" if largest is None else f"largest activation {largest:.4g}"
    if shown.fires is not None:
        says += f", fires on {shown.fires:.0%} of the pictures"
    of = [unit["picture"] for unit in units if unit["channel"] == shown.channel]
    source = embedded(pairs(shown.patches, shown.reconstructions, look))
    title = f"{layer}, channel {shown.channel}"
    alt = f"{title}: reconstructions, then the image patches under them"
    lines = [says, shown.note]
    return Card(layer, shown.channel, largest, title, [Figure(source, alt)], lines, of)


def _firsts(job: Job, page: Page) -> Shown:
    """The strongest unit of each channel, for the comparison."""
    of_channel = page.units[:, 1]
    first = [int((of_channel == c).nonzero()[0, 0]) for c in page.fires if c in of_channel]
    units, images = page.units[first], page.images[first]
    whole = torch.tensor([[0, 0, *images.shape[2:]]]).expand(len(units), 4)
    return Shown(
        [
            f"channel {c} at row {y}, column {x}, activation {activation:.3g}: "
            f"{job.pictures.paths[picture].name}"
            for (picture, c, y, x), activation in zip(
                units.tolist(), page.activations[first].tolist(), strict=True
            )
        ],
        images,
        shift_patches(page.reconstructions[first], page.boxes[first], whole),
        inside(page.boxes[first], *images.shape[2:]),
        page.activations[first],
        units[:, 1].tolist(),
        UNIT,
        units[:, 1:],
    )
