"""Figures of a layer, a feature map or a unit on every picture."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lit_deconv.attr import Deconvnet
from lit_deconv.commands.job import ROWS_A_FIGURE, Job
from lit_deconv.commands.report import Card, Figure, embedded, pairs
from lit_deconv.commands.results import Results
from lit_deconv.commands.seeds import Shown, inside
from lit_deconv.render import shift_patches


def picture_figures(job: Job, results: Results) -> None:
    """Reconstruct a layer, a map or a unit on every picture, and draw them, batch by batch."""
    nets = {name: Deconvnet(job.net.model, [name]) for name in job.layers}
    seen = 0
    for numbers, images in job.batches(min(job.options.batch_size, ROWS_A_FIGURE)):
        seen += len(numbers)
        on_device = images.to(job.device)
        activations = job.net.activations(on_device)
        found = _reconstructed(job, on_device)
        for name, (patches, boxes) in found.items():
            values = job.seed.reached(activations[name])
            _page(job, results, nets[name], name, numbers, images, values, patches, boxes)
    if not seen:
        raise ValueError("none of the pictures could be read; see the reasons above")
    for name in job.layers:
        job.finish(results, name)


def _reconstructed(job: Job, images: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Reconstructions and boxes by layer, one an image, on the CPU."""
    if job.seed.kind == "unit":
        units = torch.tensor([[sample, *job.seed.at] for sample in range(len(images))])
        cropped = job.net.reconstruct(images, dict.fromkeys(job.layers, units), crop=True)
        return {name: (patches.cpu(), boxes.cpu()) for name, (patches, boxes) in cropped.items()}
    whole = torch.tensor([[0, 0, *images.shape[2:]]]).expand(len(images), 4)
    found = job.net.attribute(images, job.seed.at[0] if job.seed.at else None)
    return {name: (full.cpu(), whole) for name, full in found.items()}


def _page(
    job: Job,
    results: Results,
    net: Deconvnet,
    name: str,
    numbers: Sequence[int],
    images: Tensor,
    values: Tensor,
    patches: Tensor,
    boxes: Tensor,
) -> None:
    channel = job.seed.at[0] if job.seed.at else None
    position = list(job.seed.at[1:])
    units = [
        job.unit(number, channel, position, value, box)
        for number, value, box in zip(numbers, values.tolist(), boxes.tolist(), strict=True)
    ]
    kind = job.seed.kind
    results.raw(name, kind, {"reconstructions": patches, "boxes": boxes}, units)
    whole = boxes.new_tensor([[0, 0, *images.shape[2:]]]).expand(len(boxes), 4)
    says = "activation" if kind == "unit" else "largest activation"
    shown = Shown(
        [f"{unit['picture']}: {says} {unit['activation']:.3g}" for unit in units],
        images,
        shift_patches(patches, boxes, whole),
        inside(boxes, *images.shape[2:]),
        values,
        [channel] * len(units),
        job.seed.column,
        torch.tensor([job.seed.at] * len(units)) if kind == "unit" else None,
        job.seed.select,
    )
    job.beside(results, net, name, shown)
    if job.options.report:
        for row, unit in enumerate(units):
            where = ", ".join(map(str, job.seed.at))
            title = f"{name}, {kind}{' ' + where if where else ''}"
            source = embedded(pairs(images[row : row + 1], shown.ours[row : row + 1], job.look))
            figure = Figure(source, f"{title}: reconstruction, then the picture")
            lines = [f"{says} {unit['activation']:.4g}", unit["picture"]]
            job.cards.append(Card(name, channel, unit["activation"], title, [figure], lines))
