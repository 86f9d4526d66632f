"""A, the work of figure 2: the top 9 units of 64 channels over 32 images, against Captum.

    python -m benchmarks.figure2 [--quick] [--threads N] [--device cuda [--tf32]] [--only vgg16]

Ours is one warm call, ``reconstruct(images, units, crop=True)``, forward included. Captum's side is
the better of one call a unit and one call a batch of units, timed on some of the units and scaled
to all; once on the model as it is, once on the model cut off behind the layer.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from benchmarks._cases import CASES, Case, build, cut_off, images_of, strongest_units
from benchmarks._errors import (
    SameSwitches,
    contrast_passed_on,
    in_the_image,
    relative_error,
)
from benchmarks._measure import Table, fewer, geometric_mean, interleaved, number, parsed, parser
from benchmarks._rival import Rival
from lit_deconv import Deconvnet

# Units that Captum is timed on, and of vgg16, where each takes half a second on a CPU. By device.
TIMED = {"cpu": (32, 8), "cuda": (576, 576)}
BATCHES = {"cpu": (8, 16, 32), "cuda": (8, 32, 96, 192, 576)}


def error(
    model: nn.Module,
    layer: str,
    images: Tensor,
    units: Tensor,
    via: Literal["auto", "images", "patches"],
) -> float:
    """Largest relative error of a unit against its activation times Captum, with the same switches."""
    comparable = contrast_passed_on(cut_off(model, layer))
    with SameSwitches(model, comparable):
        net = Deconvnet(model, layer)
        patches, boxes = net.reconstruct(images, units, crop=True, via=via)
        activation = net.activations(images)[units.unbind(1)]
        captum = Rival(comparable, layer).in_batches(images, units, 8)
    ours = in_the_image(patches, boxes, images.shape[2:])
    return float(relative_error(ours, activation.view(-1, 1, 1, 1) * captum).max())


def _error(model: nn.Module, layer: str, images: Tensor, units: Tensor) -> float:
    """The larger error of both ways, by whole images and by patches, on the units' images alone."""
    samples, row = units[:, 0].unique(return_inverse=True)
    here = torch.cat([row[:, None], units[:, 1:]], 1)
    return max(error(model, layer, images[samples], here, via) for via in ("images", "patches"))


def measure(cases: Sequence[Case], repetitions: int, subset: int | None, device: str) -> str:
    """The table and its means."""
    usual, longest = (subset, subset) if subset else TIMED[device]
    table = Table(
        "model:", "layer:", "units", "ours, ms", "spread", "ms a unit", "first call, ms",
        "Captum, s", "batch", "cut off, s", "batch", "ratio", "by CPU time", "cut off", "by CPU time",
        "error",
    )  # fmt: skip
    ratios: dict[str, list[float]] = {"whole": [], "whole cpu": [], "cut": [], "cut cpu": []}
    for case in cases:
        model, images = build(case.model).to(device), images_of(case.size).to(device)
        units = strongest_units(model, case.layer, images)
        # Captum's time is linear in units: every batch costs the same.
        count = longest if case.model == "vgg16" else usual
        some = units[:: len(units) // count][:count]
        checked = some[:: max(1, len(some) // 8)]
        net = Deconvnet(model, case.layer)
        started = time.perf_counter()
        net.reconstruct(images, units, crop=True)[0].flatten()[0].item()
        first = time.perf_counter() - started
        sizes = [size for size in BATCHES[device] if size <= count]
        whole = Rival(model, case.layer).best_for_units(images, some, sizes)
        cut = Rival(cut_off(model, case.layer), case.layer).best_for_units(images, some, sizes)
        times = interleaved(
            {
                "ours": partial(net.reconstruct, images, units, crop=True),
                "whole": whole.run,
                "cut": cut.run,
            },
            repetitions,
            device,
        )
        scale = len(units) / len(some)
        ours = times["ours"]
        row = {
            side + kind: scale * getattr(times[side], of) / getattr(ours, of)
            for side in ("whole", "cut")
            for kind, of in (("", "seconds"), (" cpu", "cpu_seconds"))
        }
        for name, ratio in row.items():
            ratios[name].append(ratio)
        table.row(
            case.model, case.layer, len(units), number(1e3 * ours.seconds), ours.spread,
            number(1e3 * ours.seconds / len(units)), number(1e3 * first),
            number(scale * times["whole"].seconds), whole.name,
            number(scale * times["cut"].seconds), cut.name,
            *(number(ratio) for ratio in row.values()),
            f"{_error(model, case.layer, images, checked):.0e}",
        )  # fmt: skip
    means = {name: number(geometric_mean(found)) for name, found in ratios.items()}
    return (
        f"{table}\n\nGeometric mean over {len(cases)} rows: {means['whole']} against Captum "
        f"({means['whole cpu']} by CPU time), {means['cut']} against Captum on the model cut off "
        f"behind the layer ({means['cut cpu']} by CPU time). Captum was timed on {usual} of the units "
        f'({longest} of vgg16) and scaled to all; "batch" is the number of units a call that '
        f"was fastest. Up to {repetitions} interleaved repetitions ({fewer()}), medians; spread is slowest "
        f"minus fastest over the median."
    )


def main(arguments: Sequence[str] | None = None) -> int:
    described = parser(__doc__)
    described.add_argument("--subset", type=int, help="units that Captum is timed on")
    asked = parsed(described, arguments)
    cases = [case for case in CASES if asked.only in str(case)]
    if asked.quick and not asked.only:
        cases = [case for case in cases if case.model in ("alexnet", "cifar")]
    print(measure(cases, asked.repetitions, asked.subset, asked.device))
    return 0


if __name__ == "__main__":
    torch.manual_seed(0)
    sys.exit(main())
