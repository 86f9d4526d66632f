"""Receptive fields against influence: which pixels, when they grow, change which unit.

Every weight is positive and every op is monotone, so a pixel that grows by much changes exactly the
units that see it; that holds for max-pooling too, whose gradient would show the switches alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from lit_deconv import Deconvnet

from .definition import quietly


class Parallel(nn.ModuleList):
    """The sum of branches, all of the size of the first."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([branch(x) for branch in self]).sum(0)


class Joined(nn.ModuleList):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self], 1)


class Sum(nn.ModuleList):
    def forward(self, x: Tensor) -> Tensor:
        first, second = self
        return first(x) + second(x)


class Function(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Conv2d(2, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1e-9 * self.fc(F.adaptive_avg_pool2d(x, 1)))


def _conv(*args: Any, **kwargs: Any) -> nn.Module:
    return nn.Conv2d(*args, **kwargs)


IMAGE = (1, 2, 17, 15)
EXACT: dict[str, tuple[Callable[[], list[nn.Module]], tuple[int, ...]]] = {
    "one": (lambda: [_conv(2, 1, 3)], IMAGE),
    "padded": (lambda: [_conv(2, 2, 3, padding=1), _conv(2, 1, (5, 3), padding=(2, 1))], IMAGE),
    "strided": (lambda: [_conv(2, 2, 3, 2, 1), _conv(2, 1, 3, 2)], IMAGE),
    "stride>kernel": (lambda: [_conv(2, 2, 2, 3), _conv(2, 1, 2)], IMAGE),
    "pools": (
        lambda: [_conv(2, 2, 3), nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(2, 1), _conv(2, 1, 2)],
        IMAGE,
    ),
    "ceil": (lambda: [_conv(2, 2, 3), nn.MaxPool2d(2, 2, ceil_mode=True)], IMAGE),
    "dilated": (lambda: [_conv(2, 2, 3, dilation=2), nn.MaxPool2d(2, 1, dilation=3)], IMAGE),
    "norms": (lambda: [_conv(2, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), _conv(2, 1, 3)], IMAGE),
    "pad": (lambda: [nn.ZeroPad2d((3, 0, 1, 2)), _conv(2, 1, 4)], IMAGE),
    "crop": (lambda: [nn.ZeroPad2d((-2, 1, 3, -1)), _conv(2, 1, 3)], IMAGE),
    "same": (lambda: [_conv(2, 2, 4, padding="same"), _conv(2, 1, 2, padding="same")], IMAGE),
    "slice": (lambda: [_conv(2, 2, 3), Function(lambda x: x[:, :, 2:, 1::2])], IMAGE),
    "branches": (
        lambda: [_conv(2, 2, 3, 2, 1), Joined([_conv(2, 1, 1), _conv(2, 1, 5, padding=2)])],
        IMAGE,
    ),
    "sum": (lambda: [Sum([_conv(2, 2, 3, padding=1), nn.MaxPool2d(3, 1, 1)]), nn.ReLU()], IMAGE),
    "uneven-sum": (
        lambda: [Sum([_conv(2, 2, 2, padding="same"), _conv(2, 2, 5, padding=2, dilation=1)])],
        IMAGE,
    ),
    "shuffle": (lambda: [_conv(2, 4, 3), nn.ChannelShuffle(2), _conv(4, 1, 3)], IMAGE),
    "shuffle-views": (
        lambda: [
            _conv(2, 4, 3),
            Function(lambda x: x.unflatten(1, (2, 2)).transpose(1, 2).flatten(1, 2)),
            _conv(4, 1, 3, 2),
        ],
        IMAGE,
    ),
    "permuted": (
        lambda: [
            _conv(2, 2, 3),
            Function(lambda x: x.permute(0, 2, 3, 1)),
            nn.Linear(2, 3),
            Function(lambda x: x.permute(0, 3, 1, 2)),
            _conv(3, 1, 3),
        ],
        IMAGE,
    ),
    "1d": (lambda: [nn.Conv1d(2, 2, 5, 2, 1), nn.MaxPool1d(3, 2), nn.Conv1d(2, 1, 2)], (1, 2, 41)),
    "3d": (lambda: [nn.Conv3d(1, 1, (1, 3, 2), (1, 2, 1)), nn.MaxPool3d(2, 1)], (1, 1, 4, 8, 6)),
    "gelu": (
        lambda: [_conv(2, 2, 3), nn.GELU(), nn.MaxPool2d(2), nn.SiLU(), _conv(2, 1, 2)],
        IMAGE,
    ),
    "local-response": (lambda: [_conv(2, 2, 3), nn.LocalResponseNorm(2), _conv(2, 1, 3)], IMAGE),
}
# Fields of uneven size: each box is as large as the largest, and holds the field.
CONTAINED: dict[str, tuple[Callable[[], list[nn.Module]], tuple[int, ...]]] = {
    "transposed": (lambda: [_conv(2, 2, 3), nn.ConvTranspose2d(2, 1, 3, 2, 1, 1)], IMAGE),
    "transposed-dilated": (
        lambda: [_conv(2, 2, 3, 2), nn.ConvTranspose2d(2, 2, 3, 3, 2, dilation=2), _conv(2, 1, 2)],
        IMAGE,
    ),
    "transposed-gaps": (lambda: [nn.ConvTranspose2d(2, 2, 1, 3), _conv(2, 1, 2)], IMAGE),
    "nearest": (lambda: [_conv(2, 2, 3, 2), nn.Upsample(scale_factor=2), _conv(2, 1, 3)], IMAGE),
    "bilinear": (
        lambda: [_conv(2, 2, 3, 2), nn.Upsample((17, 12), mode="bilinear"), _conv(2, 1, 3)],
        IMAGE,
    ),
    "unet": (
        lambda: [
            Sum([
                _conv(2, 2, 3, padding=1),
                nn.Sequential(nn.MaxPool2d(2), _conv(2, 2, 3, padding=1), nn.Upsample((17, 15))),
            ]),
        ],
        IMAGE,
    ),
    "adaptive": (lambda: [_conv(2, 2, 3), nn.AdaptiveAvgPool2d((4, 5)), _conv(2, 1, 2)], IMAGE),
    "reflect": (lambda: [_conv(2, 2, 5, padding=2, padding_mode="reflect"), _conv(2, 1, 3)], IMAGE),
    "replicate": (lambda: [_conv(2, 2, 5, padding=2, padding_mode="replicate")], IMAGE),
    "circular": (lambda: [_conv(2, 2, 3, padding=1, padding_mode="circular")], IMAGE),
    "flipped": (lambda: [_conv(2, 2, 3), Function(lambda x: x.flip(3)), _conv(2, 1, 3)], IMAGE),
    "rolled": (lambda: [_conv(2, 2, 3), Function(lambda x: x.roll(3, 2))], IMAGE),
    "transposed-map": (lambda: [_conv(2, 2, 3), Function(lambda x: x.mT)], IMAGE),
    "pixel-shuffle": (lambda: [_conv(2, 4, 3), nn.PixelShuffle(2), _conv(1, 1, 3)], IMAGE),
    "pixel-unshuffle": (
        lambda: [Function(lambda x: x[:, :, :16, :14]), nn.PixelUnshuffle(2), _conv(8, 1, 3)],
        IMAGE,
    ),
    "max-adaptive": (lambda: [_conv(2, 2, 3), nn.AdaptiveMaxPool2d((4, 5))], IMAGE),
    "cat-rows": (lambda: [Function(lambda x: torch.cat([x, x * 2], 2)), _conv(2, 1, 3)], IMAGE),
    "index-rows": (
        lambda: [Function(lambda x: x.index_select(2, torch.tensor([9, 0, 3]))), _conv(2, 1, 2)],
        IMAGE,
    ),
    "index": (lambda: [Function(lambda x: x[:, :, [9, 0, 3]]), _conv(2, 1, 2)], IMAGE),
    "row-sum": (lambda: [_conv(2, 2, 3), Function(lambda x: x + x.sum(3, keepdim=True))], IMAGE),
    "cumsum": (lambda: [_conv(2, 2, 3), Function(lambda x: x.cumsum(2))], IMAGE),
}  # fmt: skip


def positive(modules: list[nn.Module]) -> nn.Sequential:
    torch.manual_seed(2)
    model = nn.Sequential(*modules).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.abs_().add_(0.1)
    return model


def seen_by(model: nn.Module, layer: str, shape: tuple[int, ...]) -> Tensor:
    """Which pixels change which unit's place: bool [*map, *image]."""
    found: dict[str, Tensor] = {}
    hook = model.get_submodule(layer).register_forward_hook(
        lambda module, args, output: found.update(output=output)
    )
    pixels = torch.Size(shape[2:]).numel()
    x = torch.rand(shape, dtype=torch.float64)
    grown = x + 1e4 * torch.eye(pixels, dtype=torch.float64).view(pixels, 1, *shape[2:])
    with torch.no_grad():
        outputs = []
        for part in torch.cat([x, grown]).split(64):
            model(part)
            outputs.append(found["output"])
    hook.remove()
    output = torch.cat(outputs)
    # Far above what convolutions of other batch sizes round otherwise.
    changed = ((output[1:] - output[:1]).abs() > 1e-9 * output[:1].abs().max()).any(1)
    return changed.movedim(0, -1).unflatten(-1, shape[2:])


def bounds(seen: Tensor, dim: int, rank: int) -> tuple[Tensor, Tensor]:
    """First and last pixel along a dimension for each unit's place that sees any."""
    others = tuple(-rank + d for d in range(rank) if d != dim)
    line = seen.any(others) if others else seen
    index = torch.arange(line.shape[-1])
    first = torch.where(line, index, 10_000).amin(-1)
    last = torch.where(line, index, -10_000).amax(-1)
    return first, last


def assert_seen(model: nn.Module, layer: str, shape: tuple[int, ...], exact: bool) -> None:
    field = Deconvnet(model, layer).receptive_field(torch.rand(shape, dtype=torch.float64))
    seen = quietly(lambda: seen_by(model, layer, shape))
    rank = len(shape) - 2
    assert seen.any(tuple(range(-rank, 0))).any()
    places = torch.cartesian_prod(*(torch.arange(n) for n in seen.shape[:rank])).view(-1, rank)
    boxes = field.boxes(places)
    sees = seen.flatten(rank).any(-1).flatten()  # a unit may lie over padding alone
    for dim in range(rank):
        first, last = (bound.flatten()[sees] for bound in bounds(seen, dim, rank))
        start, end = boxes[sees, dim], boxes[sees, rank + dim]
        assert field.size[dim] <= shape[2 + dim]
        assert (start <= first).all()
        assert (end > last).all()
        if exact:
            assert torch.equal(start.clamp(min=0), first)
            assert torch.equal(end.clamp(max=shape[2 + dim]) - 1, last)


@pytest.mark.parametrize("name", EXACT)
def test_field_is_the_support(name: str) -> None:
    modules, shape = EXACT[name]
    model = positive(modules())
    assert_seen(model, str(len(model) - 1), shape, exact=True)


@pytest.mark.parametrize("name", CONTAINED)
def test_field_holds_the_support(name: str) -> None:
    modules, shape = CONTAINED[name]
    model = positive(modules())
    assert_seen(model, str(len(model) - 1), shape, exact=False)


def test_upsampling_widens_no_more_than_it_must() -> None:
    """Nearest neighbours doubled: two neighbouring units see at most two old places, 3 + 2 pixels."""
    model = positive(CONTAINED["nearest"][0]())
    field = Deconvnet(model, "2").receptive_field(torch.rand(IMAGE, dtype=torch.float64))
    assert field.size == (5, 5)
    assert not any(field.whole)


def test_field_is_cut_to_the_image_where_it_exceeds_it() -> None:
    model = positive([_conv(2, 2, 9, padding=4), _conv(2, 1, 9, padding=4)])
    field = Deconvnet(model, "1").receptive_field(torch.rand(1, 2, 40, 15, dtype=torch.float64))
    assert field.size == (17, 15)
    assert field.whole == (False, True)
    boxes = field.boxes(torch.tensor([[0, 0], [39, 14]]))
    assert boxes.tolist() == [[-8, 0, 9, 15], [31, 0, 48, 15]]


def test_squeeze_and_excite_sees_the_whole_image() -> None:
    model = positive([_conv(2, 2, 3), SqueezeExcite(), nn.ReLU()])
    x = torch.rand(IMAGE, dtype=torch.float64)
    field = Deconvnet(model, "2").receptive_field(x)
    assert field.size == (17, 15)
    assert field.boxes(torch.tensor([[0, 0], [14, 12]])).tolist() == [[0, 0, 17, 15]] * 2
    assert Deconvnet(model, "0").receptive_field(x).size == (3, 3)


@pytest.mark.parametrize(
    "norm",
    [nn.InstanceNorm2d(2), nn.GroupNorm(1, 2), nn.BatchNorm2d(2, track_running_stats=False)],
    ids=lambda norm: type(norm).__name__,
)
def test_statistics_of_the_map_see_the_whole_image(norm: nn.Module) -> None:
    model = positive([_conv(2, 2, 3), norm, nn.ReLU()])
    field = Deconvnet(model, "2").receptive_field(torch.rand(IMAGE, dtype=torch.float64))
    assert field.whole == (True, True)


def test_resnet18_blocks() -> None:
    """As the literature has them, and as influence shows them on an image that is large enough."""
    model = quietly(lambda: torchvision.models.resnet18(weights=None)).double().eval()
    x = torch.rand(1, 3, 256, 256, dtype=torch.float64)
    sizes = {
        "relu": 7,
        "maxpool": 11,
        "layer1.0": 27,
        "layer1.1": 43,
        "layer2.0": 67,
        "layer2.1": 99,
    }
    net = Deconvnet(model, list(sizes))
    fields = net.receptive_field(x)
    assert {name: field.size for name, field in fields.items()} == {
        name: (size, size) for name, size in sizes.items()
    }
    assert fields["layer2.1"].stride == (8, 8)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 4:
                parameter.abs_().div_(parameter[0].sum())
    model = nn.Sequential(*list(model.children())[:6])
    assert_seen(model, "4.0", (1, 3, 36, 28), exact=True)
    assert_seen(model, "5.0", (1, 3, 33, 24), exact=False)
