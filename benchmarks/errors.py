"""Errors of the engine, a table: ``python benchmarks/errors.py``.

Per model and layer, the largest relative error over the whole-layer reconstruction and eight units:
in float32 by rules against the float64 autograd walk with the same switches, and by rules against
autograd in one precision. The reference shares no code with the rules.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lit_deconv import Deconvnet

aten = torch.ops.aten
_POOLS = (aten.max_pool2d_with_indices.default, aten.max_pool3d_with_indices.default)


class Switches(TorchDispatchMode):
    """Keeps the switches of every max-pool that runs, or makes the pools use those that were kept.

    Near-ties fall differently in float32 and float64; that is a property of the forward pass, not an
    error of the way back.

    Args:
        kept: Switches in the order of the pools, map by map: one side may pool some maps at a time.
            What is there is used up; what is missing is added.
    """

    def __init__(self, kept: list[Tensor] | None = None) -> None:
        super().__init__()
        self.replayed = iter(kept or [])
        self.kept: list[Tensor] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func not in _POOLS:
            return result
        own = result[1].flatten(0, 1).unbind()
        switches = [next(self.replayed, each) for each in own]
        self.kept += switches
        indices = torch.stack(switches).view(result[1].shape)
        pooled = args[0].flatten(2).gather(2, indices.flatten(2))
        return pooled.view(result[0].shape), indices


def zfnet() -> nn.Module:
    from lit_deconv.examples.zfnet import ZFNet

    return ZFNet(num_classes=8)


def _torchvision(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(torchvision.models, name)(weights=None, **options)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    "alexnet": (_torchvision("alexnet"), ("features.1", "features.7", "features.12")),
    "vgg11_bn": (_torchvision("vgg11_bn"), ("features.2", "features.14", "features.27")),
    "resnet18": (_torchvision("resnet18"), ("relu", "layer2.1", "layer4.1")),
    "densenet121": (
        _torchvision("densenet121"),
        ("features.relu0", "features.denseblock2", "features.norm5"),
    ),
    "googlenet": (
        _torchvision("googlenet", init_weights=False),
        ("conv1", "inception3b", "inception5b"),
    ),
    "mobilenet_v2": (_torchvision("mobilenet_v2"), ("features.1", "features.7", "features.18")),
    "ZFNet (examples)": (zfnet, ("features.conv1", "features.conv3", "features.conv5")),
}


def reconstructions(
    model: nn.Module,
    layer: str,
    images: Tensor,
    path: str,
    units: Tensor,
    kept: list[Tensor] | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """The layer and some of its units by one path, and the switches of the forward pass."""
    net = Deconvnet(model, layer, path=path)  # type: ignore[arg-type]
    with Switches(kept) as switches:
        whole = net.attribute(images)
    used = switches.kept
    with Switches(used):
        alone = net.reconstruct(images, units, via="images")
    return [whole, alone], used


def strong_units(model: nn.Module, layer: str, images: Tensor) -> Tensor:
    """Eight random units of at least a tenth of the layer's largest activation.

    An activation next to zero is a difference of large numbers: its own relative error is that of
    the forward pass, and a reconstruction is proportional to it.
    """
    activation = Deconvnet(model, layer).activations(images).abs()
    strong = (activation >= 0.1 * activation.max()).nonzero()
    generator = torch.Generator().manual_seed(0)
    return strong[torch.randint(len(strong), (8,), generator=generator)]


def error(given: list[Tensor], reference: list[Tensor]) -> float:
    """Largest difference over the largest value of the reference, whole layer and unit by unit."""
    rows = [
        (one.double() - other.double(), other.double())
        for one, other in zip(given, reference, strict=True)
    ]
    errors = [
        difference.flatten(1).abs().amax(1) / expected.flatten(1).abs().amax(1).clamp(min=1e-300)
        for difference, expected in rows
    ]
    return float(torch.cat(errors).max())


def measured(name: str, size: int, seed: int) -> Iterator[tuple[str, float, float, float]]:
    """Per layer: float32 against float64, and rules against autograd in float32 and in float64."""
    torch.manual_seed(seed)
    make, layers = MODELS[name]
    model = make().eval()
    images = torch.randn(2, 3, size, size)
    for layer in layers:
        units = strong_units(model.float(), layer, images)
        single, switches = reconstructions(model, layer, images, "rules", units)
        single_autograd, _ = reconstructions(model, layer, images, "autograd", units, switches)
        exact, wide = model.double(), images.double()
        double, _ = reconstructions(exact, layer, wide, "rules", units, switches)
        reference, _ = reconstructions(exact, layer, wide, "autograd", units, switches)
        yield (
            layer,
            error(single, reference),
            error(single, single_autograd),
            error(double, reference),
        )


def main() -> int:
    """Prints the table; 1 where an error exceeds 1e-5 in float32 or 1e-10 in float64."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--size", type=int, default=96, help="rows and columns of the images")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*initialization of (GoogleNet|Inception)")
    print(f"torch {torch.__version__}, images 2 x 3 x {arguments.size} x {arguments.size}")
    print("| model | layer | float32 / float64 | rules / autograd, float32 | float64 |")
    print("|---|---|---|---|---|")
    largest = [0.0, 0.0, 0.0]
    for name in arguments.models:
        for layer, *errors in measured(name, arguments.size, arguments.seed):
            largest = [max(pair) for pair in zip(largest, errors, strict=True)]
            print(
                f"| {name} | {layer} | " + " | ".join(f"{e:.1e}" for e in errors) + " |", flush=True
            )
    print("| largest | | " + " | ".join(f"{e:.1e}" for e in largest) + " |")
    return int(not (largest[0] <= 1e-5 and largest[1] <= 1e-5 and largest[2] <= 1e-10))


if __name__ == "__main__":
    sys.exit(main())
