"""The errors of A, B and C on small images: seconds, for continuous integration. Times nothing.

    python -m benchmarks.small [--device cuda]

Fails if an error with the same switches exceeds 1e-5.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

from benchmarks import figure2, maps
from benchmarks._cases import CASES, build, cut_off, images_of, strongest_units, without_in_place
from benchmarks._measure import Table, parsed, parser

LARGEST = 1e-5
# The smallest side at which each model's late layer has a map.
_SIDES = {"alexnet": 96, "zfnet": 96, "cifar": 32, "resnet18": 64, "vgg16": 48}


def main(arguments: Sequence[str] | None = None) -> int:
    device = parsed(parser(__doc__), arguments).device
    torch.manual_seed(0)
    table = Table("model:", "layer:", "units by images", "units by patches", "maps", "whole layer")
    worst = 0.0
    for case in CASES:
        front = without_in_place(cut_off(build(case.model), case.layer)).to(device)
        images = images_of(_SIDES[case.model], 2).to(device)
        units = strongest_units(front, case.layer, images, count=4, channels=2)
        channels = units[:, 1].unique().tolist()
        errors = [
            figure2.error(front, case.layer, images, units, "images"),
            figure2.error(front, case.layer, images, units, "patches"),
            maps.map_error(front, case.layer, images, channels),
            maps.layer_error(front, case.layer, images),
        ]
        table.row(case.model, case.layer, *(f"{error:.0e}" for error in errors))
        # A comparison, so that NaN counts as too large.
        worst = max(worst, *(error if error <= LARGEST else float("inf") for error in errors))
    print(table)
    print(f"\nlargest allowed: {LARGEST:.0e}")
    return 0 if worst <= LARGEST else 1


if __name__ == "__main__":
    sys.exit(main())
