"""Linear maps beyond what convolutions need, each against its matrix: the op done to every pixel."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_deconv import Deconvnet
from lit_deconv.engine import reverse_rule
from lit_deconv.engine.registry import RULES

Function = Callable[[Tensor], Tensor]

SHAPE = (3, 4, 6, 6)
INDEX = torch.tensor([2, 0, 2, 3])
MASK = torch.arange(36).view(6, 6) % 3 == 0


def _own_index(x: Tensor) -> Tensor:
    """An index for each image, [N, 4, 5, 6]."""
    return torch.arange(len(x) * 4 * 5 * 6).view(len(x), 4, 5, 6) * 7 % 6


def _own_grid(x: Tensor) -> Tensor:
    """A rotation for each image."""
    angle = torch.arange(1.0, len(x) + 1, dtype=x.dtype) / 3
    rows = [angle.cos(), -angle.sin(), 0 * angle, angle.sin(), angle.cos(), 0.1 + 0 * angle]
    return F.affine_grid(torch.stack(rows, 1).view(-1, 2, 3), list(x.shape), align_corners=False)


def _pooled_indices(x: Tensor) -> Tensor:
    """Switches for each image that do not depend on it: the first pixel, or the last."""
    corner = torch.arange(3)[:, None] * 12 + torch.arange(3) * 2
    own = corner + 7 * (torch.arange(len(x)) % 2).view(-1, 1, 1, 1)
    return own.expand(len(x), x.shape[1], 3, 3).contiguous()


LINEAR: dict[str, Function] = {
    "repeat": lambda x: x.repeat(1, 2, 1, 3),
    "tile": lambda x: x.tile(2, 2),
    "unfold": lambda x: F.unfold(x, 3, dilation=2, padding=1, stride=2),
    "fold": lambda x: F.fold(x.flatten(2)[:, :, :25], (6, 6), 2),
    "fold of unfold": lambda x: F.fold(F.unfold(x, 2, stride=2), (6, 6), 2, stride=2),
    "sliding windows": lambda x: x.unfold(2, 3, 1),
    "cumsum": lambda x: x.cumsum(2),
    "rot90": lambda x: x.rot90(1, (2, 3)),
    "channels by index": lambda x: x[:, INDEX],
    "places by index": lambda x: x[:, :, INDEX[:, None], INDEX],
    "places by mask": lambda x: x[:, :, MASK],
    "gather": lambda x: x.gather(2, _own_index(x)),
    "masked_fill": lambda x: x.masked_fill(MASK, 0.0),
    "masked_fill in place": lambda x: x.clone().masked_fill_(MASK, 0.0),
    "masked_fill for each image": lambda x: x.masked_fill(_own_index(x)[:, :1, :1] > 2, 0.0),
    "max_unpool2d": lambda x: F.max_unpool2d(x[:, :, :3, :3], _pooled_indices(x), [2, 2]),
    "grid_sample": lambda x: F.grid_sample(x, _own_grid(x), align_corners=False),
    "grid_sample nearest": lambda x: F.grid_sample(
        x, _own_grid(x), mode="nearest", padding_mode="reflection", align_corners=True
    ),
}


class Layer(nn.Module):
    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def images() -> Tensor:
    return torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def matrices(function: Function, x: Tensor) -> Tensor:
    """What the op does to each pixel of each image, [N, out, in]; no autograd is asked."""
    nothing = function(torch.zeros_like(x))
    columns = []
    for pixel in range(x[0].numel()):
        one = torch.zeros_like(x)
        one.flatten(1)[:, pixel] = 1
        columns.append((function(one) - nothing).flatten(1))
    return torch.stack(columns, 2)


def transposed(function: Function, x: Tensor, signal: Tensor) -> Tensor:
    matrix = matrices(function, x)
    return (matrix.mT @ signal.reshape(len(x), -1, 1)).reshape(x.shape)


def unit_seeds(units: Tensor, activation: Tensor) -> Tensor:
    seeds = torch.zeros(len(units), *activation.shape[1:], dtype=activation.dtype)
    for seed, unit in zip(seeds, units.tolist(), strict=True):
        seed[tuple(unit[1:])] = activation[tuple(unit)]
    return seeds


@pytest.mark.parametrize("name", LINEAR)
def test_whole_layer_is_the_transposed_matrix(name: str) -> None:
    function, x = LINEAR[name], images()
    found = Deconvnet(nn.Sequential(Layer(function)), "0", path="rules").attribute(x)
    assert torch.allclose(found, transposed(function, x, function(x)), rtol=0, atol=1e-12)
    assert found.flatten(1).any(1).all()


@pytest.mark.parametrize("name", LINEAR)
def test_units_go_back_with_what_belongs_to_their_image(name: str) -> None:
    function, x = LINEAR[name], images()
    net = Deconvnet(nn.Sequential(Layer(function)), "0", path="rules")
    activation = function(x)
    last = [size - 1 for size in activation.shape[2:]]
    first, second, third = 1 % activation.shape[1], 0, activation.shape[1] - 1
    units = torch.tensor(
        [[2, first, *last], [0, second, *[0] * len(last)], [2, third, *[1] * len(last)]]
    )
    seeds = unit_seeds(units, activation)
    matrix = matrices(function, x)[units[:, 0]]
    expected = (matrix.mT @ seeds.reshape(3, -1, 1)).reshape(3, *x.shape[1:])
    full = net.reconstruct(x, units)
    assert torch.allclose(full, expected, rtol=0, atol=1e-12)
    patches, boxes = net.reconstruct(x, units, crop=True)
    # The box holds all there is: nothing of the reconstruction lies outside it.
    assert torch.allclose(patches.abs().sum((1, 2, 3)), full.abs().sum((1, 2, 3)))
    assert boxes.shape == (3, 4)


@pytest.mark.parametrize("largest", [True, False])
def test_extremes_share_the_signal_among_ties(largest: bool) -> None:
    extreme = torch.amax if largest else torch.amin
    x = images().round()
    found = Deconvnet(
        nn.Sequential(Layer(lambda y: extreme(y, (2, 3)))), "0", path="rules"
    ).attribute(x)
    expected = torch.zeros_like(x)
    for image in range(x.shape[0]):
        for channel in range(x.shape[1]):
            values = x[image, channel]
            hits = values == (values.max() if largest else values.min())
            expected[image, channel][hits] = extreme(values) / hits.sum()
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)


def test_a_grid_made_from_the_input_is_a_constant() -> None:
    def sample(x: Tensor) -> Tensor:
        return F.grid_sample(x, _own_grid(x) + 0.1 * x[:, :1].movedim(1, 3), align_corners=False)

    x = images()
    frozen = _own_grid(x) + 0.1 * x[:, :1].movedim(1, 3)
    found = Deconvnet(nn.Sequential(Layer(sample)), "0", path="rules").attribute(x)
    expected = transposed(lambda y: F.grid_sample(y, frozen, align_corners=False), x, sample(x))
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)


def test_max_unpool_takes_the_switches_of_this_forward() -> None:
    def there_and_back(x: Tensor) -> Tensor:
        pooled, switches = F.max_pool2d(x, 2, return_indices=True)
        return F.max_unpool2d(pooled, switches, [2, 2])

    x = images()
    found = Deconvnet(nn.Sequential(Layer(there_and_back)), "0", path="rules").attribute(x)
    # Each window's maximum came from its switch and went back there.
    assert torch.equal(found, there_and_back(x))


@pytest.mark.parametrize(
    "mixing",
    [
        lambda x: x.repeat(2, 1, 1, 1)[3:],
        lambda x: x[torch.tensor([1, 2, 0])],
        lambda x: x[:, :, x[0, 0] > 0],
        lambda x: x.cumsum(0),
    ],
    ids=["repeat images", "index images", "mask from the input", "cumsum over images"],
)
def test_what_mixes_images_is_left_to_autograd(mixing: Function) -> None:
    found = Deconvnet(nn.Sequential(Layer(mixing)), "0").explain(images())
    assert found.path == "autograd"
    assert found.reasons


def test_the_box_of_a_users_op_is_the_image_unless_its_rule_takes_windows() -> None:
    x = torch.randn(1, 2, 8, 8)
    own = torch.library.Library("zoo_rules", "FRAGMENT")
    own.define("mirrored(Tensor x) -> Tensor")
    own.impl("mirrored", lambda y: y.flip(2), "CompositeExplicitAutograd")
    for windows in (False, True):
        reverse_rule("zoo_rules::mirrored", of="x", windows=windows)(
            lambda op, signal: [(op["x"], signal.map(lambda values: values.flip(2)))]
        )
        try:
            model = nn.Sequential(Layer(torch.ops.zoo_rules.mirrored))
            field = Deconvnet(model, "0").receptive_field(x)
        finally:
            del RULES["zoo_rules::mirrored"]
        assert field.size == ((1, 1) if windows else (8, 8))
