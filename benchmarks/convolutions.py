"""G, forms of one transposed convolution at stride 1: PyTorch's kernel against Winograd's tiles.

    python -m benchmarks.convolutions [--quick] [--threads N] [--only "512 to 512"]

Each on maps one after the other, as PyTorch lays them, and in ``channels_last``, in which tiles leave
them. What the engine takes comes of a count whose constants were read off such a table; on another
kind of CPU this shows whether they hold.

To few channels, and with few filters, there is one form each.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F

from benchmarks._errors import relative_error
from benchmarks._measure import Table, interleaved, number, parsed, parser
from lit_deconv.engine.rules.convolution import _by_flipped_filters, _by_products
from lit_deconv.engine.rules.shared_work import shared_work
from lit_deconv.engine.rules.tiles import by_tiles, tiles_pay

# Channels in and out, extent of the map, seeds; the whole or what lies in the map.
SHAPES = tuple(
    (channels, found, extent, seeds, whole)
    for channels, found, rest in (
        (64, 64, ((28, 32, False), (56, 6, False))),
        (96, 48, ((5, 100, True), (16, 32, False))),
        (128, 96, ((3, 100, True), (8, 32, False))),
        (128, 128, ((8, 32, False), (28, 6, False), (112, 2, False))),
        (256, 256, ((3, 100, True), (7, 32, True), (14, 6, False), (56, 2, False))),
        (384, 192, ((5, 100, True), (13, 8, False))),
        (512, 512, ((5, 32, True), (7, 6, False), (14, 6, False), (14, 32, False), (28, 2, False))),
    )
    for extent, seeds, whole in rest
)

# Channels in and out, extent of the kernel and of the map, seeds.
SHAPES_TO_FEW = (
    (48, 3, 5, 9, 64), (48, 3, 5, 21, 14), (48, 3, 5, 32, 32), (64, 3, 3, 12, 100), (64, 3, 3, 40, 8),
    (64, 3, 3, 224, 8), (32, 1, 3, 28, 32), (64, 12, 4, 28, 32), (64, 12, 4, 112, 8), (96, 48, 3, 11, 45),
    (64, 64, 3, 40, 8),
)  # fmt: skip


def measure(shapes: Sequence[tuple[int, int, int, int, bool]], repetitions: int) -> str:
    """The table."""
    table = Table(
        "channels:", "map", "pixels:", "seeds", "PyTorch's, ms", "in channels_last", "tiles",
        "in channels_last", "taken:", "error",
    )  # fmt: skip
    for channels, found, extent, seeds, whole in shapes:
        torch.manual_seed(0)
        values = torch.randn(seeds, channels, extent, extent).clamp(min=0)
        weight = torch.randn(channels, found, 3, 3)
        side = 0 if whole else 1
        here = [(side, extent + 2 - side)] * 2
        last = values.contiguous(memory_format=torch.channels_last)
        sides = {
            "usual": partial(F.conv_transpose2d, values, weight, padding=side),
            "usual last": partial(F.conv_transpose2d, last, weight, padding=side),
            "tiles": partial(by_tiles, values, weight, here),
            "tiles last": partial(by_tiles, last, weight, here),
        }
        with torch.no_grad(), shared_work():
            taken = tiles_pay(values, weight, here)
            times = interleaved(sides, repetitions)
            exact = F.conv_transpose2d(values.double(), weight.double(), padding=side)
            errors = [relative_error(run(), exact).max() for run in sides.values()]
        usual = times.pop("usual").seconds
        table.row(
            f"{channels} to {found}", f"{extent} x {extent}", "all" if whole else "of the map", seeds,
            number(1e3 * usual), *(number(usual / time.seconds) for time in times.values()),
            "tiles" if taken else "PyTorch's", f"{float(max(errors)):.0e}",
        )  # fmt: skip
    return (
        f"{table}\n\n3x3 filters; times as fast as PyTorch's kernel for the same, medians of up to "
        f"{repetitions} interleaved repetitions; filters are transformed once. The error is the largest of "
        f"all forms, PyTorch's with them, against float64."
    )


def measure_to_few(shapes: Sequence[tuple[int, int, int, int, int]], repetitions: int) -> str:
    """The table of those to few channels, or with few filters."""
    table = Table(
        "channels:", "kernel", "map", "seeds", "PyTorch's, ms", "products", "filters turned round", "error",
    )  # fmt: skip
    for channels, found, kernel, extent, seeds in shapes:
        torch.manual_seed(0)
        values = torch.randn(seeds, channels, extent, extent).clamp(min=0)
        weight = torch.randn(channels, found, kernel, kernel)
        whole = [(0, extent + kernel - 1)] * 2
        sides = {
            "usual": partial(F.conv_transpose2d, values, weight),
            "products": partial(_by_products, values, weight, whole),
            "turned": partial(_by_flipped_filters, values, weight, whole),
        }
        with torch.no_grad(), shared_work():
            times = interleaved(sides, repetitions)
            exact = F.conv_transpose2d(values.double(), weight.double())
            errors = [relative_error(run(), exact).max() for run in sides.values()]
        usual = times["usual"].seconds
        table.row(
            f"{channels} to {found}", f"{kernel} x {kernel}", f"{extent} x {extent}", seeds,
            number(1e3 * usual), number(usual / times["products"].seconds),
            number(usual / times["turned"].seconds), f"{float(max(errors)):.0e}",
        )  # fmt: skip
    return f"{table}\n\nTimes as fast as PyTorch's transposed convolution, medians as above."


def main(arguments: Sequence[str] | None = None) -> int:
    described = parser(__doc__)
    asked = parsed(described, arguments)
    if asked.device != "cpu":
        described.error("the forms are for CPUs")
    shapes = [shape for shape in SHAPES if asked.only in f"{shape[0]} to {shape[1]}"]
    print(measure(shapes[:: 4 if asked.quick else 1], asked.repetitions))
    few = [shape for shape in SHAPES_TO_FEW if asked.only in f"{shape[0]} to {shape[1]}"]
    print(f"\n{measure_to_few(few[:: 4 if asked.quick else 1], asked.repetitions)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
