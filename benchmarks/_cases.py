"""What the benchmarks look at: models with random weights, three layers of each, strongest units."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import torchvision
from torch import Tensor, nn

from lit_deconv import Deconvnet
from lit_deconv.examples.zfnet import zfnet


@dataclass(frozen=True)
class Case:
    """One row of a table.

    Attributes:
        model: A name that ``build`` knows.
        layer: Dotted name of the layer.
        place: "early", "middle" or "late".
        size: Height and width of the images.
    """

    model: str
    layer: str
    place: str
    size: int

    def __str__(self) -> str:
        return f"{self.model} {self.layer}"


CASES = tuple(
    Case(model, layer, place, size)
    for model, size, layers in (
        ("alexnet", 224, ("features.1", "features.6", "features.11")),
        ("zfnet", 224, ("features.relu1", "features.relu3", "features.relu5")),
        ("cifar", 32, ("relu1", "relu2", "relu4")),
        ("resnet18", 224, ("relu", "layer2.1", "layer4.1")),
        ("vgg16", 224, ("features.3", "features.15", "features.29")),
    )
    for layer, place in zip(layers, ("early", "middle", "late"), strict=True)
)

UNITS = 576


@cache
def build(name: str) -> nn.Module:
    """A model in eval mode with the same random weights each time, which ask for no gradient."""
    torch.manual_seed(0)
    builders = {"zfnet": zfnet, "cifar": _cifar}
    make = builders.get(name) or (lambda: torchvision.models.get_model(name, weights=None))
    return make().eval().requires_grad_(False)


def _cifar() -> nn.Sequential:
    """Four convolutions with batch norm for 32 x 32 images, overlapping pools behind two of them."""
    net = nn.Sequential()
    before = 3
    for number, (channels, kernel) in enumerate(((48, 5), (96, 3), (128, 3), (128, 3)), start=1):
        net.add_module(f"conv{number}", nn.Conv2d(before, channels, kernel, padding=kernel // 2))
        net.add_module(f"bn{number}", nn.BatchNorm2d(channels))
        net.add_module(f"relu{number}", nn.ReLU())
        if number <= 2:
            net.add_module(f"pool{number}", nn.MaxPool2d(3, stride=2, padding=1))
        before = channels
    net.add_module("flatten", nn.Flatten())
    net.add_module("classes", nn.Linear(128 * 8 * 8, 10))
    return net


def images_of(size: int, count: int = 32) -> Tensor:
    """Random images [count, 3, size, size], the same each time."""
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def strongest_units(
    model: nn.Module, layer: str, images: Tensor, count: int = UNITS, channels: int = 64
) -> Tensor:
    """The strongest units of some channels, at most one in an image, as figure 2 of the paper has them.

    Args:
        model: The model.
        layer: The layer's dotted name.
        images: [N, C, H, W].
        count: How many units there shall be in all.
        channels: How many channels they come from; fewer where the layer has or fires fewer.

    Returns:
        int64 [U, 4] of sample, channel, row, column, channel by channel; 64 channels and their top 9
        where all goes well.
    """
    activation = Deconvnet(model, layer).activations(images)
    strength, position = activation.flatten(2).max(2)  # [N, C]
    per_channel = -(-count // min(channels, activation.shape[1]))
    top = strength.topk(min(per_channel, len(images)), dim=0)
    live = (top.values[-1] > 0).nonzero().flatten()
    chosen = live[torch.linspace(0, len(live) - 1, min(channels, len(live))).long()]
    samples = top.indices[:, chosen].t().flatten()
    which = chosen.repeat_interleave(len(top.indices))
    where = position[samples, which]
    width = activation.shape[3]
    return torch.stack([samples, which, where // width, where % width], 1)[:count]


def cut_off(model: nn.Module, layer: str) -> nn.Module:
    """The model up to and with one layer, for models that call their children in order."""
    name, _, rest = layer.partition(".")
    kept = nn.Sequential()
    for child, module in model.named_children():
        if child == name and rest and isinstance(module, nn.Sequential):
            kept.add_module(child, cut_off(module, rest))
        else:
            kept.add_module(child, module)
        if child == name:
            return kept.eval()
    raise ValueError(f"{type(model).__name__} has no child {name!r} on the way to {layer!r}")


def without_in_place(model: nn.Module) -> nn.Module:
    """The same model, its ReLUs out of place: a callable selector of Captum's that reads a layer in
    front of an in-place ReLU sees what the ReLU left of it."""
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    return model
