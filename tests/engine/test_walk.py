"""The whole pass: against explicit unpooling and transposed convolutions, against Captum, by hand."""

# Modules and options are chosen by name here, which types cannot follow.
# mypy: disable-error-code="arg-type, import-untyped, misc, operator, union-attr"

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import torchvision
from captum.attr import NeuronDeconvolution
from torch import Tensor, nn

from lit_deconv import Deconvnet
from lit_deconv.engine import RULES, Op, UnsupportedOp, Value
from lit_deconv.engine.precision import exact
from lit_deconv.engine.recorder import record
from lit_deconv.engine.recording import OnTape
from lit_deconv.engine.registry import Rule
from lit_deconv.engine.signal import Signal, Window, _told_by_position
from lit_deconv.engine.walk import walk

from .definition import all_units, assert_close, one_hot, quietly

# ---- an independent deconvnet for plain chains --------------------------------------------


def reconstruction(chain: nn.Sequential, x: Tensor, layer: int, seed: Tensor) -> Tensor:
    """Zeiler & Fergus 2.1 for a chain of conv, batch norm, ReLU and max-pool; one image a seed."""
    switches: dict[int, Tensor] = {}
    sizes: dict[int, torch.Size] = {}
    for index, module in enumerate(chain):
        sizes[index] = x.shape
        if isinstance(module, nn.MaxPool2d):
            x, switches[index] = F.max_pool2d(
                x, module.kernel_size, module.stride, module.padding, module.dilation,
                module.ceil_mode, return_indices=True,
            )  # fmt: skip
        else:
            x = module(x)
    signal = seed
    for index in range(layer, -1, -1):
        signal = _unpooled(chain[index], signal, switches.get(index), sizes[index])
    return signal


def _unpooled(
    module: nn.Module, signal: Tensor, switches: Tensor | None, size: torch.Size
) -> Tensor:
    if isinstance(module, nn.ReLU):
        return signal.clamp(min=0)
    if isinstance(module, nn.BatchNorm2d):
        scale = module.weight / (module.running_var + module.eps).sqrt()
        return signal * scale[:, None, None]
    if isinstance(module, nn.MaxPool2d):
        maps = signal.new_zeros(size).flatten(2)
        for value, place in zip(
            signal.flatten(2).unbind(2), switches.flatten(2).unbind(2), strict=True
        ):
            maps.scatter_add_(2, place[:, :, None], value[:, :, None])
        return maps.view(size)
    assert isinstance(module, nn.Conv2d)
    covered = [
        (extent - 1) * stride - 2 * padding + dilation * (kernel - 1) + 1
        for extent, stride, padding, dilation, kernel in zip(
            signal.shape[2:], module.stride, module.padding, module.dilation,
            module.kernel_size, strict=True,
        )
    ]  # fmt: skip
    return F.conv_transpose2d(
        signal, module.weight, None, module.stride, module.padding,
        [whole - part for whole, part in zip(size[2:], covered, strict=True)],
        module.groups, module.dilation,
    )  # fmt: skip


CHAINS: dict[str, tuple[Callable[[], list[nn.Module]], tuple[int, int]]] = {
    "zeiler-fergus": (
        lambda: [
            nn.Conv2d(3, 8, 7, 2, 1), nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True),
            nn.Conv2d(8, 6, 5, 2), nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True),
            nn.Conv2d(6, 6, 3, 1, 1), nn.ReLU(),
        ],
        (61, 58),
    ),
    "batch-norm": (
        lambda: [
            nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(inplace=True),
            nn.MaxPool2d(2), nn.Conv2d(6, 4, 3, 1, 2, 2), nn.BatchNorm2d(4), nn.ReLU(inplace=True),
        ],
        (17, 20),
    ),
    "groups": (
        lambda: [
            nn.Conv2d(3, 6, 3, 2, 1, groups=3), nn.ReLU(), nn.MaxPool2d(3, 1, 1),
            nn.Conv2d(6, 4, 2, groups=2), nn.ReLU(), nn.MaxPool2d(2, 3, dilation=2),
        ],
        (23, 19),
    ),
    "uneven-strides": (
        lambda: [nn.Conv2d(3, 4, 3, (2, 1), 1), nn.ReLU(), nn.Conv2d(4, 2, 3, (1, 3))], (14, 13),
    ),
    "narrower-than-a-pool": (
        lambda: [nn.Conv2d(3, 4, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(3, 1, 1)], (7, 2),
    ),
    "no-rectifier": (lambda: [nn.Conv2d(3, 4, 3), nn.MaxPool2d(2), nn.Conv2d(4, 2, 3)], (13, 12)),
}  # fmt: skip


def chain_of(name: str) -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(5)
    modules, size = CHAINS[name]
    chain = nn.Sequential(*modules()).double().eval()
    for module in chain:
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.running_mean)
            nn.init.normal_(module.weight)
    return chain.requires_grad_(False), torch.randn(2, 3, *size, dtype=torch.float64)


@pytest.mark.parametrize("path", ["rules", "autograd"])
@pytest.mark.parametrize("name", CHAINS)
def test_every_layer_of_a_chain(name: str, path: str) -> None:
    chain, x = chain_of(name)
    for layer in range(len(chain)):
        net = Deconvnet(chain, str(layer), path=path)
        activation = net.activations(x)
        kept = torch.zeros_like(activation)
        kept[:, 1] = activation[:, 1]
        expected = reconstruction(chain, x, layer, activation)
        assert_close(net.attribute(x), expected)
        assert_close(net.attribute(x, 1), reconstruction(chain, x, layer, kept))
        maps = torch.stack([net.attribute(x, channel) for channel in (1, 0, 1)])
        assert_close(net.maps(x, [1, 0, 1]), maps)
        units = all_units(activation.shape)[:: max(1, activation.numel() // 9)]
        alone = reconstruction(chain, x[units[:, 0]], layer, one_hot(units, activation))
        assert_close(net.reconstruct(x, units), alone)


@pytest.mark.cpu
@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("via", ["images", "patches"])
def test_windows_are_the_same_by_blocks_and_by_places(
    name: str, via: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain, x = chain_of(name)
    net = Deconvnet(chain, str(len(chain) - 1), path="rules")
    units = all_units(net.activations(x).shape)
    found = []
    for block in (0, 1 << 30):
        monkeypatch.setattr("lit_deconv.engine.signal._BLOCK", block)
        found.append(net.reconstruct(x, units, via=via))
    assert torch.equal(*found)


def test_a_unit_is_its_part_of_the_map_where_nothing_rectifies() -> None:
    """X' = C^T Y is linear in Y: single units add up to the layer."""
    chain, x = chain_of("no-rectifier")
    net = Deconvnet(chain, "2")
    units = all_units(net.activations(x).shape)
    alone = net.reconstruct(x, units)
    total = torch.stack([alone[units[:, 0] == image].sum(0) for image in range(2)])
    assert_close(total, net.attribute(x))


# ---- by hand ------------------------------------------------------------------------------


def test_one_convolution_by_hand() -> None:
    """X' = C^T Y with C written out as a matrix: two 2x2 filters over a 2x3 image."""
    model = nn.Sequential(nn.Conv2d(1, 2, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[[[1.0, 2], [3, 4]]], [[[0, 1], [-1, 0]]]]))
        model[0].bias.copy_(torch.tensor([10.0, 20]))
    x = torch.tensor([[[[1.0, 0, 2], [0, 1, -1]]]])
    c = torch.tensor(
        [
            [1.0, 2, 0, 3, 4, 0],  # filter 0, left
            [0.0, 1, 2, 0, 3, 4],  # filter 0, right
            [0.0, 1, 0, -1, 0, 0],  # filter 1, left
            [0.0, 0, 1, 0, -1, 0],  # filter 1, right
        ]
    )
    y = torch.tensor([15.0, 13, 20, 21])  # C x plus the biases 10 and 20
    assert torch.equal(c @ x.flatten() + torch.tensor([10.0, 10, 20, 20]), y)
    net = Deconvnet(model, "0")
    assert torch.equal(net.activations(x).flatten(), y)
    assert_close(net.attribute(x).flatten(), torch.tensor([15.0, 63, 47, 25, 78, 52]), 1e-6)
    assert_close(net.attribute(x).flatten(), c.T @ y, 1e-6)
    assert_close(net.attribute(x, (1, 0, 1)).flatten(), 21 * c[3], 1e-6)


def test_overlapping_windows_that_share_a_switch_add_or_are_placed() -> None:
    model = nn.Sequential(nn.MaxPool2d((1, 3), 1))
    x = torch.tensor([[[[0.0, 1, 5, 2, 0]]]])  # all three windows choose the 5
    add = Deconvnet(model, "0").attribute(x)
    assert torch.equal(add.flatten(), torch.tensor([0.0, 0, 15, 0, 0]))
    place = Deconvnet(model, "0", overlap="place").attribute(x)
    assert torch.equal(place.flatten(), torch.tensor([0.0, 0, 5, 0, 0]))
    pooled, indices = F.max_pool2d(x, (1, 3), 1, return_indices=True)
    assert torch.equal(place, F.max_unpool2d(pooled, indices, (1, 3), 1, output_size=(1, 5)))
    with pytest.raises(UnsupportedOp, match="rules' walk alone"):  # not the sum under that name
        Deconvnet(model, "0", overlap="place", path="autograd").attribute(x)


def test_placed_windows_by_patches_too() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.MaxPool2d(3, 1), nn.Conv2d(2, 1, 3))
    x, units = torch.randn(1, 1, 12, 12), torch.tensor([[0, 0, 2, 2], [0, 0, 0, 3]])
    found = {}
    for overlap in ("add", "place"):
        net = Deconvnet(model, "2", overlap=overlap)
        found[overlap] = net.reconstruct(x, units, via="images")
        assert_close(net.reconstruct(x, units, via="patches"), found[overlap], 1e-5)
    assert (found["add"] - found["place"]).abs().max() > 0.01


def test_negative_activation_sends_the_negative_filter_until_it_is_rectified() -> None:
    model = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.ReLU(), nn.Conv2d(1, 1, 1, bias=False))
    with torch.no_grad():
        model[0].weight.fill_(1.0)
        model[2].weight.fill_(-2.0)
    x = torch.full((1, 1, 2, 2), 3.0)
    # The last convolution answers -6: its signal, -2 * -6 = 12, is positive and passes the ReLU.
    assert torch.equal(Deconvnet(model, "2").attribute(x), torch.full_like(x, 12.0))
    with torch.no_grad():
        model[2].weight.fill_(2.0)
        model[2].bias = nn.Parameter(torch.tensor([-20.0]))
    # Now it answers -14 by its bias: -28 flows back, and the ReLU lets nothing of it through,
    # although it would have let the unit vector's positive signal through.
    assert torch.equal(Deconvnet(model, "2").attribute(x), torch.zeros_like(x))
    assert torch.equal(Deconvnet(model, "0").attribute(-x), -x)  # no rectifier: the sign is kept


# ---- Captum -------------------------------------------------------------------------------

ZOO = {
    "alexnet": (96, ("features.0", "features.4", "features.11")),
    "vgg11_bn": (64, ("features.2", "features.13", "features.27")),
    "resnet18": (64, ("relu", "layer2.1", "layer4.1")),
}


@pytest.mark.parametrize("name", ZOO)
def test_activation_times_captum_on_positive_units(name: str) -> None:
    size, layers = ZOO[name]
    torch.manual_seed(11)
    model = quietly(lambda: getattr(torchvision.models, name)(weights=None)).eval()
    x = torch.randn(2, 3, size, size)
    compared = 0
    for layer in layers:
        net = Deconvnet(model, layer, path="rules")
        assert net.explain(x).captum_faults == ()
        activation = net.activations(x)
        strongest = activation.flatten(1).argmax(1)
        units = torch.stack(
            [torch.arange(2), *torch.unravel_index(strongest, activation.shape[1:])], 1
        )
        given = net.reconstruct(x, units)
        for unit, image in zip(units.tolist(), given, strict=True):
            value = activation[tuple(unit)]
            assert value > 0
            captum = NeuronDeconvolution(model, model.get_submodule(layer))
            with exact():
                one = quietly(lambda c=captum, u=unit: c.attribute(x[u[0], None], tuple(u[1:])))
            assert_close(image, value * one[0], 1e-5)
            compared += 1
    assert compared == 6


class _TwoWays(nn.Module):
    """A sum whose summands begin, on the way back, with a rectifier and with a scale."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.after = nn.Conv2d(4, 5, 3, padding=1)
        nn.init.constant_(self.norm.running_var, 0.3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        return self.after(torch.relu(x) + self.norm(x) + x)


@pytest.mark.parametrize("via", ["images", "patches"])
def test_branches_that_share_a_signal_do_not_overwrite_each_other(via: str) -> None:
    # Rectifiers and scales work in place where nothing else holds the signal.
    model = _TwoWays().eval().double()
    images = torch.randn(2, 3, 7, 7, dtype=torch.float64)
    units = torch.tensor([[0, 1, 3, 3], [1, 4, 0, 6]])
    found = Deconvnet(model, "after", path="rules").reconstruct(images, units, via=via)
    expected = Deconvnet(model, "after", path="autograd").reconstruct(images, units)
    assert_close(found, expected)


def test_a_rule_of_the_users_may_hand_one_signal_to_both_summands(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def twice(op: Op, signal: Signal) -> list[tuple[Value, Signal]]:
        return [(op["self"], signal), (op["other"], signal)]

    model = _TwoWays().eval().double()
    images = torch.randn(2, 3, 7, 7, dtype=torch.float64)
    expected = Deconvnet(model, "after", path="rules").attribute(images)
    monkeypatch.setitem(RULES, "add", Rule(twice, ("self", "other")))
    assert_close(Deconvnet(model, "after", path="rules").attribute(images), expected)


def test_a_seed_is_not_overwritten() -> None:
    model, images = nn.Sequential(nn.ReLU()), torch.randn(1, 2, 3, 3)
    tape = record(model, (images,), {"0": model[0]}, model=model)
    seed = torch.randn(1, 2, 3, 3)
    before = seed.clone()
    walk(tape, tape.layers["0"], Signal(seed))
    assert torch.equal(seed, before)


def test_parts_are_counted_by_windows_not_by_whole_maps() -> None:
    model = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 4, 3)).cpu()
    images = torch.randn(1, 3, 200, 200, device="cpu")  # elsewhere parts are larger
    recording = OnTape(record(model, (images,), {"2": model[2]}, model=model), (images,))
    maps = torch.tensor([[0, 0], [1, 0], [2, 0]], device="cpu")
    alone = [count for count, _ in recording.walk_maps("2", maps)]
    assert alone == [1, 1, 1]  # a map of 64 x 200 x 200 floats is larger than a part
    assert recording.units_per_part("2") > 1000  # a window has 64 x 3 x 3


def test_more_units_go_together_where_their_windows_leave_the_image() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 9, padding=4), nn.ReLU(), nn.Conv2d(8, 4, 1)).cpu()
    images = torch.randn(1, 3, 32, 24, device="cpu")
    recording = OnTape(record(model, (images,), {"2": model[2]}, model=model), (images,))
    most = recording.units_per_part("2")
    assert recording.units_per_part("2", ((4, 27), (4, 19))) == most  # none leaves it
    corner, side = ((0, 0), (23, 23)), ((0, 0), (0, 23))
    assert recording.units_per_part("2", corner) == most * 9 * 9 // (5 * 5)
    assert recording.units_per_part("2", side) == most * 9 * 9 // (5 * 9)


@pytest.mark.cpu
def test_what_is_kept_of_windows_lies_on_the_cpu_whatever_the_default_device() -> None:
    _told_by_position.cache_clear()
    window = Window(torch.tensor([[0], [1]]), (2,), (-1,), ((0, 1),))
    placed = Signal(torch.ones(2, 1, 3), None, window)  # at -1 to 1 and at 1 to 3
    with torch.device("meta"):
        clipped = placed.clipped([3])
    assert clipped.values.tolist() == [[[0, 1, 1]], [[1, 1, 0]]]
    assert _told_by_position.cache_info().currsize == 1
