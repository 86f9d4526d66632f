"""B and C, feature maps and whole layers with their own activations, against Captum.

    python -m benchmarks.maps [--quick] [--threads N] [--device cuda] [--only vgg16] [--tables C]

B: 64 feature maps, each over 8 images; ours is one call of ``maps``, whose forward all of them
share, Captum's a call a map, timed on a few of the maps. C: the whole layer, 32 images, one call of
``attribute``. The rival is Captum's NeuronDeconvolution with the callable whose gradient is the
activation itself, half the sum of squares; in C with the number of images a call whose median is the
fastest. ReLUs run out of place on both sides, or the callable would read what the next ReLU left of a layer.
Errors are taken against a Captum to whom contrast normalisation passes the signal on, as it does in
the paper and here.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks._cases import CASES, Case, build, cut_off, images_of, without_in_place
from benchmarks._errors import SameSwitches, contrast_passed_on, relative_error
from benchmarks._measure import Table, fewer, geometric_mean, interleaved, number, parsed, parser
from benchmarks._rival import Rival
from lit_deconv import Deconvnet

MAPS = 64

# Seconds that the repetitions of a row of C may take: its ratios are the smallest of all.
_LAYER_BUDGET = 100.0
# And those that each of them lasts at least.
_LAYER_SECONDS = {"cpu": 1.0, "cuda": 0.3}


def map_error(model: nn.Module, layer: str, images: Tensor, channels: Sequence[int]) -> float:
    """Largest relative error of a feature map in an image, with the same switches."""
    comparable = contrast_passed_on(cut_off(model, layer))
    with SameSwitches(model, comparable):
        ours = _maps(Deconvnet(model, layer), images, channels)
        captum = _captum_maps(Rival(comparable, layer), images, channels)
    return float(relative_error(ours, captum).max())


def layer_error(model: nn.Module, layer: str, images: Tensor) -> float:
    """The same of a whole layer."""
    comparable = contrast_passed_on(cut_off(model, layer))
    with SameSwitches(model, comparable):
        ours = Deconvnet(model, layer).attribute(images)
        captum = Rival(comparable, layer).layer(images, len(images))
    return float(relative_error(ours, captum).max())


def feature_maps(cases: Sequence[Case], repetitions: int, timed: int, device: str) -> str:
    """Table B."""
    table = Table(
        "model:", "layer:", "ours, s", "spread", "Captum, s", "ratio", "by CPU time", "error"
    )
    ratios, cpu_ratios = [], []
    for case in cases:
        model, images = _prepared(case, device, 8)
        net, rival = Deconvnet(model, case.layer), Rival(model, case.layer)
        activation = net.activations(images)
        live = (activation.amax((2, 3)) > 0).all(0).nonzero().flatten().tolist()
        channels = live[:: max(1, len(live) // MAPS)][:MAPS]
        times = interleaved(
            {
                "ours": partial(_maps, net, images, channels),
                "captum": partial(_captum_maps, rival, images, channels[:timed]),
            },
            repetitions,
            device,
        )
        scale = len(channels) / timed
        ratio = scale * times["captum"].seconds / times["ours"].seconds
        cpu_ratio = scale * times["captum"].cpu_seconds / times["ours"].cpu_seconds
        ratios.append(ratio)
        cpu_ratios.append(cpu_ratio)
        table.row(
            case.model, case.layer, number(times["ours"].seconds),
            times['ours'].spread, number(scale * times["captum"].seconds),
            number(ratio), number(cpu_ratio),
            f"{map_error(model, case.layer, images[:2], channels[:4]):.0e}",
        )  # fmt: skip
    return (
        f"{table}\n\nGeometric mean {number(geometric_mean(ratios))} "
        f"({number(geometric_mean(cpu_ratios))} by CPU time), smallest {number(min(ratios))} "
        f"({number(min(cpu_ratios))}). {MAPS} maps over 8 images (the first layer of the CIFAR net has "
        f"48); Captum was timed on {timed} of the maps and scaled; up to {repetitions} interleaved "
        f"repetitions ({fewer()}), medians."
    )


def whole_layers(cases: Sequence[Case], repetitions: int, count: int, device: str) -> str:
    """Table C."""
    table = Table(
        "model:", "layer:", "ours, s", "spread", "Captum, s", "images a call", "ratio",
        "by CPU time", "error",
    )  # fmt: skip
    ratios, cpu_ratios = [], []
    for case in cases:
        model, images = _prepared(case, device, count)
        net = Deconvnet(model, case.layer)
        rival = Rival(model, case.layer)
        forms = {str(n): partial(rival.layer, images, n) for n in sorted({2, 8, count})}
        times = interleaved(
            {"ours": partial(net.attribute, images), **forms},
            repetitions,
            device,
            at_least=_LAYER_SECONDS[device],
            budget=_LAYER_BUDGET,
        )
        ours = times.pop("ours")
        form, captum = min(times.items(), key=lambda side: side[1].seconds)
        ratio = captum.seconds / ours.seconds
        cpu_ratio = min(side.cpu_seconds for side in times.values()) / ours.cpu_seconds
        ratios.append(ratio)
        cpu_ratios.append(cpu_ratio)
        table.row(
            case.model, case.layer, number(ours.seconds), ours.spread,
            number(captum.seconds), form, number(ratio), number(cpu_ratio),
            f"{layer_error(model, case.layer, images[:4]):.0e}",
        )  # fmt: skip
    return (
        f"{table}\n\nGeometric mean {number(geometric_mean(ratios))} "
        f"({number(geometric_mean(cpu_ratios))} by CPU time), smallest {number(min(ratios))} "
        f"({number(min(cpu_ratios))}). {count} images, up to {repetitions} "
        f"interleaved repetitions ({fewer(_LAYER_BUDGET)}), medians."
    )


def _maps(net: Deconvnet, images: Tensor, channels: Sequence[int]) -> Tensor:
    """Our way to several feature maps, [maps * N, C, H, W]."""
    return net.maps(images, channels).flatten(0, 1)


def _captum_maps(rival: Rival, images: Tensor, channels: Sequence[int]) -> Tensor:
    """Captum's."""
    return torch.cat([rival.map(images, channel) for channel in channels])


def _prepared(case: Case, device: str, count: int) -> tuple[nn.Module, Tensor]:
    model = without_in_place(build(case.model)).to(device)
    return model, images_of(case.size, count).to(device)


def main(arguments: Sequence[str] | None = None) -> int:
    described = parser(__doc__)
    described.add_argument("--tables", default="BC", choices=("B", "C", "BC"))
    asked = parsed(described, arguments)
    cases = [case for case in CASES if asked.only in str(case)]
    if asked.quick and not asked.only:
        cases = [case for case in cases if case.model in ("alexnet", "cifar")]
    if "B" in asked.tables:
        print("### B, feature maps\n")
        print(feature_maps(cases, asked.repetitions, 2 if asked.quick else 4, asked.device))
    if "C" in asked.tables:
        print("\n### C, whole layers\n")
        print(whole_layers(cases, asked.repetitions, 8 if asked.quick else 32, asked.device))
    return 0


if __name__ == "__main__":
    sys.exit(main())
