"""D, how the time grows: with the number of units, the size of the images, the depth of the layer.

    python -m benchmarks.scaling [--quick] [--threads N] [--device cuda]

Ours is one warm call, ``reconstruct(images, units, crop=True)``, forward included.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks._cases import CASES, build, cut_off, images_of
from benchmarks._measure import Run, Table, exponent, interleaved, number, parsed, parser
from benchmarks._rival import Rival
from lit_deconv import Deconvnet

COUNTS = (1, 3, 10, 30, 100, 300, 1000, 3000, 10_000)
SIZES = (64, 128, 256, 512)
DEPTHS = (1, 2, 4, 8, 16, 32)


def units_over(images: Tensor, net: Deconvnet, count: int) -> Tensor:
    """Any number of random units of a layer, int64 [U, 4]."""
    shape = net.activations(images[:1]).shape
    generator = torch.Generator().manual_seed(2)
    sizes = (len(images), *shape[1:])
    return torch.stack([torch.randint(size, (count,), generator=generator) for size in sizes], 1)


def by_units(counts: Sequence[int], repetitions: int, device: str) -> str:
    """Milliseconds by number of units, beside one plain forward up to the layer."""
    table = Table(
        "model:", "layer:", "forward", *(f"{count:,}" for count in counts), "exponent from 100",
        "1 unit / forward", "Captum, exponent",
    )  # fmt: skip
    for case in CASES:
        if case.model not in ("alexnet", "cifar"):
            continue
        model, images = build(case.model).to(device), images_of(case.size).to(device)
        net, front = Deconvnet(model, case.layer), cut_off(model, case.layer)
        most = units_over(images, net, max(counts)).to(device)
        rival = Rival(model, case.layer)
        sides: dict[str, Run] = {
            f"{count}": partial(net.reconstruct, images, most[:count], crop=True)
            for count in counts
        }
        sides["forward"] = partial(_forward, front, images)
        few = [1, 4, 16]
        for count in few:
            sides[f"captum {count}"] = partial(rival.in_batches, images, most[:count], 8)
        times = {
            name: time.seconds for name, time in interleaved(sides, repetitions, device).items()
        }
        many = [count for count in counts if count >= 100]
        table.row(
            case.model, case.layer, number(1e3 * times["forward"]),
            *(number(1e3 * times[f"{count}"]) for count in counts),
            number(exponent(many, [times[f"{count}"] for count in many])),
            number(times["1"] / times["forward"]),
            number(exponent(few, [times[f"captum {count}"] for count in few])),
        )  # fmt: skip
    return (
        f'{table}\n\nMilliseconds, units at random over 32 images; "forward" is a plain forward of '
        f"these up to the layer."
    )


def by_image(sizes: Sequence[int], repetitions: int, device: str) -> str:
    """Milliseconds for a hundred units over 8 images by height and width of these, Captum for one."""
    table = Table(
        "vgg16 layer:", "side:", *map(str, sizes), "exponent", "1 pixel more of the side costs"
    )
    # Its head takes any size, for the adaptive pool in front of it.
    model = build("vgg16").to(device)
    for layer in ("features.3", "features.8", "features.15"):
        net, rival = Deconvnet(model, layer), Rival(model, layer)
        sides: dict[str, Run] = {}
        for size in sizes:
            images = images_of(size, 8).to(device)
            units = units_over(images, net, 100).to(device)
            sides[f"ours {size}"] = partial(net.reconstruct, images, units, crop=True)
            sides[f"Captum {size}"] = partial(rival.in_batches, images, units[:1], 1)
        times = {
            name: time.seconds for name, time in interleaved(sides, repetitions, device).items()
        }
        for side in ("ours", "Captum"):
            seconds = [times[f"{side} {size}"] for size in sizes]
            grows = (seconds[-1] / seconds[0] - 1) / (sizes[-1] - sizes[0])
            table.row(
                layer, f"{side}, {100 if side == 'ours' else 1} units",
                *(number(1e3 * s) for s in seconds), number(exponent(sizes, seconds)), f"{grows:.2%}",
            )  # fmt: skip
    return f"{table}\n\nMilliseconds, 8 images, units at random."


def by_depth(depths: Sequence[int], repetitions: int, device: str) -> str:
    """Milliseconds for 100 units in a chain of 3x3 convolutions and ReLUs, by the unit's depth."""
    table = Table("side:", *map(str, depths), "exponent")
    model = chain(max(depths)).to(device)
    images = images_of(64, 8).to(device)
    sides: dict[str, Run] = {}
    for depth in depths:
        layer = str(2 * depth - 1)
        net, rival = Deconvnet(model, layer), Rival(cut_off(model, layer), layer)
        units = units_over(images, net, 100).to(device)
        sides[f"ours {depth}"] = partial(net.reconstruct, images, units, crop=True)
        sides[f"Captum {depth}"] = partial(rival.in_batches, images, units[:8], 8)
    times = {name: time.seconds for name, time in interleaved(sides, repetitions, device).items()}
    for side, scale in (("ours", 1.0), ("Captum", 100 / 8)):
        seconds = [scale * times[f"{side} {depth}"] for depth in depths]
        table.row(side, *(number(1e3 * s) for s in seconds), number(exponent(depths, seconds)))
    return (
        f"{table}\n\nMilliseconds, 100 units at random over 8 images of 64 x 64, 32 channels, the "
        f"receptive field 2 * depth + 1; Captum on the model cut off behind the layer, 8 units scaled "
        f"to 100."
    )


def chain(depth: int, channels: int = 32) -> nn.Sequential:
    """3x3 convolutions, each with a ReLU."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for index in range(depth):
        layers += [nn.Conv2d(channels if index else 3, channels, 3, padding=1), nn.ReLU()]
        nn.init.kaiming_normal_(layers[-2].weight)  # type: ignore[arg-type]
    return nn.Sequential(*layers).eval().requires_grad_(False)


def _forward(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return model(images)


def main(arguments: Sequence[str] | None = None) -> int:
    asked = parsed(parser(__doc__), arguments)
    repetitions = min(asked.repetitions, 3)
    counts = COUNTS[:7:2] if asked.quick else COUNTS
    print("### By number of units\n")
    print(by_units(counts, repetitions, asked.device))
    print("\n### By size of the images\n")
    print(by_image(SIZES[:2] if asked.quick else SIZES, repetitions, asked.device))
    print("\n### By depth\n")
    print(by_depth(DEPTHS[:4] if asked.quick else DEPTHS, repetitions, asked.device))
    return 0


if __name__ == "__main__":
    sys.exit(main())
